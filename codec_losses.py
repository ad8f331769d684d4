"""Spectral distances between a waveform and its reconstruction: losses of the codec and a measure of its quality.

Knows nothing of the model. Dims: B batch, N samples. Audio is 24 kHz mono in [-1, 1].
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
import torchaudio.functional as AF
from torch import Tensor, nn

from audio import SAMPLE_RATE

SCALES = ((256, 20), (512, 40), (1024, 80), (2048, 160))  # window in samples and mel bands, hop a quarter of the window
FLOOR = 1e-4  # of amplitudes under the logarithm or a power, -80 dB: fainter differences do not count
LOUDNESS = 0.3  # power of the amplitude that loudness goes with, about (Stevens 1957, On the psychophysical law)


class SpectralTerms(NamedTuple):
    mel: Tensor  # () mean over the scales of |log10 mel - log10 mel|
    magnitude: Tensor  # () mean over the scales of |magnitude - magnitude|
    loudness: Tensor  # () the same of magnitudes to the power `LOUDNESS`


class SpectralDistance(nn.Module):
    """L1 between log-mel, linear (both as in DAC, arXiv 2306.06546, 3.5) and compressed spectra at four scales."""

    def __init__(self):
        super().__init__()
        for size, n_mels in SCALES:
            bank = AF.melscale_fbanks(size // 2 + 1, 0.0, SAMPLE_RATE / 2, n_mels, SAMPLE_RATE)
            self.register_buffer(f"bank_{size}", bank, persistent=False)
            self.register_buffer(f"window_{size}", torch.hann_window(size), persistent=False)

    def forward(self, estimate: Tensor, target: Tensor) -> SpectralTerms:
        """(B, N), (B, N) -> the terms. N of at least 2048 samples."""
        mel, magnitude, loudness = [], [], []
        with torch.autocast(estimate.device.type, enabled=False):
            for size, _ in SCALES:
                bank, window = getattr(self, f"bank_{size}"), getattr(self, f"window_{size}")
                ours, theirs = (spectrum(wave.float(), window) for wave in (estimate, target))  # (B, frames, bins)
                magnitude.append(F.l1_loss(ours, theirs))
                loudness.append(F.l1_loss(*((amplitude + FLOOR) ** LOUDNESS for amplitude in (ours, theirs))))
                logs = [(amplitude @ bank).clamp(min=FLOOR).log10() for amplitude in (ours, theirs)]
                mel.append(F.l1_loss(*logs))
        return SpectralTerms(*(torch.stack(term).mean() for term in (mel, magnitude, loudness)))


def spectrum(wave: Tensor, window: Tensor) -> Tensor:
    """(B, N) -> magnitudes (B, frames, bins), scaled so that white noise has its own level in each bin."""
    size = len(window)
    padded = F.pad(wave, (size // 2, size // 2), mode="reflect")
    frames = padded.unfold(1, size, size // 4) * (window / window.square().sum().sqrt())  # (B, frames, size)
    return torch.fft.rfft(frames).abs()  # a quarter faster than torch.stft here; the gradient of abs() at 0 is 0
