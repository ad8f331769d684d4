"""What a listener would notice of a reconstruction, as losses: the disturbance behind PESQ and the correlation of STOI.

Both follow the published measures without what has no gradient or is of no use for an aligned pair: time alignment,
frames of silence taken out one by one. `Hearing` agrees with the measures (`tests/test_hearing_losses.py`), it does not
replace them. A codec that was trained with it has been trained towards its PESQ and STOI: judge it by others as well.

Knows nothing of the model. Dims: B batch, N samples, F frames, K bands. Audio is 24 kHz mono in [-1, 1].
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from audio import SAMPLE_RATE

MIN_SAMPLES = 9_600  # both measures look at spans of about 0.4 s

# ---- ITU-T P.862 and P.862.2: frames of 32 ms, half overlapping, up to 8 kHz -----------------------------------------

FRAME = 768  # samples; bins 31.25 Hz apart, as in the standard (512 at 16 kHz)
BINS = FRAME // 3  # 0 to 8 kHz
BARK = 0.45  # width of a band; the standard's 49 bands are of about this width
SPEECH_HZ = (325.0, 3250.0)  # the level is set by what lies between
SPEECH_POWER = 1e7
# of the standard, whose windows are shorter, and whose powers in a band are per 0.32 Bark, times 100
TO_PRESSURE = 6.910853e-6 * (512 / FRAME) ** 2 * 100 * 0.32 / BARK
TO_SONE = 0.1866055
ZWICKER = 0.23  # power of the pressure that loudness goes with
TELEPHONE = ((2.740826, -5.4816519, 2.740826), (1.0, -1.9444777, 0.94597794))  # P.862.2, the high-pass at 16 kHz
WORST = 45.0  # disturbance of a frame
SYMMETRIC, ASYMMETRIC = 0.1, 0.0309  # PESQ before its mapping is 4.5 less these times the disturbances

# ---- STOI (Taal et al. 2011, IEEE TASLP 19(7)): frames of 25.6 ms, half overlapping, third octaves -------------------

SHORT = 616  # samples, 25.7 ms
THIRDS, LOWEST_HZ = 15, 150.0
SEGMENT = 30  # frames, 0.39 s
CLIP = 1 + 10 ** (15 / 20)  # a band may exceed the original by so much
QUIET = 1e-4  # of the loudest segment's energy; fainter ones do not count


class Heard(NamedTuple):
    disturbance: Tensor  # (B,) 4.5 less PESQ before its mapping; 0 for equal signals
    unlike: Tensor  # (B,) 1 less STOI


class Hearing(nn.Module):
    def __init__(self):
        super().__init__()
        hertz = torch.arange(1, BINS + 1) * (SAMPLE_RATE / FRAME)
        bark = bark_of(hertz)
        band = ((bark - bark[0]) / BARK).long()  # (BINS,)
        bank = F.one_hot(band).double()  # (BINS, K), every band has a bin
        z = torch.exp(-2j * torch.pi * hertz.double() / 16_000)
        above, below = (sum(c * z**k for k, c in enumerate(part)) for part in TELEPHONE)
        centres = (bank * hertz[:, None]).sum(dim=0) / bank.sum(dim=0)
        stretch = (6 / (bark_of(centres) + 2)).clamp(1, 2) ** 0.15  # low bands grow louder faster
        thirds = LOWEST_HZ * 2 ** (torch.arange(THIRDS) / 3)
        fine = torch.arange(SHORT + 1) * (SAMPLE_RATE / 2 / SHORT)
        inside = (fine[:, None] >= thirds * 2 ** (-1 / 6)) & (fine[:, None] < thirds * 2 ** (1 / 6))
        for name, value in {
            "speech": (hertz >= SPEECH_HZ[0]) & (hertz <= SPEECH_HZ[1]),
            "bank": bank * (above / below).abs().square()[:, None] * TO_PRESSURE,  # (BINS, K)
            "threshold": 10 ** (quiet_db(centres) / 10),  # (K,)
            "power": ZWICKER * stretch,  # (K,)
            "window": torch.hann_window(FRAME),
            "thirds": inside,  # (SHORT + 1, THIRDS)
            "short_window": torch.hann_window(SHORT),
        }.items():
            self.register_buffer(name, value.float(), persistent=False)

    def forward(self, estimate: Tensor, target: Tensor) -> Heard:
        """(B, N), (B, N) -> the losses. N of at least `MIN_SAMPLES`."""
        with torch.autocast(estimate.device.type, enabled=False):
            pair = estimate.float(), target.float()
            return Heard(self.disturbance(*pair), self.unlike(*pair))

    # -- PESQ

    def disturbance(self, estimate: Tensor, target: Tensor) -> Tensor:
        """(B, N), (B, N) -> (B,)"""
        ours, theirs = self.pressures(estimate), self.pressures(target)  # (B, F, K)
        told = self.audible(theirs, 100).sum(dim=2, keepdim=True) >= 1e7  # (B, F, 1) frames of speech
        theirs = theirs * self.colour(ours, theirs, told)
        ours = ours * self.gains(ours, theirs)
        loud, wanted = self.loudness(ours), self.loudness(theirs)
        masked = 0.25 * torch.minimum(loud, wanted)
        differ = F.relu((loud - wanted).abs() - masked)  # (B, F, K)
        added = ((ours + 50) / (theirs + 50)) ** 1.2
        added = torch.where(added < 3, 0, added.clamp(max=12))  # what was added disturbs more than what is lacking
        weight = ((self.audible(theirs, 1).sum(dim=2) + 1e5) / 1e7) ** -0.04  # (B, F) soft frames count more
        width = BARK * differ.size(2)
        both = BARK * (width * (differ.square().sum(dim=2) + 1e-9)).sqrt() * weight  # (B, F)
        more = BARK * (differ * added).sum(dim=2) * weight
        return SYMMETRIC * over_time(both) + ASYMMETRIC * over_time(more)

    def pressures(self, wave: Tensor) -> Tensor:
        """(B, N) -> powers in the bands (B, F, K), speech at the standard's listening level."""
        frames = wave.unfold(1, FRAME, FRAME // 2) * self.window
        power = torch.view_as_real(torch.fft.rfft(frames)[..., 1 : BINS + 1]).square().sum(dim=3)  # (B, F, BINS)
        # by Parseval, the mean square of what lies between; the window takes 3/8
        level = 2 * (power * self.speech).sum(dim=2).mean(dim=1) / (FRAME * FRAME * 3 / 8)  # (B,)
        return (power @ self.bank) * (SPEECH_POWER / (level + 1e-9))[:, None, None]

    def audible(self, pressures: Tensor, times: float) -> Tensor:
        """What lies above so many times the threshold of hearing; the rest is 0."""
        return pressures * (pressures > times * self.threshold)

    def colour(self, ours: Tensor, theirs: Tensor, told: Tensor) -> Tensor:
        """How the reconstruction's mean spectrum differs, (B, 1, K): half forgiven."""
        means = [(self.audible(x, 100) * told).mean(dim=1, keepdim=True) + 1000 for x in (ours, theirs)]
        return (means[0] / means[1]).clamp(0.01, 100)

    def gains(self, ours: Tensor, theirs: Tensor) -> Tensor:
        """How its level differs from frame to frame, (B, F, 1): forgiven where it changes slowly."""
        levels = [self.audible(x, 1).sum(dim=2, keepdim=True) + 5e3 for x in (ours, theirs)]
        ratio = levels[1] / levels[0]
        before = torch.cat([ratio[:, :1], ratio[:, :-1]], dim=1)
        return (0.8 * ratio + 0.2 * before).clamp(3e-4, 5)

    def loudness(self, pressures: Tensor) -> Tensor:
        """Zwicker's law: pressures (B, F, K) -> sone per Bark."""
        above = (0.5 + 0.5 * (pressures / self.threshold).clamp(min=1)) ** self.power - 1
        return TO_SONE * (self.threshold / 0.5) ** self.power * above

    # -- STOI

    def unlike(self, estimate: Tensor, target: Tensor) -> Tensor:
        """(B, N), (B, N) -> (B,)"""
        ours, theirs = self.segments(estimate), self.segments(target)  # (B, S, THIRDS, SEGMENT)
        ours = ours * (theirs.norm(dim=3, keepdim=True) / (ours.norm(dim=3, keepdim=True) + 1e-9))
        ours = torch.minimum(ours, CLIP * theirs)
        energy = theirs.square().sum(dim=(2, 3))  # (B, S)
        ours, theirs = (x - x.mean(dim=3, keepdim=True) for x in (ours, theirs))
        alike = F.cosine_similarity(ours, theirs, dim=3, eps=1e-9).mean(dim=2)  # (B, S)
        counts = energy > QUIET * energy.amax(dim=1, keepdim=True)
        return ((1 - alike) * counts).sum(dim=1) / counts.sum(dim=1).clamp(min=1)

    def segments(self, wave: Tensor) -> Tensor:
        """(B, N) -> envelopes of all spans of `SEGMENT` frames, (B, S, THIRDS, SEGMENT)."""
        frames = wave.unfold(1, SHORT, SHORT // 2) * self.short_window
        power = torch.view_as_real(torch.fft.rfft(frames, n=2 * SHORT)).square().sum(dim=3) @ self.thirds
        return (power + 1e-9).sqrt().unfold(1, SEGMENT, 1)


def bark_of(hertz: Tensor) -> Tensor:
    """Traunmüller 1990, JASA 88(1), eq. 6."""
    return 26.81 * hertz / (1960 + hertz) - 0.53


def quiet_db(hertz: Tensor) -> Tensor:
    """Threshold of hearing in dB of sound pressure, Terhardt 1979, Hearing Research 1(2), eq. 1."""
    khz = hertz / 1000
    return 3.64 * khz**-0.8 - 6.5 * torch.exp(-0.6 * (khz - 3.3) ** 2) + 1e-3 * khz**4


def over_time(disturbance: Tensor) -> Tensor:
    """(B, F) -> (B,): the worst moments of spans of 0.3 s, then their root mean square."""
    spans = disturbance.clamp(max=WORST).unfold(1, 20, 10)  # (B, S, 20)
    return ((spans**6).mean(dim=2) + 1e-9).pow(1 / 3).mean(dim=1).sqrt()
