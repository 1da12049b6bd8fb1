"""Gemma 3 1B, 999,885,952 parameters: five local layers to each global one, sandwich norms, GeGLU.

Shape: "Gemma 3 Technical Report", https://arxiv.org/abs/2503.19786, section 2, and
https://huggingface.co/google/gemma-3-1b-pt/blob/main/config.json. The recipe is ours.

    # text in corpus/, or set config.data.path and config.data.tokenizer
    python train.py --config=configs/gemma3_1b.py --workdir=runs/gemma3

Expected: for planning; not run here. The vocabulary of 262,144 is a third of the parameters.
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    """Gemma 3 1B."""
    config = base.get_config()
    config.model.vocab_size = 262_144
    config.model.layers = 26
    config.model.embed_dim = 1152
    config.model.mlp_dim = 6912
    config.model.heads = 4
    config.model.kv_heads = 1
    config.model.head_dim = 256
    config.model.norm_position = "sandwich"
    config.model.norm_plus_one = True
    config.model.max_length = 32_768
    config.model.rope_theta = 1_000_000.0
    config.model.rope_local_theta = 10_000.0
    config.model.activation = "gelu_tanh"
    config.model.qk_norm = True
    config.model.window = 512
    config.model.pattern = ("local",) * 5 + ("global",)
    config.model.embed_scale = True

    config.mesh.data = 1
    config.mesh.fsdp = -1
    config.precision.compute = "bfloat16"
    config.data.source = "jsonl"
    config.data.path = "corpus/*.jsonl"
    config.data.tokenizer = "corpus/tokenizer.json"
    config.data.sequence_length = 4096
    config.data.batch_size = 256

    config.optimizer.learning_rate = 1e-3
    config.optimizer.warmup_steps = 2000
    config.train.steps = 100_000
    return config
