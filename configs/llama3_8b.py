"""Llama 3 8B, 8,030,261,248 parameters.

Shape: "The Llama 3 Herd of Models", https://arxiv.org/abs/2407.21783, table 3, and
https://huggingface.co/meta-llama/Meta-Llama-3-8B/blob/main/config.json. The peak learning rate is
that table's; batch, length and warm-up are those of the first phase of its section 3.4.1. Llama 3.1
differs in the positions alone: `--config.model.rope_scaling=llama3 --config.model.rope_factor=8`.

    # text in corpus/, or set config.data.path and config.data.tokenizer
    python train.py --config=configs/llama3_8b.py --workdir=runs/llama3_8b

Expected: for planning; not run here. At rest in mixed precision with a float32 master copy, AdamW
and FSDP over all devices: 12 bytes a parameter, 96 GB in all, divided by the devices.
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    """Llama 3 8B: RMSNorm, rotary positions, SwiGLU, 8 K/V heads, untied embeddings."""
    config = base.get_config()
    config.model.vocab_size = 128_256
    config.model.layers = 32
    config.model.embed_dim = 4096
    config.model.mlp_dim = 14_336
    config.model.heads = 32
    config.model.kv_heads = 8
    config.model.head_dim = 128
    config.model.norm_eps = 1e-5
    config.model.max_length = 8192
    config.model.rope_theta = 500_000.0
    config.model.tied = False

    config.mesh.data = 1
    config.mesh.fsdp = -1
    config.precision.compute = "bfloat16"
    config.remat.policy = "attention"
    config.data.source = "jsonl"
    config.data.path = "corpus/*.jsonl"
    config.data.tokenizer = "corpus/tokenizer.json"
    config.data.sequence_length = 8192
    config.data.batch_size = 512

    config.optimizer.learning_rate = 3e-4
    config.optimizer.warmup_steps = 8000
    config.optimizer.final_fraction = 0.01
    config.train.steps = 1_200_000
    return config
