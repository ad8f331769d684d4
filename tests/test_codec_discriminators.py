"""Discriminators of the codec: shapes, that they learn to tell, and that fooling them brings a waveform nearer."""

import pytest
import torch

from codec_discriminators import (
    DISCRIMINATORS,
    DiscriminatorConfig,
    Discriminators,
    PeriodDiscriminator,
    SpectrumDiscriminator,
    fooling_loss,
    telling_loss,
)

TINY = DiscriminatorConfig((256, 128), 4, (2, 3), (4, 8, 8), 2400)


def tone(n: int, frequency: float) -> torch.Tensor:
    """(n, 2400) at random phases."""
    phase = 6.3 * torch.rand(n, 1, generator=torch.Generator().manual_seed(int(frequency)))
    return 0.3 * torch.sin(2 * torch.pi * frequency * torch.arange(2400) / 24_000 + phase)


def test_feature_maps_end_in_verdicts_of_one_channel():
    maps = SpectrumDiscriminator(256, 4)(torch.randn(2, 2400))
    assert [m.shape[1] for m in maps] == [4, 4, 4, 4, 4, 1]
    assert maps[0].shape[2:] == ((2400 - 256) // 64 + 1, 129) and maps[-1].shape[3] == 17  # three strides of 2
    maps = PeriodDiscriminator(7, (4, 8))(torch.randn(2, 2400))
    assert maps[-1].shape[:2] == (2, 1) and maps[-1].shape[3] == 7


def test_sizes_are_light_and_full():
    sizes = {name: sum(p.numel() for p in Discriminators(c).parameters()) for name, c in DISCRIMINATORS.items()}
    assert 0.5e6 < sizes["light"] < 1e6 and 40e6 < sizes["full"] < 45e6


def test_discriminators_learn_to_tell_and_gradients_lead_to_fooling_them():
    torch.manual_seed(0)
    judges = Discriminators(TINY)
    optimizer = torch.optim.AdamW(judges.parameters(), lr=3e-3)
    losses = []
    for _ in range(60):
        loss = telling_loss(judges(tone(4, 440)), judges(0.1 * torch.randn(4, 2400)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(2, abs=0.2) and losses[-1] < 0.5
    wave = (0.1 * torch.randn(4, 2400)).requires_grad_()
    real = judges(tone(4, 440))
    before = fooling_loss(real, judges(wave))
    before.backward()
    with torch.no_grad():
        after = fooling_loss(real, judges(wave - 1e-3 * wave.grad / wave.grad.norm()))
    assert after < before
    assert all(p.grad is not None for p in judges.parameters())


def test_nothing_is_to_be_gained_on_the_recording_itself_but_the_verdict():
    torch.manual_seed(0)
    judges, wave = Discriminators(TINY), tone(2, 300)
    maps = judges(wave)
    verdicts = sum(torch.relu(1 - m[-1]).mean() for m in maps) / len(maps)
    torch.testing.assert_close(fooling_loss(maps, maps), verdicts)


def test_two_processes_want_of_their_halves_what_one_wants_of_the_batch():
    """Also where one has the soft recordings."""
    torch.manual_seed(0)
    judges, wave = Discriminators(TINY), 0.1 * torch.randn(4, 2400)
    real = tone(4, 440) * torch.tensor([1.0, 1.0, 0.01, 0.01])[:, None]
    halves = [(judges(real[half]), judges(wave[half])) for half in (slice(2), slice(2, 4))]
    sizes = []
    alone = [fooling_loss(*maps, lambda own: sizes.append(own) or own) for maps in halves]
    means = [(first + second) / 2 for first, second in zip(sizes[:4], sizes[4:], strict=True)]
    told = iter(means * 2)
    both = [fooling_loss(*maps, lambda own: next(told)) for maps in halves]
    whole = fooling_loss(judges(real), judges(wave))
    torch.testing.assert_close(sum(both) / 2, whole)
    assert abs(sum(alone) / 2 - whole) > 0.1


@pytest.mark.parametrize("size", ["light", "full"])
def test_what_goes_through_keeps_its_size(size):
    """torch's own weights leave a hundredth of it, and of the gradient: such a judge never learns."""
    torch.manual_seed(0)
    wave = torch.randn(2, 8192)
    for maps in Discriminators(DISCRIMINATORS[size])(wave):
        assert all(0.1 < m.std() < 5 for m in maps)
