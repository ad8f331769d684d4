"""Discriminators of the speech codec: they tell recordings from reconstructions and are thrown away after training.

Complex spectra at several scales (EnCodec, arXiv 2210.13438, 3.4) and periods (HiFi-GAN, arXiv 2010.05646, 2.3), hinge
losses and feature matching as in EnCodec. Knows nothing of the codec. Letters: B batch, N samples.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from audio import SAMPLE_RATE

SLOPE = 0.2  # of leaky ReLU
COMPRESSION = 0.3  # power of the magnitudes: beside the loudest bins half of the others are all but zero


@dataclass(frozen=True)
class DiscriminatorConfig:
    windows: tuple[int, ...]  # samples, of the spectra
    channels: int  # of a spectrum's feature maps
    periods: tuple[int, ...]  # samples
    period_channels: tuple[int, ...]  # one per layer
    samples: int  # of each crop that they hear in a step, at most


PERIODS = (2, 3, 5, 7, 11)
DISCRIMINATORS = {
    "light": DiscriminatorConfig((1024, 512, 256), 8, PERIODS, (4, 16, 64, 128, 128), 8192),
    "full": DiscriminatorConfig((2048, 1024, 512, 256, 128), 32, PERIODS, (32, 128, 512, 1024, 1024), SAMPLE_RATE),
}


class SpectrumDiscriminator(nn.Module):
    """Convolutions over the real and imaginary part of one spectrum; time dilated, frequency strided."""

    def __init__(self, window: int, channels: int):
        super().__init__()
        self.register_buffer("window", torch.hann_window(window), persistent=False)
        layers = [nn.Conv2d(2, channels, (3, 9), padding=(1, 4))]
        layers += [
            nn.Conv2d(channels, channels, (3, 9), stride=(1, 2), dilation=(d, 1), padding=(d, 4)) for d in (1, 2, 4)
        ]
        layers += [nn.Conv2d(channels, channels, 3, padding=1), nn.Conv2d(channels, 1, 3, padding=1)]
        self.layers = _normalised(layers)

    def forward(self, wave: Tensor) -> list[Tensor]:
        """(B, N) -> feature maps of every layer, the last one the verdicts (B, 1, frames, bins)."""
        size = len(self.window)
        with torch.autocast(wave.device.type, enabled=False):
            spectrum = torch.stft(
                wave.float(), size, size // 4, window=self.window, normalized=True, center=False, return_complex=True
            )
            parts = torch.view_as_real(spectrum)  # (B, bins, frames, 2)
            parts = parts * (parts.square().sum(dim=3, keepdim=True) + 1e-7) ** ((COMPRESSION - 1) / 2)
        return _features(self.layers, parts.permute(0, 3, 2, 1))


class PeriodDiscriminator(nn.Module):
    """Convolutions along every `period`-th sample."""

    def __init__(self, period: int, channels: tuple[int, ...]):
        super().__init__()
        self.period = period
        widths = (1, *channels)
        strides = [3] * (len(channels) - 1) + [1]
        layers = [
            nn.Conv2d(before, after, (5, 1), (stride, 1), padding=(2, 0))
            for before, after, stride in zip(widths[:-1], channels, strides, strict=True)
        ]
        layers.append(nn.Conv2d(channels[-1], 1, (3, 1), padding=(1, 0)))
        self.layers = _normalised(layers)

    def forward(self, wave: Tensor) -> list[Tensor]:
        """(B, N) -> feature maps of every layer, the last one the verdicts (B, 1, rows, period)."""
        padded = F.pad(wave[:, None], (0, -wave.size(1) % self.period), mode="reflect")
        return _features(self.layers, padded.unflatten(2, (-1, self.period)))


def _normalised(layers: list[nn.Conv2d]) -> nn.ModuleList:
    """Weights that keep the size of what goes through: torch's own make it smaller by each layer, until nothing is told
    from nothing and there is no gradient to learn from."""
    for layer in layers:
        nn.init.kaiming_normal_(layer.weight, a=SLOPE)
        nn.init.zeros_(layer.bias)
    return nn.ModuleList(weight_norm(layer) for layer in layers)


def _features(layers: nn.ModuleList, x: Tensor) -> list[Tensor]:
    maps = []
    for layer in layers[:-1]:
        x = F.leaky_relu(layer(x), SLOPE)
        maps.append(x)
    return [*maps, layers[-1](x)]


class Discriminators(nn.ModuleList):
    """All of them; each gives the feature maps of its layers, verdicts last."""

    def __init__(self, config: DiscriminatorConfig):
        super().__init__(
            [SpectrumDiscriminator(window, config.channels) for window in config.windows]
            + [PeriodDiscriminator(period, config.period_channels) for period in config.periods]
        )

    def forward(self, wave: Tensor) -> list[list[Tensor]]:
        """(B, N), N of at least the widest window."""
        return [discriminator(wave) for discriminator in self]


def telling_loss(real: list[list[Tensor]], estimate: list[list[Tensor]]) -> Tensor:
    """() hinge loss of the discriminators: verdicts above 1 on recordings, below -1 on reconstructions."""
    pairs = zip(real, estimate, strict=True)
    return sum(F.relu(1 - r[-1].float()).mean() + F.relu(1 + e[-1].float()).mean() for r, e in pairs) / len(real)


def fooling_loss(
    real: list[list[Tensor]], estimate: list[list[Tensor]], over_processes: Callable[[Tensor], Tensor] = lambda own: own
) -> Tensor:
    """() of the codec: verdicts on reconstructions upwards, and feature maps like those of the recordings.

    Feature maps weigh 4 to 4 as in EnCodec; their distance is relative to their own size, the mean `over_processes`.
    """
    total = 0.0
    for r, e in zip(real, estimate, strict=True):
        own = [theirs.detach().float() for theirs in r[:-1]]
        sizes = over_processes(torch.stack([theirs.abs().mean() for theirs in own])).clamp(min=1e-6)
        maps = torch.stack([F.l1_loss(ours.float(), theirs) for ours, theirs in zip(e[:-1], own, strict=True)])
        total = total + F.relu(1 - e[-1].float()).mean() + (maps / sizes).mean()
    return total / len(real)
