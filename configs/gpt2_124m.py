"""GPT-2 small, 124,439,808 parameters, trained on text as the open reproductions train it.

Shape: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners",
https://huggingface.co/openai-community/gpt2/blob/main/config.json. Recipe: AdamW at 6e-4, half a
million tokens a step, after Brown et al. 2020, https://arxiv.org/abs/2005.14165, table 2.1 (125M).

    # text in corpus/, or set config.data.path and config.data.tokenizer
    python train.py --config=configs/gpt2_124m.py --workdir=runs/gpt2

Expected: not run here yet. Open reproductions on OpenWebText report a held-out loss near 2.85 after
300 billion tokens (https://github.com/karpathy/nanoGPT).
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    """GPT-2 small: LayerNorm, learned positions, GELU, biases, tied embeddings."""
    config = base.get_config()
    config.model.vocab_size = 50257
    config.model.layers = 12
    config.model.embed_dim = 768
    config.model.mlp_dim = 3072
    config.model.heads = 12
    config.model.kv_heads = 12
    config.model.head_dim = 64
    config.model.norm = "layer"
    config.model.norm_eps = 1e-5
    config.model.positions = "learned"
    config.model.max_length = 1024
    config.model.activation = "gelu_tanh"
    config.model.gated = False
    config.model.qkv_bias = True
    config.model.attention_out_bias = True
    config.model.mlp_bias = True

    config.precision.compute = "bfloat16"
    config.data.source = "text"
    config.data.path = "corpus/*.txt"
    config.data.tokenizer = "corpus/tokenizer.json"
    config.data.sequence_length = 1024
    config.data.batch_size = 512

    config.optimizer.learning_rate = 6e-4
    config.optimizer.warmup_steps = 2000
    config.train.steps = 600_000
    config.eval.every = 1000
    return config
