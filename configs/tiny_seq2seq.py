r"""A byte-level encoder-decoder of the shape of `configs/tiny.py`, with T5's relative positions.

    python train.py --config=configs/tiny_seq2seq.py --workdir=runs/tiny_seq2seq
    JAX_NUM_CPU_DEVICES=8 python train.py --config=configs/tiny_seq2seq.py \
        --workdir=runs/tiny_seq2seq8 --config.mesh.fsdp=2 --config.mesh.tensor=2

The loss starts at ln(257) = 5.5. With Muon, 90 steps of a quarter of the batch reach 2.47 on
held-out docstrings, where the best constant is at 3.13 (`benchmarks/learning.py`).
"""

from ml_collections import ConfigDict

from configs import tiny


def get_config() -> ConfigDict:
    """`tiny`, two of its layers as an encoder of the source."""
    config = tiny.get_config()
    config.model.family = "encoder_decoder"
    config.model.encoder_layers = 2
    config.model.layers = 2
    config.model.cross = "plain"
    config.model.positions = "relative"
    config.model.max_length = 256

    config.objective.name = "seq2seq"
    config.data.source = "docstrings"
    config.data.packing = "none"
    return config
