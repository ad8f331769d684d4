"""Degradations: each changes what its name says, by the amount asked for, and nothing at severity 0."""

import numpy as np
import pytest
from spoken_clips import SENTENCES, speech

import degradations
from audio import SAMPLE_RATE
from conversation_metrics import levels, prosody_of
from speech_metrics import log_mel_distance


def lots() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.mark.parametrize(
    "name", ["add_noise", "clip", "drop_words", "flatten_level", "gain", "insert_pauses", "remove_pauses"]
)
def test_severity_zero_changes_nothing(name):
    clip = speech(0)
    np.testing.assert_array_equal(getattr(degradations, name)(clip, 0.0, lots()), clip)


@pytest.mark.parametrize("name", ["flatten_pitch", "shift_pitch", "stretch", "change_speaker", "excite"])
def test_severity_zero_keeps_prosody_through_analysis_and_synthesis(name):
    before = prosody_of(speech(0), SENTENCES[0])
    after = prosody_of(getattr(degradations, name)(speech(0), 0.0, lots()), SENTENCES[0])
    assert after.pitch == pytest.approx(before.pitch, abs=0.3)  # semitones
    assert after.pitch_spread == pytest.approx(before.pitch_spread, abs=0.3)
    assert after.rate == pytest.approx(before.rate, rel=0.03)


def test_pitch_and_tempo_change_by_the_amount_asked_for():
    base = prosody_of(degradations.flatten_pitch(speech(0), 0.0, lots()), SENTENCES[0])

    def after(name: str, severity: float):
        return prosody_of(getattr(degradations, name)(speech(0), severity, lots()), SENTENCES[0])

    assert after("flatten_pitch", 0.5).pitch_spread == pytest.approx(base.pitch_spread / 2, rel=0.15)
    assert after("flatten_pitch", 1.0).pitch_spread < 0.2
    assert after("flatten_pitch", -1.0).pitch_spread == pytest.approx(2 * base.pitch_spread, rel=0.2)
    assert after("misplace_pitch", 1.0).pitch_spread == pytest.approx(base.pitch_spread, rel=0.15)
    assert after("shift_pitch", 4.0).pitch - base.pitch == pytest.approx(4, abs=0.3)
    assert after("stretch", 0.25).rate == pytest.approx(base.rate / 1.25, rel=0.05)


def test_pauses_are_inserted_and_removed():
    clip = speech(0)
    longer = degradations.insert_pauses(clip, 3.0, lots())
    assert len(longer) - len(clip) == 3 * int(0.3 * SAMPLE_RATE)
    shares = [prosody_of(wave, SENTENCES[0]).pause_share for wave in (clip, longer)]
    assert shares[1] > shares[0] + 0.1
    assert prosody_of(degradations.remove_pauses(longer, 1.0, lots()), SENTENCES[0]).pause_share < 0.02


def test_noise_has_the_level_asked_for():
    clip = speech(0)
    noise = degradations.add_noise(clip, 30.0, lots()) - clip
    assert 10 * np.log10(np.mean(clip**2) / np.mean(noise**2)) == pytest.approx(10, abs=0.1)


def test_clipping_cuts_the_share_asked_for_and_keeps_the_level():
    clip = speech(0)
    cut = degradations.clip(clip, 0.1, lots())
    assert np.mean(np.abs(cut) >= np.abs(cut).max() * 0.999) == pytest.approx(0.1, abs=0.005)
    assert np.mean(cut**2) == pytest.approx(np.mean(clip**2), rel=1e-3)


def test_levels_come_closer_to_their_median_by_the_share_asked_for():
    seconds = np.arange(4 * SAMPLE_RATE) / SAMPLE_RATE
    loud = np.where(seconds % 2 < 1, 0.5, 0.05)  # 20 dB apart
    tone = (loud * np.sin(2 * np.pi * 200 * seconds)).astype(np.float32)
    softer = degradations.flatten_level(tone, 0.6, lots())
    assert np.ptp(np.percentile(levels(softer), [10, 90])) == pytest.approx(8, abs=0.2)
    np.testing.assert_array_equal(np.sign(softer), np.sign(tone))


def test_fewer_codebooks_are_further_from_what_was_said():
    clip = speech(0)
    every, few, fewest = (degradations.leave_out_codebooks(clip, left_out, lots()) for left_out in (0.0, 16.0, 31.0))
    assert len(every) == len(few) == len(fewest) == len(clip)
    distances = [log_mel_distance(clip, copy) for copy in (every, few, fewest)]
    assert distances == sorted(distances) and distances[2] > 1.2 * distances[0]
    assert not len(degradations.leave_out_codebooks(clip[:0], 0.0, lots()))


def test_words_are_dropped_in_the_share_asked_for():
    clip = np.arange(100 * int(0.35 * SAMPLE_RATE), dtype=np.float32)
    assert len(degradations.drop_words(clip, 0.5, lots())) == pytest.approx(len(clip) / 2, rel=0.2)
    assert len(degradations.drop_words(clip, 1.0, lots())) == 0


def test_shuffling_moves_the_share_asked_for_and_loses_nothing():
    items = list(range(200))
    for severity in (0.0, 0.5, 1.0):
        moved = degradations.shuffled(items, severity, lots())
        assert sorted(moved) == items
        assert np.mean(np.array(moved) != items) == pytest.approx(severity, abs=0.1)
