"""T5 small, 60,506,624 parameters, on spans cut out of text.

Shape: https://huggingface.co/google-t5/t5-small/blob/main/config.json. Recipe: Raffel et al. 2020,
https://arxiv.org/abs/1910.10683, section 3.1: 128 rows of 512 tokens, 15% of them cut out in spans
of 3, Adafactor at an inverse square root of the step, from 1e-2 down; here a cosine.

    # text in corpus/, or a checkpoint by --config.init_from=DIR
    python train.py --config=configs/t5_small.py --workdir=runs/t5_small

Expected: not run here yet.
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    """RMSNorm before each sublayer, relative positions, ReLU, no biases, one table."""
    config = base.get_config()
    config.model.family = "encoder_decoder"
    config.model.vocab_size = 32128
    config.model.encoder_layers = 6
    config.model.layers = 6
    config.model.cross = "plain"
    config.model.embed_dim = 512
    config.model.mlp_dim = 2048
    config.model.heads = 8
    config.model.kv_heads = 8
    config.model.head_dim = 64
    config.model.positions = "relative"
    config.model.max_length = 512
    config.model.activation = "relu"
    config.model.gated = False
    config.model.query_scale = 1.0
    config.model.head_scale = True
    config.model.dropout = 0.1

    config.objective.name = "span_corruption"
    config.data.source = "text"
    config.data.path = "corpus/*.txt"
    config.data.tokenizer = "corpus/tokenizer.json"
    config.data.source_length = 512
    config.data.sequence_length = 128
    config.data.packing = "none"
    config.data.batch_size = 128

    config.optimizer.name = "adafactor"
    config.optimizer.learning_rate = 1e-2
    config.optimizer.warmup_steps = 10_000
    config.optimizer.weight_decay = 0.0
    config.train.steps = 524_288
    config.eval.every = 1000
    return config
