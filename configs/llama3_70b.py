"""Llama 3 70B, 70,553,706,496 parameters.

Shape: "The Llama 3 Herd of Models", https://arxiv.org/abs/2407.21783, table 3, and
https://huggingface.co/meta-llama/Meta-Llama-3-70B/blob/main/config.json. The peak learning rate is
that table's; batch, length and warm-up are those of the first phase of its section 3.4.1. Llama 3.1
differs in the positions alone: `--config.model.rope_scaling=llama3 --config.model.rope_factor=8`.

    # text in corpus/, or set config.data.path and config.data.tokenizer
    python train.py --config=configs/llama3_70b.py --workdir=runs/llama3_70b

Expected: for planning; not run here. At rest in mixed precision with a float32 master copy, AdamW
and FSDP over all devices: 12 bytes a parameter, 847 GB in all, divided by the devices.
"""

from ml_collections import ConfigDict

from configs import llama3_8b


def get_config() -> ConfigDict:
    """Llama 3 70B: as 8B, deeper and wider."""
    config = llama3_8b.get_config()
    config.model.layers = 80
    config.model.embed_dim = 8192
    config.model.mlp_dim = 28_672
    config.model.heads = 64
    config.remat.policy = "full"
    config.optimizer.learning_rate = 1.5e-4
    return config
