"""Prosody features of tones whose pitch, level, pauses and rate are known."""

import numpy as np
import pytest
import torch

from audio import SAMPLE_RATE
from frames import N_PROSODY
from prosody import prosody_features

PITCH, PITCH_SPREAD, LEVEL, LEVEL_SPREAD, PAUSES, RATE = range(N_PROSODY)


def buzz(pitch, seconds: float = 1.5, level: float = 0.1) -> np.ndarray:
    """A steady buzz with harmonics at 24 kHz, like a sung vowel; `pitch` in Hz, one or one per sample."""
    phase = np.cumsum(np.broadcast_to(pitch, int(seconds * SAMPLE_RATE))) / SAMPLE_RATE
    return (level * sum(np.sin(2 * np.pi * phase * h) / h for h in range(1, 8))).astype(np.float32)


def silence(seconds: float) -> np.ndarray:
    return np.zeros(int(seconds * SAMPLE_RATE), dtype=np.float32)


@pytest.mark.parametrize("pitch", [100.0, 150.0, 200.0])
def test_a_known_pitch_is_found_in_octaves_from_150_hz(pitch):
    assert prosody_features(buzz(pitch), 20)[PITCH].item() == pytest.approx(np.log2(pitch / 150), abs=0.06)


@pytest.mark.parametrize("pitch", [90.0, 110.0, 180.0])
def test_doubling_the_pitch_adds_one_octave_and_changes_no_level(pitch):
    low, high = prosody_features(buzz(pitch), 20), prosody_features(buzz(2 * pitch), 20)
    assert (high - low)[PITCH].item() == pytest.approx(1.0, abs=0.06)
    torch.testing.assert_close(high[[LEVEL, PAUSES, RATE]], low[[LEVEL, PAUSES, RATE]], atol=0.05, rtol=0)


def test_a_lively_voice_has_a_wider_pitch_than_a_flat_one():
    t = np.arange(int(2.0 * SAMPLE_RATE)) / SAMPLE_RATE
    lively = buzz(150 * 2 ** (0.5 * np.sin(2 * np.pi * t)), 2.0)
    flat, wide = prosody_features(buzz(150.0, 2.0), 20), prosody_features(lively, 20)
    assert flat[PITCH_SPREAD] < 0.1
    expected = 2 * 2 * 0.5 * np.sin(np.pi / 4)  # half octaves between the quartiles of a sine of half an octave
    assert wide[PITCH_SPREAD].item() == pytest.approx(expected, abs=0.3)


@pytest.mark.parametrize("gain_db", [-20, -6, 10])
def test_a_gain_moves_the_level_by_its_decibels_and_nothing_else(gain_db):
    samples = buzz(150.0)
    before, after = prosody_features(samples, 20), prosody_features(samples * np.float32(10 ** (gain_db / 20)), 20)
    expected = before.clone()
    expected[LEVEL] += gain_db / 10
    torch.testing.assert_close(after, expected, atol=2e-3, rtol=0)


def test_the_level_is_counted_from_23_db_below_full_scale():
    samples = (0.1 * np.sqrt(2) * np.sin(2 * np.pi * 200 * np.arange(SAMPLE_RATE) / SAMPLE_RATE)).astype(np.float32)
    assert prosody_features(samples, 20)[LEVEL].item() == pytest.approx((-20 + 23) / 10, abs=0.01)


def test_a_voice_that_swells_has_a_wider_level_than_a_steady_one():
    samples = buzz(150.0)
    swelling = samples * np.linspace(0.1, 1.0, len(samples), dtype=np.float32)
    assert prosody_features(samples, 20)[LEVEL_SPREAD] < 0.1 < prosody_features(swelling, 20)[LEVEL_SPREAD]


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5])
def test_the_pause_share_is_the_share_of_silence(share):
    spoken = buzz(150.0, 0.5 * (1 - share))
    samples = np.concatenate([spoken, silence(0.5 * share)] * 4)
    assert prosody_features(samples, 20)[PAUSES].item() == pytest.approx(share, abs=0.05)


def test_twice_the_text_in_the_same_speech_is_one_octave_faster():
    samples = buzz(150.0, 2.0)
    slow, fast = prosody_features(samples, 15), prosody_features(samples, 30)
    assert (fast - slow)[RATE].item() == pytest.approx(1.0, abs=1e-5)
    assert torch.equal(fast[:RATE], slow[:RATE])
    assert fast[RATE].item() == pytest.approx(0.0, abs=0.02)  # 30 characters in 2 s


def test_pauses_do_not_slow_the_rate_of_articulation():
    samples = buzz(150.0, 2.0)
    broken = np.concatenate([samples[:24_000], silence(1.0), samples[24_000:]])
    one, other = prosody_features(samples, 30), prosody_features(broken, 30)
    assert (one - other)[RATE].abs() < 0.05
    assert other[PAUSES].item() == pytest.approx(1 / 3, abs=0.03)


@pytest.mark.parametrize(
    "samples",
    [silence(1.0), 1e-5 * buzz(150.0), buzz(150.0, 0.19), silence(0.0), np.full(SAMPLE_RATE, np.nan, dtype=np.float32)],
    ids=["silence", "as good as silence", "too short", "nothing", "not a number"],
)
def test_what_cannot_be_measured_is_nan(samples):
    features = prosody_features(samples, 20)
    assert features.shape == (N_PROSODY,) and features.isnan().all()


@pytest.mark.parametrize("n_characters", [0, 1, 500])
@pytest.mark.parametrize("seconds", [0.2, 0.21, 0.95, 4.0])
def test_sound_of_any_kind_gives_finite_numbers_of_a_usual_size(seconds, n_characters):
    noise = np.random.default_rng(0).standard_normal(int(seconds * SAMPLE_RATE)).astype(np.float32)
    click = silence(seconds)
    click[100] = 1.0
    for samples in (buzz(150.0, seconds), 0.1 * noise, click, np.sign(noise) * np.float32(1.0)):
        features = prosody_features(samples, n_characters)
        assert features.dtype == torch.float32
        assert features.isfinite().all() and features.abs().max() < 15


def test_the_same_sound_gives_the_same_features():
    samples = buzz(150.0) + 0.01 * np.random.default_rng(0).standard_normal(int(1.5 * SAMPLE_RATE)).astype(np.float32)
    before = samples.copy()
    assert torch.equal(prosody_features(samples, 20), prosody_features(samples, 20))
    assert np.array_equal(samples, before)
