"""config.json both ways: published ones, what is refused, which family says what."""

from __future__ import annotations

from dataclasses import replace

import pytest

from configs import (
    bert_base,
    gemma3_1b,
    gpt2_124m,
    llama3_8b,
    mixtral_8x7b,
    qwen3_0_6b,
    qwen3_30b_a3b,
    t5_small,
)
from experiment import read_model
from hf.families import FAMILIES, differences, family_for, fields_of
from hf.family import computed
from models.config import ModelConfig
from models.experts_config import ExpertsConfig
from tests.hf.synthetic import CONFIGS as OTHERS
from tests.hf.synthetic import LLAMA, MIXTRAL, T5

CONFIGS = OTHERS | {"t5": T5, "t5, tied": replace(T5, tied=True, head_scale=True)}
# As they are on the hub, less what says nothing of the model.
PUBLISHED = {
    "gpt2": {
        "activation_function": "gelu_new",
        "architectures": ["GPT2LMHeadModel"],
        "attn_pdrop": 0.1,
        "embd_pdrop": 0.1,
        "initializer_range": 0.02,
        "layer_norm_epsilon": 1e-05,
        "n_ctx": 1024,
        "n_embd": 768,
        "n_head": 12,
        "n_layer": 12,
        "n_positions": 1024,
        "resid_pdrop": 0.1,
        "vocab_size": 50257,
    },
    "bert-base-uncased": {
        "architectures": ["BertForMaskedLM"],
        "attention_probs_dropout_prob": 0.1,
        "gradient_checkpointing": False,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1,
        "hidden_size": 768,
        "initializer_range": 0.02,
        "intermediate_size": 3072,
        "layer_norm_eps": 1e-12,
        "max_position_embeddings": 512,
        "num_attention_heads": 12,
        "num_hidden_layers": 12,
        "pad_token_id": 0,
        "position_embedding_type": "absolute",
        "type_vocab_size": 2,
        "vocab_size": 30522,
    },
    "Meta-Llama-3-8B": {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "max_position_embeddings": 8192,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "vocab_size": 128256,
    },
    "Qwen3-0.6B-Base": {
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": False,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "max_position_embeddings": 32768,
        "max_window_layers": 28,
        "num_attention_heads": 16,
        "num_hidden_layers": 28,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "vocab_size": 151936,
    },
    "gemma-3-1b-pt": {
        "architectures": ["Gemma3ForCausalLM"],
        "attention_bias": False,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 1152,
        "intermediate_size": 6912,
        "max_position_embeddings": 32768,
        "num_attention_heads": 4,
        "num_hidden_layers": 26,
        "num_key_value_heads": 1,
        "query_pre_attn_scalar": 256,
        "rms_norm_eps": 1e-06,
        "rope_local_base_freq": 10000,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": 512,
        "sliding_window_pattern": 6,
        "vocab_size": 262144,
    },
    "t5-small": {
        "architectures": ["T5ForConditionalGeneration"],
        "d_ff": 2048,
        "d_kv": 64,
        "d_model": 512,
        "dropout_rate": 0.1,
        "initializer_factor": 1.0,
        "is_encoder_decoder": True,
        "layer_norm_epsilon": 1e-06,
        "n_positions": 512,
        "num_heads": 8,
        "num_layers": 6,
        "output_past": True,
        "relative_attention_num_buckets": 32,
        "vocab_size": 32128,
    },
    "Mixtral-8x7B-v0.1": {
        "architectures": ["MixtralForCausalLM"],
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "max_position_embeddings": 32768,
        "num_attention_heads": 32,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "output_router_logits": False,
        "rms_norm_eps": 1e-05,
        "rope_theta": 1000000.0,
        "router_aux_loss_coef": 0.02,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "vocab_size": 32000,
    },
    "Qwen3-30B-A3B-Base": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "attention_bias": False,
        "decoder_sparse_step": 1,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "max_position_embeddings": 32768,
        "max_window_layers": 48,
        "mlp_only_layers": [],
        "moe_intermediate_size": 768,
        "norm_topk_prob": True,
        "num_attention_heads": 32,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 48,
        "num_key_value_heads": 4,
        "output_router_logits": False,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000.0,
        "router_aux_loss_coef": 0.001,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        "vocab_size": 151936,
    },
}
OURS = {
    "bert-base-uncased": bert_base,
    "gpt2": gpt2_124m,
    "Meta-Llama-3-8B": llama3_8b,
    "Qwen3-0.6B-Base": qwen3_0_6b,
    "gemma-3-1b-pt": gemma3_1b,
    "t5-small": t5_small,
    "Mixtral-8x7B-v0.1": mixtral_8x7b,
    "Qwen3-30B-A3B-Base": qwen3_30b_a3b,
}


def read(config: dict) -> ModelConfig:
    return ModelConfig(**fields_of(config, "--hf = 'x': config.json"))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_are_our_configs(name):
    assert computed(read(PUBLISHED[name])) == computed(read_model(OURS[name].get_config()))


@pytest.mark.parametrize("family", CONFIGS)
def test_there_and_back(family):
    config = CONFIGS[family]
    written = family_for(config).write(config)
    back = read(written | {"architectures": [family_for(config).architecture]})
    assert computed(back) == computed(config)


def test_the_newer_form_of_rotary_parameters():
    old = PUBLISHED["Meta-Llama-3-8B"]
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    first = read(old | {"rope_scaling": scaling})
    new = {k: v for k, v in old.items() if not k.startswith("rope")}
    second = read(new | {"rope_parameters": scaling | {"rope_theta": 500000.0}})
    assert first == second
    assert (first.rope_scaling, first.rope_factor) == ("llama3", 8.0)

    old = PUBLISHED["gemma-3-1b-pt"]
    new = {k: v for k, v in old.items() if not k.startswith("rope")}
    both = {
        "full_attention": {"rope_type": "default", "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    assert read(new | {"rope_parameters": both}) == read(old)


ROBERTA = PUBLISHED["bert-base-uncased"] | {
    "architectures": ["RobertaForMaskedLM"],
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 514,
    "pad_token_id": 1,
    "type_vocab_size": 1,
    "vocab_size": 50265,
}


def test_positions_of_a_roberta_begin_behind_its_padding():
    base = read(ROBERTA)
    assert (base.max_length, base.position_offset, base.token_types) == (512, 2, 1)
    without = {name: value for name, value in ROBERTA.items() if name != "pad_token_id"}
    assert read(without) == base  # 1 by their class
    other = read(ROBERTA | {"pad_token_id": 5})
    assert (other.max_length, other.position_offset) == (508, 6)


def test_the_classes_of_a_classifier():
    bert = PUBLISHED["bert-base-uncased"] | {"architectures": ["BertForSequenceClassification"]}
    assert read(bert).tasks == (("label", 2),)  # by their class
    three = {"id2label": {"0": "no", "1": "yes", "2": "neither"}}
    config = read(bert | three)
    assert (config.tasks, config.token_head, config.pooler) == ((("label", 3),), False, True)


def test_a_trunk_with_several_heads_is_of_no_family():
    with pytest.raises(ValueError, match="no family of checkpoints computes it; Bert") as error:
        family_for(replace(CONFIGS["bert"], tasks=(("digit", 10),)))
    assert "tasks = ()" in str(error.value)


def test_a_window_that_is_left_out_is_the_class_default():
    mistral = PUBLISHED["Meta-Llama-3-8B"] | {"architectures": ["MistralForCausalLM"]}
    assert read(mistral).window == 4096
    assert read(mistral | {"sliding_window": None}).window == 0


def test_a_t5_without_the_scale_has_a_head_of_its_own():
    """Transformers 5 writes of every T5 that it is tied, and what was meant in another key."""
    old = PUBLISHED["t5-small"]
    assert read(old).tied
    for new in ({"tie_word_embeddings": False}, {"scale_decoder_outputs": False}):
        config = read(old | {"tie_word_embeddings": True} | new)
        assert not config.tied
        assert not config.head_scale


def test_windows_of_mixtures():
    """Of every layer, where there is one; absent it is none."""
    mixtral = PUBLISHED["Mixtral-8x7B-v0.1"]
    del (absent := dict(mixtral))["sliding_window"]
    assert read(absent).window == 0
    assert read(mixtral | {"sliding_window": 9}).window == 9
    qwen3 = PUBLISHED["Qwen3-30B-A3B-Base"] | {"sliding_window": 9}
    assert read(qwen3).window == 0
    windowed = read(qwen3 | {"use_sliding_window": True, "max_window_layers": None})
    assert (windowed.window, windowed.pattern) == (9, ("local",))


def test_the_number_of_experts_by_either_name():
    qwen3 = PUBLISHED["Qwen3-30B-A3B-Base"]
    newer = {k: v for k, v in qwen3.items() if k != "num_experts"} | {"num_local_experts": 128}
    assert read(newer) == read(qwen3)


REFUSED = [
    ("t5-small", {"feed_forward_proj": "gated-swish"}, "feed_forward_proj = 'gated-swish'"),
    ("gpt2", {"architectures": ["GPT2ForSequenceClassification"]}, "architectures = ['GPT2For"),
    ("gpt2", {"architectures": None}, "architectures = None"),
    ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights = False"),
    ("gpt2", {"activation_function": "quick_gelu"}, "activation_function = 'quick_gelu'"),
    ("gpt2", {"n_head": 7}, "n_head = 7: does not divide n_embd = 768"),
    ("gpt2", {"n_embd": None}, "n_embd = None: is missing"),
    ("gpt2", {"n_layer": "12"}, "n_layer = '12': should be a whole number"),
    ("gpt2", {"quantization_config": {"bits": 4}}, "quantization_config = {'bits': 4}"),
    ("Meta-Llama-3-8B", {"mlp_bias": True}, "mlp_bias = True"),
    ("Meta-Llama-3-8B", {"attention_bias": "no"}, "attention_bias = 'no': should be true or"),
    ("Meta-Llama-3-8B", {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
    (
        "Meta-Llama-3-8B",
        {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
        "rope_scaling.type = 'dynamic'",
    ),
    ("Meta-Llama-3-8B", {"rope_scaling": {"rope_type": "llama3"}}, "rope_scaling.factor = None"),
    ("Meta-Llama-3-8B", {"rope_scaling": 8}, "rope_scaling = 8: should be a mapping"),
    ("Meta-Llama-3-8B", {"rms_norm_eps": "small"}, "rms_norm_eps = 'small': should be a number"),
    ("bert-base-uncased", {"is_decoder": True}, "is_decoder = True"),
    ("bert-base-uncased", {"tie_word_embeddings": False}, "tie_word_embeddings = False"),
    ("bert-base-uncased", {"position_embedding_type": "relative_key"}, "position_embedding_type"),
    ("bert-base-uncased", {"num_attention_heads": 7}, "does not divide hidden_size = 768"),
    (
        "bert-base-uncased",
        {"architectures": ["BertForSequenceClassification"], "problem_type": "regression"},
        "problem_type = 'regression'",
    ),
    (
        "bert-base-uncased",
        {"architectures": ["BertForSequenceClassification"], "id2label": {"0": "score"}},
        "id2label = {'0': 'score'}: should be at least 2 classes",
    ),
    (
        "bert-base-uncased",
        {"architectures": ["RobertaForMaskedLM"], "hidden_act": "relu"},
        "hidden_act = 'relu'",
    ),
    (
        "bert-base-uncased",
        {"architectures": ["RobertaForMaskedLM"], "pad_token_id": -1},
        "pad_token_id = -1",
    ),
    (
        "bert-base-uncased",
        {"architectures": ["RobertaForMaskedLM"], "pad_token_id": 511},
        "max_position_embeddings = 512: no row is left after 512",
    ),
    ("Qwen3-0.6B-Base", {"layer_types": ["linear_attention"] * 28}, "layer_types"),
    ("Qwen3-0.6B-Base", {"layer_types": ["full_attention"] * 3}, "should be 28 of"),
    ("Mixtral-8x7B-v0.1", {"num_local_experts": None}, "num_local_experts = None: is missing"),
    ("Mixtral-8x7B-v0.1", {"num_local_experts": 1}, "num_local_experts = 1: should be 2 or more"),
    ("Mixtral-8x7B-v0.1", {"num_experts_per_tok": 9}, "num_experts_per_tok = 9: more than num_loc"),
    ("Qwen3-30B-A3B-Base", {"num_experts": None}, "num_experts = None: is missing"),
    ("Qwen3-30B-A3B-Base", {"decoder_sparse_step": 2}, "decoder_sparse_step = 2: not computed"),
    ("Qwen3-30B-A3B-Base", {"mlp_only_layers": [0]}, "mlp_only_layers = [0]: not computed here"),
    ("Qwen3-30B-A3B-Base", {"shared_expert_intermediate_size": 8}, "shared_expert_intermediate_s"),
    ("Qwen3-30B-A3B-Base", {"norm_topk_prob": 1}, "norm_topk_prob = 1: should be true or false"),
    (
        "Qwen3-30B-A3B-Base",
        {"use_sliding_window": True, "sliding_window": 9},
        "max_window_layers = 48: not computed here",
    ),
    ("gemma-3-1b-pt", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping = 50.0"),
    ("gemma-3-1b-pt", {"use_bidirectional_attention": True}, "use_bidirectional_attention = True"),
]


@pytest.mark.parametrize(("name", "change", "words"), REFUSED)
def test_what_is_not_computed_here(name, change, words):
    with pytest.raises(ValueError) as error:
        read(PUBLISHED[name] | change)
    assert str(error.value).startswith("--hf = 'x': config.json: ")
    assert words in str(error.value)
    assert len(str(error.value)) < 400


@pytest.mark.parametrize(
    "change",
    [
        {"norm_position": "post"},
        {"mlp_bias": True},
        {"attention_out_bias": True},
        {"logit_softcap": 30.0},
        {"embed_scale": True},
        {"positions": "none"},
        {"query_scale": 1.0},
        {"experts": ExpertsConfig(8, 2, normalise=False), "window": 5, "pattern": ("local",)},
    ],
)
def test_what_no_family_computes(change):
    with pytest.raises(ValueError, match=r"no family of checkpoints computes it; \w+ has") as error:
        family_for(replace(LLAMA, **change))
    assert next(iter(change)) in str(error.value)


def test_each_family_is_found():
    found = {name: family_for(config).architecture for name, config in CONFIGS.items()}
    assert set(found.values()) == {family.architecture for family in FAMILIES}


def test_other_words_for_the_same_are_no_difference():
    llama = family_for(LLAMA)
    assert not differences(llama, replace(LLAMA, query_scale=8**-0.5, dropout=0.5, unroll=2))
    assert not differences(llama, replace(LLAMA, pattern=("global", "global")))


def test_how_a_router_is_trained_is_no_difference():
    mixtral = family_for(MIXTRAL)
    experts = replace(MIXTRAL.experts, capacity=1.25, balance_loss=0.5, z_loss=0.1)
    assert not differences(mixtral, replace(MIXTRAL, experts=experts))
    assert not differences(mixtral, replace(MIXTRAL, experts=replace(experts, mlp_dim=64)))
    assert differences(mixtral, replace(MIXTRAL, experts=replace(experts, normalise=False)))
