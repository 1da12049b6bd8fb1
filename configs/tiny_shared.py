r"""The first run's decoder with two blocks for its four layers and a factorised embedding.

As much work a token as `configs/tiny.py` with half of its weights; docs/sharing.md says what that
saves and what not.

    python train.py --config=configs/tiny_shared.py --workdir=runs/tiny_shared
    JAX_NUM_CPU_DEVICES=8 python train.py --config=configs/tiny_shared.py \
        --workdir=runs/tiny_shared8 --config.mesh.fsdp=4 --config.mesh.tensor=2

The loss starts at ln(257) = 5.5; 100 steps of a quarter of the batch reach 2.53 held out
(`benchmarks/learning.py`, shared).
"""

from ml_collections import ConfigDict

from configs import tiny


def get_config() -> ConfigDict:
    """`tiny`, shared."""
    config = tiny.get_config()
    config.model.distinct = 2
    config.model.embed_rank = 32
    return config
