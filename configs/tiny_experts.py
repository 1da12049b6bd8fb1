r"""The first run's decoder with 8 experts in place of each feed-forward, 2 for every token.

As much work a token as `configs/tiny.py`, with four times the weights in feed-forwards.

    python train.py --config=configs/tiny_experts.py --workdir=runs/tiny_experts
    JAX_NUM_CPU_DEVICES=8 python train.py --config=configs/tiny_experts.py \
        --workdir=runs/tiny_experts8 --config.mesh.fsdp=2 --config.mesh.expert=4

The loss starts at ln(257) = 5.5; `balance` is 2, the experts of a token, where all are used alike.
"""

from ml_collections import ConfigDict

from configs import tiny


def get_config() -> ConfigDict:
    """`tiny` with experts."""
    config = tiny.get_config()
    config.experts.number = 8
    config.experts.per_token = 2
    config.experts.mlp_dim = 192
    return config
