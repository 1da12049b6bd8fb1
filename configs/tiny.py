r"""A byte-level decoder of 0.95 million parameters on the Python standard library: the first run.

For any machine: real text that comes with every Python, its bytes as tokens, float32 throughout.
The mesh is `data=-1`, so it runs on 1, 2, 4 or 8 devices; heads divide by 8 for tensor parallelism.

    python train.py --config=configs/tiny.py --workdir=runs/tiny
    JAX_NUM_CPU_DEVICES=8 python train.py --config=configs/tiny.py --workdir=runs/tiny8 \
        --config.mesh.data=2 --config.mesh.fsdp=2 --config.mesh.tensor=2

The loss starts at ln(257) = 5.5 and falls below half of it within a minute on two cores.
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    """The embedded default."""
    config = base.get_config()
    config.model.vocab_size = 257  # 256 bytes and the end of a document
    config.model.layers = 4
    config.model.embed_dim = 128
    config.model.mlp_dim = 384
    config.model.heads = 8
    config.model.kv_heads = 8
    config.model.head_dim = 16
    config.model.max_length = 128
    config.model.tied = False  # tied, it would begin by repeating its input, below ln(257)

    config.data.source = "stdlib"
    config.data.tokenizer = "bytes"
    config.data.sequence_length = 128
    config.data.batch_size = 64

    config.optimizer.learning_rate = 3e-3
    config.optimizer.warmup_steps = 20
    config.train.steps = 120
    config.checkpoint.every = 100
    return config
