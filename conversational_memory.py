"""ConversationalMemory: what was said and how it sounded, kept in constant size after the turns left the context.

Design of this project, from the gated delta rule (arXiv 2412.06464) and its parallel form (arXiv 2406.06484). Two
stores of H matrices (Dv x Dk): semantic, written from a turn's text rows, half-lives of minutes to half an hour;
prosodic, written from its audio rows and prosody features, half-lives of seconds. A turn is written once, when it ends,
from states that no read has touched, so all turns of a batch run in parallel and gradients through all of them are
exact. Decay runs in seconds of conversation, silence included. Letters: B batch, T rows, D width, N turns, m writes of
a turn, W = N m, H heads, F prosody features.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from audio import FRAME_RATE
from frames import N_PROSODY, Rows, learnt_rows

SEMANTIC_SECONDS = (120.0, 1800.0)  # half-lives at first, spaced evenly in their logarithm over the heads
PROSODIC_SECONDS = (2.0, 30.0)
SHORTEST, LONGEST = 0.5, 1e4  # seconds, half-lives are held between them
N_WRITES = 2  # m


class TurnTimes(NamedTuple):
    """The turns of a batch of rows."""

    start: Tensor  # (B, N) seconds
    end: Tensor  # (B, N) seconds, of the audio if there is any
    conversations: Tensor  # (B, N) int64, -1 where a row has no such turn
    text: Tensor  # (B, N, T) bool: which rows are the turn's text
    audio: Tensor  # (B, N, T)


def find_turns(rows: Rows) -> TurnTimes:
    """Turns 0..N-1 of (B, T) rows."""
    N = int(rows.turns.max()) + 1
    own = rows.turns[:, None] == torch.arange(N, device=rows.turns.device)[:, None]  # (B, N, T)
    text, audio = own & rows.mask[:, None, :, -1], own & rows.mask[:, None, :, :-1].any(dim=-1)
    times = rows.times[:, None] / FRAME_RATE
    timed = torch.where(audio.any(dim=-1, keepdim=True), audio, own)
    exists = own.any(dim=-1)
    start = torch.where(own, times, math.inf).amin(dim=-1)
    end = torch.where(timed, times, -math.inf).amax(dim=-1)
    conversations = torch.where(own, rows.conversations[:, None], -1).amax(dim=-1)
    return TurnTimes(torch.where(exists, start, 0.0), torch.where(exists, end, 0.0), conversations, text, audio)


class Writes(NamedTuple):
    """What turns put into one store."""

    keys: Tensor  # (B, H, W, Dk) of length 1
    values: Tensor  # (B, H, W, Dv)
    strengths: Tensor  # (B, H, W) in (0, 1); 0 where there is nothing to write


class MemoryStore(nn.Module):
    """H delta-rule matrices with their own half-lives, and the gated read from them.

    Initialisation: matrices normal with std 0.02, the gate 0 (an exact no-op), half-lives spaced over `seconds`.
    """

    def __init__(
        self, d_model: int, n_heads: int, d_key: int, d_value: int, seconds: tuple[float, float], features: int
    ):
        super().__init__()
        self.n_heads, self.d_key, self.d_value, self.features = n_heads, d_key, d_value, features
        self.pool_queries = nn.Parameter(0.02 * torch.randn(N_WRITES, d_model))
        self.key = nn.Linear(2 * d_model, n_heads * d_key, bias=False)
        self.value = nn.Linear(d_model + features, n_heads * d_value, bias=False)
        self.strength = nn.Linear(d_model, n_heads)
        self.query = nn.Linear(d_model, n_heads * d_key, bias=False)
        self.out = nn.Linear(n_heads * d_value, d_model, bias=False)
        self.gate = nn.Parameter(torch.zeros(1))
        low, high = (math.log(bound) for bound in seconds)
        self.log_half_life = nn.Parameter(torch.linspace(low, high, n_heads) if n_heads > 1 else torch.tensor([low]))
        for linear in (self.key, self.value, self.strength, self.query, self.out):
            nn.init.normal_(linear.weight, std=0.02)
        nn.init.zeros_(self.strength.bias)

    def half_lives(self) -> Tensor:
        """(H,) seconds."""
        return self.log_half_life.float().clamp(math.log(SHORTEST), math.log(LONGEST)).exp()

    def decay(self, seconds: Tensor) -> Tensor:
        """(B, ...) seconds gone by -> (B, H, ...) what is left, 1 for none and for negative ones."""
        rate = 1 / self.half_lives().view(-1, *[1] * (seconds.ndim - 1))
        return torch.exp2(-seconds.clamp(min=0)[:, None] * rate)

    def writes(self, states: Tensor, members: Tensor, speaker: Tensor, prosody: Tensor) -> Writes:
        """(B, T, D) states, (B, N, T) rows of each turn, (B, N, D), (B, N, F) -> m writes of each turn, in order."""
        B, N, _ = members.shape
        pooled = pool(states, self.pool_queries, members)  # (B, N, m, D)
        prosody = prosody.nan_to_num(0.0).to(pooled.dtype)
        facts = [pooled, prosody[:, :, None, : self.features].expand(-1, -1, N_WRITES, -1)]
        key = self.key(torch.cat((pooled, speaker[:, :, None].expand_as(pooled)), dim=-1))
        value, strength = self.value(torch.cat(facts, dim=-1)), self.strength(pooled).sigmoid()
        strength = strength * members.any(dim=-1)[:, :, None, None]

        def by_head(x: Tensor) -> Tensor:
            return precise(x).reshape(B, N * N_WRITES, self.n_heads, -1).transpose(1, 2)  # (B, H, W, d)

        return Writes(F.normalize(by_head(key), dim=-1), by_head(value), by_head(strength)[..., 0])

    def queries(self, states: Tensor) -> Tensor:
        """(B, T, D) -> (B, H, T, Dk) of length 1."""
        q = self.query(states).view(*states.shape[:2], self.n_heads, self.d_key).transpose(1, 2)
        return F.normalize(precise(q), dim=-1)

    def read_all(self, states: Tensor, writes: Writes, turns: TurnTimes, row_turns: Tensor) -> Tensor:
        """What every row reads of the earlier turns of its conversation: (B, T, D) -> (B, T, H Dv).

        The matrix of a turn is sum_i decay_i u_i k_i^T with u_i = b_i (v_i - M k_i), M the matrix just before write i:
        a triangular system in u, solved at once.
        """
        ends, order = (x.repeat_interleave(N_WRITES, dim=1) for x in (turns.end, turns.conversations))
        same = order[:, :, None] == order[:, None]  # (B, W, W)
        overlap = self.decay(ends[:, :, None] - ends[:, None]) * same[:, None]
        overlap = overlap * (writes.keys @ writes.keys.transpose(2, 3)) * writes.strengths[..., None]
        system = torch.eye(overlap.size(-1), device=overlap.device) + overlap.tril(-1)
        stored = torch.linalg.solve_triangular(
            system, writes.strengths[..., None] * writes.values, upper=False, unitriangular=True
        )  # (B, H, W, Dv)

        own = row_turns.clamp(min=0)
        index = torch.arange(turns.end.size(1), device=own.device).repeat_interleave(N_WRITES)
        seen = (turns.conversations.gather(1, own)[..., None] == order[:, None]) & (index < row_turns[..., None])
        left = self.decay(turns.start.gather(1, own)[..., None] - ends[:, None]) * seen[:, None]  # (B, H, T, W)
        read = (left * (self.queries(states) @ writes.keys.transpose(2, 3))) @ stored  # (B, H, T, Dv)
        return read.transpose(1, 2).flatten(2)

    def read(self, states: Tensor, matrices: Tensor) -> Tensor:
        """(B, T, D) rows of one turn, (B, H, Dv, Dk) -> (B, T, H Dv)."""
        return (self.queries(states) @ matrices.transpose(2, 3)).transpose(1, 2).flatten(2)

    def update(self, matrices: Tensor, writes: Writes) -> Tensor:
        """The delta rule, write after write: M + b (v - M k) k^T."""
        for keys, values, strengths in zip(*(x.unbind(dim=2) for x in writes), strict=True):
            old = (matrices @ keys[..., None])[..., 0]  # (B, H, Dv)
            matrices = matrices + (strengths[..., None] * (values - old))[..., None] * keys[:, :, None]
        return matrices

    def add(self, x: Tensor, read: Tensor) -> Tensor:
        """The read is not normalised: a faded memory must stay faint."""
        return x + (self.gate.tanh() * self.out(read.to(self.out.weight.dtype))).to(x.dtype)


def precise(x: Tensor) -> Tensor:
    """At least fp32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def pool(states: Tensor, queries: Tensor, members: Tensor) -> Tensor:
    """(B, T, D), (m, D), (B, N, T) -> (B, N, m, D): attention pools over each turn's rows, 0 where it has none."""
    scores = states @ queries.t() * states.size(-1) ** -0.5  # (B, T, m)
    scores = scores.transpose(1, 2)[:, None].masked_fill(~members[:, :, None], torch.finfo(scores.dtype).min)
    weights = scores.softmax(dim=-1) * members[:, :, None]  # (B, N, m, T)
    return (weights.flatten(1, 2) @ states).unflatten(1, weights.shape[1:3])


class MemoryState(NamedTuple):
    """What a conversation remembers, `seconds` after it began; the whole memory, to save and restore."""

    matrices: tuple[Tensor, ...]  # (B, H, Dv, Dk) of each store, fp32
    seconds: Tensor  # (B,)

    def to_tensors(self) -> dict[str, Tensor]:
        """Named, as a safetensors file wants them."""
        return {f"matrices.{i}": matrix for i, matrix in enumerate(self.matrices)} | {"seconds": self.seconds}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], like: MemoryState) -> MemoryState:
        """Inverse of `to_tensors`; ValueError names the first tensor that is not of the shape of `like`."""
        expected = like.to_tensors()
        for name, tensor in expected.items():
            found = tuple(tensors[name].shape) if name in tensors else "missing"
            if found != tuple(tensor.shape):
                raise ValueError(f"memory: tensor {name} is {found}, expected {tuple(tensor.shape)}")
        return cls(tuple(tensors[name] for name in list(expected)[:-1]), tensors["seconds"])


class MemoryCache:
    """The memory of a conversation under way, and the states of the turn that it will be written from."""

    def __init__(self, state: MemoryState):
        self.state = state
        self.current = state.matrices  # faded to the start of the turn under way
        self.turn: int | None = None
        self.states: list[Tensor] = []
        self.rows: list[Rows] = []


class ConversationalMemory(nn.Module):
    """Both stores, on the states between two backbone blocks."""

    def __init__(self, d_model: int, semantic_heads: int, prosodic_heads: int, d_key: int, d_value: int):
        super().__init__()
        self.norm = nn.RMSNorm(d_model, eps=1e-5)
        self.speaker_query = nn.Parameter(0.02 * torch.randn(1, d_model))
        self.stores = nn.ModuleDict()
        if semantic_heads:
            self.stores["semantic"] = MemoryStore(d_model, semantic_heads, d_key, d_value, SEMANTIC_SECONDS, 0)
        if prosodic_heads:
            self.stores["prosodic"] = MemoryStore(d_model, prosodic_heads, d_key, d_value, PROSODIC_SECONDS, N_PROSODY)
            self.prosody_head = nn.Linear(prosodic_heads * d_value, N_PROSODY)
            nn.init.normal_(self.prosody_head.weight, std=0.02)
            nn.init.zeros_(self.prosody_head.bias)

    def normed(self, x: Tensor) -> Tensor:
        """States as the stores read them, in the precision of the weights."""
        return self.norm(x.to(self.norm.weight.dtype))

    def members(self, name: str, turns: TurnTimes) -> Tensor:
        """(B, N, T) the rows that a store is written from."""
        return {"semantic": turns.text, "prosodic": turns.audio}[name]

    def writes(self, states: Tensor, turns: TurnTimes, prosody: Tensor) -> dict[str, Writes]:
        """(B, T, D) normed states, (B, N, F) -> the writes of every turn into each store."""
        speaker = pool(states, self.speaker_query, turns.text)[:, :, 0]  # (B, N, D)
        stores = self.stores.items()
        return {name: store.writes(states, self.members(name, turns), speaker, prosody) for name, store in stores}

    def forward(self, x: Tensor, rows: Rows, turns: TurnTimes) -> tuple[Tensor, Tensor | None]:
        """Whole conversations: (B, T, D) -> (B, T, D), and (B, T, F) the prosody each row expects of its turn.

        The expectation is read from the prosodic store, before the gate; None without that store.
        """
        expected = None
        with in_own_precision(x):
            states = self.normed(x)
            writes = self.writes(states, turns, turn_prosody(rows, turns))
            for name, store in self.stores.items():
                read = store.read_all(states, writes[name], turns, rows.turns)
                x = store.add(x, read)
                if name == "prosodic":
                    expected = self.prosody_head(read.to(states.dtype)).float()
        return x, expected

    def empty(self, batch_size: int, device: torch.device | str = "cpu") -> MemoryState:
        """The memory of a conversation that has not begun."""
        shapes = [(batch_size, store.n_heads, store.d_value, store.d_key) for store in self.stores.values()]
        return MemoryState(
            tuple(torch.zeros(shape, device=device) for shape in shapes), torch.zeros(batch_size, device=device)
        )

    def read(self, x: Tensor, rows: Rows, cache: MemoryCache) -> Tensor:
        """The next rows of one turn: (B, T, D) -> (B, T, D); the same as `forward` gives."""
        turn = int(rows.turns[0, 0])
        assert (rows.turns == turn).all(), "a cached conversation is read turn by turn"
        if turn != cache.turn:
            cache.turn, cache.states, cache.rows = turn, [], []
            cache.current = self.faded(cache.state, rows.times[:, 0] / FRAME_RATE)
        with in_own_precision(x):
            states = self.normed(x)
            for store, matrices in zip(self.stores.values(), cache.current, strict=True):
                x = store.add(x, store.read(states, matrices))
        cache.states.append(states)
        cache.rows.append(rows)
        return x

    def end_turn(self, cache: MemoryCache, prosody: Tensor) -> None:
        """Write the turn whose rows were read last; `prosody` is (B, F). Only once for a turn."""
        assert cache.states, "there is no turn to write"
        rows = Rows(*(torch.cat(columns, dim=1) for columns in zip(*cache.rows, strict=True)))
        turns = find_turns(rows._replace(turns=torch.zeros_like(rows.turns)))
        states = torch.cat(cache.states, dim=1)
        with in_own_precision(states):
            writes = self.writes(states, turns, prosody[:, None].to(states.device))
            faded = self.faded(cache.state, turns.end[:, 0])
            stores = zip(self.stores.items(), faded, strict=True)
            matrices = tuple(store.update(before, writes[name]) for (name, store), before in stores)
        cache.state = MemoryState(matrices, torch.maximum(cache.state.seconds, turns.end[:, 0]))
        cache.turn, cache.states, cache.rows = None, [], []

    def faded(self, state: MemoryState, seconds: Tensor) -> tuple[Tensor, ...]:
        """The matrices at a later time (B,)."""
        gone = (seconds - state.seconds)[:, None, None]
        pairs = zip(self.stores.values(), state.matrices, strict=True)
        return tuple(store.decay(gone) * matrices for store, matrices in pairs)


def in_own_precision(x: Tensor) -> torch.autocast:
    """No autocast: projections run in the precision of their weights, matrices in fp32."""
    return torch.autocast(x.device.type, enabled=False)


def turn_prosody(rows: Rows, turns: TurnTimes) -> Tensor:
    """(B, T, F) of the rows -> (B, N, F) of the turns, nan where not measured."""
    own = turns.text | turns.audio
    first = own.int().argmax(dim=-1)  # (B, N) the turn's first row
    return rows.prosody.gather(1, first[..., None].expand(-1, -1, rows.prosody.size(-1)))


def prosody_targets(rows: Rows, turns: TurnTimes) -> Tensor:
    """(B, N, F) what the memory should expect of each turn's sound; nan where there is none, it was not measured, or
    the turn is context."""
    wanted = (turns.audio & learnt_rows(rows)[:, None]).any(dim=-1, keepdim=True)
    return torch.where(wanted, turn_prosody(rows, turns), torch.nan)


def prosody_loss(expected: Tensor, rows: Rows, turns: TurnTimes) -> Tensor:
    """Sum of squared errors of what the row before a turn's first audio row expects, (B, T, F), over all features."""
    before = (turns.audio.int().argmax(dim=-1) - 1).clamp(min=0)  # (B, N)
    guess = expected.gather(1, before[..., None].expand(-1, -1, expected.size(-1)))
    target = prosody_targets(rows, turns)
    return torch.where(target.isnan(), 0.0, (guess - target.nan_to_num(0.0)) ** 2).sum()
