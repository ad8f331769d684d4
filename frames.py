"""The (T, K + 1) layout shared by training and generation: turns to rows, masks, end of turn, targets.

Columns 0..K-1 of a row hold one code per codebook, column K a text id; a mask of the same shape says which entries are
real. A turn is its text rows, then its audio frames, then one end-of-turn frame; turns follow each other. Knows nothing
of models, files or tokenizers' insides. Letters: T rows, K codebooks, V codes per codebook.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

IGNORE = -100  # target that carries no loss


class Turn(NamedTuple):
    """One turn of a conversation, as ids."""

    text_ids: list[int]  # BOS "[speaker]text" EOS
    codes: Tensor | None  # (T, K) int64 frames of its audio; None: still to be spoken


class Rows(NamedTuple):
    """A sequence for the backbone."""

    tokens: Tensor  # (T, K + 1) int64
    mask: Tensor  # (T, K + 1) bool


@dataclass(frozen=True, kw_only=True)
class FrameLayout:
    """How many codebooks there are and what ends a turn.

    End of turn is an own code V in codebook 0, the other columns masked.
    Deviation: csm-1b uses an all-zero frame, also a legal frame of its codec; `zero_end_of_turn` does the same.
    """

    n_codebooks: int
    codebook_size: int
    zero_end_of_turn: bool = False

    @property
    def end_of_turn(self) -> int:
        """The code in codebook 0 that ends a turn (0 only together with zeros in all others)."""
        return 0 if self.zero_end_of_turn else self.codebook_size

    def text_rows(self, text_ids: Sequence[int]) -> Rows:
        """n ids -> n rows with only the text column live."""
        tokens = torch.zeros(len(text_ids), self.n_codebooks + 1, dtype=torch.int64)
        tokens[:, -1] = torch.tensor(text_ids, dtype=torch.int64)
        mask = torch.zeros_like(tokens, dtype=torch.bool)
        mask[:, -1] = True
        return Rows(tokens, mask)

    def audio_rows(self, codes: Tensor) -> Rows:
        """(T, K) codes -> T rows with the code columns live. ValueError for codes that are not of this layout."""
        self.check_codes(codes)
        tokens = torch.zeros(len(codes), self.n_codebooks + 1, dtype=torch.int64)
        tokens[:, :-1] = codes
        mask = torch.ones_like(tokens, dtype=torch.bool)
        mask[:, -1] = False
        return Rows(tokens, mask)

    def end_rows(self) -> Rows:
        """The one end-of-turn frame."""
        tokens = torch.zeros(1, self.n_codebooks + 1, dtype=torch.int64)
        tokens[0, 0] = self.end_of_turn
        mask = torch.zeros_like(tokens, dtype=torch.bool)
        mask[0, : self.n_codebooks if self.zero_end_of_turn else 1] = True
        return Rows(tokens, mask)

    def turn_rows(self, turn: Turn) -> Rows:
        """All rows of one turn; without codes, its text rows only (the prompt of a reply)."""
        parts = [self.text_rows(turn.text_ids)]
        if turn.codes is not None:
            parts += [self.audio_rows(turn.codes), self.end_rows()]
        return concatenate(parts)

    def is_end_of_turn(self, codes: Tensor) -> Tensor:
        """(..., K) codes -> (...) bool: is this frame the end of a turn?"""
        if self.zero_end_of_turn:
            return (codes == 0).all(dim=-1)
        return codes[..., 0] == self.codebook_size

    def check_codes(self, codes: Tensor) -> None:
        """ValueError unless `codes` is (T, K) with every code in [0, V)."""
        K, V = self.n_codebooks, self.codebook_size
        if codes.ndim != 2 or codes.size(1) != K:
            raise ValueError(f"codes must be (T, {K}), got {tuple(codes.shape)}")
        if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < V:
            raise ValueError(f"codes must lie in [0, {V}), got {int(codes.min())}..{int(codes.max())}")


def turn_length(n_text: int, n_frames: int) -> int:
    """Rows of a turn with audio: text, frames, end of turn."""
    return n_text + n_frames + 1


def concatenate(parts: Sequence[Rows]) -> Rows:
    """Rows one after the other."""
    return Rows(torch.cat([part.tokens for part in parts]), torch.cat([part.mask for part in parts]))


def next_frame_targets(rows: Rows) -> Tensor:
    """(T, K) int64: what row t must predict, the codes of row t + 1; IGNORE where that row is text or masked.

    The hidden state of row t gives codebook 0 of the next frame and starts the depth decoder for the rest of it.
    """
    targets = torch.full_like(rows.tokens[:, :-1], IGNORE)
    following = rows.tokens[1:, :-1]
    targets[:-1] = torch.where(rows.mask[1:, :-1], following, IGNORE)
    return targets
