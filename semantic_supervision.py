"""Heads that make the semantic codebooks carry the words and not the speaker; thrown away after training.

At 12.5 frames per second a text has more characters than its speech has frames, so the head spreads every frame over 4
sub-frames (CTC: Graves et al. 2006, "Connectionist Temporal Classification"; reversed gradient: arXiv 1409.7495).
Letters: B batch, T frames, D width of the latents.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from codec_batches import SPREAD, SemanticBatch
from residual_quantizer import scale_gradient


class SemanticNats(NamedTuple):
    characters: Tensor  # () nats per character, mean over the utterances
    speaker: Tensor  # () nats; its gradient reaches the latents reversed
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

    def forward(self, latents: Tensor, batch: SemanticBatch, reversal: float) -> SemanticNats:
        """(B, T, D); the speaker's gradient is multiplied by -`reversal`."""
        log_probabilities = self.log_probabilities(latents)
        nats = F.ctc_loss(
            log_probabilities.transpose(0, 1),
            batch.characters,
            SPREAD * batch.n_frames,
            batch.n_characters,
            reduction="none",
        )  # (B,)
        live = torch.arange(latents.size(1), device=latents.device) < batch.n_frames[:, None]  # (B, T)
        speakers = self.speaker_head(scale_gradient(latents, -reversal)).float()  # (B, T, speakers)
        speakers = (speakers * live[..., None]).sum(dim=1) / batch.n_frames[:, None]
        speaker = F.cross_entropy(speakers, batch.speakers)
        return SemanticNats(
            (nats / batch.n_characters).mean(), speaker, self.teacher_distance(latents, batch.features, live)
        )

    def teacher_distance(self, latents: Tensor, features: Tensor, live: Tensor) -> Tensor:
        """(B, T, D), (B, T, teacher's D) and the frames that count (B, T) -> ().

        As Mimi is distilled (Moshi, arXiv 2410.00037, 3.3.2).
        """
        if self.teacher_head is None:
            return latents.new_zeros(())
        cosine = F.cosine_similarity(self.teacher_head(latents).float(), features, dim=2)  # (B, T)
        return (((1 - cosine) * live).sum(dim=1) / live.sum(dim=1)).mean()
