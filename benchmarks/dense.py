"""A decoder of 6.2 million parameters on the Python standard library: what compression is shown on.

    python train.py --config=benchmarks/dense.py --workdir=runs/dense

SwiGLU, RMSNorm and rotary positions as in Llama 3 (https://arxiv.org/abs/2407.21783), a BPE of 4096
tokens. On two CPU cores a quarter of an hour.
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    """6.2 M parameters, 5.1 M of them in matrices of the layers."""
    config = base.get_config()
    config.model.vocab_size = 4096
    config.model.layers = 6
    config.model.embed_dim = 256
    config.model.mlp_dim = 768
    config.model.heads = 8
    config.model.kv_heads = 8
    config.model.head_dim = 32
    config.model.max_length = 256
    config.model.unroll = 2

    config.data.source = "stdlib"
    config.data.tokenizer = "bpe"
    config.data.sequence_length = 256
    config.data.batch_size = 16

    config.optimizer.learning_rate = 2e-3
    config.optimizer.warmup_steps = 50
    config.train.steps = 500
    config.train.log_every = 25
    config.checkpoint.every = 250
    config.checkpoint.keep = 1
    config.eval.batches = 64
    return config
