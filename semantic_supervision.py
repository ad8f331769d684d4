"""Heads that make the semantic codebooks carry the words and not the speaker; thrown away after training.

At 12.5 frames per second a text has more characters than its speech has frames, so the head spreads every frame over 4
sub-frames (CTC: Graves et al. 2006, "Connectionist Temporal Classification"). The speaker is taken out against a head
that looks for it (as in arXiv 1409.7495, but towards equal chances instead of along the reversed gradient).
Letters: B batch, T frames, D width of the latents.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from codec_batches import NO_PHONE, SPREAD, SemanticBatch
from rvq_tokenizer import KERNEL, ConvNeXtBlock

READER_BLOCKS = 3


class SemanticNats(NamedTuple):
    characters: Tensor  # () nats per character, mean over the utterances
    speaker: Tensor  # () nats; teaches the head alone
    confusion: Tensor  # () nats of that head from knowing nothing; teaches the latents alone
    teacher: Tensor  # () 1 - cosine to the teacher's features, mean over the frames; 0 without a teacher
    phones: Tensor  # () nats per sub-frame whose phone is known, mean over the utterances; 0 without an alignment


class Reader(nn.Module):
    """Log-probabilities of characters and CTC's blank from latents: ConvNeXt blocks that see both sides."""

    def __init__(self, dim: int, n_characters: int, width: int):
        super().__init__()
        self.spread = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, SPREAD * width))
        self.blocks = nn.ModuleList(ConvNeXtBlock(width) for _ in range(READER_BLOCKS))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, n_characters + 1))

    def forward(self, latents: Tensor, live: Tensor) -> Tensor:
        """(B, T, D) and the frames that count (B, T) -> (B, SPREAD * T, characters + blank); padding counts nothing."""
        live = live.repeat_interleave(SPREAD, dim=1)[..., None]  # (B, SPREAD * T, 1)
        x = self.spread(latents).unflatten(2, (SPREAD, -1)).flatten(1, 2) * live  # (B, SPREAD * T, width)
        for block in self.blocks:
            x = (x + block(F.pad(x, (0, 0, KERNEL // 2, KERNEL // 2)))) * live
        return self.head(x).float().log_softmax(dim=-1)

    def nats(self, latents: Tensor, batch: SemanticBatch) -> Tensor:
        """() nats per character of whole utterances."""
        log_probabilities = self(latents, batch.live(latents.size(1))).transpose(0, 1)
        lengths = (SPREAD * batch.n_frames, batch.n_characters)
        nats = F.ctc_loss(log_probabilities, batch.characters, *lengths, reduction="none")  # (B,)
        return (nats / batch.n_characters).mean()


class SemanticHeads(nn.Module):
    """Characters, speaker, a teacher's features and phones from the quantised semantic latents."""

    def __init__(
        self,
        dim: int,
        n_characters: int,
        n_speakers: int,
        feature_width: int = 0,
        n_phones: int = 0,
        width: int = 192,
    ):
        super().__init__()
        self.reader = Reader(dim, n_characters, width)
        self.speaker_head = nn.Sequential(nn.Linear(dim, width), nn.GELU(), nn.Linear(width, n_speakers))
        self.teacher_head = nn.Linear(dim, feature_width) if feature_width else None
        self.phone_head = nn.Linear(dim, SPREAD * n_phones) if n_phones else None

    def forward(self, latents: Tensor, batch: SemanticBatch) -> SemanticNats:
        """(B, T, D) of whole utterances."""
        live = batch.live(latents.size(1))
        return SemanticNats(
            self.reader.nats(latents, batch),
            F.cross_entropy(self.speakers_of(latents.detach(), live), batch.speakers),
            self.confusion(latents, live),
            self.teacher_distance(latents, batch.features, live),
            self.phone_nats(latents, batch.phones),
        )

    def speakers_of(self, latents: Tensor, live: Tensor, frozen: bool = False) -> Tensor:
        """(B, T, D) and the frames that count (B, T) -> (B, speakers) log-odds, means over the frames."""
        weights = {name: p.detach() if frozen else p for name, p in self.speaker_head.named_parameters()}
        scores = torch.func.functional_call(self.speaker_head, weights, latents).float() * live[..., None]
        return scores.sum(dim=1) / live.sum(dim=1, keepdim=True)

    def confusion(self, latents: Tensor, live: Tensor) -> Tensor:
        """() nats by which the speaker head, as it is, is from giving every speaker the same chance; for the latents.

        Bounded, unlike the head's own loss reversed, along which the latents run away.
        """
        log_chances = self.speakers_of(latents, live, frozen=True).log_softmax(dim=1)
        return -log_chances.mean() - math.log(log_chances.size(1))

    def teacher_distance(self, latents: Tensor, features: Tensor, live: Tensor) -> Tensor:
        """(B, T, D), (B, T, teacher's D) and the frames that count (B, T) -> ().

        As Mimi is distilled (Moshi, arXiv 2410.00037, 3.3.2).
        """
        if self.teacher_head is None:
            return latents.new_zeros(())
        cosine = F.cosine_similarity(self.teacher_head(latents).float(), features, dim=2)  # (B, T)
        return (((1 - cosine) * live).sum(dim=1) / live.sum(dim=1)).mean()

    def phone_nats(self, latents: Tensor, phones: Tensor) -> Tensor:
        """(B, T, D) and the phones (B, SPREAD * T), NO_PHONE where none is known -> ().

        A frame lasts longer than most phones, so every sub-frame is asked for its own, of its frame alone: beside the
        characters, whose order is asked for and not their time (PAST, arXiv 2505.14470, has both).
        """
        if self.phone_head is None:
            return latents.new_zeros(())
        scores = self.phone_head(latents).float().unflatten(2, (SPREAD, -1)).flatten(1, 2)  # (B, SPREAD * T, phones)
        nats = F.cross_entropy(scores.transpose(1, 2), phones, ignore_index=NO_PHONE, reduction="none")
        return (nats.sum(dim=1) / (phones != NO_PHONE).sum(dim=1).clamp(min=1)).mean()


def disagreement(one: Tensor, other: Tensor, live: Tensor) -> Tensor:
    """(B, T, D) latents of two disguises of the same utterances and the frames that count (B, T) -> (): mean squared
    distance, in units of that of two frames of the utterance, so that small latents are no better than large ones."""
    share = (live / live.sum(dim=1, keepdim=True))[..., None]  # (B, T, 1)

    def spread(x: Tensor) -> Tensor:
        return ((x - (share * x).sum(dim=1, keepdim=True)).square() * share).sum(dim=(1, 2))  # (B,)

    apart = ((one - other).square() * share).sum(dim=(1, 2))  # (B,)
    return (apart / (spread(one) + spread(other)).clamp(min=1e-6)).mean()
