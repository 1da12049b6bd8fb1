"""Qwen 3 0.6B, 596,049,920 parameters: QK-norm, heads wider than embed_dim / heads, tied
embeddings.

Shape: "Qwen3 Technical Report", https://arxiv.org/abs/2505.09388, table 1, and
https://huggingface.co/Qwen/Qwen3-0.6B-Base/blob/main/config.json. The recipe is ours.

    # text in corpus/, or set config.data.path and config.data.tokenizer
    python train.py --config=configs/qwen3_0_6b.py --workdir=runs/qwen3

Expected: for planning; not run here.
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    """Qwen 3 0.6B."""
    config = base.get_config()
    config.model.vocab_size = 151_936
    config.model.layers = 28
    config.model.embed_dim = 1024
    config.model.mlp_dim = 3072
    config.model.heads = 16
    config.model.kv_heads = 8
    config.model.head_dim = 128
    config.model.max_length = 32_768
    config.model.rope_theta = 1_000_000.0
    config.model.qk_norm = True

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
    config.optimizer.schedule = "wsd"
    config.train.steps = 100_000
    return config
