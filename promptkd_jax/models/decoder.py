"""One decoder-only language model for every family: token ids in, last hidden states out.

B batch, T tokens, X prompt columns, M soft-prompt tokens, D width, N heads, K key/value heads,
H head width, F feed-forward width, V vocabulary, L layers, S columns of the key/value cache.
Parameters have the sizes of `DecoderConfig.padded`, outputs those of the model.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from promptkd_jax.infra.errors import ModelError
from promptkd_jax.infra.sharding import ROWS, constrain, to_device, unshard_fsdp
from promptkd_jax.models.attention import (
    BTNH_SPEC,
    attend,
    attend_to_cache,
    dropped,
    kv_repeats,
    repeat_kv,
)
from promptkd_jax.models.config import DecoderConfig
from promptkd_jax.models.feed_forward import FeedForward, MixtureOfExperts
from promptkd_jax.models.lora import without_changes
from promptkd_jax.models.norms import RMSNorm, make_norm
from promptkd_jax.models.projection import project
from promptkd_jax.models.quantization import SCALE
from promptkd_jax.models.rotary import rotate

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int, Key

NO_WINDOW = 2**30  # positions, more than any row has

# Values that a layer's forward pass keeps for its backward pass, from the policy that keeps all and
# computes nothing twice to the one that keeps the layer's input alone.
REMAT = {
    "none": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


# The cache is [L, B, K, S, H], and one token a row is written: x[b], [K, H], to c[l, b, :, s_b].
# This is a scatter of [B, K, H] at the indices (l, s_b), [B, 2]: K and H are the window that is
# written whole, L and S are indexed (0 and 3), and B is a batching dimension of both, b's into row
# b. That keeps rows where they are on a mesh; `cache.at[layer, rows, :, columns]`, with rows as one
# more index, would gather what is written from all devices.
BY_ROW = jax.lax.ScatterDimensionNumbers(
    update_window_dims=(1, 2),
    inserted_window_dims=(0, 3),
    scatter_dims_to_operand_dims=(0, 3),
    operand_batching_dims=(1,),
    scatter_indices_batching_dims=(0,),
)


class Cache(NamedTuple):
    """Keys and values of all columns seen so far, each `[L, B, K, S, H]`: the columns that a head
    reads for the next token lie together. K includes the copies of `attention.kv_repeats`."""

    key: jax.Array
    value: jax.Array


def empty_cache(config: DecoderConfig, rows: int, columns: int) -> Cache:
    """A cache of zeros for `rows` rows of at most `columns` tokens, the soft prompt included."""
    padded = config.padded
    heads = padded.num_kv_heads * kv_repeats(padded.num_heads, padded.num_kv_heads)
    shape = (config.num_layers, rows, heads, columns, config.head_dim)
    return place_cache(Cache(jnp.zeros(shape, config.dtype), jnp.zeros(shape, config.dtype)))


def place_cache(cache: Cache) -> Cache:
    """The cache with its rows and heads on the devices that have those of the queries."""
    return jax.tree.map(lambda x: constrain(x, None, ROWS, "tensor", None, None), cache)


def head(params: Mapping[str, Any]) -> Float[Array, "V D"]:
    """The output head `[V, D]`, padding included; with tied embeddings, the embedding itself."""
    return params["lm_head"] if "lm_head" in params else params["embed"]["embedding"]


def embed(params: Mapping[str, Any], tokens: Int[Array, "*B"]) -> Float[Array, "*B D"]:
    """Input embeddings `[..., D]` of token ids `[...]`, in the dtype of the parameters."""
    return params["embed"]["embedding"][tokens]


class Decoder(nn.Module):
    """The decoder of `config`; `Decoder(config).apply({"params": params}, tokens)`.

    With `mutable=["intermediates"]`, `apply` also returns what it computed on the way, as
    1-tuples of arrays stacked over the layers, the prefix's columns included: under "layers"
    "hidden" `[L, B, M + T, D]`, each layer's output; under its "experts"
    "router_scores" `[L, B, M + T, E]`; and under its "attention" "queries"
    `[L, B, M + T, N, H]`, "keys" and "values" `[L, B, M + T, K, H]`, before rotary positions.
    """

    config: DecoderConfig

    @nn.compact
    def __call__(
        self,
        tokens: jax.Array,
        *,
        prefix: jax.Array | None = None,
        cache: Cache | None = None,
        column: jax.Array | None = None,
        dropout_keys: jax.Array | None = None,
    ) -> jax.Array | tuple[jax.Array, Cache]:
        """Last hidden states of `tokens`, after the final norm.

        Rows start at column 0, so causal attention needs no padding mask: what stands behind a
        row's end is computed and means nothing.

        Args:
          tokens: `[B, T]` token ids.
          prefix: `[M, D]` embeddings put before every row (the soft prompt). They take the
            positions 0..M-1 and move the tokens to M..M+T-1.
          cache: where to write keys and values, from column 0 on.
          column: `[B]`: decode one token a row (T = 1) that stands in this column, M included;
            it sees the columns of the cache up to its own.
          dropout_keys: `[B]` typed keys: the dropout of the config; None: none.

        Returns:
          `[B, T, D]`, without the prefix; with a cache also the new cache.

        Raises:
          ModelError: more columns than a learned position table has rows.
        """
        config = self.config
        x = _embedded(config, tokens, prefix)  # [B, M + T, D]
        # Columns, the prefix included: [1, M + T] for whole rows, [B, 1] for one token a row.
        positions = jnp.arange(x.shape[1])[None] if column is None else column[:, None]
        if config.learned_positions:
            # Beyond the table a position would be NaN, and NaN behind a row's end spoils the row.
            columns = x.shape[1] if cache is None else cache.key.shape[3]
            if columns > config.max_positions:
                raise ModelError(
                    f"{columns} columns (soft prompt and new tokens included) in a {config.family} "
                    f"model of {config.max_positions} positions; shorten the rows or the soft "
                    "prompt"
                )
            table = config.max_positions + config.position_offset
            at = Embedding(config, table, config.width, name="positions")
            x = x + at(positions + config.position_offset)
        x = dropped(_scaled(x, config.input_scale), config.dropout.embedding, dropout_keys, 0)
        # Constrained at every layer's edge: left to itself, the partitioner may gather rows.
        x = constrain(x, ROWS, None, None)
        decode = column is not None
        # One scan over L stacked layers: compiled once, whatever the depth. The whole cache goes
        # along as a carry, of which each layer writes its own part in place; as one of the scan's
        # stacked outputs it would be written anew for every token.
        kinds = jnp.asarray(config.pattern, jnp.int32) if config.pattern else None
        layers = jnp.arange(config.num_layers), kinds
        (x, cache), _ = _layers(config)((x, cache), layers, positions, decode, dropout_keys)
        if config.norm_placement != "sum":
            x = make_norm(config, "final_norm")(x)
        if config.projected_width:
            x = project(config, config.projected_width, False, "project_out")(x)
        x = _scaled(x, config.logit_scale)
        # Declared here, multiplied by the losses: no [B, T, V] array leaves the model.
        if not config.tied:
            shape = (config.padded.vocab_size, config.embedding_width)
            self.param("lm_head", nn.initializers.normal(0.02), shape, config.param_dtype)
        # Hidden states are aligned with the tokens, with a prefix and without.
        if prefix is not None:
            x = x[:, prefix.shape[0] :]
        return x if cache is None else (x, cache)

    # What losses, steps and the sampler ask of a model, see `language_model.LanguageModel`.

    @nn.nowrap
    def hidden_states(
        self,
        params: Any,
        tokens: Int[Array, "B T"],
        prefix: Float[Array, "M D"] | None = None,
        dropout_keys: Key[Array, " B"] | None = None,
    ) -> Float[Array, "B T D"]:
        """Last hidden states `[B, T, D]` of tokens `[B, T]`, behind a prefix `[M, D]` or none, and
        with dropout where there are keys for it."""
        return self.apply({"params": params}, tokens, prefix=prefix, dropout_keys=dropout_keys)

    @nn.nowrap
    def output_head(self, params: Any) -> Float[Array, "V D"]:
        """The head `[V, D]`, without padding."""
        return head(params)[: self.config.vocab_size]

    @property
    def logit_soft_cap(self) -> float | None:
        """The soft cap of the logits that the head gives, see `LazyLogits`."""
        return self.config.logit_soft_cap

    @nn.nowrap
    def input_embeddings(self, params: Any, tokens: Int[Array, "*B"]) -> Float[Array, "*B D"]:
        """Embeddings `[..., D]` of token ids `[...]`, as the decoder puts them behind a prefix."""
        return _scaled(embed(params, tokens), self.config.embedding_scale)

    @nn.nowrap
    def for_sampling(self, params: Any) -> Any:
        """The parameters as every step of a rollout reads them: in the dtype of computation (but
        for routers, which choose as in training, and quantised kernels), not cut along `fsdp`. Else
        each written token would gather and round all of them."""

        if self.config.offload:  # brought to the device layer by layer, for every token
            return params

        def rounded(path, x):
            stays = {"router", SCALE}.intersection(getattr(key, "key", None) for key in path)
            return x if stays or x.dtype == jnp.int8 else x.astype(self.config.dtype)

        return unshard_fsdp(jax.tree.map_with_path(rounded, params))

    @nn.nowrap
    def prefill(
        self, params: Any, tokens: jax.Array, prefix: jax.Array | None, columns: int
    ) -> tuple[jax.Array, Cache]:
        """Runs prompts `[B, X]`: their hidden states `[B, X, D]`, and a cache of S = M + `columns`
        columns, where `columns` counts the prompt and all tokens that are still to be written."""
        prefix_length = 0 if prefix is None else prefix.shape[0]
        cache = empty_cache(self.config, tokens.shape[0], prefix_length + columns)
        return self.apply({"params": params}, tokens, prefix=prefix, cache=cache)

    @nn.nowrap
    def decode(
        self,
        params: Any,
        tokens: jax.Array,
        prefix: jax.Array | None,
        column: jax.Array,
        cache: Cache,
    ) -> tuple[jax.Array, Cache]:
        """Runs one token a row, `[B]`, in `column` `[B]`, M not counted: their hidden states
        `[B, D]`, and the cache with their keys and values."""
        prefix_length = 0 if prefix is None else prefix.shape[0]
        hidden, cache = self.apply(
            {"params": params}, tokens[:, None], cache=cache, column=prefix_length + column
        )
        return hidden[:, 0], cache


class Embedding(nn.Module):
    """A table of `rows` embeddings, looked up by `[...]` ids: `[..., width]`."""

    config: DecoderConfig
    rows: int
    width: int

    @nn.compact
    def __call__(self, ids):
        shape = (self.rows, self.width)
        initial = nn.initializers.normal(0.02)
        table = self.param("embedding", initial, shape, self.config.param_dtype)
        # Cut along the width as well, a row would have to be put together after it is looked up.
        table = constrain(table, "tensor", None)
        return jnp.take(table, ids, axis=0).astype(self.config.dtype)


def _embedded(config: DecoderConfig, tokens: jax.Array, prefix: jax.Array | None) -> jax.Array:
    """The prefix `[M, D]`, in front of every row, and the embeddings of the tokens."""
    embed = Embedding(config, config.padded.vocab_size, config.embedding_width, name="embed")
    x = _scaled(embed(tokens), config.embedding_scale)
    if prefix is not None:
        rows = jnp.broadcast_to(prefix.astype(x.dtype), (x.shape[0], *prefix.shape))
        x = jnp.concatenate([rows, x], axis=1)
    return project(config, config.width, False, "project_in")(x) if config.projected_width else x


class Layer(nn.Module):
    """Attention and feed-forward, each between its norms, added to the residual stream."""

    config: DecoderConfig

    # carry      hidden states [B, T, D], and the whole cache or None: T is M + T of the decoder for
    #            whole rows, 1 in decoding
    # layer      [] twice: the layer's number, its place along L in the cache; the number of its
    #            kind, None where there is one kind
    # positions  [1, T] for whole rows, [B, 1] in decoding: the columns of the hidden states
    # decode     static: whether one token a row reads the cache
    # keys       [B], or None: of dropout
    @nn.compact
    def __call__(self, carry, layer, positions, decode, keys):
        (x, cache), config = carry, self.config
        placement = config.norm_placement

        def before(x, name: str):
            return make_norm(config, name)(x) if placement in ("before", "both") else x

        if keys is not None:  # each layer has its own, beside that of the embeddings, 0
            keys = jax.vmap(jax.random.fold_in, (0, None))(keys, 1 + layer[0])

        def added(x, y, name: str, place: int):
            y = dropped(y, config.dropout.residual, keys, place)
            if placement in ("after", "both"):
                y = make_norm(config, f"post_{name}")(y)
            x = constrain(x + _scaled(y, config.residual_scale), ROWS, None, None)
            return make_norm(config, name)(x) if placement == "sum" else x

        attended, cache = Attention(config, name="attention")(
            before(x, "attention_norm"), cache, layer, positions, decode, keys
        )
        x = added(x, attended, "attention_norm", 0)
        if config.experts:
            network = MixtureOfExperts(config, name="experts")
        else:
            network = FeedForward(config, name="mlp")
        x = added(x, network(before(x, "mlp_norm"), keys), "mlp_norm", 1)
        # Read by `teacher.lazy_logits_and_states`, and nothing where the collection is not mutable.
        self.sow("intermediates", "hidden", x)
        return (x, cache), None


class Attention(nn.Module):
    """Causal self-attention with grouped heads, rotary or no positions, optional window."""

    config: DecoderConfig

    # The arguments of `Layer`, its carry taken apart.
    @nn.compact
    def __call__(self, x, cache, layer, positions, decode, keys):
        config, padded = self.config, self.config.padded
        index, kind = layer

        def heads(number: int, name: str):
            return project(config, (number, config.head_dim), config.qkv_bias, name)(x, keys)

        # [B, T, D] -> [B, T, N, H] and [B, T, K, H]
        query = heads(padded.num_heads, "query")
        key = heads(padded.num_kv_heads, "key")
        value = heads(padded.num_kv_heads, "value")
        if config.qk_norm == "head":  # over H
            query = make_norm(config, "query_norm")(query)
            key = make_norm(config, "key_norm")(key)
        elif config.qk_norm:  # over N and H, or K and H
            query = RMSNorm(config, config.num_heads, name="query_norm")(query)
            key = RMSNorm(config, config.num_kv_heads, name="key_norm")(key)
        query, key, value = (constrain(x, *BTNH_SPEC) for x in (query, key, value))
        # Without rotary positions, so that their products say what tokens mean to one another and
        # not how far apart they stand, whatever the positions of the other model are.
        self.sow("intermediates", "queries", query[:, :, : config.num_heads])
        self.sow("intermediates", "keys", key[:, :, : config.num_kv_heads])
        self.sow("intermediates", "values", value[:, :, : config.num_kv_heads])
        columns = x.shape[1] if cache is None else cache.key.shape[3]
        query, key = (_rotate(config, a, positions, columns, kind) for a in (query, key))
        if config.attention_scale is not None:  # what attends multiplies by H ** -0.5
            query = _scaled(query, config.attention_scale * config.head_dim**0.5)
        sinks = None
        if config.attention_sinks:
            initial = nn.initializers.normal(0.02)
            sinks = self.param("sinks", initial, (padded.num_heads,), config.param_dtype)
        # Where a mesh cuts heads more finely than there are K of them, each device has its own.
        key, value = (repeat_kv(a, padded.num_heads) for a in (key, value))
        if cache is not None:
            cache = _write(cache, index, key, value, positions if decode else None)
        if decode:
            # [L, B, K, S, H] -> [B, K, S, H], the row's new column included.
            key, value = (jax.lax.dynamic_index_in_dim(c, index, keepdims=False) for c in cache)
            out = _attend_to_cache(config, query, key, value, sinks, positions, kind)
        else:
            out = _attend(config, query, key, value, sinks, kind, keys)
        return project(config, config.width, config.out_bias, "out", 2)(out, keys), cache


def _of_kinds(config: DecoderConfig, name: str, kind) -> tuple[list, jax.Array | None]:
    """The different values that the kinds of layers have of an attribute, and the place among them
    of that of the layer's kind; None where there is one value."""
    every = [getattr(one, name) for one in config.kinds]
    values = list(dict.fromkeys(every))
    place = None if len(values) == 1 else jnp.asarray([values.index(x) for x in every])[kind]
    return values, place


def _rotate(config: DecoderConfig, x: jax.Array, positions, columns: int, kind) -> jax.Array:
    """Queries or keys `[B, T, heads, H]` with the rotary positions of the layer's kind, if any."""
    ropes, place = _of_kinds(config, "rope", kind)
    turned = [
        x if rope is None else rotate(rope, x, positions, columns, config.max_positions)
        for rope in ropes
    ]
    return turned[0] if place is None else jax.lax.select_n(place, *turned)


def _attend(config: DecoderConfig, query, key, value, sinks, kind, keys) -> jax.Array:
    """`attend` with the window of the layer's kind, which its kernels have to know."""
    windows, place = _of_kinds(config, "sliding_window", kind)
    how = {"soft_cap": config.attention_soft_cap, "sinks": sinks}
    how |= {"dropout": config.dropout.attention, "dropout_keys": keys}
    ways = [functools.partial(attend, sliding_window=window, **how) for window in windows]
    if place is None:
        return ways[0](query, key, value)
    return jax.lax.switch(place, ways, query, key, value)


def _attend_to_cache(config: DecoderConfig, query, key, value, sinks, positions, kind) -> jax.Array:
    """`attend_to_cache` with the window of the layer's kind, which is only compared with."""
    windows, place = _of_kinds(config, "sliding_window", kind)
    window = windows[0]
    if place is not None:
        window = jnp.asarray([NO_WINDOW if x is None else x for x in windows])[place]
    how = {"soft_cap": config.attention_soft_cap, "sinks": sinks}
    return attend_to_cache(query, key, value, positions, sliding_window=window, **how)


def _scaled(x: jax.Array, scale: float) -> jax.Array:
    """The array by a number that is rounded to its dtype first, as `transformers` has it."""
    return x if scale == 1.0 else x * jnp.asarray(scale, x.dtype)


def _write(cache: Cache, index, key, value, positions) -> Cache:
    """Puts `[B, T, K, H]` into layer `index`: one column a row, or all from column 0."""
    if positions is None:

        def write(c, x):
            return jax.lax.dynamic_update_slice(c, x.swapaxes(1, 2)[None], (index, 0, 0, 0, 0))
    else:
        # [B, 2]: (layer, column) of each row's write; a column beyond the cache is dropped.
        places = jnp.stack([jnp.full_like(positions[:, 0], index), positions[:, 0]], axis=1)

        def write(c, x):
            return jax.lax.scatter(c, places, x[:, 0], BY_ROW, unique_indices=True, mode="drop")

    return place_cache(jax.tree.map(write, cache, Cache(key, value)))


def _layers(config: DecoderConfig) -> nn.Module:
    """All layers as one scan over their stacked parameters."""
    layer = Layer
    if REMAT[config.remat] is not None:
        # static: `decode` (self counts as argument 0); CSE cannot happen across scan iterations.
        policy = without_changes(REMAT[config.remat], config.lora)
        layer = nn.remat(Layer, policy=policy, prevent_cse=False, static_argnums=(4,))
    if config.offload:  # inside of the scan, so that the device has one layer at a time
        layer = nn.map_variables(layer, "params", trans_in_fn=to_device)
    scanned = nn.scan(
        layer,
        variable_axes={"params": 0, "intermediates": 0},
        split_rngs={"params": True},
        in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast),
        length=config.num_layers,
    )
    return scanned(config, name="layers")
