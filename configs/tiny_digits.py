r"""Handwritten digits classified by a ViT of 0.1 million parameters: which digit, and odd or even.

1,797 scans of 8 x 8 pixels that scikit-learn ships, in patches of 2 x 2: rows of 16 patches. After
Dosovitskiy et al. 2020, https://arxiv.org/abs/2010.11929, with two heads over the mean of features.

    pip install -e '.[images]'
    python train.py --config=configs/tiny_digits.py --workdir=runs/tiny_digits

The loss starts at ln(10) + ln(2) = 3.0, what is best without looking; 300 steps name 9 of 10
held-out digits.
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    """A ViT as the model itself: its shape is `model`'s, and stages divide its layers."""
    config = base.get_config()
    config.model.family = "vision"
    config.model.layers = 4
    config.model.embed_dim = 48
    config.model.mlp_dim = 96
    config.model.heads = 8
    config.model.kv_heads = 8
    config.model.head_dim = 8
    config.model.norm = "layer"
    config.model.positions = "learned"
    config.model.max_length = 16
    config.model.activation = "gelu"
    config.model.gated = False
    config.model.qkv_bias = True
    config.model.attention_out_bias = True
    config.model.mlp_bias = True
    config.model.init_std = 0.06  # of narrow layers

    config.vision.image_size = 8
    config.vision.patch_size = 2
    config.vision.channels = 1

    config.objective.name = "classification"
    config.objective.tasks = {"digit": 10, "parity": 2}
    config.data.source = "digits"
    config.data.packing = "none"
    config.data.sequence_length = 16  # the patches of an image
    config.data.batch_size = 64

    config.optimizer.learning_rate = 3e-3
    config.optimizer.warmup_steps = 20
    config.train.steps = 300
    config.checkpoint.every = 300
    config.eval.batches = 2
    return config
