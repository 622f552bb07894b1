"""One decoder-only language model for every family: token ids in, last hidden states out.

B batch, T tokens, X prompt columns, M soft-prompt tokens, D width, N heads, K key/value heads,
H head width, F feed-forward width, V vocabulary, L layers, S columns of the key/value cache.
Parameters have the sizes of `DecoderConfig.padded`, outputs those of the model.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from promptkd_jax.infra.sharding import ROWS, constrain, to_device
from promptkd_jax.models.config import DecoderConfig
from promptkd_jax.models.layers.attention import (
    BTNH_SPEC,
    attend,
    attend_to_cache,
    dropped,
    repeat_kv,
)
from promptkd_jax.models.layers.cache import Cache, LayerCache, make_cache
from promptkd_jax.models.layers.embedding import embedded, learned_positions, scaled
from promptkd_jax.models.layers.feed_forward import FeedForward, MixtureOfExperts
from promptkd_jax.models.layers.gated_prefix import (
    GatedPrefix,
    attend_gated,
    attend_gated_to_cache,
    gate_of,
    prefix_columns,
    prefix_vectors,
)
from promptkd_jax.models.layers.layer_params import (
    UNSTACKED,
    has_experts_of_all,
    layer_params,
    rollout_params,
)
from promptkd_jax.models.layers.lora import without_changes
from promptkd_jax.models.layers.norms import RMSNorm, make_norm
from promptkd_jax.models.layers.projection import project
from promptkd_jax.models.layers.rotary import rotate
from promptkd_jax.models.layers.segments import packed_columns

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int, Key

# Values that a layer's forward pass keeps for its backward pass, from the policy that keeps all and
# computes nothing twice to the one that keeps the layer's input alone.
REMAT = {
    "none": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


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
        prefix: Float[Array, "M D"] | GatedPrefix | None = None,
        dropout_keys: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        columns: int = 0,
        cache: Cache | None = None,
        position: jax.Array | None = None,
    ) -> jax.Array | tuple[jax.Array, Any]:
        """Last hidden states of `tokens`, after the final norm.

        Rows start at column 0, so causal attention needs no padding mask: what stands behind a
        row's end is computed and means nothing.

        Args:
          tokens: `[B, T]` token ids.
          prefix: `[M, D]` embeddings put before every row (the soft prompt). They take the
            positions 0..M-1 and move the tokens to M..M+T-1; a `GatedPrefix` leaves them at 0..T-1.
            With a cache, of a prefix that is in it, the gates.
          dropout_keys: `[B]` typed keys: the dropout of the config; None: none.
          segment_ids: `[B, T]`, of packed rows: of the segment of each token, from 1, 0 where there
            is none. A segment is computed as a row of its own, behind the prefix, for which M
            columns are empty in front of every segment but the first. None: rows are not packed.
          columns: S, where keys and values for a cache are wanted; 0: they are not.
          cache: decode one token a row (T = 1), which sees the cache and is written into it.
          position: `[B]`, of that token, M included.

        Returns:
          `[B, T, D]`, without the prefix. With `columns` also the keys and values of all layers,
          `[L, B, M + T, K, H]` each; with a cache also the new one.

        Raises:
          ModelError: more columns than a learned position table has rows; see also `gate_of`.
        """
        config, packed, segments = self.config, None, None
        gates = gate_of(prefix, config, segment_ids, dropout_keys)
        if segment_ids is not None:  # [B, M + T] each
            packed, segments = packed_columns(segment_ids, prefix_columns(prefix))
        x = embedded(config, tokens, None if cache else prefix_vectors(prefix), packed)
        # x: [B, M + T, D]. Positions: [1, M + T] for whole rows, [B, 1] for one token a row.
        positions = jnp.arange(x.shape[1])[None] if cache is None else position[:, None]
        unmoved = gates.columns if gates else 0
        positions = (positions if packed is None else packed) - unmoved
        if config.learned_positions:
            longest = cache.columns if cache else columns or x.shape[1]
            x = x + learned_positions(config, positions, longest, unmoved)
        x = dropped(scaled(x, config.input_scale), config.dropout.embedding, dropout_keys, 0)
        # Constrained at every layer's edge: left to itself, the partitioner may gather rows.
        x = constrain(x, ROWS, None, None)
        if cache is None:
            # One scan over L stacked layers: compiled once, whatever the depth.
            kinds = jnp.asarray(config.pattern, jnp.int32) if config.pattern else None
            layers = jnp.arange(config.num_layers), kinds, gates
            x, kept = _layers(config)(x, layers, positions, dropout_keys, columns, segments)
        else:
            x, kept = _decode_layers(config, self.variables["params"], x, position, cache, gates)
        if config.norm_placement != "sum":
            x = make_norm(config, "final_norm")(x)
        if config.projected_width:
            x = project(config, config.projected_width, False, "project_out")(x)
        x = scaled(x, config.logit_scale)
        # Declared here, multiplied by the losses: no [B, T, V] array leaves the model.
        if not config.tied:
            shape = (config.padded.vocab_size, config.embedding_width)
            self.param("lm_head", nn.initializers.normal(0.02), shape, config.param_dtype)
        # Hidden states are aligned with the tokens, with a prefix and without.
        x = x if cache else x[:, prefix_columns(prefix) :]
        return x if kept is None else (x, kept)

    # What losses, steps and the sampler ask of a model, see `language_model.LanguageModel`.

    @nn.nowrap
    def hidden_states(
        self,
        params: Any,
        tokens: Int[Array, "B T"],
        prefix: Float[Array, "M D"] | GatedPrefix | None = None,
        dropout_keys: Key[Array, " B"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T D"]:
        """Last hidden states `[B, T, D]` of tokens `[B, T]`, behind a prefix `[M, D]` or none, with
        dropout where there are keys for it, and of packed rows where there are `segment_ids`."""
        how = {"prefix": prefix, "dropout_keys": dropout_keys, "segment_ids": segment_ids}
        return self.apply({"params": params}, tokens, **how)

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
        return scaled(embed(params, tokens), self.config.embedding_scale)

    @nn.nowrap
    def for_sampling(self, params: Any) -> Any:
        """The parameters as every step of a rollout reads them: in the dtype of computation (but
        for routers, which choose as in training, and quantised kernels), not cut along `fsdp`. Else
        each written token would gather and round all of them."""
        return rollout_params(self.config, params)

    @nn.nowrap
    def prefill(
        self,
        params: Any,
        tokens: jax.Array,
        lengths: jax.Array,
        prefix: Float[Array, "M D"] | GatedPrefix | None,
        prompt_columns: int,
        new_columns: int,
    ) -> tuple[jax.Array, Cache]:
        """Runs prompts `[B, X]` of `lengths` `[B]`: their hidden states `[B, X, D]`, and a cache
        with room for `prompt_columns` of a prompt, M not counted, and for `new_columns` tokens."""
        shift = prefix_columns(prefix)
        columns = {"prompt_columns": shift + prompt_columns, "new_columns": new_columns}
        hidden, (keys, values) = self.apply(
            {"params": params}, tokens, prefix=prefix, columns=sum(columns.values())
        )
        return hidden, make_cache(self.config, keys, values, shift + lengths, **columns)

    @nn.nowrap
    def decode(
        self,
        params: Any,
        tokens: jax.Array,
        prefix: Float[Array, "M D"] | GatedPrefix | None,
        column: jax.Array,
        cache: Cache,
    ) -> tuple[jax.Array, Cache]:
        """Runs one token a row, `[B]`, in `column` `[B]`, M not counted: their hidden states
        `[B, D]`, and the cache with their keys and values."""
        position = prefix_columns(prefix) + column
        hidden, cache = self.apply(
            {"params": params}, tokens[:, None], prefix=prefix, cache=cache, position=position
        )
        return hidden[:, 0], cache


class Layer(nn.Module):
    """Attention and feed-forward, each between its norms, added to the residual stream."""

    config: DecoderConfig
    experts_of: int | None = None  # see `MixtureOfExperts.layer`

    # x          hidden states [B, T, D]: T is M + T of the decoder for whole rows, 1 in decoding
    # layer      its number, that of its kind, None where there is one kind, and its gate or None
    # positions  [1, T] for whole rows, [B, T] for packed ones, [B, 1] in decoding
    # keys       [B], or None: of dropout
    # columns    static: S, where keys and values for a cache are wanted, else 0
    # segments   [B, T] of packed rows, else None
    # turn       of decoding, else None
    @nn.compact
    def __call__(self, x, layer, positions, keys, columns, segments=None, turn=None):
        config, (index, kind, gate) = self.config, layer
        placement = config.norm_placement

        def before(x, name: str):
            return make_norm(config, name)(x) if placement in ("before", "both") else x

        if keys is not None:  # each layer has its own, beside that of the embeddings, 0
            keys = jax.vmap(jax.random.fold_in, (0, None))(keys, 1 + index)

        def added(x, y, name: str, place: int):
            y = dropped(y, config.dropout.residual, keys, place)
            if placement in ("after", "both"):
                y = make_norm(config, f"post_{name}")(y)
            x = constrain(x + scaled(y, config.residual_scale), ROWS, None, None)
            return make_norm(config, name)(x) if placement == "sum" else x

        attended, kept = Attention(config, name="attention")(
            before(x, "attention_norm"), kind, gate, positions, keys, columns, segments, turn
        )
        x = added(x, attended, "attention_norm", 0)
        if config.experts:
            network = MixtureOfExperts(config, self.experts_of, name="experts")
        else:
            network = FeedForward(config, name="mlp")
        x = added(x, network(before(x, "mlp_norm"), keys), "mlp_norm", 1)
        # Read by `teacher.lazy_logits_and_states`, and nothing where the collection is not mutable.
        self.sow("intermediates", "hidden", x)
        return x, kept


class Attention(nn.Module):
    """Causal self-attention with grouped heads, rotary or no positions, optional window."""

    config: DecoderConfig

    # The arguments of `Layer`. Returns also what is kept for a cache: keys and values
    # [B, T, K, H], the layer's part of the new cache in decoding, or None.
    @nn.compact
    def __call__(self, x, kind, gate, positions, keys, columns, segments, turn):
        config, padded = self.config, self.config.padded

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
        longest = (columns or x.shape[1]) - (gate.columns if gate else 0)
        query, key = (_rotate(config, a, positions, longest, kind) for a in (query, key))
        if config.attention_scale is not None:  # what attends multiplies by H ** -0.5
            query = scaled(query, config.attention_scale * config.head_dim**0.5)
        sinks = None
        if config.attention_sinks:
            initial = nn.initializers.normal(0.02)
            sinks = self.param("sinks", initial, (padded.num_heads,), config.param_dtype)
        # Where a mesh cuts heads more finely than there are K of them, each device has its own.
        key, value = (repeat_kv(a, padded.num_heads) for a in (key, value))
        if turn is not None:
            kept = turn.layer.write(key, value, turn.column)  # the row's own column included
            how = {"soft_cap": config.attention_soft_cap, "sinks": sinks}
            run = attend_to_cache
            if gate:
                run = functools.partial(attend_gated_to_cache, gate=gate)
            out = run(query, kept, turn.seen, **how)
        else:
            kept = (key, value) if columns else None
            out = _attend(config, query, key, value, sinks, kind, gate, keys, segments)
        return project(config, config.width, config.out_bias, "out", 2)(out, keys), kept


def _of_kinds(config: DecoderConfig, name: str, kind) -> tuple[list, jax.Array | None]:
    """The different values that the kinds of layers have of an attribute, and the place among them
    of that of the layer's kind; None where there is one value."""
    every = [getattr(one, name) for one in config.kinds]
    if isinstance(kind, int):  # of a layer that is not one of a scan
        return [every[kind]], None
    values = list(dict.fromkeys(every))  # without repeats, in their order
    place = None if len(values) == 1 else jnp.asarray([values.index(x) for x in every])[kind]
    return values, place


def _rotate(config: DecoderConfig, x: jax.Array, positions, columns: int, kind) -> jax.Array:
    """Queries or keys `[B, T, heads, H]` with the rotary positions of the layer's kind, if any."""
    ropes, place = _of_kinds(config, "rope", kind)
    # No branch: all kinds are computed, and one is taken.
    turned = [
        x if rope is None else rotate(rope, x, positions, columns, config.max_positions)
        for rope in ropes
    ]
    return turned[0] if place is None else jax.lax.select_n(place, *turned)


def _attend(
    config: DecoderConfig, query, key, value, sinks, kind, gate, keys, segments
) -> jax.Array:
    """`attend` with the window of the layer's kind, which its kernels have to know."""
    # A window is a constant of a kernel, not an argument: one branch for each that there is.
    windows, place = _of_kinds(config, "sliding_window", kind)
    how = {"soft_cap": config.attention_soft_cap, "sinks": sinks}
    if gate:
        run = functools.partial(attend_gated, gate=gate)
    else:
        run, rate = attend, config.dropout.attention
        how |= {"segment_ids": segments, "dropout": rate, "dropout_keys": keys}
    ways = [functools.partial(run, sliding_window=window, **how) for window in windows]
    if place is None:
        return ways[0](query, key, value)
    return jax.lax.switch(place, ways, query, key, value)


class Turn(NamedTuple):
    """What a layer gets of the cache when every row is given one token.

    `layer` is the layer's part, `column` the one that is written, `[]`, and `seen` `[B, S]` says
    which columns the token sees, its own included.
    """

    layer: LayerCache
    column: jax.Array
    seen: jax.Array


def _decode_layers(
    config: DecoderConfig, params: Any, x: jax.Array, position: jax.Array, cache: Cache, gates
) -> tuple[jax.Array, Cache]:
    """All layers for one token a row, written out: in a scan, XLA would copy the parameters and the
    cache of each out of their stacks for every token."""
    positions = position[:, None] - (gates.columns if gates else 0)
    if UNSTACKED not in params:  # so that XLA takes nothing out of the loop, which would be a copy
        params, x = jax.lax.optimization_barrier((params, x))
    layers, before = [], x
    for index, layer in enumerate(cache.layers):
        own, before = layer_params(config, params, index, before), x
        kind = config.pattern[index] if config.pattern else 0
        seen = cache.seen(position, config.kinds[kind].sliding_window)
        turn = Turn(layer, cache.column, seen)
        experts_of = index if has_experts_of_all(config, params) else None
        gate = jax.tree.map(operator.itemgetter(index), gates)
        how = config, experts_of, kind, cache.columns
        x, layer = _decode_layer(*how, own, x, gate, positions, turn)
        layers.append(layer)
    return x, cache.replace(layers=tuple(layers), turn=cache.turn + 1)


# Jitted by itself, a layer is traced once for all that are alike; XLA compiles each all the same.
@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _decode_layer(config, experts_of, kind, columns, params, x, gate, positions, turn):
    """One layer for one token a row: `x` `[B, 1, D]`, and the layer's part of the new cache."""
    layer = Layer(config, experts_of, parent=None)
    place = None, kind, gate  # its number is that of its dropout alone
    return layer.apply({"params": params}, x, place, positions, None, columns, turn=turn)


def _layers(config: DecoderConfig) -> nn.Module:
    """All layers as one scan over their stacked parameters."""
    layer, policy = Layer, REMAT[config.remat]
    if config.offload:
        # Inside of the scan, so that the device has one layer at a time, and inside of what is
        # computed again, so that the backward pass fetches it again: kept, it would have all.
        layer = nn.map_variables(layer, "params", trans_in_fn=to_device)
        policy = policy or REMAT["dots"]
    if policy is not None:
        # static: `columns` (self counts as argument 0); CSE cannot happen across scan iterations.
        policy = without_changes(policy, config.lora)
        layer = nn.remat(layer, policy=policy, prevent_cse=False, static_argnums=(5,))
    scanned = nn.scan(
        layer,
        variable_axes={"params": 0, "intermediates": 0},
        split_rngs={"params": True},
        in_axes=(0, *(nn.broadcast,) * 4),
        length=config.num_layers,
        check_constancy_invariants=False,  # a layer has none; checked, it is traced twice
    )
    return scanned(config, name="layers")
