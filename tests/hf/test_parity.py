"""Every family computes what `transformers` computes: logits, loss and gradients, on real text."""

from __future__ import annotations

import numpy as np
import pytest

from tests.hf import parity
from tests.hf.parity import GRADIENTS, LOGITS, LOSS, ROUND_TRIP, SEEDS

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("default")  # theirs are not ours to mend


LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,  # below the text: the long waves are slowed
}
COMMON = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,  # logits of order one, so that 1e-4 says something
    "attention_dropout": 0.0,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2 = {
    "vocab_size": 300,
    "n_embd": 32,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 64,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CASES = {
    "gpt2": ("GPT2", GPT2),
    "gpt2, 5 heads, inner width": ("GPT2", GPT2 | {"n_embd": 40, "n_head": 5, "n_inner": 56}),
    "gpt2, untied": ("GPT2", GPT2 | {"tie_word_embeddings": False}),
    "llama": ("Llama", COMMON),
    "llama3": ("Llama", COMMON | {"num_key_value_heads": 2, "rope_parameters": LLAMA3}),
    "llama3, tied, wide heads": (
        "Llama",
        COMMON
        | {
            "num_key_value_heads": 1,
            "head_dim": 24,
            "tie_word_embeddings": True,
            "rope_parameters": LLAMA3 | {"factor": 32.0, "rope_theta": 500000.0},
        },
    ),
    "llama, linear, biases": (
        "Llama",
        COMMON
        | {
            "attention_bias": True,
            "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0},
        },
    ),
    "mistral, window": ("Mistral", COMMON | {"num_key_value_heads": 2, "sliding_window": 7}),
    "mistral, whole": ("Mistral", COMMON | {"num_key_value_heads": 4, "sliding_window": None}),
    "qwen3": (
        "Qwen3",
        COMMON | {"num_key_value_heads": 2, "head_dim": 16, "tie_word_embeddings": True},
    ),
    "qwen3, window, biases": (
        "Qwen3",
        COMMON
        | {
            "num_key_value_heads": 2,
            "head_dim": 8,
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 5,
            "max_window_layers": 1,
        },
    ),
    "gemma3": (
        "Gemma3",
        COMMON
        | {
            "num_key_value_heads": 1,
            "head_dim": 16,
            "query_pre_attn_scalar": 24,
            "sliding_window": 6,
            "sliding_window_pattern": 2,
        },
    ),
    "gemma3, linear, softcap": (
        "Gemma3",
        COMMON
        | {
            "num_hidden_layers": 7,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "sliding_window": 9,
            "final_logit_softcapping": 5.0,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        },
    ),
}
MIXTURE = COMMON | {"num_key_value_heads": 2, "num_experts_per_tok": 2}
CASES |= {
    "mixtral": ("Mixtral", MIXTURE | {"num_local_experts": 4}),
    "mixtral, window, wide heads": (
        "Mixtral",
        MIXTURE
        | {"num_local_experts": 6, "num_experts_per_tok": 3, "head_dim": 16, "sliding_window": 7},
    ),
    "qwen3 moe": (
        "Qwen3Moe",
        MIXTURE
        | {"num_experts": 8, "moe_intermediate_size": 24, "head_dim": 16, "norm_topk_prob": True},
    ),
    "qwen3 moe, weights as they are, window, biases, tied": (
        "Qwen3Moe",
        MIXTURE
        | {
            "num_experts": 5,
            "num_experts_per_tok": 1,
            "moe_intermediate_size": 40,
            "head_dim": 8,
            "norm_topk_prob": False,
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 5,
            "tie_word_embeddings": True,
        },
    ),
}
CLASSES = {
    "GPT2": ("GPT2Config", "GPT2LMHeadModel"),
    "Llama": ("LlamaConfig", "LlamaForCausalLM"),
    "Mistral": ("MistralConfig", "MistralForCausalLM"),
    "Qwen3": ("Qwen3Config", "Qwen3ForCausalLM"),
    "Gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM"),
    "Mixtral": ("MixtralConfig", "MixtralForCausalLM"),
    "Qwen3Moe": ("Qwen3MoeConfig", "Qwen3MoeForCausalLM"),
}


def random_model(name: str, seed: int, **changes):
    """Their model with random weights, biases and gains too."""
    kind, settings = CASES[name]
    settings = settings | changes
    config_class, model_class = (getattr(transformers, c) for c in CLASSES[kind])
    torch.manual_seed(seed)
    config = config_class(**settings, attn_implementation="eager")
    model = model_class(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # gains of 1 and biases of 0 would hide a swap
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def their_logits(model, tokens: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(input_ids=torch.tensor(tokens[:, :-1].astype(np.int64))).logits.numpy()


def their_loss_and_gradients(model, tokens: np.ndarray):
    model.zero_grad()
    out = model(input_ids=torch.tensor(tokens[:, :-1].astype(np.int64))).logits
    target = torch.tensor(tokens[:, 1:].astype(np.int64))
    loss = torch.nn.functional.cross_entropy(out.flatten(0, 1), target.flatten())
    loss.backward()
    named = model.named_parameters()
    return loss.item(), {name: p.grad.numpy() for name, p in named if p.grad is not None}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_logits_loss_gradients_and_back(name, tmp_path):
    folder = tmp_path / "0"
    random_model(name, 0).save_pretrained(folder)
    with parity.ours(folder) as laid:
        for seed in SEEDS:
            theirs = random_model(name, seed)
            folder = tmp_path / str(seed)
            theirs.save_pretrained(folder)
            tokens = parity.tokens(seed, 300)
            params = laid.read(folder)
            got = laid.run(params, tokens)
            expected = their_logits(theirs, tokens)
            assert expected.std() > 0.3
            loss, gradients = their_loss_and_gradients(theirs, tokens)
            gradients = laid.in_our_layout(gradients)
            assert got.gradients.keys() == gradients.keys()
            apart = {n: np.abs(got.gradients[n] - gradients[n]).max() for n in gradients}
            worst = {
                "logits": np.abs(got.logits - expected).max(),
                "loss": abs(got.loss - loss),
                "gradients": max(apart.values()),
            }
            print(f"{name}, seed {seed}:", ", ".join(f"{k} {v:.1e}" for k, v in worst.items()))
            assert worst["logits"] < LOGITS
            assert worst["loss"] < LOSS
            assert worst["gradients"] < GRADIENTS, apart

        # And back: to the folder as it was, and to one of which only the parameters are known.
        for out, like in (("like", folder), ("alone", None)):
            laid.write(params, tmp_path / out, like)
            loaded, report = type(theirs).from_pretrained(
                tmp_path / out, output_loading_info=True, attn_implementation="eager"
            )
            assert not any(report.values()), report
            assert np.abs(their_logits(loaded, tokens) - expected).max() < ROUND_TRIP


@pytest.mark.slow
@pytest.mark.parametrize(("name", "layers"), [("mixtral", 1), ("qwen3 moe", 3)])
def test_the_balance_loss_of_routers(name, layers, tmp_path):
    """Ours is the sum of every layer's; theirs is of all layers as if they were one."""
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func as balance_of

    weight = 0.5
    theirs = random_model(name, 0, num_hidden_layers=layers, router_aux_loss_coef=weight)
    theirs.save_pretrained(tmp_path / "in")
    tokens = parity.tokens(0, 300)
    inputs = torch.tensor(tokens[:, :-1].astype(np.int64))
    out = theirs(input_ids=inputs, labels=inputs, output_router_logits=True)
    config = theirs.config
    each = [
        balance_of((logits,), config.num_local_experts, config.num_experts_per_tok)
        for logits in out.router_logits
    ]
    if layers == 1:
        assert abs(out.aux_loss.item() - each[0].item()) < LOSS
    else:
        assert abs(out.aux_loss.item() - sum(each).item() / layers) > LOSS
    target = torch.tensor(tokens[:, 1:].astype(np.int64))
    loss = torch.nn.functional.cross_entropy(out.logits.flatten(0, 1), target.flatten())
    (loss + weight * sum(each)).backward()

    with parity.ours(tmp_path / "in", balance_loss=weight) as laid:
        got = laid.run(laid.read(tmp_path / "in"), tokens)
        gradients = laid.in_our_layout({n: p.grad.numpy() for n, p in theirs.named_parameters()})
    apart = {n: np.abs(got.gradients[n] - gradients[n]).max() for n in gradients}
    print(f"{name}: balance {got.means['balance']:.4f}, gradients {max(apart.values()):.1e}")
    assert abs(got.loss - loss.item()) < LOSS
    assert abs(got.means["balance"] - sum(each).item() / layers) < LOSS
    assert max(apart.values()) < GRADIENTS, apart
