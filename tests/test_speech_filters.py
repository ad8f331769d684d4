"""Voice activity and DNSMOS on a real voice, spoiled in known ways."""

import json
from dataclasses import replace

import numpy as np
import pytest
from spoken_clips import SENTENCES, speech

import speech_filters
from audio import SAMPLE_RATE, read_audio, resample
from collect_data import main
from command_line import EXIT_MISSING, run
from speech_filters import Cleaning, cleaned, cut_silence, dnsmos, rate, time_words, times_of
from speech_sources import UnitResult
from turn_shards import Reject, TurnRecord, make_turn

RATE = 16_000


@pytest.fixture(scope="module")
def clean() -> np.ndarray:
    """(N,) at 16 kHz, a sentence of the built-in voice."""
    return resample(speech(0), SAMPLE_RATE, RATE)


def turn_of(samples: np.ndarray, **facts) -> TurnRecord:
    facts |= {"source": "test", "split_group": "g", "conv_key": "c", "speaker_id": "s"}
    return make_turn(samples.astype(np.float32), RATE, "A sentence of some length, about so long.", "test:0", **facts)


def noise(seconds: float, level: float) -> np.ndarray:
    return level * np.random.default_rng(0).standard_normal(int(seconds * RATE))


def hum() -> np.ndarray:
    return 0.1 * np.sin(2 * np.pi * 100 * np.arange(3 * RATE) / RATE)


def test_noise_around_speech_is_cut_and_its_times_move_along(clean):
    words = json.dumps([["Good", 1.2, 1.4]])
    around = np.concatenate([noise(1.0, 0.004), clean, noise(1.5, 0.004)])
    turn = turn_of(around, start_s=10.0, end_s=99.0, words=words)
    cut = cut_silence(turn)
    lead = cut.start_s - 10.0
    assert 0.7 < lead < 1.3  # a margin is left
    assert turn.duration_s - lead - cut.duration_s > 1.0
    assert cut.end_s == pytest.approx(cut.start_s + cut.duration_s, abs=1e-3)
    assert json.loads(cut.words)[0][1] == pytest.approx(1.2 - lead, abs=1e-6)
    kept, original = read_audio(cut.audio, None)[0], read_audio(turn.audio, None)[0]
    np.testing.assert_array_equal(kept, original[round(lead * RATE) : round(lead * RATE) + len(kept)])
    assert (cut.utt_id, cut.text, cut.speaker_id, cut.num_samples) == (turn.utt_id, turn.text, "s", len(kept))


def test_sound_without_speech_is_refused():
    reject = cut_silence(turn_of(hum()))
    assert isinstance(reject, Reject) and reject.reason == "no_speech"


def test_dnsmos_tells_clean_speech_from_noisy_and_clipped_speech(clean):
    best = dnsmos(clean)
    assert best > 2.8
    for how, spoiled in {"noise": clean + noise(10, 0.05)[: len(clean)], "clipping": clean.clip(-0.02, 0.02)}.items():
        assert dnsmos(spoiled.astype(np.float32)) < best - 0.4, how


def test_dnsmos_does_not_see_level(clean):
    for gain in (0.25, 2.0):
        assert dnsmos(np.float32(gain) * clean) == pytest.approx(dnsmos(clean), abs=1e-4)


def test_poor_turns_are_refused_with_their_figure_and_good_ones_keep_it(clean):
    turn = turn_of(clean)
    score = dnsmos(read_audio(turn.audio, RATE)[0])
    assert rate(turn, 1.0).dnsmos_ovrl == pytest.approx(score, abs=1e-3)
    assert rate(turn, None) is turn
    reject = rate(turn, 4.9)
    assert reject.reason == "dnsmos" and f"{score:.2f}" in reject.detail


def test_a_units_turns_and_rejects_all_come_back(clean):
    good, other = turn_of(clean), replace(turn_of(hum()), utt_id="test:1")
    earlier = Reject(utt_id="test:9", reason="too_short")
    result = cleaned(lambda: UnitResult([good, other], [earlier]), Cleaning(True, 1.0))
    assert [turn.utt_id for turn in result.turns] == ["test:0"] and result.turns[0].dnsmos_ovrl > 1
    assert {(r.utt_id, r.reason) for r in result.rejects} == {("test:9", "too_short"), ("test:1", "no_speech")}


def test_words_are_timed_where_they_are_said():
    pause = 1.5
    joined = np.concatenate([speech(0), np.zeros(int(pause * SAMPLE_RATE), np.float32), speech(1)])
    samples = resample(joined, SAMPLE_RATE, RATE)
    turn = replace(turn_of(samples), text=f"{SENTENCES[0]} {SENTENCES[1]}")
    words = json.loads(time_words(turn).words)
    assert [word for word, _, _ in words] == turn.text.split()
    times = np.array([span for _, *span in words])
    assert (np.diff(times.ravel()) >= 0).all() and times[0, 0] >= 0 and times[-1, 1] <= turn.duration_s
    first, n = len(speech(0)) / SAMPLE_RATE, len(SENTENCES[0].split())
    assert times[n - 1, 1] < first + 0.3 and times[n, 0] > first + pause - 0.3  # nothing is said in the pause
    assert time_words(replace(turn, lang="cs")).words is None


def test_words_that_were_not_heard_share_the_time_between_those_that_were():
    heard = [("one", 0.5, 1.0), ("for", 3.0, 3.5), ("five", 4.0, 4.5)]
    times = times_of(["One,", "two", "three!", "five"], heard, 5.0)
    assert times.tolist() == [[0.5, 1.0], [1.0, 2.0], [2.0, 4.0], [4.0, 4.5]]  # "three!" has twice the letters of "two"
    assert times_of(["a", "b"], [], 2.0).tolist() == [[0, 1], [1, 2]]


@pytest.mark.parametrize("flags", [["--words"], ["--vad"], ["--min_dnsmos", "3"]])
def test_a_filter_without_its_package_is_one_line_and_exit_5(tmp_path, monkeypatch, capsys, flags):
    monkeypatch.setattr(speech_filters.importlib.util, "find_spec", lambda name: None)
    code = run(main, ["--sources", "local", "--input", str(tmp_path), "--out", str(tmp_path / "out"), *flags])
    assert code == EXIT_MISSING
    assert "setup_environment.py --extras data eval filters" in capsys.readouterr().err
