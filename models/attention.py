"""Scaled dot-product attention: one function for every mask, head layout and backend."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec as P

from models.blocked_attention import BLOCK, blocked_attention
from models.config_checks import BIASED
from models.masks import NO_ARRAYS, Mask, MaskArrays, visible
from models.row_attention import row_attention
from models.xla_attention import Core, xla_attention
from parallel.footprint import Activation
from parallel.mesh import platform
from parallel.remat import CROSS_TENSORS, TENSORS
from parallel.rules import Rules

IMPLEMENTATIONS = ("auto", "xla", "rows", "blocked", "cudnn")
MOST_ROWS = 8  # blocks of queries that are unrolled on CPU; the program grows with them
LARGEST_HEAD = 128  # of cuDNN's kernel with a bias
LONGEST_BIAS = 8192  # longer rows with a mask that cuDNN takes as a bias go to the blocked form


def attention(
    q_BTNH: Array,
    k_BSKH: Array,
    v_BSKH: Array,
    mask: Mask,
    arrays: MaskArrays = NO_ARRAYS,
    *,
    rules: Rules,
    implementation: str = "auto",
    scale: float | None = None,
    softcap: float | None = None,
    dropout_rate: float = 0.0,
    dropout_key: Array | None = None,
    block: int = BLOCK,
    bias_NTS: Array | None = None,
    sublayer: str = "attention",
) -> Array:
    """Attention with grouped K/V heads (Vaswani et al. 2017, https://arxiv.org/abs/1706.03762;
    Ainslie et al. 2023, https://arxiv.org/abs/2305.13245).

    Matrix products are in the dtype of q, the softmax in float32. Queries that see nothing give 0.

    Args:
      q_BTNH: queries, sharded as `"batch seq act_heads head_dim"`.
      k_BSKH: keys, sharded as `"batch seq act_kv_heads head_dim"`; K divides N. Query head n reads
        K/V head n // (N / K).
      v_BSKH: values, as the keys.
      mask: which keys are seen.
      arrays: the segments and prefix lengths that the mask asks for.
      rules: the layout.
      implementation: `xla` keeps the probabilities, quadratic in T. `blocked` skips blocks that
        the mask hides statically and keeps nothing quadratic; so does `rows`, its loop over blocks
        of queries unrolled: faster on CPU, but the program grows. `cudnn` is the flash attention of
        cuDNN: on GPU, bfloat16 or float16, no softcap and no dropout; causality and causal windows
        are its own, while documents, prefixes and two-sided windows reach it as a bias
        [B, 1, T, S] in the compute dtype. `auto` is xla up to one block; on CPU
        rows up to `MOST_ROWS` blocks; else cudnn where it can and such a bias is no longer than
        `LONGEST_BIAS`, else blocked (`benchmarks/attention.py` times them on CPU).
      scale: of the scores; default 1 / sqrt(H).
      softcap: scores are `softcap * tanh(score / softcap)` (Gemma Team 2024,
        https://arxiv.org/abs/2408.00118); None for none.
      dropout_rate: share of the probabilities that are dropped.
      dropout_key: needed where the rate is not 0; equal keys drop equally on every mesh.
      block: queries and keys in a block of the blocked forms.
      bias_NTS: float32, added to the scores (T5's relative positions), heads sharded as those of
        q; in form xla alone, which `auto` then is. Its gradient is summed over the batch.
      sublayer: the first part of the names for rematerialisation, "attention" or "cross".

    Returns:
      o_BTNH, sharded as q.

    Raises:
      ValueError: an implementation that does not exist, that adds no bias, or cudnn where it
        cannot run.
    """
    assert dropout_rate == 0.0 or dropout_key is not None
    scale = 1 / math.sqrt(q_BTNH.shape[-1]) if scale is None else scale
    core = Core(mask, scale, softcap, dropout_rate, sublayer)
    spec = rules.spec("batch seq act_heads head_dim")
    q_BTKGH, k_BSKH, v_BSKH = _group_heads(q_BTNH, k_BSKH, v_BSKH, rules)
    form = _choose(implementation, q_BTNH, k_BSKH, core, added=bias_NTS is not None)
    if form == "cudnn":
        return _cudnn(q_BTNH, k_BSKH, v_BSKH, arrays, core, spec)
    block = min(block, max(q_BTNH.shape[1], k_BSKH.shape[1]))
    if form == "blocked":
        o_BTKGH = blocked_attention(q_BTKGH, k_BSKH, v_BSKH, arrays, dropout_key, core, block)
    elif form == "rows":
        o_BTKGH = row_attention(q_BTKGH, k_BSKH, v_BSKH, arrays, dropout_key, core, block)
    else:
        o_BTKGH = xla_attention(q_BTKGH, k_BSKH, v_BSKH, arrays, dropout_key, core, bias_NTS)
    return jnp.reshape(o_BTKGH, q_BTNH.shape, out_sharding=spec)


def _choose(implementation: str, q_BTNH: Array, k_BSKH: Array, core: Core, added: bool) -> str:
    """The form that runs; checks one that was asked for."""
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"config.model.attention = {implementation!r}: choose one of "
            f"{', '.join(IMPLEMENTATIONS)}"
        )
    T, S = q_BTNH.shape[1], k_BSKH.shape[1]
    if added:
        if implementation not in BIASED:
            raise ValueError(
                f"config.model.attention = {implementation!r}: adds no bias to the scores; choose "
                f"{' or '.join(BIASED)}"
            )
        return "xla"
    if implementation == "cudnn" and (reason := _not_for_cudnn(q_BTNH, k_BSKH, core)):
        raise ValueError(
            f"config.model.attention = 'cudnn': {reason}; choose auto, xla, rows or blocked"
        )
    form = form_for(
        implementation,
        platform(),
        max(T, S),
        q_BTNH.shape[-1],
        q_BTNH.dtype.name,
        softcap=core.softcap is not None,
        dropped=core.dropout_rate != 0.0,
        biased=not _in_kernel(core.mask),
    )
    refused = implementation == "auto" and form == "cudnn" and _not_for_cudnn(q_BTNH, k_BSKH, core)
    return "blocked" if refused else form


def _not_for_cudnn(q_BTNH: Array, k_BSKH: Array, core: Core) -> str | None:
    """Why cuDNN cannot compute this, or None where it can."""
    runs_on = platform()
    if runs_on not in ("gpu", "cuda"):
        return f"cuDNN runs on NVIDIA GPUs and this mesh is of {runs_on}"
    if q_BTNH.dtype not in (jnp.bfloat16, jnp.float16):
        return f"cuDNN wants config.precision.compute bfloat16 or float16, not {q_BTNH.dtype}"
    if core.softcap is not None:
        return f"cuDNN has no soft-capping (softcap {core.softcap})"
    if core.dropout_rate != 0.0:
        return f"dropout of attention (rate {core.dropout_rate}) is not built for cuDNN"
    # JAX knows what this cuDNN and this GPU can do: ask it, on shapes alone.
    q, k = (jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q_BTNH, k_BSKH))
    try:
        jax.eval_shape(
            functools.partial(jax.nn.dot_product_attention, implementation="cudnn"), q, k, k
        )
    except (NotImplementedError, RuntimeError, ValueError) as error:
        return f"JAX says {error}".rstrip(".")
    return None


def _in_kernel(mask: Mask) -> bool:
    """cuDNN computes this mask itself; others are handed to it as a bias."""
    by_data = mask.prefix or mask.segments or mask.before > 0
    return not by_data and (mask.causal or mask.window is None)


def _cudnn(
    q_BTNH: Array, k_BSKH: Array, v_BSKH: Array, arrays: MaskArrays, core: Core, spec: P
) -> Array:
    mask, T, S = core.mask, q_BTNH.shape[1], k_BSKH.shape[1]
    window = (mask.window - 1, 0) if mask.window and _in_kernel(mask) else None
    seen = None if _in_kernel(mask) else visible(mask, jnp.arange(T), jnp.arange(S), arrays)

    # Outside of the island, where it is the same for all layers and not kept for each.
    lowest = (
        -(2.0**41) if q_BTNH.dtype == jnp.bfloat16 else -(2.0**15)
    )  # cuDNN subtracts two of them
    bias = None if seen is None else jnp.where(seen, 0.0, lowest).astype(q_BTNH.dtype)

    def island(q: Array, k: Array, v: Array, bias: Array | None) -> Array:
        return jax.nn.dot_product_attention(
            q,
            k,
            v,
            bias=bias,
            scale=core.scale,
            is_causal=mask.causal and not (mask.prefix or mask.before),
            local_window_size=window,
            implementation="cudnn",
        )

    # On each device by itself. Key and value heads that are fewer than the parts are whole on every
    # device (`parallel.rules`), whose query heads then all look at one of them.
    heads = jax.typeof(q_BTNH).sharding.spec[2]
    whole = heads is not None and jax.typeof(k_BSKH).sharding.spec[2] is None
    group = q_BTNH.shape[2] // k_BSKH.shape[2]

    def local(q: Array, k: Array, v: Array, bias: Array | None) -> Array:
        if whole:
            one = jax.lax.axis_index(heads) * q.shape[2] // group
            k, v = (jax.lax.dynamic_slice_in_dim(x, one, 1, axis=2) for x in (k, v))
        return island(q, k, v, bias)

    mesh = jax.sharding.get_abstract_mesh()
    inputs = q_BTNH, k_BSKH, v_BSKH, bias
    o_BTNH = jax.shard_map(
        local,
        in_specs=tuple(P() if x is None else jax.typeof(x).sharding.spec for x in inputs),
        out_specs=spec,
        axis_names=set(mesh.axis_names) - set(mesh.manual_axes),
        check_vma=False,
    )(*inputs)
    if seen is None:
        return o_BTNH
    # cuDNN spreads a row that sees nothing over all keys: make it 0, as the other forms do.
    any_BT11 = jnp.any(seen, axis=(1, 3))[:, :, None, None]
    return jnp.where(any_BT11, o_BTNH, jnp.zeros_like(o_BTNH))


def _group_heads(
    q_BTNH: Array, k_BSKH: Array, v_BSKH: Array, rules: Rules
) -> tuple[Array, Array, Array]:
    """Splits the query heads into [K, G], K sharded as the query heads were.

    Replicated K/V heads, fewer than the parts of the query heads, are first repeated to one for
    each part: every device cuts out the one head that its query heads read.
    """
    B, T, N, H = q_BTNH.shape
    batch, seq, heads, head_dim = rules.spec("batch seq act_heads head_dim")
    if rules.axes("act_kv_heads") != rules.axes("act_heads"):
        repeats = max(1, rules.parts("act_heads") // k_BSKH.shape[2])
        k_BSKH, v_BSKH = _repeat_heads(k_BSKH, repeats), _repeat_heads(v_BSKH, repeats)
    spec = P(batch, seq, heads, head_dim)
    k_BSKH, v_BSKH = jax.reshard(k_BSKH, spec), jax.reshard(v_BSKH, spec)
    K = k_BSKH.shape[2]
    assert N % K == 0, (N, K)
    spec = P(batch, seq, heads, None, head_dim)
    return jnp.reshape(q_BTNH, (B, T, K, N // K, H), out_sharding=spec), k_BSKH, v_BSKH


def _repeat_heads(x_BSKH: Array, repeats: int) -> Array:
    B, S, K, H = x_BSKH.shape
    x = jnp.broadcast_to(x_BSKH[:, :, :, None, :], (B, S, K, repeats, H))
    return jnp.reshape(x, (B, S, K * repeats, H))


def form_for(
    implementation: str,
    platform: str,
    length: int,
    head_dim: int,
    dtype: str,
    *,
    softcap: bool = False,
    dropped: bool = False,
    biased: bool = True,
    added: bool = False,
) -> str:
    """The form that attention takes on `platform`, by what is known without an array: this cuDNN
    and this GPU may still refuse.

    Args:
      length: tokens of a row.
      dtype: compute dtype.
      softcap, dropped: whether scores are capped, probabilities dropped.
      biased: whether the mask reaches cuDNN as a bias (documents).
      added: whether a bias is added to the scores.
    """
    if added:
        return "xla"
    if implementation != "auto":
        return implementation
    if length <= BLOCK:  # one block: nothing to skip, and the probabilities are few
        return "xla"
    if platform == "cpu" and length <= MOST_ROWS * BLOCK:
        return "rows"
    possible = platform in ("gpu", "cuda") and dtype in ("bfloat16", "float16")
    too_large = biased and (head_dim > LARGEST_HEAD or length > LONGEST_BIAS)
    return "cudnn" if possible and not (softcap or dropped or too_large) else "blocked"


def attention_residuals(
    form: str, *, dropped: bool, sublayer: str = "attention"
) -> list[Activation]:
    """What the core keeps beside q, k and v and its own result."""
    out = Activation(f"{sublayer}_out", "batch seq act_heads head_dim")
    if form == "xla":
        probs = Activation(f"{sublayer}_probs", (TENSORS | CROSS_TENSORS)[f"{sublayer}_probs"])
        masked = [probs._replace(name="dropout", dtype="bool"), probs]
        return [probs, *(masked if dropped else [])]
    return [out, Activation(f"{sublayer}_lse", "batch act_heads seq", "float32")]
