"""The row layout shared by training and generation: turns to rows, masks, targets, times, end of turn.

Columns 0..K-1 of a row hold one code per codebook, column K a text id; a mask of the same shape says which entries are
real. A turn is text rows, audio frames and an end-of-turn frame in one of three orders; turns follow each other. Knows
nothing of models, files or tokenizers' insides. Letters: B batch, T rows, K codebooks, S semantic ones, V codes per
codebook, C acoustic delay in frames, F prosody features.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

IGNORE = -100  # target that carries no loss
ORDERS = ("speak", "joint", "listen")  # text, then audio; both in chunks; audio, then text
N_PROSODY = 6  # features of a turn's sound, see `audio.prosody_features`
RATE_PRIOR_IDS = 50  # the assumed speaking rate counts as much as this many text ids heard


class Turn(NamedTuple):
    """One turn of a conversation, as ids."""

    text_ids: list[int]  # BOS "[speaker]text" EOS
    codes: Tensor | None  # (T, K or fewer) int64 frames of its audio; None: text only, or still to be spoken
    n_prompt: int = 1  # the first ids, which name the speaker and are never generated
    order: str = "speak"
    gap: float = 0.0  # frames of silence before it
    prosody: Tensor | None = None  # (F,) of its audio; None: not measured
    learn: bool = True  # False: context only, no targets


class Rows(NamedTuple):
    """Rows of one sequence, as below, or of a batch with a leading dimension B."""

    tokens: Tensor  # (T, K + 1) int64
    mask: Tensor  # (T, K + 1) bool
    targets: Tensor  # (T, K + 1) int64 what follows the row: the next frame's codes or the next text id, else IGNORE
    positions: Tensor  # (T,) int64, from 0 in every document
    documents: Tensor  # (T,) int64, rows attend their own document only; -1 on padding
    conversations: Tensor  # (T,) int64, memory is carried along a conversation, over all its documents
    turns: Tensor  # (T,) int64, counted up along the sequence; -1 on padding
    times: Tensor  # (T,) float32 frames since the conversation began, silence included
    prosody: Tensor  # (T, F) float32 of the row's turn, nan where not measured

    def to(self, device: torch.device | str) -> Rows:
        return Rows(*(send(tensor, device) for tensor in self))

    def batch(self) -> Rows:
        """One sequence as a batch of one."""
        return Rows(*(tensor[None] for tensor in self))

    def spans(self) -> list[list[int]]:
        """Of every row of a batch, how long its documents are, one after the other; padding counts as one."""
        return [torch.unique_consecutive(row, return_counts=True)[1].tolist() for row in self.documents]

    def allowed(self) -> Tensor:
        """(B, 1, T, T) bool of a batch: which row may attend which, causal and within its document."""
        T = self.documents.size(1)
        same = self.documents[:, :, None] == self.documents[:, None, :]
        return (same & torch.ones(T, T, dtype=torch.bool, device=same.device).tril())[:, None]


def learnt_rows(rows: Rows) -> Tensor:
    """(B, T) bool of a batch: rows of turns that have targets; other turns are context."""
    turns = rows.turns.clamp(min=0)
    wanted = (rows.targets != IGNORE).any(dim=-1)  # (B, T)
    by_turn = torch.zeros_like(turns).scatter_add(1, turns, wanted.long())
    return (by_turn.gather(1, turns) > 0) & (rows.turns >= 0)


def send(tensor: Tensor, device: torch.device | str) -> Tensor:
    """To another device; from the CPU to a GPU through pinned memory, so that neither waits for the other."""
    to_gpu = tensor.device.type == "cpu" and torch.device(device).type == "cuda"
    return (tensor.pin_memory() if to_gpu else tensor).to(device, non_blocking=True)


@dataclass
class Clock:
    """Where a conversation stands: row, turn and time of what comes next."""

    position: int = 0  # rows of the document so far
    turn: int = -1
    turn_start: float = 0.0  # frames
    now: float = 0.0  # frames, silence included
    frames: int = 0  # spoken in finished turns ...
    text_ids: int = 0  # ... and the ids of their text: together the speaking rate

    def begin_turn(self, gap: float = 0.0) -> None:
        self.turn += 1
        self.now += max(0.0, gap)
        self.turn_start = self.now

    def copy(self) -> Clock:
        return dataclasses.replace(self)


class _Items(NamedTuple):
    """Text or audio rows of one turn, not yet in order."""

    tokens: Tensor  # (n, K + 1)
    mask: Tensor  # (n, K + 1)
    wanted: Tensor  # (n, K + 1) what the row before must predict
    offsets: Tensor  # (n,) frames since the turn began


@dataclass(frozen=True, kw_only=True)
class FrameLayout:
    """How many codebooks there are, what ends a turn, when acoustic codes enter, how text and audio take turns.

    Row r of a turn's audio holds the semantic codes 0..S-1 of frame r and the acoustic codes S..K-1 of frame r - C, so
    that the acoustic codes of C frames can be predicted at once. The end of turn is an own code V in codebook 0 of the
    row after the last frame; the acoustic codes still due follow in C - 1 more rows.
    Deviation: csm-1b ends a turn with an all-zero frame, also a legal frame of its codec; `zero_end_of_turn` does so.
    """

    n_codebooks: int
    codebook_size: int
    zero_end_of_turn: bool = False
    n_semantic: int = 1
    acoustic_delay: int = 0
    text_per_chunk: int = 20  # joint order: text ids, then frames, in turns; text runs ahead of speech
    frames_per_chunk: int = 12
    frames_per_text_id: float = 12.5 / 15  # assumed before a conversation's own rate is known

    @property
    def end_of_turn(self) -> int:
        """The code in codebook 0 that ends a turn (0 only together with zeros in all others)."""
        return 0 if self.zero_end_of_turn else self.codebook_size

    @property
    def closing_rows(self) -> int:
        """Rows after a turn's last frame: its end, and acoustic codes still due."""
        return max(1, self.acoustic_delay)

    def turn_length(self, n_text: int, n_frames: int) -> int:
        """Rows of a turn with audio."""
        return n_text + n_frames + self.closing_rows

    def turn_rows(self, turn: Turn, clock: Clock | None = None, ends: bool = True) -> Rows:
        """All rows of one turn, as the next of the conversation whose `clock` is given and moved on.

        If the turn does not end with them, because its text is still to be written, `end_turn` is left to the caller.

        ValueError for codes that are not of this layout and for an unknown order.
        """
        if turn.codes is not None:
            self.check_codes(turn.codes)
        order = self.row_order(turn)
        clock = Clock() if clock is None else clock
        clock.begin_turn(turn.gap)
        parts = [self._text_items(turn.text_ids, turn.n_prompt, clock)]
        if turn.codes is not None:
            n_frames = len(turn.codes)
            parts.append(self._audio_items(turn.codes, 0, n_frames + self.closing_rows, n_frames))
        items = _Items(*(torch.cat(columns) for columns in zip(*parts, strict=True)))
        rows = self._place(items, order, clock, turn.prosody)
        if turn.learn:
            rows.targets[:-1] = items.wanted[order][1:]
        if ends:
            self.end_turn(turn, clock)
        return rows

    def row_order(self, turn: Turn) -> Tensor:
        """(T,) indices into [text rows, audio rows]: the order in which a turn's rows follow each other.

        A joint turn whose speech would end before its text was written puts all text first.
        """
        if turn.order not in ORDERS:
            raise ValueError(f"order {turn.order!r} of a turn must be one of {', '.join(ORDERS)}")
        n_text = len(turn.text_ids)
        text = list(range(n_text))
        n_frames = 0 if turn.codes is None else len(turn.codes)
        audio = [n_text + r for r in range(n_frames + self.closing_rows)] if turn.codes is not None else []
        order = text[: turn.n_prompt]
        if turn.order == "listen":
            return torch.tensor(order + audio + text[turn.n_prompt :])
        if turn.order == "joint":
            written, spoken = turn.n_prompt, 0
            while written < n_text and spoken <= n_frames:
                order += text[written : written + self.text_per_chunk]
                written += self.text_per_chunk
                if written < n_text:
                    order += audio[spoken : spoken + self.frames_per_chunk]
                    spoken += self.frames_per_chunk
            if spoken <= n_frames:
                return torch.tensor(order + audio[spoken:])
        return torch.tensor(text + audio)

    def text_rows(self, text_ids: Sequence[int], n_prompt: int, clock: Clock, first: int = 0) -> Rows:
        """Rows of the text ids `first`... of the turn under way, one after the other."""
        items = self._text_items(text_ids, n_prompt, clock, first)
        return self._place(items, torch.arange(len(text_ids)), clock)

    def audio_row(self, codes: Tensor, clock: Clock) -> Rows:
        """The newest row of a turn being spoken, the last of (n, K) frames with the acoustic codes of C before."""
        items = self._audio_items(codes, len(codes) - 1, len(codes), None)
        return self._place(items, torch.arange(1), clock)

    def end_rows(self, codes: Tensor, clock: Clock) -> Rows:
        """The rows that close a turn of (n, K) frames."""
        items = self._audio_items(codes, len(codes), len(codes) + self.closing_rows, len(codes))
        return self._place(items, torch.arange(self.closing_rows), clock)

    def end_turn(self, turn: Turn, clock: Clock) -> None:
        """Move the clock behind a turn whose rows are placed."""
        n_spoken = len(turn.text_ids) - turn.n_prompt
        if turn.codes is None:
            clock.now = clock.turn_start + n_spoken * self.speaking_rate(clock)
        else:
            clock.now = clock.turn_start + len(turn.codes)
            clock.frames += len(turn.codes)
            clock.text_ids += n_spoken

    def speaking_rate(self, clock: Clock) -> float:
        """Frames per text id, from the turns heard so far."""
        heard = RATE_PRIOR_IDS * self.frames_per_text_id + clock.frames
        return heard / (RATE_PRIOR_IDS + clock.text_ids)

    def is_end_of_turn(self, codes: Tensor) -> Tensor:
        """(..., K) codes -> (...) bool: is this frame the end of a turn?"""
        if self.zero_end_of_turn:
            return (codes == 0).all(dim=-1)
        return codes[..., 0] == self.codebook_size

    def check_codes(self, codes: Tensor) -> None:
        """ValueError unless `codes` is (T, K), or (T, fewer) of the first codebooks, with every code in [0, V)."""
        K, V = self.n_codebooks, self.codebook_size
        if codes.ndim != 2 or not 1 <= codes.size(1) <= K:
            raise ValueError(f"codes must be (T, 1..{K}), got {tuple(codes.shape)}")
        if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < V:
            raise ValueError(f"codes must lie in [0, {V}), got {int(codes.min())}..{int(codes.max())}")

    def _empty(self, n: int) -> _Items:
        tokens = torch.zeros(n, self.n_codebooks + 1, dtype=torch.int64)
        return _Items(
            tokens, torch.zeros_like(tokens, dtype=torch.bool), torch.full_like(tokens, IGNORE), torch.zeros(n)
        )

    def _text_items(self, text_ids: Sequence[int], n_prompt: int, clock: Clock, first: int = 0) -> _Items:
        """Rows of the ids first, first + 1, ... of a turn's text."""
        items = self._empty(len(text_ids))
        index = torch.arange(first, first + len(text_ids))
        items.tokens[:, -1] = torch.tensor(text_ids, dtype=torch.int64)
        items.mask[:, -1] = True
        items.wanted[:, -1] = torch.where(index >= n_prompt, items.tokens[:, -1], IGNORE)
        items.offsets[:] = self.speaking_rate(clock) * (index - n_prompt).clamp(min=0)
        return items

    def _audio_items(self, codes: Tensor, start: int, stop: int, n_frames: int | None) -> _Items:
        """Audio rows start..stop-1 of a turn; it has `n_frames` frames, or is not over yet if None."""
        S, K, C = self.n_semantic, self.n_codebooks, self.acoustic_delay
        items = self._empty(stop - start)
        row = torch.arange(start, stop)
        k = codes.size(1)  # fewer than K: the first codebooks, the others are not there
        for low, high, delay in ((0, min(S, k), 0), (S, k, C)):
            live = (row >= delay) & (row < len(codes) + delay)
            items.tokens[live, low:high] = codes[row[live] - delay, low:high]
            items.mask[live, low:high] = True
        inside = row < len(codes)
        items.wanted[inside, :k] = codes[row[inside]]
        if n_frames is not None:
            end = (row == n_frames).nonzero().squeeze(1)
            ends = slice(0, K if self.zero_end_of_turn else 1)
            items.tokens[end, ends] = items.wanted[end, ends] = self.end_of_turn
            items.mask[end, ends] = True
        items.offsets[:] = row.clamp(max=len(codes))
        return items

    def _place(self, items: _Items, order: Tensor, clock: Clock, prosody: Tensor | None = None) -> Rows:
        T = len(order)
        features = torch.full((N_PROSODY,), torch.nan) if prosody is None else prosody
        rows = Rows(
            items.tokens[order],
            items.mask[order],
            torch.full((T, self.n_codebooks + 1), IGNORE),
            torch.arange(clock.position, clock.position + T),
            torch.zeros(T, dtype=torch.int64),
            torch.zeros(T, dtype=torch.int64),
            torch.full((T,), clock.turn),
            clock.turn_start + items.offsets[order],
            features.expand(T, -1),
        )
        clock.position += T
        return rows


def concatenate(parts: Sequence[Rows]) -> Rows:
    """Rows one after the other."""
    return Rows(*(torch.cat(columns) for columns in zip(*parts, strict=True)))
