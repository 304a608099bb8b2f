"""The language model: Helium over frames, and the depth transformer over the codes of one frame.

At every position the temporal transformer reads one token of each stream (text, own voice, user), summed as
embeddings. From its normed output ``hidden`` a linear head predicts the text token; then the depth transformer
predicts the codes of the own voice one after the other, each from ``hidden`` and the token just chosen
(Défossez et al. 2024, "Moshi", sections 3.4.1 to 3.4.4; PyTorch ``moshi/models/lm.py``).

Weights only: caches are in the state that :meth:`Lm.init_state` makes. Delays, sampling and the bookkeeping of
streams are elsewhere (``tokens``, ``sampling``, ``engine``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..config import LmConfig
from ..errors import ConfigError, TokenError
from ..layers.conditioning import Condition, ConditionProvider
from ..layers.transformer import GatedFeedForward, Transformer, make_norm, make_rope
from ..state import State
from ..tokens import delay_tokens, undelay

__all__ = ["DepthCache", "DepthLayer", "DepthTransformer", "Lm", "LmOutput", "embed_ids"]

DepthCache = list[mx.array]
"""Keys and values of the depth transformer's layers within a frame: [2, batch, kv_heads, steps so far, head_dim]."""


class FactoredEmbedding(nn.Module):
    """An embedding table followed by projections: low-rank, or two muxed token streams.

    A muxed id is ``(second + 1) * rows + first``; the result is ``out1(E[first]) + out2(E[second])``, the second
    term being zero where there is no second token (id below ``rows``).
    """

    def __init__(self, rows: int, dim: int, rank: int | None, demux: bool):
        super().__init__()
        width = rank or dim
        self.weight = mx.random.normal((rows, width)) * width**-0.5
        self._demux = demux
        if rank is not None:
            self.low_rank = nn.Linear(rank, dim, bias=False)
        if demux:
            self.out1 = nn.Linear(width, dim, bias=False)
            self.out2 = nn.Linear(width, dim, bias=False)

    def __call__(self, ids: mx.array) -> mx.array:
        zero = mx.array(0, self.weight.dtype)
        given = (ids >= 0)[..., None]
        ids = mx.maximum(ids, 0)
        if not self._demux:
            out: mx.array = self.low_rank(mx.where(given, self.weight[ids], zero))
            return out
        rows = self.weight.shape[0]
        second = ids // rows - 1
        out = self.out1(self.weight[ids % rows])
        other = self.out2(self.weight[mx.maximum(second, 0)])
        out = out + mx.where((second >= 0)[..., None], other, zero)
        return mx.where(given, out, zero)


def _embedding(rows: int, dim: int, rank: int | None = None, demux: bool = False) -> nn.Module:
    if rank is None and not demux:
        table = nn.Embedding(rows, dim)
        table.weight = mx.random.normal((rows, dim)) * dim**-0.5
        return table
    return FactoredEmbedding(rows, dim, rank, demux)


def embed_ids(table: nn.Module, ids: mx.array) -> mx.array:
    """Look up ``ids``; -1 gives exact zeros. The rule lives here because a quantized table does not know it."""
    if isinstance(table, FactoredEmbedding):
        return table(ids)
    return _where_given(table(ids), ids[..., None])  # -1 reads the last row


@partial(mx.compile, shapeless=True)
def _where_given(vectors: mx.array, ids: mx.array) -> mx.array:
    """One kernel instead of two."""
    return mx.where(ids >= 0, vectors, mx.array(0, vectors.dtype))


class DepthLayer(nn.Module):
    """A pre-norm layer whose projections depend on the step; its norms do not."""

    def __init__(self, config: LmConfig):
        super().__init__()
        dim, sets = config.depformer_dim, range(config.num_weight_sets)
        self._heads = config.depformer_num_heads
        self._kv_heads = self._heads // config.depth_kv_repeat
        self._head_dim = dim // self._heads
        self.norm1 = make_norm(config.norm, dim)
        self.norm2 = make_norm(config.norm, dim)
        projected = dim + 2 * self._kv_heads * self._head_dim
        self.in_proj = [nn.Linear(dim, projected, bias=False) for _ in sets]
        self.out_proj = [nn.Linear(dim, dim, bias=False) for _ in sets]
        self.gating = [GatedFeedForward(dim, hidden) for hidden in config.depth_hidden]

    def split_heads(self, projected: mx.array) -> mx.array:
        """[batch, channels] -> [batch, heads (queries, keys, values), 1, head_dim]."""
        return projected.reshape(projected.shape[0], self._heads + 2 * self._kv_heads, 1, self._head_dim)

    def split_queries(self, heads: mx.array) -> tuple[mx.array, mx.array]:
        """Queries [batch, heads, steps, head_dim]; keys and values [2, batch, kv_heads, steps, head_dim]."""
        queries, rest = mx.split(heads, [self._heads], axis=1)
        return queries, mx.unflatten(rest, 1, (2, self._kv_heads)).swapaxes(0, 1)

    def split_values(self, heads: mx.array) -> tuple[mx.array, mx.array]:
        """Query and key heads together, and those of values."""
        queries_keys, values = mx.split(heads, [self._heads + self._kv_heads], axis=1)
        return queries_keys, values

    def attend(self, queries: mx.array, keys_values: mx.array, mask: str | None) -> mx.array:
        """[batch, heads, steps, head_dim] from what :meth:`split_queries` gives."""
        keys, values = (part.squeeze(0) for part in mx.split(keys_values, 2))
        return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=self._head_dim**-0.5, mask=mask)


class DepthTransformer(nn.Module):
    """Predicts the codes of one frame, one codebook a step, from the temporal transformer's output.

    Step k uses weight set ``schedule[k]`` for its input projection, attention and feed-forward layers; embeddings,
    norms before the head, and heads belong to the step itself.

    Attributes
    ----------
    recompute : bool
        As for :class:`~moshi_mlx.layers.transformer.Transformer`, when all codes are given.
    """

    def __init__(self, config: LmConfig):
        super().__init__()
        self.recompute = False
        dim, rank = config.depformer_dim, config.depformer_low_rank_embeddings
        self._schedule = config.schedule
        self.rope = make_rope(config.depformer_pos_emb, config.depth_max_period)
        self.linear_in = [nn.Linear(config.dim, dim, bias=False) for _ in range(config.num_weight_sets)]
        self.embs = [
            _embedding(config.text_card + 1, dim, rank, config.demux_second_stream),
            *(_embedding(config.card + 1, dim, rank) for _ in range(config.dep_q - 1)),
        ]
        self.layers = [DepthLayer(config) for _ in range(config.depformer_num_layers)]
        if config.depformer_norm is not None:
            self.norms = [make_norm(config.depformer_norm, dim) for _ in range(config.dep_q)]
        self.linear_out = [nn.Linear(dim, config.card, bias=False) for _ in range(config.dep_q)]

    def step(self, index: int, hidden: mx.array, token: mx.array, cache: DepthCache) -> mx.array:
        """Logits of code ``index``.

        Parameters
        ----------
        index : int
            Codebook, from 0. Steps of one frame come in order.
        hidden : mx.array [batch, dim]
            Normed output of the temporal transformer.
        token : mx.array [batch], int
            The text token for step 0, code ``index - 1`` after that.
        cache : DepthCache
            An empty list at the first step of every frame; extended in place.

        Returns
        -------
        mx.array [batch, card]
        """
        weights = self._schedule[index]
        x = self.linear_in[weights](hidden) + embed_ids(self.embs[index], token)
        for number, layer in enumerate(self.layers):
            heads = layer.split_heads(layer.in_proj[weights](layer.norm1(x)))
            queries, keys_values = layer.split_queries(self._rotate(layer, heads, index))
            if index:
                cache[number] = keys_values = mx.concatenate([cache[number], keys_values], axis=3)
            else:
                cache.append(keys_values)
            attended = layer.attend(queries, keys_values, None).reshape(x.shape)  # one query: heads in a row
            x = x + layer.out_proj[weights](attended)
            x = x + layer.gating[weights](layer.norm2(x))
        return self._head(index, x)

    def __call__(self, hidden: mx.array, tokens: mx.array) -> mx.array:
        """Logits of all codes with the true ones before them given (teacher forcing).

        Parameters
        ----------
        hidden : mx.array [n, dim]
            One row a frame.
        tokens : mx.array [n, dep_q], int
            The text token, then codes 0 to ``dep_q - 2``.

        Returns
        -------
        mx.array [n, dep_q, card]
        """
        steps = range(len(self._schedule))
        xs = [
            self.linear_in[self._schedule[k]](hidden) + embed_ids(self.embs[k], tokens[:, k]) for k in steps
        ]  # fmt: skip
        for layer in self.layers:
            run = partial(self._all_steps, layer)
            xs = (nn.utils.checkpoint(layer, run) if self.recompute else run)(xs)
        return mx.stack([self._head(k, xs[k]) for k in steps], axis=1)

    def _all_steps(self, layer: DepthLayer, xs: list[mx.array]) -> list[mx.array]:
        """A layer on all steps of n frames at once, [n, depformer_dim] each."""
        steps = range(len(xs))
        split = [layer.split_heads(layer.in_proj[self._schedule[k]](layer.norm1(xs[k]))) for k in steps]
        heads = self._rotate(layer, mx.concatenate(split, axis=2), 0)
        attended = layer.attend(*layer.split_queries(heads), "causal").transpose(0, 2, 1, 3)
        attended = attended.reshape(len(xs[0]), len(xs), -1)
        out = []
        for k in steps:
            weights = self._schedule[k]
            x = xs[k] + layer.out_proj[weights](attended[:, k])
            out.append(x + layer.gating[weights](layer.norm2(x)))
        return out

    def _rotate(self, layer: DepthLayer, heads: mx.array, offset: int) -> mx.array:
        if self.rope is None:
            return heads
        queries_keys, values = layer.split_values(heads)
        return mx.concatenate([self.rope(queries_keys, offset), values], axis=1)

    def _head(self, index: int, x: mx.array) -> mx.array:
        norms = self.get("norms")
        logits: mx.array = self.linear_out[index](x if norms is None else norms[index](x))
        return logits


@dataclass(frozen=True)
class LmOutput:
    """Predictions for a whole sequence, aligned with its tokens.

    Attributes
    ----------
    text_logits : mx.array [batch, 1, time, text_out]
    text_mask : mx.array [batch, 1, time], bool
        Where a position predicts the token and the token is not -1. Logits are zero where the delays leave none.
    logits : mx.array [batch, dep_q, time, card]
    mask : mx.array [batch, dep_q, time], bool
    """

    text_logits: mx.array
    text_mask: mx.array
    logits: mx.array
    mask: mx.array


class Lm(nn.Module):
    """Temporal and depth transformer.

    Parameters
    ----------
    config : LmConfig
    """

    def __init__(self, config: LmConfig):
        super().__init__()
        self._config = config
        self.backend = "auto"  # what computes a step: see moshi_mlx.cpu.backend
        self.sharding: Any = None  # the other machines that compute it too: see moshi_mlx.sharding
        dim = config.dim
        text_rows = config.text_card + config.text_start_row
        self.text_emb = _embedding(text_rows, dim, demux=config.demux_second_stream)
        self.audio_embs = [_embedding(config.card + 1, dim) for _ in range(config.n_q)]
        self.transformer = Transformer(
            config.num_layers,
            dim,
            config.num_heads,
            config.hidden,
            context=config.context,
            rope=make_rope(config.positional_embedding, config.max_period),
            kv_repeat=config.kv_repeat,
            norm=config.norm,
            cross_attention=config.cross_attention,
        )
        self.out_norm = make_norm(config.norm, dim)
        self.text_linear = nn.Linear(dim, config.text_out, bias=False)
        if config.dep_q:
            self.depformer = DepthTransformer(config)
        if config.extra_heads_num_heads:
            heads = range(config.extra_heads_num_heads)
            self.extra_heads = [nn.Linear(dim, config.extra_heads_dim, bias=False) for _ in heads]
        if config.conditioners and config.fuser is not None:
            self.condition_provider = ConditionProvider(config.conditioners, config.fuser, dim)

    @property
    def config(self) -> LmConfig:
        return self._config

    @property
    def dtype(self) -> mx.Dtype:
        """Type of activations and caches: that of the norms, which are never quantized."""
        dtype: mx.Dtype = self.out_norm.weight.dtype
        return dtype

    def condition(self, rows: Sequence[Mapping[str, Any]] | None) -> Condition | None:
        """Conditions for a batch; see :class:`ConditionProvider`.

        Raises
        ------
        ConfigError
            If the model takes conditions and none are given, or the other way round.
        """
        provider = self.get("condition_provider")
        if provider is None:
            if rows is not None and any(rows):
                raise ConfigError("this model takes no conditions")
            return None
        if rows is None:
            raise ConfigError(f"this model needs conditions: {sorted(self.config.conditioners)}")
        condition: Condition = provider(rows)
        return condition

    def init_state(
        self,
        batch: int = 1,
        *,
        condition: Condition | None = None,
        kv_bits: int | None = None,
        slots: int | None = None,
        pinned: bool = False,
    ) -> State:
        """The state of ``batch`` sequences at position 0: rings, and what the conditions add.

        Parameters
        ----------
        batch : int
        condition : Condition or None
            From :meth:`condition`, with as many rows.
        kv_bits : {None, 8}
            Precision of the cache.
        slots : int, optional
            Slots of the rings, the context by default: :func:`~moshi_mlx.layers.attention.resize_rings`.
        pinned : bool
            See :meth:`~moshi_mlx.layers.transformer.Transformer.init_state`.
        """
        self._check_condition(condition, batch)
        source = None if condition is None or condition.cross is None else condition.cross.astype(self.dtype)
        counts = None if condition is None else condition.cross_slots
        rings = self.transformer.init_state(batch, self.dtype, kv_bits, source, counts, slots, pinned)
        state: State = {"transformer": rings}
        if condition is not None and condition.sum is not None:
            state["condition_sum"] = condition.sum.astype(self.dtype)
        return state

    def _check_condition(self, condition: Condition | None, batch: int) -> None:
        given = [] if condition is None else [part for part in (condition.sum, condition.cross) if part is not None]
        if self.config.cross_attention and (condition is None or condition.cross is None):
            raise ConfigError("this model attends to a condition: give one")
        for part in given:
            if part.shape[0] != batch:
                raise ConfigError(f"{batch} sequences need as many conditions, found {part.shape[0]}")

    def embed(self, tokens: mx.array) -> mx.array:
        """Summed embeddings [batch, time, dim] of one token per stream ``tokens`` [batch, streams, time]."""
        total: mx.array | None = None
        for stream, table in enumerate(self.audio_embs, start=1):
            vectors = embed_ids(table, tokens[:, stream]).astype(self.dtype)  # MLX's float formats come as bfloat16
            total = vectors if total is None else total + vectors
        text = embed_ids(self.text_emb, tokens[:, 0]).astype(self.dtype)
        return text if total is None else total + text

    def step(self, tokens: mx.array, state: State, active: mx.array | None = None, sinks: int = 0) -> mx.array:
        """Advance the temporal transformer.

        Parameters
        ----------
        tokens : mx.array [batch, streams, time], int
            What each stream holds at the new positions, delays applied; -1 embeds to zeros.
        state : State
            Advanced in place.
        active : mx.array [batch], bool, optional
        sinks : int
            Rows that advance, and pinned positions; see :meth:`Transformer.step`.

        Returns
        -------
        mx.array [batch, time, dim]
            Normed output: what both heads and the depth transformer read.
        """
        return self.step_embedded(self.embed(tokens), state, active, sinks)

    def step_embedded(self, x: mx.array, state: State, active: mx.array | None = None, sinks: int = 0) -> mx.array:
        """Like :meth:`step`, from summed embeddings [batch, time, dim] (PersonaPlex keeps voices in this form)."""
        extra = state.get("condition_sum")
        if extra is not None:
            x = x + extra
        hidden: mx.array = self.out_norm(self.transformer.step(x, state["transformer"], active, sinks))
        return hidden

    def extra_head_logits(self, hidden: mx.array) -> mx.array:
        """Logits [heads, ..., extra_heads_dim] of the extra heads (speech-to-text: pause prediction)."""
        heads = self.get("extra_heads") or []
        return mx.stack([head(hidden) for head in heads])

    def __call__(self, tokens: mx.array, condition: Condition | None = None) -> LmOutput:
        """Teacher-forced predictions of whole sequences; differentiable.

        Parameters
        ----------
        tokens : mx.array [batch, streams, time], int
            Text, own codes, user codes, not delayed; -1 where a stream has nothing.
        condition : Condition or None

        Returns
        -------
        LmOutput
        """
        config = self.config
        batch, streams, time = tokens.shape
        if streams != config.num_streams:
            raise TokenError(f"this model reads {config.num_streams} streams, found {streams}")
        self._check_condition(condition, batch)
        starts = (config.text_start_id,) + (config.audio_start_id,) * config.n_q
        delayed = delay_tokens(tokens, config.delays, starts)
        x = self.embed(delayed[:, :, :-1])
        source = counts = None
        if condition is not None:
            if condition.sum is not None:
                x = x + condition.sum.astype(x.dtype)
            if condition.cross is not None:
                source, counts = condition.cross.astype(x.dtype), condition.cross_slots
        hidden = self.out_norm(self.transformer(x, source, counts))
        text_logits, text_mask = undelay(self.text_linear(hidden)[:, None], config.delays[:1])
        text_mask = text_mask & (tokens[:, :1] != -1)
        dep_q = config.dep_q
        if not dep_q:
            empty = mx.zeros((batch, 0, time), mx.bool_)
            return LmOutput(text_logits, text_mask, mx.zeros((batch, 0, time, config.card), hidden.dtype), empty)
        given = delayed[:, :dep_q, 1:].transpose(0, 2, 1).reshape(batch * time, dep_q)
        by_frame = self.depformer(hidden.reshape(batch * time, -1), given)
        by_position = by_frame.reshape(batch, time, dep_q, -1).transpose(0, 2, 1, 3)
        logits, mask = undelay(by_position, config.delays[1 : 1 + dep_q])
        return LmOutput(text_logits, text_mask, logits, mask & (tokens[:, 1 : 1 + dep_q] != -1))
