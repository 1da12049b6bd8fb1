r"""Captions of handwritten digits: a small ViT before a byte-level decoder, 0.2 million parameters.

1,797 scans of 8 x 8 pixels that scikit-learn ships, each with a caption such as "a scan of the
digit seven". Image first, then text, as PaliGemma: https://arxiv.org/abs/2407.07726.

    pip install -e '.[images]'
    python train.py --config=configs/tiny_captions.py --workdir=runs/tiny_captions

All captions are alike but for their last word: what is best without looking at the image is a loss
of ln(10) a caption, shared by its 25 bytes: 0.092. Below 0.02 after 300 steps. With
`--config.model.cross=gated` give `--config.model.init_std=0.125`, too (`benchmarks/learning.py`).
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    """`vision` is the ViT's shape, `model` the decoder's."""
    config = base.get_config()
    config.model.family = "vision_language"
    config.model.vocab_size = 257  # 256 bytes and the end of a caption
    config.model.layers = 3
    config.model.embed_dim = 64
    config.model.mlp_dim = 128
    config.model.heads = 8
    config.model.kv_heads = 8
    config.model.head_dim = 8
    config.model.max_length = 64
    config.model.tied = False
    config.model.init_std = 0.06  # of narrow layers; with 0.02 the image is found much later

    config.vision.image_size = 8
    config.vision.patch_size = 2
    config.vision.channels = 1
    config.vision.layers = 2
    config.vision.embed_dim = 48
    config.vision.mlp_dim = 96
    config.vision.heads = 8

    config.objective.name = "captioning"
    config.data.source = "digits"
    config.data.packing = "none"
    config.data.tokenizer = "bytes"
    config.data.sequence_length = 32  # after the 16 patches of an image
    config.data.batch_size = 64

    config.optimizer.learning_rate = 3e-3
    config.optimizer.warmup_steps = 20
    config.train.steps = 300
    config.checkpoint.every = 300
    config.eval.batches = 2
    return config
