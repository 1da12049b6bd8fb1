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

    # A local Hugging Face checkpoint to start from, or the workdir of another run. It fills `model`
    # and `experts` (a workdir `vision` too), and `data.tokenizer` where it has one; keys of the
    # command line stand above it.
    config.init_from = ""
    config.init_new = ()  # patterns of parameters that a workdir may lack, drawn: ("heads/*",)
    config.init_drop = ()  # of those in it that are left out; docs/sharing.md

    config.model = model = ConfigDict()  # models/config.py
    model.family = "decoder"  # decoder | encoder (tokens see both ways) | encoder_decoder (a text
    #          from another) | vision (images classified) | vision_language (an image, then text)
    model.encoder_layers = 0  # of an encoder_decoder's encoder, otherwise like the decoder
    model.source_tied = True  # the encoder's embedding table is the decoder's
    model.cross = "none"  # none | plain | gated (by a scalar from 0): attention over the source, or
    #                       over an image that then does not stand before the text
    model.vocab_size = 4096  # of the tokenizer; padded at rest to a multiple of 128
    model.layers = 4
    model.distinct = 0  # blocks that the layers share; 0: every layer has its own
    model.sharing = "cycle"  # cycle (blocks 0 1 2 0 1 2) | repeat (0 0 1 1 2 2)
    model.embed_dim = 256
    model.embed_rank = 0  # r of a factorised embedding [V, r] [r, D], and head; 0: [V, D]
    model.mlp_dim = 1024  # inner width of the feed-forward
    model.heads = 8  # query heads
    model.kv_heads = 8  # fewer than heads: grouped-query attention; 1: multi-query
    model.head_dim = 32  # need not be embed_dim / heads
    model.norm = "rms"  # rms | layer
    model.norm_position = "pre"  # pre | post | sandwich (before and after)
    model.norm_eps = 1e-6
    model.norm_plus_one = False  # gains are stored minus one (Gemma)
    model.positions = "rope"  # rope | learned | sinusoidal | relative (a bias of scores) | none
    model.max_length = 2048  # tokens; the longest sequence, the size of a learned table
    model.position_offset = 0  # rows of that table before the first position's (RoBERTa: 2)
    model.token_types = 0  # encoder: rows of a table (BERT: 2); 0: none; rows here are of type 0
    model.embed_norm = False  # encoder: embeddings go through a norm before dropout
    model.relative_buckets = 32  # of distances of tokens, each with a bias for each head
    model.relative_distance = 128  # tokens; from here on all distances are in one bucket
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
    model.head_transform = False  # encoder: dense, activation and norm before the head's table
    model.head_bias = False  # encoder: a bias for each token of the vocabulary
    model.pooler = False  # encoder: rows are classified by dense and tanh of their first token
    model.embed_scale = False  # embeddings times sqrt(embed_dim)
    model.head_scale = False  # features before the loss head divided by sqrt(embed_dim)
    model.init_std = 0.02  # of the initial weights
    model.dropout = 0.0  # of embeddings and residual branches, in [0, 1)
    model.attention_dropout = 0.0  # of attention probabilities
    model.attention = "auto"  # auto | xla | rows | blocked | cudnn
    model.unroll = 1  # layers in one iteration of the scan; more is faster, and saves more

    config.experts = experts = ConfigDict()  # models/experts_config.py; in place of feed-forwards
    experts.number = 0  # of a layer; 0: one dense feed-forward
    experts.per_token = 2  # experts that a token goes to
    experts.mlp_dim = 0  # inner width of an expert; 0: model.mlp_dim
    experts.capacity = 0.0  # 0: no token is dropped; else of an expert, in even shares of a row
    experts.normalise = True  # the weights of a token's experts sum to one
    experts.balance_loss = 0.01  # weight of the load-balancing loss of each layer
    experts.z_loss = 0.0  # weight of the router z-loss of each layer

    config.vision = vision = ConfigDict()  # models/vision_config.py; images, and a ViT beside them
    vision.image_size = 0  # pixels of a side; 0: no images
    vision.patch_size = 16  # pixels of a patch's side; an image is whole patches
    vision.channels = 3  # values of a pixel: 1 (grey) or 3 (red, green, blue)
    vision.layers = 0  # of the ViT beside a decoder; with family vision they are model.layers,
    vision.embed_dim = 0  # and this is model.embed_dim,
    vision.mlp_dim = 0  # and so on: leave these four 0 there
    vision.heads = 0
    vision.projector = "linear"  # linear | mlp: how the ViT's features become tokens of the decoder

    config.weights = weights = ConfigDict()  # training/stored.py; docs/compression.md
    # Forms of weights at rest, by patterns of their names: {"stack/*": "int4:128"}. A compressed
    # checkpoint's config has them: int8, int4:128, int3:128, nf4:64, fp8, 2:4, rank:64
    weights.forms = ConfigDict()

    config.quantize = quantize = ConfigDict()  # training/rounded.py; rounding in training
    # Forms that weights are rounded to where they are used, the gradient going straight through, by
    # patterns as above: {"stack/*": "int4:32"}. int8+int8 and fp8+fp8 multiply codes with codes
    quantize.forms = ConfigDict()

    config.adapter = adapter = ConfigDict()  # training/adapters.py; docs/adapters.md
    adapter.method = ""  # "" (none) | lora | dora | ia3 | prefix: what is trained on a frozen base
    adapter.base = ""  # the workdir of a run, compressed or not; it fills `model` and the like
    adapter.rank = 8  # lora, dora
    adapter.alpha = 16.0  # lora, dora: alpha / rank times the product of both factors is added
    adapter.names = ()  # patterns of matrices: ("stack/*/query",); (): all of the layers
    adapter.prefix_length = 16  # prefix: virtual positions

    config.mesh = mesh = ConfigDict()  # parallel/mesh.py; the product is the number of devices
    mesh.data = -1  # copies of the model, each on its part of the batch; -1: what is left
    mesh.fsdp = 1  # as data, and parameters and optimizer state are divided too (parallel.zero)
    mesh.pipe = 1  # pipeline stages, each with its part of the layers
    mesh.context = 1  # parts of the sequence; only 1 for now
    mesh.expert = 1  # as data, and experts are divided too: tokens travel to theirs
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
    data.source = "stdlib"  # stdlib | text | jsonl | tokens | dataset | docstrings (code to
    #                         docstring, of the standard library) | digits (scans) | images (jsonl)
    data.path = ""  # file or glob; a folder for dataset; empty for stdlib, docstrings and digits
    data.eval_path = ""  # held-out documents; empty: about 5% of path's are held out
    data.text_field = "text"  # the field of jsonl, dataset and images that holds the text
    data.source_field = ""  # the field of jsonl that holds its source (objective seq2seq)
    data.token_dtype = "uint16"  # uint16 | uint32: of raw .bin files (tokens)
    data.tokenizer = "bpe"  # bytes | bpe (trained on the training documents) | a tokenizer.json
    data.end_token = ""  # end of document in that tokenizer.json; empty: looked for by usual names
    data.sequence_length = 256  # tokens in a row; of the targets where rows have sources
    data.source_length = 256  # tokens in a source row (span_corruption, seq2seq)
    data.batch_size = 64  # rows of a step over all devices
    data.packing = "packed"  # packed (several documents a row, which do not see each other) |
    #                          buckets (one piece a row, rows of several lengths) | none
    data.buckets = ()  # those lengths, rising; the last one is sequence_length
    data.prefetch_mib = 64  # MiB of host memory for batches made ahead
    data.cache = ""  # folder for tokenised text; empty: in the workdir

    config.optimizer = optimizer = ConfigDict()  # training/optim.py
    optimizer.name = "adamw"  # adamw | adafactor | lion | muon | sgd | and with less state
    #                           adamw8bit | adamw4bit | galore | apollo; docs/optimizers.md
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
    optimizer.frozen = ()  # patterns of parameters that stay as they are: ("embedding", "stack/*")
    optimizer.rank = (
        128  # galore and apollo: of the moments of matrices; apollo with 1: APOLLO-Mini
    )
    optimizer.refresh = 200  # galore and apollo: updates after which the projection changes
    optimizer.projection_scale = 0.0  # factor of their updates; 0: 0.25, 1, APOLLO-Mini 128 ** 0.5
    optimizer.stochastic_rounding = False  # with precision.params bfloat16: small updates add up
    optimizer.clip_norm = 1.0  # gradients with a larger global norm are scaled down to it; 0: off

    config.sparsity = sparsity = ConfigDict()  # training/sparsity.py; docs/pruning.md
    sparsity.target = 0.0  # share of zeros in the end, in (0, 1); 0: none are made
    sparsity.hold = False  # zeros of the start stay: a pruned checkpoint is trained further
    sparsity.names = ()  # patterns of matrices: ("stack/*/mlp/*",); (): all of the layers
    sparsity.begin = 0  # step of the first zeros
    sparsity.end = 0  # of the last; the same: all at once. Between them the share rises cubically
    sparsity.every = 100  # steps between two changes
    sparsity.scope = "layer"  # layer (each matrix of each layer alike) | global (all together)
    sparsity.pattern = "unstructured"  # unstructured | 2:4 (two of every four rows; target 0.5)

    config.objective = objective = ConfigDict()  # data/objective.py
    objective.name = "causal_lm"  # causal_lm | prefix_lm (a prefix of each row sees itself whole) |
    #      masked_lm | span_corruption | seq2seq | captioning | classification; docs/objectives.md
    objective.mask_rate = 0.15  # of the tokens: masked_lm, span_corruption
    objective.span_length = 3.0  # tokens of a span on average: span_corruption
    objective.tasks = ConfigDict()  # what is classified: {"digit": 10} has a head of 10 classes
    objective.task_weight = 1.0  # of each task's loss, beside that of tokens

    config.loss = loss = ConfigDict()  # training/losses.py
    loss.chunk = 1024  # tokens per device whose logits exist at one time
    loss.z_loss = 0.0  # weight of the squared log of the softmax's sum; 0: off

    config.distill = distill = ConfigDict()  # training/distill.py; docs/distillation.md
    distill.teacher = ""  # workdir of a run, or a folder of Hugging Face, to learn from; empty: off
    distill.teacher_step = 0  # of that run; 0: the newest
    distill.teacher_compute = ""  # float32 | bfloat16: its parameters and forward pass; empty: as
    #                               precision.compute
    distill.kind = "forward"  # forward: KL(teacher || student) | reverse: KL(student || teacher)
    distill.temperature = 1.0  # logits of both are divided by it, the divergence times its square
    distill.weight = 0.5  # of the divergence; the rest, to 1, is the cross-entropy's
    distill.hidden_weight = 0.0  # of the squared difference of residual streams; 0: off
    distill.layers = ()  # after which ones, student:teacher: ("2:4", "4:8"); (): the last of both

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

    config.generate = generate = ConfigDict()  # generation/config.py
    generate.batch_size = 8  # texts at a time, over all devices; more prompts wait for a free row
    generate.prompt_length = 0  # tokens of the longest prompt; 0: as those that are given
    generate.max_new_tokens = 64  # of each text, at most
    generate.temperature = 0.0  # logits are divided by it; 0: always the likeliest token
    generate.top_k = 0  # one of so many likeliest tokens is drawn; 0: of all
    generate.top_p = 1.0  # one of the fewest that together have this probability; 1: of all
    generate.min_p = 0.0  # one of those with this part of the likeliest one's; 0: of all
    generate.stop = ()  # a text ends before any of these
    generate.ignore_end = False  # a text does not end with the token that ends a document
    generate.cache = "contiguous"  # contiguous | paged (blocks of a pool, as many as texts need)
    generate.cache_dtype = "compute"  # compute (precision.compute) | int8
    generate.block_size = 16  # paged: tokens of a block
    generate.blocks = 0  # paged: of the pool, over all devices; 0: what all rows need at most

    config.logging = logging = ConfigDict()  # training/metrics.py
    logging.tensorboard = True
    logging.wandb = False  # offline, with the extra `wandb`

    config.memory = memory = ConfigDict()  # memory/plan.py
    memory.check = "refuse"  # refuse | warn | off: a run that is predicted not to fit
    memory.budget_gib = 0.0  # GiB per device that may be used; 0: all that the device has
    return config.lock()
