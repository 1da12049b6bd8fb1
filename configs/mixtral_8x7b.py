r"""Mixtral 8x7B, 46,702,792,704 parameters: 8 experts in place of each feed-forward, 2 for a token.

Shape: "Mixtral of Experts", https://arxiv.org/abs/2401.04088, table 1, and
https://huggingface.co/mistralai/Mixtral-8x7B-v0.1/blob/main/config.json. The recipe is ours.

    # text in corpus/, or set config.data.path and config.data.tokenizer
    python plan.py --config=configs/mixtral_8x7b.py --target=gpu:h100:8x8 \
        --config.mesh.fsdp=8 --config.mesh.expert=8

Expected: for planning; not run here.
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    """Mixtral 8x7B."""
    config = base.get_config()
    config.model.vocab_size = 32_000
    config.model.layers = 32
    config.model.embed_dim = 4096
    config.model.mlp_dim = 14_336
    config.model.heads = 32
    config.model.kv_heads = 8
    config.model.head_dim = 128
    config.model.max_length = 32_768
    config.model.norm_eps = 1e-5
    config.model.rope_theta = 1_000_000.0
    config.model.tied = False
    config.experts.number = 8
    config.experts.per_token = 2
    config.experts.balance_loss = 0.02

    config.mesh.data = 1
    config.mesh.fsdp = -1
    config.precision.compute = "bfloat16"
    config.remat.policy = "full"
    config.data.source = "jsonl"
    config.data.path = "corpus/*.jsonl"
    config.data.tokenizer = "corpus/tokenizer.json"
    config.data.sequence_length = 4096
    config.data.batch_size = 256

    config.optimizer.learning_rate = 3e-4
    config.optimizer.warmup_steps = 2000
    config.train.steps = 100_000
    return config
