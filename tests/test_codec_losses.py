"""Properties of the spectral distances of the codec."""

import pytest
import torch

from codec_losses import SpectralDistance, spectrum


@pytest.fixture(scope="module")
def distance():
    return SpectralDistance()


def noise(seed: int, level: float = 0.1) -> torch.Tensor:
    return level * torch.randn(2, 8192, generator=torch.Generator().manual_seed(seed))


def test_equal_signals_have_no_distance(distance):
    assert all(term == 0 for term in distance(noise(0), noise(0)))


def test_distance_grows_with_added_noise(distance):
    found = [distance(noise(0) + level * noise(1), noise(0)) for level in (0.03, 0.1, 0.3, 1.0)]
    for term in zip(*(map(float, terms) for terms in found), strict=True):
        assert list(term) == sorted(term) and term[-1] > 3 * term[0]


def test_ten_times_the_amplitude_is_one_unit_of_log_mel(distance):
    assert distance(10 * noise(0, 0.05), noise(0, 0.05)).mel.item() == pytest.approx(1.0, abs=1e-4)


def test_white_noise_has_its_own_level_at_every_window():
    for size in (256, 2048):
        power = spectrum(noise(0), torch.hann_window(size)).square().mean().item()
        assert power == pytest.approx(0.01, rel=0.1)


def test_differences_below_the_floor_do_not_count(distance):
    assert distance(noise(0, 1e-6), noise(1, 1e-7)).mel.item() < 1e-3


def test_gradient_is_finite_on_digital_silence(distance):
    silence = torch.zeros(1, 4096, requires_grad=True)
    sum(distance(silence, noise(0)[:1, :4096])).backward()
    assert torch.isfinite(silence.grad).all()


def test_gradient_descent_on_the_distance_approaches_the_target(distance):
    target = torch.sin(torch.arange(4096) * 0.2)[None] * 0.3
    estimate = (0.1 * torch.randn(1, 4096, generator=torch.Generator().manual_seed(3))).requires_grad_()
    optimizer = torch.optim.Adam([estimate], lr=0.01)
    first = distance(estimate, target).mel.item()
    for _ in range(60):
        optimizer.zero_grad()
        distance(estimate, target).mel.backward()
        optimizer.step()
    assert distance(estimate, target).mel.item() < 0.7 * first


def test_float32_inside_autocast(distance):
    with torch.autocast("cpu", torch.bfloat16):
        inside = distance(noise(0), noise(1)).mel
    assert inside.dtype == torch.float32 and inside == distance(noise(0), noise(1)).mel
