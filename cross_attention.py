"""VoiceTextCrossAttention: two gated paths between text and voice, which sit at different rates in one sequence.

Design of this project; the gates are those of Llama 3.2 Vision (zero-initialised tanh). Text arrives at 3 to 15 ids per
second, voice at 12.5 frames per second. The two directions are not mirror images:

- voice <- text, full resolution: an audio row attends every text row before it, past turns and its own.
- text <- voice, pooled: a text row attends learned pools of 4 audio rows (320 ms) of one turn that end before it.

Both look only at earlier rows of the sequence, so no stack of them can leak the future. Positions are times: one axis
in frames, text not yet spoken standing where the running speaking rate expects it. Letters: B batch, T rows, D width,
H heads, Q audio rows, M text rows, P pools.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from frames import Rows, learnt_rows
from transformer import (
    Attention,
    FeedForward,
    TransformerConfig,
    attend,
    init_matrices,
    keep_frequencies,
    rope_angles,
    rope_frequencies,
    rotate,
)

POOL = 4  # audio rows; a turn's last rows that fill no pool are not pooled


class Streams(NamedTuple):
    """Which rows are text, audio and pools, when they sound, and who may attend whom; shared by all layers.

    With a cache the keys are those of the cache and then the new ones, and `pools` counts from the oldest row that
    waits in the cache for its pool.
    """

    text: Tensor  # (B, M) indices of text rows; padded with others, which `sees_*` leaves out
    audio: Tensor  # (B, Q)
    pools: Tensor  # (B, P, POOL) indices of the rows of each pool
    text_times: Tensor  # (B, M) frames
    audio_times: Tensor  # (B, Q)
    pool_times: Tensor  # (B, P) of the last row
    sees_text: Tensor  # (B, 1, Q, past + M) bool
    sees_pools: Tensor  # (B, 1, M, past + P) bool


class StreamState:
    """What a cached conversation has read so far; every row of the batch has the same structure."""

    def __init__(self) -> None:
        self.n_text = 0
        self.n_pools = 0
        self.turn = -1
        self.waiting = 0  # newest audio rows of `turn` that do not fill a pool yet
        self.kept = 0  # how many of them the layers held before the rows last placed


def indices(flags: Tensor) -> tuple[Tensor, Tensor]:
    """(B, T) bool -> (B, n) positions of the true ones, padded to the longest row, and (B, n) which are real."""
    n = int(flags.sum(dim=1).max())
    order = flags.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :n]
    return order, flags.gather(1, order)


def find_streams(rows: Rows, state: StreamState | None = None) -> Streams:
    """(B, T) rows, the next ones of what `state` has read -> their streams; moves `state` on."""
    is_text, is_audio = rows.mask[..., -1], rows.mask[..., :-1].any(dim=-1)
    text, text_real = indices(is_text)
    audio, audio_real = indices(is_audio)

    # Audio rows that wait for their pool come first; they began one, so a row's place in its pool counts from there.
    waiting = 0 if state is None else state.waiting
    pad = (waiting, 0)
    all_audio, all_real = indices(F.pad(is_audio, pad, value=True))
    turns = F.pad(rows.turns, pad, value=-1 if state is None else state.turn)
    turn = turns.gather(1, all_audio)  # (B, N) of each audio row
    place = torch.arange(turn.size(1), device=turn.device).expand_as(turn)
    begins = F.pad(turn[:, 1:] != turn[:, :-1], (1, 0), value=True)
    rank = place - torch.where(begins, place, 0).cummax(dim=1).values  # within the turn
    last, pool_real = indices((rank % POOL == POOL - 1) & all_real)  # (B, P) places among the audio rows
    members = last[..., None] + torch.arange(1 - POOL, 1, device=last.device)
    pools = all_audio.gather(1, members.clamp(min=0).flatten(1)).view(*last.shape, POOL)

    documents = F.pad(rows.documents, pad, value=0)
    pool_row = pools[..., -1]  # (B, P)

    def sees(queries: Tensor, query_real: Tensor, keys: Tensor, key_real: Tensor, n_past: int) -> Tensor:
        """(B, 1, queries, past + keys): real rows of one document, the key earlier; all of the past."""
        same = documents.gather(1, queries + waiting)[..., None] == documents.gather(1, keys)[:, None]
        new = same & (keys[:, None] < queries[..., None] + waiting) & key_real[:, None]
        return (F.pad(new, (n_past, 0), value=True) & query_real[..., None])[:, None]

    past_text, past_pools = (0, 0) if state is None else (state.n_text, state.n_pools)
    streams = Streams(
        text,
        audio,
        pools,
        rows.times.gather(1, text),
        rows.times.gather(1, audio),
        rows.times.gather(1, pool_row - waiting),  # the last row of a pool is never one that waited
        sees(audio, audio_real, text + waiting, text_real, past_text),
        sees(text, text_real, pool_row, pool_real, past_pools),
    )
    if state is not None:
        assert text_real.all(), "rows of a cached batch must have the same structure"
        assert all_real.all(), "rows of a cached batch must have the same structure"
        state.n_text, state.n_pools, state.kept = past_text + text.size(1), past_pools + pools.size(1), waiting
        if turn.size(1):
            state.turn, state.waiting = int(turn[0, -1]), int(rank[0, -1] + 1) % POOL
    return streams


class KeyStore:
    """Keys and values of one direction, growing as new ones come."""

    def __init__(self) -> None:
        self.keys: Tensor | None = None  # (B, G, n, d)
        self.values: Tensor | None = None

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        if self.keys is not None and keys.size(2) == 0:
            return self.keys, self.values
        if self.keys is not None:
            keys, values = torch.cat((self.keys, keys), dim=2), torch.cat((self.values, values), dim=2)
        self.keys, self.values = keys, values
        return keys, values


class CrossCache:
    """What one layer keeps of a conversation."""

    def __init__(self) -> None:
        self.text, self.pools = KeyStore(), KeyStore()
        self.waiting: Tensor | None = None  # (B, fewer than POOL, D) normed audio rows that fill no pool yet


class Direction(Attention):
    """Grouped-query attention of one stream to the other, on the axis of time; the projections of self-attention."""

    def heads(self, x: Tensor, rope: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """(B, n, heads * d) -> (B, heads, n, d), turned to its times if they are given."""
        x = x.unflatten(2, (x.size(2) // self.d_head, self.d_head)).transpose(1, 2)
        return x if rope is None else rotate(x, *rope).to(x.dtype)

    def forward(
        self,
        queries: Tensor,
        query_rope: tuple[Tensor, Tensor],
        keys: Tensor,
        key_rope: tuple[Tensor, Tensor],
        allowed: Tensor,
        store: KeyStore | None,
    ) -> Tensor:
        """(B, q, D) and (B, k, D) -> (B, q, D); zero where a query may attend nothing."""
        B, n, _ = queries.shape
        if store is not None and keys.size(1) == 0:  # most rows of a conversation under way
            k, v = store.keys, store.values
        else:
            k, v = self.heads(self.k_proj(keys), key_rope), self.heads(self.v_proj(keys))
            if store is not None:
                k, v = store.append(k, v)
        if n == 0 or k is None or k.size(2) == 0:
            return torch.zeros_like(queries)
        q = self.heads(self.q_proj(queries), query_rope)
        some = allowed.any(dim=-1, keepdim=True)  # (B, 1, q, 1); attention over nothing would be nan
        out = attend(q, k, v, allowed | ~some)
        return self.o_proj((out * some).transpose(1, 2).reshape(B, n, -1))

    def weights(
        self, queries: Tensor, query_rope: tuple[Tensor, Tensor], keys: Tensor, key_rope: tuple, allowed: Tensor
    ) -> Tensor:
        """The attention map of the same call without a store: (B, H, q, k), rows sum to 1, or 0 with nothing to see."""
        q = self.heads(self.q_proj(queries), query_rope).float()
        k = self.heads(self.k_proj(keys), key_rope).float()
        k = k.repeat_interleave(self.n_heads // self.n_kv_heads, dim=1)
        scores = (q @ k.transpose(2, 3)) * self.d_head**-0.5
        lowest = torch.finfo(scores.dtype).min  # finite, so that a row without keys is not nan
        return scores.masked_fill(~allowed, lowest).softmax(dim=-1) * allowed


class VoiceTextCrossAttention(nn.Module):
    """y = h + tanh(a) Attention + tanh(b) FeedForward, a for each direction; a = b = 0 at first: an exact no-op.

    Initialisation: matrices normal with std 0.02, gates and the pool's query 0, norms 1.
    """

    def __init__(self, config: TransformerConfig, d_ff: int):
        super().__init__()
        self.config = config
        self.norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        self.voice = Direction(config)  # voice <- text
        self.text = Direction(config)  # text <- voice
        self.pool_query = nn.Parameter(torch.zeros(config.d_model))  # at first a pool is the mean of its rows
        self.feed_forward_norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        self.feed_forward = FeedForward(config.d_model, d_ff)
        self.voice_gate = nn.Parameter(torch.zeros(1))
        self.text_gate = nn.Parameter(torch.zeros(1))
        self.feed_forward_gate = nn.Parameter(torch.zeros(1))
        self.register_buffer("frequencies", rope_frequencies(config), persistent=False)
        init_matrices(self, residual_scale=1.0)  # the gates hold the residual stream as it was

    def _apply(self, *args, **kwargs) -> VoiceTextCrossAttention:
        super()._apply(*args, **kwargs)
        keep_frequencies(self)
        return self

    def open_gates(self) -> None:
        """Let it take part from the first step on: in a model without trained weights there is nothing to hold."""
        for gate in (self.voice_gate, self.text_gate, self.feed_forward_gate):
            nn.init.ones_(gate)

    def forward(
        self,
        x: Tensor,
        streams: Streams,
        state: StreamState | None = None,
        cache: CrossCache | None = None,
        maps: list[Tensor] | None = None,
    ) -> Tensor:
        """(B, T, D) -> (B, T, D). The map of voice over text, (B, H, Q, M), is appended to `maps` if given."""
        normed = self.norm(x)
        text, audio = take(normed, streams.text), take(normed, streams.audio)
        pools = self._pools(normed, streams, state, cache)
        times = (streams.audio_times, streams.text_times, streams.pool_times)
        audio_rope, text_rope, pool_rope = (rope_angles(self.frequencies, t) if t.size(1) else None for t in times)
        heard = self.voice(audio, audio_rope, text, text_rope, streams.sees_text, cache and cache.text)
        read = self.text(text, text_rope, pools, pool_rope, streams.sees_pools, cache and cache.pools)
        if maps is not None:
            maps.append(self.voice.weights(audio, audio_rope, text, text_rope, streams.sees_text))
        if cache is None and 0 in (text.size(1), audio.size(1), pools.size(1)):
            # processes that shard a model must all have a gradient for every parameter, if only 0
            x = x + 0.0 * sum(parameter.sum() for parameter in self.parameters())
        x = put(x, streams.audio, self.voice_gate.tanh() * heard)
        x = put(x, streams.text, self.text_gate.tanh() * read)
        return x + self.feed_forward_gate.tanh() * self.feed_forward(self.feed_forward_norm(x))

    def _pools(self, normed: Tensor, streams: Streams, state: StreamState | None, cache: CrossCache | None) -> Tensor:
        """(B, T, D) -> (B, P, D): means of the rows of each pool, weighted by a learned query."""
        rows = normed
        if cache is not None and state.kept:
            rows = torch.cat((cache.waiting, normed), dim=1)
        if cache is not None:
            audio = rows[:, : state.kept], take(normed, streams.audio)
            audio = torch.cat(audio, dim=1)
            cache.waiting = audio[:, audio.size(1) - state.waiting :]
        B, P, _ = streams.pools.shape
        members = take(rows, streams.pools.flatten(1)).view(B, P, POOL, normed.size(-1))
        weights = (members.float() @ self.pool_query.float() * members.size(-1) ** -0.5).softmax(dim=-1)
        return (weights[..., None] * members).sum(dim=2).to(normed.dtype)


def take(x: Tensor, index: Tensor) -> Tensor:
    """(B, T, D) at (B, n) -> (B, n, D)."""
    return x.gather(1, index[..., None].expand(-1, -1, x.size(-1)))


def put(x: Tensor, index: Tensor, change: Tensor) -> Tensor:
    """(B, T, D) with (B, n, D) added at (B, n); padded entries carry a change of zero."""
    return x.scatter_add(1, index[..., None].expand_as(change), change.to(x.dtype))


def guided_rows(streams: Streams, rows: Rows) -> Tensor:
    """(B, Q) bool: audio rows of learnt turns whose whole text precedes their audio: those that guidance is for."""
    text_turn, audio_turn = rows.turns.gather(1, streams.text), rows.turns.gather(1, streams.audio)
    own = audio_turn[..., None] == text_turn[:, None]  # (B, Q, M)
    visible = (own & streams.sees_text[:, 0]).sum(dim=-1)
    _, n_text = progress(rows.mask[..., -1], rows.turns)
    whole = (visible == n_text.gather(1, streams.audio)) & (visible > 0)
    real, turn = rows.mask[..., :-1].any(dim=-1).gather(1, streams.audio), audio_turn.clamp(min=0)
    early = torch.zeros_like(rows.turns).scatter_add(1, turn, (real & ~whole).long())  # (B, T) by turn
    return whole & (early.gather(1, turn) == 0) & learnt_rows(rows).gather(1, streams.audio)


def guidance_loss(weights: Tensor, streams: Streams, rows: Rows, sharpness: float = 0.2) -> Tensor:
    """Sum over the guided rows of the attention far from the diagonal of the row's own turn, heads averaged.

    W = 1 - exp(-(i / n - j / m)^2 / 2 g^2), "Efficiently Trainable Text-to-Speech" (arXiv 1710.08969, section 4.1); 1
    for the text of other turns. `weights` is (B, H, Q, M).
    """
    turns, is_audio = rows.turns, rows.mask[..., :-1].any(dim=-1)
    own = turns.gather(1, streams.audio)[..., None] == turns.gather(1, streams.text)[:, None]  # (B, Q, M)
    text_share, _ = progress(rows.mask[..., -1], turns)
    audio_share, _ = progress(is_audio, turns)
    distance = audio_share.gather(1, streams.audio)[..., None] - text_share.gather(1, streams.text)[:, None]
    penalty = torch.where(own, 1 - torch.exp(-(distance**2) / (2 * sharpness**2)), 1.0)
    return ((weights.mean(dim=1) * penalty).sum(dim=-1) * guided_rows(streams, rows)).sum()


def progress(flags: Tensor, turns: Tensor) -> tuple[Tensor, Tensor]:
    """(B, T) rows of a kind -> (B, T) where in its turn each stands, 0 to 1, and how many its turn has."""
    own = turns.clamp(min=0)
    live = flags & (turns >= 0)
    count = torch.zeros_like(turns).scatter_add(1, own, live.long())  # (B, T) by turn
    before = count.cumsum(dim=1) - count
    rank = live.long().cumsum(dim=1) - before.gather(1, own)  # from 1
    total = count.gather(1, own)
    return (rank - 0.5) / total.clamp(min=1), total
