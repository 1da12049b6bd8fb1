r"""PaliGemma 3B: SigLIP So400m/14 at 224 pixels before Gemma 2B, 2,923,466,480 parameters.

Shape: Beyer et al. 2024, https://arxiv.org/abs/2407.07726, section 3.1, and
https://huggingface.co/google/paligemma-3b-pt-224/blob/main/config.json. Two things differ from it,
neither in shape: the ViT's gelu is exact, and the text of a row has no prompt in the prefix. The
recipe is ours.

    # a jsonl with an image and a caption in each line in corpus/, or set config.data.path
    python train.py --config=configs/paligemma_like.py --workdir=runs/paligemma

Expected: for planning; not run here. An image is 256 tokens before the text.
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    """PaliGemma 3B at 224 pixels."""
    config = base.get_config()
    config.model.family = "vision_language"
    config.model.vocab_size = 257_216
    config.model.layers = 18
    config.model.embed_dim = 2048
    config.model.mlp_dim = 16_384
    config.model.heads = 8
    config.model.kv_heads = 1
    config.model.head_dim = 256
    config.model.norm_plus_one = True
    config.model.max_length = 8192
    config.model.activation = "gelu_tanh"
    config.model.embed_scale = True

    config.vision.image_size = 224
    config.vision.patch_size = 14
    config.vision.layers = 27
    config.vision.embed_dim = 1152
    config.vision.mlp_dim = 4304
    config.vision.heads = 16

    config.mesh.data = 1
    config.mesh.fsdp = -1
    config.precision.compute = "bfloat16"
    config.objective.name = "captioning"
    config.data.source = "images"
    config.data.path = "corpus/*.jsonl"
    config.data.tokenizer = "corpus/tokenizer.json"
    config.data.packing = "none"
    config.data.sequence_length = 256
    config.data.batch_size = 256

    config.optimizer.learning_rate = 2e-5
    config.optimizer.warmup_steps = 1000
    config.train.steps = 100_000
    return config
