"""The Transformer of 2017, base, 63,045,632 parameters (the paper says 65 million).

Shape and recipe: Vaswani et al. 2017, "Attention Is All You Need", table 3, sections 5.1 and 5.3,
https://arxiv.org/abs/1706.03762: one table of 37,000 tokens for source, target and loss head, about
25,000 tokens of each a step, Adam with b2 = 0.98 and 4,000 steps of warm-up. Here the rate falls as
a cosine does, and labels are not smoothed.

    # {"source": ..., "text": ...} a line of pairs/*.jsonl, a tokenizer.json beside them
    python train.py --config=configs/transformer_2017_base.py --workdir=runs/transformer_2017

Expected: not run here yet.
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    """Post-norm, sinusoidal positions, ReLU, embeddings times sqrt(512), dropout 0.1."""
    config = base.get_config()
    config.model.family = "encoder_decoder"
    config.model.vocab_size = 37000
    config.model.encoder_layers = 6
    config.model.layers = 6
    config.model.cross = "plain"
    config.model.embed_dim = 512
    config.model.mlp_dim = 2048
    config.model.heads = 8
    config.model.kv_heads = 8
    config.model.head_dim = 64
    config.model.norm = "layer"
    config.model.norm_position = "post"
    config.model.positions = "sinusoidal"
    config.model.activation = "relu"
    config.model.gated = False
    config.model.mlp_bias = True
    config.model.embed_scale = True
    config.model.init_std = 512**-0.5
    config.model.dropout = 0.1

    config.objective.name = "seq2seq"
    config.data.source = "jsonl"
    config.data.path = "pairs/*.jsonl"
    config.data.source_field = "source"
    config.data.tokenizer = "pairs/tokenizer.json"
    config.data.source_length = 128
    config.data.sequence_length = 128
    config.data.packing = "none"
    config.data.batch_size = 192

    config.optimizer.learning_rate = 7e-4  # 512 ** -0.5 * 4000 ** -0.5, its highest there
    config.optimizer.warmup_steps = 4000
    config.optimizer.weight_decay = 0.0
    config.optimizer.b1 = 0.9
    config.optimizer.b2 = 0.98
    config.optimizer.eps = 1e-9
    config.optimizer.clip_norm = 0.0
    config.train.steps = 100_000
    config.eval.every = 1000
    return config
