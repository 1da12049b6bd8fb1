"""BERT-base, 109,514,298 parameters as a masked LM, trained on text by its paper's recipe.

Shape: https://huggingface.co/google-bert/bert-base-uncased/blob/main/config.json (its file has
592,386 parameters more: the pooler, and the head of a second objective that is not trained here).
Recipe: Devlin et al. 2019, https://arxiv.org/abs/1810.04805, appendix A.2: 256 rows of 512 tokens,
Adam at 1e-4 with 10,000 steps of warm-up and a straight line down over a million, dropout 0.1. The
paper's first 900,000 steps are of 128 tokens.

    # text in corpus/, or set config.data.path and config.data.tokenizer
    python train.py --config=configs/bert_base.py --workdir=runs/bert

Expected: not run here yet. Labels of rows beside the masked tokens, or alone:

    --config.objective.tasks='{"topic": 4}' [--config.objective.name=classification]
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    """BERT-base: post-norm, learned positions, token types, GELU, a transform before the head."""
    config = base.get_config()
    config.model.family = "encoder"
    config.model.vocab_size = 30522
    config.model.layers = 12
    config.model.embed_dim = 768
    config.model.mlp_dim = 3072
    config.model.heads = 12
    config.model.kv_heads = 12
    config.model.head_dim = 64
    config.model.norm = "layer"
    config.model.norm_position = "post"
    config.model.norm_eps = 1e-12
    config.model.positions = "learned"
    config.model.max_length = 512
    config.model.token_types = 2
    config.model.embed_norm = True
    config.model.activation = "gelu"
    config.model.gated = False
    config.model.qkv_bias = True
    config.model.attention_out_bias = True
    config.model.mlp_bias = True
    config.model.head_transform = True
    config.model.head_bias = True
    config.model.dropout = 0.1
    config.model.attention_dropout = 0.1

    config.objective.name = "masked_lm"
    config.precision.compute = "bfloat16"
    config.data.source = "text"
    config.data.path = "corpus/*.txt"
    config.data.tokenizer = "corpus/tokenizer.json"
    config.data.sequence_length = 512
    config.data.batch_size = 256

    config.optimizer.learning_rate = 1e-4
    config.optimizer.warmup_steps = 10_000
    config.optimizer.schedule = "wsd"
    config.optimizer.decay_fraction = 1.0  # all that the warm-up leaves
    config.optimizer.final_fraction = 0.0
    config.optimizer.weight_decay = 0.01
    config.optimizer.b2 = 0.999
    config.optimizer.eps = 1e-6
    config.train.steps = 1_000_000
    config.eval.every = 1000
    return config
