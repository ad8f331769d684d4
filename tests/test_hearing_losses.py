"""The losses go with PESQ and STOI themselves, vanish for equal signals, and have gradients everywhere."""

import numpy as np
import pytest
import torch
import torchaudio.functional as AF
from conftest import voice

from hearing_losses import MIN_SAMPLES, Hearing

RATE = 24_000


@pytest.fixture(scope="module")
def hearing() -> Hearing:
    return Hearing()


def speech(seconds: float = 3.0) -> torch.Tensor:
    """(1, N), with pauses."""
    syllables = [voice(seconds / 6, pitch, rate=RATE) for pitch in (110, 160, 130, 200, 120, 180)]
    wave = np.concatenate([np.pad(part, (0, RATE // 20)) for part in syllables])
    return torch.from_numpy(wave).float()[None]


def worsened(wave: torch.Tensor) -> dict[str, torch.Tensor]:
    noise = torch.randn(wave.shape, generator=torch.Generator().manual_seed(0)) * wave.std()
    peak = wave.abs().max()
    return {
        **{f"noise at {db} dB": wave + noise * 10 ** (-db / 20) for db in (40, 30, 20, 10, 0)},
        **{f"clipped at {share}": wave.clamp(-share * peak, share * peak) for share in (0.5, 0.2, 0.05)},
        **{f"below {hertz} Hz": AF.lowpass_biquad(wave, RATE, hertz) for hertz in (3000, 1000)},
    }


def test_disturbance_goes_with_pesq(hearing):
    pesq = pytest.importorskip("pesq").pesq
    wave = speech()
    ours, theirs = [], []
    for estimate in worsened(wave).values():
        raw = 4.5 - hearing.disturbance(estimate, wave).item()
        ours.append(0.999 + 4 / (1 + np.exp(-1.3669 * raw + 3.8224)))  # P.862.2, the mapping
        theirs.append(pesq(16_000, *(AF.resample(x, RATE, 16_000)[0].numpy() for x in (wave, estimate)), "wb"))
    assert np.corrcoef(ours, theirs)[0, 1] > 0.9
    assert np.abs(np.subtract(ours, theirs)).mean() < 0.4


def test_unlikeness_goes_with_stoi(hearing):
    stoi = pytest.importorskip("pystoi").stoi
    wave = speech()
    ours = [1 - hearing.unlike(estimate, wave).item() for estimate in worsened(wave).values()]
    theirs = [stoi(wave[0].numpy(), estimate[0].numpy(), RATE) for estimate in worsened(wave).values()]
    assert np.corrcoef(ours, theirs)[0, 1] > 0.95
    assert np.abs(np.subtract(ours, theirs)).mean() < 0.05


def test_equal_signals_have_none_whatever_their_level(hearing):
    wave = speech()
    for level in (1.0, 0.1):
        heard = hearing(level * wave, wave)
        assert heard.disturbance < 0.02 and abs(heard.unlike) < 1e-3


@pytest.mark.parametrize("estimate", ["silence", "speech", "noise"])
@pytest.mark.parametrize("target", ["silence", "speech"])
def test_gradient_is_finite(hearing, estimate, target):
    waves = {"silence": torch.zeros(1, MIN_SAMPLES), "speech": speech()[:, :MIN_SAMPLES]}
    waves["noise"] = torch.randn(1, MIN_SAMPLES, generator=torch.Generator().manual_seed(0))
    wave = waves[estimate].clone().requires_grad_()
    sum(hearing(wave, waves[target])).sum().backward()
    assert torch.isfinite(wave.grad).all()


def test_each_signal_is_heard_on_its_own(hearing):
    wave = speech()
    pair = torch.cat([wave, 1e-3 * wave.flip(1)])
    noisy = pair + 0.1 * pair.std(dim=1, keepdim=True) * torch.randn_like(pair)
    together = hearing(noisy, pair)
    for row in range(2):
        alone = hearing(noisy[row : row + 1], pair[row : row + 1])
        for ours, theirs in zip(together, alone, strict=True):
            torch.testing.assert_close(ours[row : row + 1], theirs, rtol=1e-4, atol=1e-5)


def test_following_the_gradient_is_heard(hearing):
    wave = speech()[:, :MIN_SAMPLES]
    noise = torch.randn(wave.shape, generator=torch.Generator().manual_seed(0))
    estimate = (wave + 0.1 * wave.std() * noise).requires_grad_()
    optimizer = torch.optim.Adam([estimate], lr=3e-4)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        losses.append(sum(hearing(estimate, wave)).sum())
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0]
