"""Every key there is, with its default and its meaning. An experiment starts from here and changes
a few.

Keys are set in a config file (`config.model.layers = 12`) or on a command line
(`--config.model.layers=12`). Each section is checked by the dataclass of the same name in the file
that uses it.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The defaults, locked: a misspelt key in an experiment is an error there."""
    config = ConfigDict()
    config.seed = 0  # of initial weights, order of data and dropout

    config.layout = "given"  # given | auto: mesh, parallel, remat and micro-steps are chosen to fit

    config.model = model = ConfigDict()  # models/config.py
    model.family = "decoder"
    model.vocab_size = 4096  # of the tokenizer; padded at rest to a multiple of 128
    model.layers = 4
    model.embed_dim = 256
    model.mlp_dim = 1024  # inner width of the feed-forward
    model.heads = 8  # query heads
    model.kv_heads = 8  # fewer than heads: grouped-query attention; 1: multi-query
    model.head_dim = 32  # need not be embed_dim / heads
    model.norm = "rms"  # rms | layer
    model.norm_position = "pre"  # pre | post | sandwich (before and after)
    model.norm_eps = 1e-6
    model.norm_plus_one = False  # gains are stored minus one (Gemma)
    model.positions = "rope"  # rope | learned | sinusoidal | none
    model.max_length = 2048  # tokens; the longest sequence, the size of a learned table
    model.rope_theta = 10_000.0  # base of the rotary frequencies
    model.rope_local_theta = 0.0  # the same for local layers; 0: as rope_theta
    model.rope_scaling = "none"  # none | linear | llama3: rotary frequencies for longer contexts
    model.rope_factor = 1.0  # how much longer
    model.rope_low_freq_factor = (
        1.0  # llama3: slower than original_length / this are divided by the factor
    )
    model.rope_high_freq_factor = 4.0  # llama3: faster than original_length / this stay
    model.rope_original_length = 8192  # llama3: tokens, the context before scaling
    model.activation = "silu"  # gelu | gelu_tanh | silu | relu
    model.gated = True  # SwiGLU (silu) or GeGLU (gelu) instead of a plain feed-forward
    model.qkv_bias = False
    model.attention_out_bias = False
    model.mlp_bias = False
    model.qk_norm = False  # RMSNorm of each head's queries and keys (Qwen 3, Gemma 3)
    model.query_scale = 0.0  # factor of the attention logits; 0: head_dim ** -0.5
    model.attention_softcap = 0.0  # attention logits x become cap * tanh(x / cap); 0: off
    model.logit_softcap = 0.0  # the same for the output logits
    model.window = 0  # tokens a local layer sees, its own included; 0: all
    model.pattern = ("global",)  # kinds of layers, local or global, repeated over the depth
    model.tied = True  # the loss head is the embedding table
    model.embed_scale = False  # embeddings times sqrt(embed_dim)
    model.init_std = 0.02  # of the initial weights
    model.dropout = 0.0  # of embeddings and residual branches, in [0, 1)
    model.attention_dropout = 0.0  # of attention probabilities
    model.attention = "auto"  # auto | xla | rows | blocked | cudnn
    model.unroll = 1  # layers in one iteration of the scan; more is faster, and saves more

    config.mesh = mesh = ConfigDict()  # parallel/mesh.py; the product is the number of devices
    mesh.data = -1  # copies of the model, each on its part of the batch; -1: what is left
    mesh.fsdp = 1  # as data, and parameters and optimizer state are divided too (parallel.zero)
    mesh.pipe = 1  # pipeline stages, each with its part of the layers
    mesh.context = 1  # parts of the sequence; only 1 for now
    mesh.expert = 1  # groups of experts; only 1 for now
    mesh.tensor = 1  # parts of every layer: heads, feed-forward, vocabulary

    config.parallel = parallel = ConfigDict()  # parallel/rules.py
    parallel.zero = 3  # over fsdp: 1 divides optimizer state, 2 gradients too, 3 parameters too
    parallel.sequence = False  # the residual stream's sequence is divided over tensor
    parallel.preset = "megatron"  # megatron | mlp | whole_vocab: which dims tensor divides
    parallel.rules = ConfigDict()  # single rows of that table, such as {"embed": ["fsdp"]}

    config.pipeline = pipeline = (
        ConfigDict()
    )  # parallel/pipeline.py; of no effect without mesh.pipe
    pipeline.schedule = "1f1b"  # gpipe | 1f1b | interleaved | zb_h1 | zb_v
    pipeline.microbatches = 8  # parts of a step's batch; its gradient accumulation, too
    pipeline.chunks = 0  # of a stage's layers; 0: 2 for interleaved and zb_v, else 1
    pipeline.form = (
        ""  # wide | lean | single: bubble against buffers; empty: what suits the schedule
    )
    pipeline.balance = "equal"  # layers of chunks: equal (else by cost) | cost: the head counts
    pipeline.layers = ()  # of every chunk in the model's order; (): as balance says
    pipeline.orders = ""  # a Python file with a schedule of your own; docs/pipeline.md

    config.precision = precision = (
        ConfigDict()
    )  # parallel/precision.py; float32 | bfloat16 | float16
    precision.params = "float32"  # master weights and moments
    precision.compute = "float32"  # activations and the weights that the model sees
    precision.accumulate = "float32"  # sum of gradients over micro-steps
    precision.scale = 2.0**15  # first loss scale, with compute float16
    precision.scale_steps = 2000  # good steps after which it doubles

    config.remat = remat = ConfigDict()  # parallel/remat.py
    remat.policy = (
        "none"  # none | full | dots | attention | custom: what the backward pass recomputes
    )
    remat.save = ()  # custom: names of tensors kept on the device
    remat.offload = ()  # custom: names of tensors kept in host memory

    config.data = data = ConfigDict()  # data/config.py
    data.source = "stdlib"  # stdlib | text | jsonl | tokens | dataset
    data.path = ""  # file or glob; a folder for dataset; empty for stdlib
    data.eval_path = ""  # held-out documents; empty: about 5% of path's are held out
    data.text_field = "text"  # the field of jsonl and dataset that holds the text
    data.token_dtype = "uint16"  # uint16 | uint32: of raw .bin files (tokens)
    data.tokenizer = "bpe"  # bytes | bpe (trained on the training documents) | a tokenizer.json
    data.end_token = ""  # end of document in that tokenizer.json; empty: looked for by usual names
    data.sequence_length = 256  # tokens in a row
    data.batch_size = 64  # rows of a step over all devices
    data.packing = "packed"  # packed (several documents a row, which do not see each other) |
    #                          buckets (one piece a row, rows of several lengths) | none
    data.buckets = ()  # those lengths, rising; the last one is sequence_length
    data.prefetch_mib = 64  # MiB of host memory for batches made ahead
    data.cache = ""  # folder for tokenised text; empty: in the workdir

    config.optimizer = optimizer = ConfigDict()  # training/optim.py
    optimizer.name = "adamw"  # adamw | adafactor | lion | muon | sgd
    optimizer.learning_rate = 1e-3  # at its highest
    optimizer.warmup_steps = 100
    optimizer.schedule = "cosine"  # cosine | wsd | constant
    optimizer.final_fraction = 0.1  # of learning_rate at the last step
    optimizer.decay_fraction = 0.2  # wsd: of the steps, at the end, in which it falls
    optimizer.weight_decay = 0.1  # of matrices and tables; gains and biases do not decay
    optimizer.b1 = 0.9
    optimizer.b2 = 0.95
    optimizer.eps = 1e-8
    optimizer.momentum = 0.9  # sgd and muon
    optimizer.offload = False  # optimizer state in host memory, streamed layer by layer
    optimizer.clip_norm = 1.0  # gradients with a larger global norm are scaled down to it; 0: off

    config.loss = loss = ConfigDict()  # training/losses.py
    loss.chunk = 1024  # tokens per device whose logits exist at one time
    loss.z_loss = 0.0  # weight of the squared log of the softmax's sum; 0: off

    config.train = train = ConfigDict()  # train.py
    train.steps = 1000  # in all; a run that is continued goes on up to it
    train.log_every = 10  # steps
    train.grad_accumulation = 1  # micro-steps per step; batch_size is divided by it
    train.max_skipped = 20  # updates with a gradient that is not finite, in a row, before giving up

    config.checkpoint = checkpoint = ConfigDict()  # training/checkpoint.py
    checkpoint.every = 1000  # steps
    checkpoint.keep = 3  # of the newest
    checkpoint.best = ""  # a metric; the step with the lowest is kept too

    config.eval = evaluation = ConfigDict()  # training/evaluation.py
    evaluation.every = 0  # steps; 0: only at the end
    evaluation.batches = 16  # of held-out text

    config.logging = logging = ConfigDict()  # training/metrics.py
    logging.tensorboard = True
    logging.wandb = False  # offline, with the extra `wandb`

    config.memory = memory = ConfigDict()  # memory/plan.py
    memory.check = "refuse"  # refuse | warn | off: a run that is predicted not to fit
    memory.budget_gib = 0.0  # GiB per device that may be used; 0: all that the device has
    return config.lock()
