"""What a training step hides of the frames already spoken, so that the model reads the text and not its own history.

A frame's K codes are a fingerprint of one moment of the training data: a model that sees them all looks up what came
next and never learns to read. Three ways to blur them, all in the input only; targets, times and the depth decoder's
input stay as they are. Sources: dropped and replaced history is scheduled sampling's cure for exposure bias (Bengio et
al. 2015, arXiv 1506.03099) in its cheapest form, noise; fewer codebooks fed back follows the design of this project.

Letters: B batch, T rows, K codebooks, V codes per codebook.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from frames import Rows


@dataclass(frozen=True, kw_only=True)
class Corruption:
    """Shares; ValueError for those that cannot work."""

    drop_frames: float = 0.0  # of the frames: none of their codes is seen
    replace_codes: float = 0.0  # of the codes: another one is seen
    shallow: float = 0.0  # of the turns: only their first codebooks are seen, how many is drawn

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            if not 0 <= getattr(self, f.name) < 1:
                raise ValueError(f"{f.name}={getattr(self, f.name)} must be at least 0 and less than 1")

    def __bool__(self) -> bool:
        return any(dataclasses.astuple(self))


def corrupt(rows: Rows, how: Corruption, codebook_size: int, seeds: Sequence[int]) -> tuple[Rows, Tensor]:
    """(B, T) rows and a seed for each -> rows with other codes in places, and (B, T, K + 1) what is to be embedded.

    Text is never touched, nor are special codes such as the end of turn (csm-1b's is an ordinary frame, which is).
    """
    tokens, shown = rows.tokens.clone(), rows.mask.clone()
    for place, seed in enumerate(seeds):
        length = int((rows.documents[place] >= 0).sum())  # draws must not depend on the padding
        row = (column[place, :length] for column in (rows.tokens, rows.mask, rows.turns))
        tokens[place, :length], shown[place, :length] = _corrupt_one(*row, how, codebook_size, seed)
    return rows._replace(tokens=tokens), shown


def _corrupt_one(
    tokens: Tensor, mask: Tensor, turns: Tensor, how: Corruption, codebook_size: int, seed: int
) -> tuple[Tensor, Tensor]:
    """(T, K + 1) tokens and mask, (T,) turns of one row."""
    random = torch.Generator().manual_seed(seed)
    T, K = tokens.size(0), tokens.size(1) - 1
    codes = torch.zeros_like(mask)
    codes[:, :K] = mask[:, :K] & (tokens[:, :K] < codebook_size)  # (T, K + 1) real codes
    other = torch.randint(0, codebook_size, tokens.shape, generator=random)
    replaced = codes & (torch.rand(tokens.shape, generator=random) < how.replace_codes)
    hidden = torch.rand(T, 1, generator=random) < how.drop_frames  # (T, 1)

    n_turns = int(turns.max()) + 1
    depth = torch.randint(1, K, (n_turns,), generator=random)  # codebooks that a shallow turn shows
    depth[torch.rand(n_turns, generator=random) >= how.shallow] = K
    hidden = hidden | (torch.arange(K + 1) >= depth[turns][:, None])
    return torch.where(replaced, other, tokens), mask & ~(codes & hidden)
