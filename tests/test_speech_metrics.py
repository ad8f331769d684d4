"""Each metric tells good from bad: controlled degradations in known order, and what it must not see leaves it alone."""

from __future__ import annotations

import importlib.util
import zlib

import numpy as np
import pytest
import scipy.signal
import torch
from spoken_clips import SENTENCES, other_speaker, speech

from audio import SAMPLE_RATE, resample
from command_line import MissingRequirement
from speech_metrics import (
    ASR_RATE,
    Item,
    NotMeasurable,
    Recognizer,
    SpeakerEncoder,
    bootstrap,
    code_histograms,
    count_errors,
    distill_mos,
    entropy,
    log_mel_distance,
    perplexity_figures,
    pesq_wb,
    stoi,
)

needs_pesq = pytest.mark.skipif(importlib.util.find_spec("pesq") is None, reason="pesq could not be built here")
NAMES = ["log_mel_l1", "stoi", pytest.param("pesq_wb", marks=needs_pesq)]
PAIRED = {"log_mel_l1": log_mel_distance, "stoi": stoi, "pesq_wb": pesq_wb}
SIGN = {"log_mel_l1": 1, "stoi": -1, "pesq_wb": -1}  # of the change when things get worse


def noisy(wave: np.ndarray, snr_db: float) -> np.ndarray:
    noise = np.random.default_rng(0).standard_normal(len(wave))
    noise *= np.sqrt(np.mean(wave**2) / np.mean(noise**2)) * 10 ** (-snr_db / 20)
    return (wave + noise).astype(np.float32)


def low_passed(wave: np.ndarray, hz: float) -> np.ndarray:
    sections = scipy.signal.butter(8, hz, fs=SAMPLE_RATE, output="sos")
    return scipy.signal.sosfiltfilt(sections, wave).astype(np.float32)


@pytest.fixture(scope="module")
def recognizer():
    return Recognizer()


@pytest.fixture(scope="module")
def encoder():
    return SpeakerEncoder()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("degrade", [noisy, low_passed])
def test_codec_metrics_worsen_with_every_step_of_noise_and_low_pass(name, degrade):
    levels = (30, 20, 10, 0) if degrade is noisy else (6000, 3000, 1500, 500)
    for wave in (speech(0), other_speaker(1)):
        worse = [SIGN[name] * PAIRED[name](wave, degrade(wave, level)) for level in levels]
        assert all(np.diff([SIGN[name] * PAIRED[name](wave, wave), *worse]) > 0), worse


@needs_pesq
def test_codec_metrics_are_perfect_for_an_identical_copy():
    assert log_mel_distance(speech(0), speech(0)) == 0
    assert stoi(speech(0), speech(0)) == pytest.approx(1)
    assert pesq_wb(speech(0), speech(0)) == pytest.approx(4.644, abs=0.01)


@needs_pesq
def test_pesq_and_stoi_do_not_see_level_and_pesq_not_what_lies_above_8_khz():
    wave = speech(0)
    assert stoi(wave, wave * 0.5) == pytest.approx(1, abs=1e-4)
    assert pesq_wb(wave, wave * 0.5) == pytest.approx(4.644, abs=0.05)
    assert pesq_wb(wave, low_passed(wave, 10_000)) > 4.5
    assert log_mel_distance(wave, low_passed(wave, 10_000)) > 0.005  # the mel distance does see it


def test_log_mel_distance_of_a_gain_is_its_logarithm():
    loud = np.random.default_rng(0).standard_normal(SAMPLE_RATE).astype(np.float32)  # above the floor in every band
    assert log_mel_distance(loud, loud * 0.5) == pytest.approx(np.log10(2), abs=1e-3)


@needs_pesq
def test_a_mute_copy_gets_the_worst_score_and_is_not_left_out():
    wave, mute = speech(0), np.zeros_like(speech(0))
    assert pesq_wb(wave, mute) == 1.0 < pesq_wb(wave, noisy(wave, 0))
    assert stoi(wave, mute) < stoi(wave, noisy(wave, 0))
    assert log_mel_distance(wave, mute) > log_mel_distance(wave, noisy(wave, 20))


@pytest.mark.parametrize("name", NAMES)
def test_unmeasurable_and_wrong_input_are_told_apart(name):
    metric = PAIRED[name]
    wave = speech(0)
    with pytest.raises(NotMeasurable, match="silent"):
        metric(np.zeros_like(wave), wave)
    with pytest.raises(ValueError, match="shape") as caught:
        metric(wave, wave[:-1])
    assert not isinstance(caught.value, NotMeasurable)
    broken = wave.copy()
    broken[100] = np.nan
    with pytest.raises(ValueError, match="finite"):
        metric(wave, broken)


@pytest.mark.parametrize("name", NAMES)
def test_a_clip_of_50_ms_is_refused_by_name_not_scored(name):
    short = speech(0)[12_000:13_200]
    with pytest.raises(NotMeasurable):
        PAIRED[name](short, short)


def test_error_counts_split_what_was_dropped_added_and_changed():
    truth = "We walk along the river every Sunday morning, my brother and I."
    assert count_errors(truth, truth.upper().replace(",", "")).words == 12
    dropped = count_errors(truth, "We walk along the river, my brother and I.")
    assert (dropped.substitutions, dropped.insertions, dropped.deletions) == (0, 0, 3)
    added = count_errors(truth, truth + " Thank you.")
    assert (added.substitutions, added.insertions, added.deletions) == (0, 2, 0)
    changed = count_errors(truth, truth.replace("river", "liver"))
    assert (changed.substitutions, changed.insertions, changed.deletions, changed.character_errors) == (1, 0, 0, 1)


def test_spelling_case_numbers_and_fillers_are_no_errors():
    errors = count_errors("The colour is, um, twenty-one...", "the color is 21")
    assert errors.words == 5  # the color is 2 1
    assert errors.substitutions + errors.insertions + errors.deletions + errors.character_errors == 0


@pytest.mark.parametrize(
    ("spoken", "written"),
    [
        ("We meet at ten fifty-five.", ["We meet at 10.55.", "We meet at 10:55", "we meet at 1055"]),
        ("It costs twenty-six dollars ninety-five.", ["It costs $26.95.", "It costs $26 95"]),
        ("Please call four five eight, zero five eight zero.", ["Please call 458-0580.", "please call 4580580"]),
        ("Forty-two, twenty-three, fifty-four.", ["42, 23, 54", "42 23, 54."]),
        ("One ticket is ten dollars fifty, two are twenty dollars.", ["1 ticket is $10.50, two are $20."]),
        ("One ticket is one oh five, or one point five.", ["1 ticket is 1.05 or 1.5"]),
        ("One thousand, two hundred and five people.", ["1,205 people", "1205 people"]),
        ("We meet at ten o'clock.", ["We meet at 10 o'clock", "We meet at 10 oclock.", "We meet at ten o\u2019clock."]),
        ("Hello.", ["[Music, applause] Hello.", "(well, nearly) hello"]),
        ("The ninth of May, the twenty-ninth of June.", ["the 9th of May, the 29th of June"]),
    ],
)
def test_a_number_is_the_same_however_a_recogniser_writes_it(spoken, written):
    for transcript in written:
        errors = count_errors(spoken, transcript)
        assert errors.wrong == errors.character_errors == 0, transcript


@pytest.mark.parametrize(
    ("spoken", "written", "wrong"),
    [
        ("We meet at ten fifty-five.", "We meet at 10:45.", 1),
        ("Page nineteen.", "Page 90.", 2),
        ("We meet at ten o'clock.", "We meet at 100.", 1),
        ("It costs twenty-six dollars.", "It costs 26.", 1),
        ("My number is four five eight.", "My number is 48.", 1),
    ],
)
def test_other_numbers_are_errors(spoken, written, wrong):
    assert count_errors(spoken, written).wrong == wrong


def test_a_text_without_words_is_refused_and_an_empty_transcript_is_all_deletions():
    with pytest.raises(NotMeasurable):
        count_errors("...", "hello")
    assert count_errors("hello there", "").deletions == 2


def test_predicted_quality_falls_with_noise_clipping_and_fewer_bands_and_does_not_see_level():
    good = distill_mos(speech(0))
    assert distill_mos(np.float32(0.3) * speech(0)) == pytest.approx(good, abs=1e-3)
    clipped = np.clip(speech(0), *np.float32(np.quantile(speech(0), (0.15, 0.85))))
    for worse in ([noisy(speech(0), level) for level in (20, 10, 0)], [low_passed(speech(0), 3400)], [clipped]):
        assert np.all(np.diff([good, *map(distill_mos, worse)]) < -0.2)
    with pytest.raises(NotMeasurable, match="silent"):
        distill_mos(np.zeros(SAMPLE_RATE, np.float32))
    assert 1 <= distill_mos(speech(0)[: SAMPLE_RATE // 20]) <= 5


def test_the_level_of_a_clip_changes_no_word(recognizer):
    hard = noisy(speech(1), 3)
    assert recognizer.transcribe(hard) == recognizer.transcribe(np.float32(0.25) * hard)  # a power of two, so exact


def test_word_error_rate_rises_with_noise(recognizer):
    rates = []
    for level in (60, 0, -10):
        errors = [count_errors(SENTENCES[i], recognizer.transcribe(noisy(speech(i), level))) for i in range(2)]
        rates.append(sum(e.substitutions + e.insertions + e.deletions for e in errors) / sum(e.words for e in errors))
    assert rates[0] <= 0.1 < rates[1] < rates[2]


def test_silenced_words_are_counted_as_deletions(recognizer):
    cut = speech(1).copy()
    cut[int(0.35 * len(cut)) : int(0.75 * len(cut))] = 0
    errors = count_errors(SENTENCES[1], recognizer.transcribe(cut))
    assert errors.deletions >= 3 and errors.insertions <= 1


def test_silence_has_no_transcript_and_the_same_clip_always_the_same(recognizer):
    assert recognizer.transcribe(np.zeros(SAMPLE_RATE, np.float32)) == ""
    hard = noisy(speech(2), 0)
    assert recognizer.transcribe(hard) == recognizer.transcribe(hard)


@pytest.mark.parametrize(("begin", "seconds"), [(0.2, 0.25), (0.8, 0.2), (1.0, 0.4), (1.3, 0.15)])
def test_a_recogniser_that_falls_into_a_loop_is_heard_no_further(recognizer, begin, seconds):
    piece = speech(0)[int(begin * SAMPLE_RATE) : int((begin + seconds) * SAMPLE_RATE)]
    looped = np.tile(piece, int(8 / seconds))
    first = " ".join(each.text for each in recognizer._segments(resample(looped, SAMPLE_RATE, ASR_RATE)))
    assert packed(first) > 2.4 and packed(recognizer.transcribe(looped)) < 2.4
    assert len(recognizer.transcribe(looped).split()) < 40  # 5 words a second


def packed(text: str) -> float:
    """How many times smaller it gets."""
    return len(text.encode()) / len(zlib.compress(text.encode()))


def test_an_unknown_recogniser_names_the_way_out(tmp_path):
    with pytest.raises(MissingRequirement, match="--asr bundled"):
        Recognizer(str(tmp_path / "nowhere"))


def test_speaker_similarity_tells_a_swapped_speaker(encoder):
    own = [encoder.embed(speech(i)) for i in range(3)]
    swapped = [encoder.embed(other_speaker(i)) for i in range(3)]
    same = [own[i] @ own[j] for i in range(3) for j in range(i)] + [
        swapped[i] @ swapped[j] for i, j in ((0, 1), (1, 2))
    ]
    other = [own[i] @ swapped[j] for i in range(3) for j in range(3)]  # also where the words are the same
    assert min(same) > max(other) + 0.05


def test_speaker_similarity_falls_with_noise_alone(encoder):
    """The known weakness that the definition states."""
    clean = encoder.embed(speech(0))
    similarities = [float(clean @ encoder.embed(noisy(speech(0), level))) for level in (40, 20, 10, 0)]
    assert similarities[0] > 0.97 and all(np.diff(similarities) < 0)


def test_speaker_similarity_does_not_see_level(encoder):
    """The encoder by itself does: 6 dB made 0.96 of 1."""
    for gain in (0.3, 2.0):
        assert float(encoder.embed(speech(0)) @ encoder.embed(np.float32(gain) * speech(0))) > 0.999


def test_short_or_silent_clips_get_no_speaker_decision(encoder):
    with pytest.raises(NotMeasurable, match=r"1\.6 s"):
        encoder.embed(speech(0)[:SAMPLE_RATE])
    with pytest.raises(NotMeasurable, match="silent"):
        encoder.embed(np.zeros(4 * SAMPLE_RATE, np.float32))


def test_bootstrap_is_a_ratio_of_sums_and_its_interval_covers_the_truth():
    assert bootstrap([Item("a", 1, 10), Item("b", 9, 30)]).value == pytest.approx(0.25)
    covered, generator = 0, np.random.default_rng(1)
    for seed in range(200):
        means = generator.normal(2.0, 1.0, 20)  # 20 conversations of 3 clips that share most of their value
        items = [Item(str(c), m + generator.normal(0, 0.2)) for c, m in enumerate(means) for _ in range(3)]
        figure = bootstrap(items, seed=seed)
        covered += figure.low <= 2.0 <= figure.high
    assert 0.88 <= covered / 200 <= 0.98


def test_turns_of_one_conversation_do_not_count_as_independent():
    values = np.random.default_rng(0).normal(size=10)
    once = bootstrap([Item(str(c), v) for c, v in enumerate(values)])
    repeated = bootstrap([Item(str(c), v) for c, v in enumerate(values) for _ in range(50)])
    assert repeated.high - repeated.low == pytest.approx(once.high - once.low)


def test_one_conversation_has_no_interval_and_no_items_no_figure():
    figure = bootstrap([Item("a", 1.0), Item("a", 2.0)], {"too short": 3})
    assert figure.low is None and figure.high is None and figure.excluded == {"too short": 3}
    nothing = bootstrap([], {"silent": 2})
    assert nothing.value is None and nothing.n == 0 and nothing.excluded == {"silent": 2}


def test_perplexity_tells_a_used_codebook_from_a_collapsed_one():
    generator = np.random.default_rng(0)
    V = 16
    codes = {
        str(c): np.stack([generator.integers(V, size=400), generator.integers(4, size=400), np.zeros(400, int)], axis=1)
        for c in range(5)
    }
    histograms = {name: code_histograms(c, V) for name, c in codes.items()}
    full, quarter, collapsed = perplexity_figures(histograms)
    assert full.value > 0.98 and quarter.value == pytest.approx(0.25, abs=0.005) and collapsed.value == 1 / V
    assert full.low <= full.value <= full.high and full.n == 2000
    assert np.allclose(entropy(np.array([[1, 1, 0], [0, 0, 0]])), [np.log(2), 0])
    with pytest.raises(ValueError, match=r"\[0, 8\)"):
        code_histograms(codes["0"], 8)


def test_the_recogniser_leaves_the_threads_of_torch_alone():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        Recognizer().transcribe(np.random.default_rng(0).normal(scale=0.1, size=24_000).astype(np.float32))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
