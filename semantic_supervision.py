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

from codec_batches import SPREAD, SemanticBatch


class SemanticNats(NamedTuple):
    characters: Tensor  # () nats per character, mean over the utterances
    speaker: Tensor  # () nats; teaches the head alone
    confusion: Tensor  # () nats of that head from knowing nothing; teaches the latents alone
    teacher: Tensor  # () 1 - cosine to the teacher's features, mean over the frames; 0 without a teacher


class SemanticHeads(nn.Module):
    """Characters, speaker and a teacher's features from the quantised semantic latents; thrown away after training."""

    def __init__(self, dim: int, n_characters: int, n_speakers: int, feature_width: int = 0, width: int = 192):
        super().__init__()
        self.spread = nn.Linear(dim, SPREAD * width)
        self.mix = nn.Sequential(
            nn.GELU(),
            nn.Conv1d(width, width, 7, padding=3),
            nn.GELU(),
            nn.Conv1d(width, width, 7, padding=3),
            nn.GELU(),
        )
        self.characters_head = nn.Linear(width, n_characters + 1)
        self.speaker_head = nn.Sequential(nn.Linear(dim, width), nn.GELU(), nn.Linear(width, n_speakers))
        self.teacher_head = nn.Linear(dim, feature_width) if feature_width else None

    def log_probabilities(self, latents: Tensor) -> Tensor:
        """(B, T, D) -> (B, SPREAD * T, characters + blank)"""
        fine = self.spread(latents).unflatten(2, (SPREAD, -1)).flatten(1, 2)  # (B, SPREAD * T, width)
        fine = self.mix(fine.transpose(1, 2)).transpose(1, 2)
        return self.characters_head(fine).float().log_softmax(dim=-1)

    def forward(self, latents: Tensor, batch: SemanticBatch) -> SemanticNats:
        """(B, T, D) of whole utterances."""
        log_probabilities = self.log_probabilities(latents)
        nats = F.ctc_loss(
            log_probabilities.transpose(0, 1),
            batch.characters,
            SPREAD * batch.n_frames,
            batch.n_characters,
            reduction="none",
        )  # (B,)
        live = torch.arange(latents.size(1), device=latents.device) < batch.n_frames[:, None]  # (B, T)
        speaker = F.cross_entropy(self.speakers_of(latents.detach(), live), batch.speakers)
        told = self.teacher_distance(latents, batch.features, live)
        return SemanticNats((nats / batch.n_characters).mean(), speaker, self.confusion(latents, live), told)

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
