"""Heads that make the semantic codebooks carry the words and not the speaker; thrown away after training.

At 12.5 frames per second a text has more characters than its speech has frames, so the head spreads every frame over 4
sub-frames (CTC: Graves et al. 2006, "Connectionist Temporal Classification"; reversed gradient: arXiv 1409.7495).
Letters: B batch, T frames, D width of the latents.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from codec_batches import SPREAD, SemanticBatch
from residual_quantizer import scale_gradient


class SemanticHeads(nn.Module):
    """Characters and speaker from the quantised semantic latents; thrown away after training."""

    def __init__(self, dim: int, n_characters: int, n_speakers: int, width: int = 192):
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

    def log_probabilities(self, latents: Tensor) -> Tensor:
        """(B, T, D) -> (B, SPREAD * T, characters + blank)"""
        fine = self.spread(latents).unflatten(2, (SPREAD, -1)).flatten(1, 2)  # (B, SPREAD * T, width)
        fine = self.mix(fine.transpose(1, 2)).transpose(1, 2)
        return self.characters_head(fine).float().log_softmax(dim=-1)

    def forward(self, latents: Tensor, batch: SemanticBatch, reversal: float) -> tuple[Tensor, Tensor]:
        """(B, T, D) -> nats per character, and nats of the speaker, whose gradient reaches the latents reversed."""
        log_probabilities = self.log_probabilities(latents)
        nats = F.ctc_loss(
            log_probabilities.transpose(0, 1),
            batch.characters,
            SPREAD * batch.n_frames,
            batch.n_characters,
            reduction="sum",
        )
        live = torch.arange(latents.size(1), device=latents.device) < batch.n_frames[:, None]  # (B, T)
        mean = (latents * live[..., None]).sum(dim=1) / live.sum(dim=1, keepdim=True)
        speakers = self.speaker_head(scale_gradient(mean, -reversal))
        return nats / batch.n_characters.sum(), F.cross_entropy(speakers.float(), batch.speakers)
