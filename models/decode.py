"""A decoder that goes on from where it was: prompts in, then one token after another.

`begin` reads prompts whole and fills a cache; `go_on` adds tokens to it. Layers run one after the
other, each with its own arrays of weights and of cache: a loop over stacked ones would copy both at
every token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from operator import itemgetter
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.sharding import NamedSharding

from models.block import Block
from models.cached_attention import LayerCache, Places, replaced_rows
from models.config import ModelConfig
from models.decoder import Decoder
from models.encoder_decoder import EncoderDecoder
from models.kv_cache import CacheShape, cache_kept, empty_cache
from models.memory_decoder import MemoryDecoder
from models.rows import Memory, Rows, rows_of
from models.stack import STACKED
from models.vision_language import CrossVisionLanguage, VisionLanguage
from parallel.mesh import platform
from parallel.remat import RematConfig
from parallel.rules import Rules
from parallel.several import of_rows
from parallel.stored import cast, is_stored, layer_axes, layers_of

Tree = Any
STACK = "stack"


class Cache(NamedTuple):
    """What is kept of all rows.

    Attributes:
      layers: the arrays of each.
      source_segments_BS: int32, of an encoder-decoder's source; 0 = padding.
    """

    layers: list[dict[str, Array]]
    source_segments_BS: Array | None = None


class DecoderWeights(NamedTuple):
    """Parameters as decoding takes them: those outside the stack, and those of each block."""

    outside: Tree
    blocks: list[Tree]


@dataclass(frozen=True)
class Decoding:
    """A decoder as pure functions on its weights and a cache.

    Attributes:
      config: of the model; no expert has a capacity, so that no token is dropped.
      rules: the layout, without a divided residual stream: one token does not divide.
      shape: of the cache.
      compute: compute dtype.
      prefix: a prompt's tokens see each other (`config.objective.name = "prefix_lm"`).
      graph, block: the modules without their parameters.
    """

    config: ModelConfig
    rules: Rules
    shape: CacheShape
    compute: str
    prefix: bool
    graph: Any
    block: Any

    def begin(
        self,
        weights: DecoderWeights,
        cache: Cache,
        batch: Mapping[str, Array],
        count_B: Array,
        row_B: Array | None = None,
        table_BN: Array | None = None,
        adapter_B: Array | None = None,
    ) -> tuple[Cache, Array]:
        """Reads prompts.

        Args:
          batch: `tokens` [B, T], padded on the right, and what else the model reads: `patches`, or
            the arrays of a source; `prefix`, where tokens follow a prompt already.
          count_B: tokens of each prompt; of a row with 0 nothing is kept.
          row_B, table_BN: as in `models.cached_attention.Places`.
          adapter_B: the adapter of each row (`parallel.several`), where weights have several.

        Returns:
          The cache, and the logits of the token after each prompt, float32 [B, V padded].
        """
        model = nnx.merge(self.graph, weights.outside)
        index_BT = self._index(batch["tokens"])
        segments_BT = (index_BT < count_B[:, None]).astype(jnp.int32)
        batch = {**batch, "positions": index_BT, "segments": segments_BT}
        if self.prefix:
            batch.setdefault("prefix", count_B)
        memory, image = None, self.config.image_tokens
        if isinstance(model, MemoryDecoder):
            memory = Memory(model.features(batch), model.segments(batch))
            x_BTD = Decoder.embed(model, batch)
        else:
            x_BTD = model.embed(batch)
        rows = rows_of(model.in_stream(batch) if isinstance(model, VisionLanguage) else batch)
        if model.relative is not None:
            rows = rows._replace(bias=model.relative.bias(x_BTD.shape[1]))
        # An image stands before the text and is in the cache, too.
        count_B = count_B + image * (count_B > 0).astype(jnp.int32)
        places = Places(jnp.zeros_like(count_B), count_B, row_B, table_BN)
        if cache.source_segments_BS is not None:
            assert memory is not None
            segments = replaced_rows(cache.source_segments_BS, memory.segments_BS, places)
            cache = cache._replace(source_segments_BS=segments)
        rows = rows._replace(memory=memory)
        weights = weights._replace(blocks=of_rows(weights.blocks, adapter_B))
        return self._run(model, weights, cache, x_BTD, rows, places, fresh=True)

    def go_on(
        self,
        weights: DecoderWeights,
        cache: Cache,
        tokens_BT: Array,
        start_B: Array,
        count_B: Array,
        row_B: Array | None = None,
        table_BN: Array | None = None,
        adapter_B: Array | None = None,
    ) -> tuple[Cache, Array]:
        """Adds tokens to rows, images before them counted in `start_B`; else like `begin`."""
        model = nnx.merge(self.graph, weights.outside)
        index_BT = self._index(tokens_BT)
        # Padding goes no further than the row.
        positions_BT = jnp.minimum(start_B[:, None] + index_BT, self.shape.slots - 1)
        segments_BT = (index_BT < count_B[:, None]).astype(jnp.int32)
        batch = {"tokens": tokens_BT, "positions": positions_BT, "segments": segments_BT}
        x_BTD = Decoder.embed(model, batch)
        rows = rows_of(batch)
        if model.relative is not None:
            rows = rows._replace(bias=model.relative.bias_of(positions_BT, self._slots))
        if isinstance(model, MemoryDecoder):
            rows = rows._replace(memory=Memory(None, cache.source_segments_BS))
        places = Places(start_B, count_B, row_B, table_BN)
        weights = weights._replace(blocks=of_rows(weights.blocks, adapter_B))
        return self._run(model, weights, cache, x_BTD, rows, places, fresh=False)

    def _run(
        self,
        model: Decoder,
        weights: DecoderWeights,
        cache: Cache,
        x_BTD: Array,
        rows: Rows,
        places: Places,
        *,
        fresh: bool,
    ) -> tuple[Cache, Array]:
        config = self.config
        layers: list[dict[str, Array]] = []
        for number, arrays in enumerate(cache.layers):
            local = config.pattern[number % len(config.pattern)] == "local"
            of_block = weights.blocks[block_of(config, number)]
            x_BTD, of_block, layers[-1:] = _together(x_BTD, of_block, layers[-1:])
            block: Block = nnx.merge(self.block, of_block)
            kept = LayerCache(
                arrays, config, self.rules, self.shape, places, fresh=fresh, local=local
            )
            x_BTD, _ = block(x_BTD, rows._replace(cache=kept), local=local)
            layers.append(kept.arrays)
        x_BTD, layers[-1:] = _together(x_BTD, layers[-1:])
        last_BT = self._index(x_BTD) == (places.count_B - 1)[:, None]
        x_BTD = jnp.sum(jnp.where(last_BT[:, :, None], x_BTD, 0), 1, keepdims=True)
        hidden_BTD = Decoder.finish(model, x_BTD, {})
        return cache._replace(layers=layers), self._logits(model, hidden_BTD)[:, 0]

    def _logits(self, model: Decoder, hidden_BTD: Array) -> Array:
        """float32 [B, T, V padded], whole on every device of the row; -inf where no token is."""
        config, rules, head = self.config, self.rules, model.head()
        features, weight = _together(model.to_head(hidden_BTD), head.weight)
        table = jax.reshard(weight, rules.gathered(head.axes, head.weight.shape))
        product = partial(jnp.einsum, preferred_element_type=jnp.float32)
        spec = rules.spec("batch seq act_vocab")
        if not head.axes.startswith("vocab"):
            logits = product("btd,dv->btv", features, table, out_sharding=spec)
        elif platform() == "cpu":  # faster with the table first
            turned = jax.P(spec[2], *spec[:2])
            logits = product("vd,btd->vbt", table, features, out_sharding=turned)
            logits = jnp.moveaxis(logits, 0, 2)
        else:
            logits = product("btd,vd->btv", features, table, out_sharding=spec)
        logits = jax.reshard(logits, rules.spec("batch seq act_embed"))
        if config.logit_softcap:
            logits = config.logit_softcap * jnp.tanh(logits / config.logit_softcap)
        real = jnp.arange(logits.shape[-1]) < config.vocab_size
        return jnp.where(real[None, None], logits, -jnp.inf)

    def _index(self, like_BT: Array) -> Array:
        """The index of each token in its row, int32 [B, T]."""
        return jax.lax.broadcasted_iota(
            jnp.int32, like_BT.shape[:2], 1, out_sharding=self.rules.spec("batch seq")
        )

    @property
    def _slots(self) -> int:
        """Tokens of a row that queries are compared with."""
        shape = self.shape
        return shape.row_blocks * shape.block if shape.block else shape.slots

    def empty(self) -> Cache:
        """A cache of nothing, laid out; call it under `jax.jit`."""
        kept = cache_kept(self.config, self.shape, self.rules, self.compute)
        segments = None
        if self.config.family == "encoder_decoder":
            sizes = self.shape.rows, self.shape.source
            segments = jnp.zeros(sizes, jnp.int32, out_sharding=self.rules.spec("batch seq"))
        return Cache(empty_cache(kept, self.rules), segments)


def _together(*values: Any) -> Any:
    """The same values, of which none is there before all are.

    Layers one after the other are one long program, and nothing else would keep a compiler from
    gathering the weights of all of them first, where fsdp divides them, or from writing all caches
    last: with every layer's weights, keys and values beside each other.
    """
    return jax.lax.optimization_barrier(values)


def make_decoding(
    config: ModelConfig, rules: Rules, shape: CacheShape, compute: str, *, prefix: bool = False
) -> Decoding:
    """The decoding of a model; call it inside `jax.set_mesh`.

    Args:
      rules: without sequence parallelism, and of a mesh without stages.
    """
    assert not rules.staged, rules
    assert rules.parts("residual_seq") == 1, rules
    config = replace(config, experts=replace(config.experts, capacity=0.0))
    kind = kind_of(config)
    model = nnx.eval_shape(lambda: kind(config, rules, RematConfig(), nnx.Rngs(params=0)))
    block = nnx.graphdef(model.stack.blocks)
    model.stack.blocks = None
    return Decoding(config, rules, shape, compute, prefix, nnx.graphdef(model), block)


def kind_of(config: ModelConfig) -> type[Decoder]:
    """The class of a family's decoder.

    Raises:
      ValueError: a family that gives no text.
    """
    if config.family == "vision_language":
        return VisionLanguage if config.cross == "none" else CrossVisionLanguage
    kinds = {"decoder": Decoder, "encoder_decoder": EncoderDecoder}
    if config.family not in kinds:
        raise ValueError(
            f"config.model.family = {config.family!r}: gives no text; choose "
            f"{', '.join(kinds)} or vision_language"
        )
    return kinds[config.family]


def block_of(config: ModelConfig, layer: int) -> int:
    """The number of a layer's block, as `Stack.block_of` says it of an array."""
    if not config.distinct:
        return layer
    if config.sharing == "repeat":
        return layer // (config.layers // config.distinct)
    return layer % config.distinct


def weights_of(
    params: Tree, axes: Tree, rules: Rules, compute: str, *, keep: bool = False
) -> DecoderWeights:
    """Parameters at rest cast, laid out for the model and cut in blocks, one array after the other:
    those of `params` are deleted as they go, unless they are to be kept.
    """

    def placed(node: Any, axes: Any) -> Any:
        return jax.tree.map(lambda a, n: jax.reshard(a, rules.in_model(n, a.shape)), node, axes)

    def consumed(node: Any, axes: Any, *, cut: bool) -> Any:
        made = jax.jit(lambda node: _pieces(cast(node, compute), axes, placed, cut=cut))(node)
        # What needs no change is given on as it is.
        leaves = jax.tree.leaves(made)
        if not keep:
            jax.block_until_ready(made)
            for array in jax.tree.leaves(node):
                if all(leaf is not array for leaf in leaves):
                    array.delete()
        return made

    return _in_pieces(params, axes, consumed)


def abstract_weights(
    params: Tree, axes: Tree, rules: Rules, compute: str, mesh: Any
) -> DecoderWeights:
    """What `weights_of` makes, as `ShapeDtypeStruct`s with shardings."""

    def placed(node: Any, axes: Any) -> Any:
        def shape_of(a: Any, names: str) -> jax.ShapeDtypeStruct:
            sharding = NamedSharding(mesh, rules.in_model(names, a.shape))
            return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding)

        return jax.tree.map(shape_of, node, axes)

    def described(node: Any, axes: Any, *, cut: bool) -> Any:
        bare = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), node)
        same = lambda node, axes: node
        made = jax.eval_shape(lambda n: _pieces(cast(n, compute), axes, same, cut=cut), bare)
        return (
            _pieces(made, axes, placed, cut=False)
            if not cut
            else [
                placed(node, own)
                for node, own in zip(made, layer_axes(axes, len(made)), strict=True)
            ]
        )

    return _in_pieces(params, axes, described)


def _pieces(node: Any, axes: Any, placed: Callable[[Any, Any], Any], *, cut: bool) -> Any:
    """A weight laid out, whole or cut in layers."""
    if not cut:
        return placed(node, axes)
    layers = layers_of(node)
    own = layer_axes(axes, len(layers))
    return [placed(layer, names) for layer, names in zip(layers, own, strict=True)]


def _in_pieces(params: Tree, axes: Tree, piece: Callable[..., Any]) -> DecoderWeights:
    """`piece` of every weight, one after the other: of those in the stack by layers."""
    outside, stacked = _parted(params)
    outer_axes, block_axes = _parted(axes)

    def each(tree: Tree, axes: Tree, *, cut: bool) -> Tree:
        return jax.tree.map(partial(piece, cut=cut), tree, axes, is_leaf=is_stored)

    lists = each(stacked, block_axes, cut=True)
    return DecoderWeights(each(outside, outer_axes, cut=False), _transposed(lists))


def _transposed(lists: Tree) -> list[Tree]:
    """A list of trees of a tree of lists."""
    is_list = lambda x: isinstance(x, list)
    length = len(jax.tree.leaves(lists, is_leaf=is_list)[0])
    return [jax.tree.map(itemgetter(i), lists, is_leaf=is_list) for i in range(length)]


def _parted(tree: Tree) -> tuple[Tree, Tree]:
    """(what is outside the decoder's stack, its stacked arrays)."""
    outside = {name: value for name, value in tree.items() if name != STACK}
    return outside, tree[STACK][STACKED]
