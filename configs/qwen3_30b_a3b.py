r"""Qwen 3 30B-A3B, 30,532,122,624 parameters: 128 experts in each layer, 8 of them for a token.

Shape: "Qwen3 Technical Report", https://arxiv.org/abs/2505.09388, table 2, and
https://huggingface.co/Qwen/Qwen3-30B-A3B-Base/blob/main/config.json. The recipe is ours.

    # text in corpus/, or set config.data.path and config.data.tokenizer
    python plan.py --config=configs/qwen3_30b_a3b.py --target=gpu:h100:8x8 \
        --config.mesh.fsdp=8 --config.mesh.expert=8

Expected: for planning; not run here.
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    """Qwen 3 30B-A3B."""
    config = base.get_config()
    config.model.vocab_size = 151_936
    config.model.layers = 48
    config.model.embed_dim = 2048
    config.model.mlp_dim = 6144  # of no effect: every layer has experts
    config.model.heads = 32
    config.model.kv_heads = 4
    config.model.head_dim = 128
    config.model.max_length = 32_768
    config.model.qk_norm = True
    config.model.rope_theta = 1_000_000.0
    config.model.tied = False
    config.experts.number = 128
    config.experts.per_token = 8
    config.experts.mlp_dim = 768
    config.experts.balance_loss = 0.001

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
