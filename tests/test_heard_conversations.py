"""Conversations as they are heard: what a metric had to leave out is counted, and nothing is measured twice."""

import importlib.util

import numpy as np
import pytest
from spoken_clips import SENTENCES, other_speaker, speech

import heard_conversations as hc
from audio import SAMPLE_RATE
from pronunciation import PRONUNCIATION_METRICS, sentences, words
from speech_metrics import OF_VOICES, NotMeasurable

SILENCE, NOTHING = np.zeros(SAMPLE_RATE, np.float32), np.zeros(0, np.float32)


class Says:
    """A recogniser that hears one text, and an encoder whose voices are all alike; both count how often they listen."""

    def __init__(self, text: str = ""):
        self.text, self.asked = text, 0

    def transcribe(self, samples: np.ndarray) -> str:
        self.asked += 1
        return self.text

    def embed(self, samples: np.ndarray) -> np.ndarray:
        self.asked += 1
        return np.array([1.0, 0.0])


def heard(turns: hc.Turns, original: hc.Turns | None = None, name: str = "this", **models: object) -> hc.Heard:
    ears = hc.Ears()
    ears.__dict__.update(models)
    return hc.Heard(name, turns, original or turns, hc.Human({}, {}), ears)


def turn(text: str = SENTENCES[0], samples: np.ndarray = SILENCE, speaker: str = "a") -> hc.Turn:
    return hc.Turn(speaker, text, samples, None)


def test_people_of_one_name_in_two_conversations_are_two():
    human = hc.Human({name: [("0", None)] for name in ("a", "b", "c")}, {})
    assert [speaker for speaker, _ in human.prosody_but("b")] == ["a/0", "c/0"]


def test_turns_that_cannot_be_measured_are_counted(monkeypatch):
    monkeypatch.setattr(hc, "dnsmos", lambda samples: 3.0 if samples.any() else 1.84)
    one = [turn(samples=speech(0))]
    half = [*one, turn(), turn(samples=NOTHING)]
    for metric in ("pitch_spread", "rate", "dnsmos", "pitch_contour"):
        conversation = heard(half)
        assert hc.MEASURES[metric](conversation) == hc.MEASURES[metric](heard(one))
        assert conversation.left_out == {"the clip is silent": 2}, metric
    for metric in ("pitch_spread", "dnsmos", "speaker_similarity", "character_run", "emotional_coherence"):
        with pytest.raises(NotMeasurable):
            hc.MEASURES[metric](heard(half[1:]))


def test_who_is_silent_has_every_word_wrong():
    assert hc.MEASURES["wer"](heard([turn(samples=NOTHING)], recognizer=Says("Never asked."))) == 1.0


def test_a_turn_without_words_does_not_void_the_error_rate_of_the_others():
    conversation = heard([turn("Mm-hmm."), turn("Go on."), turn("Um.")], recognizer=Says("go"))
    assert hc.MEASURES["wer"](conversation) == 0.5
    assert conversation.left_out == {"the text has no words": 2}
    with pytest.raises(NotMeasurable, match="no text of the conversation has words"):
        hc.MEASURES["wer"](heard([turn("Um.")], recognizer=Says("go")))
    definition = hc.METRICS_OF_CONVERSATIONS["wer"].definition
    assert "summed over a conversation" in definition and "mean over conversations" in definition


def test_every_turn_is_embedded_once():
    encoder = Says()
    original = [
        turn(samples=wave(i), speaker=who) for i in range(2) for who, wave in (("a", speech), ("b", other_speaker))
    ]
    for _ in range(2):  # severities
        changed = [turn(samples=each.samples, speaker=each.speaker) for each in original]
        conversation = heard(changed, original, encoder=encoder)
        for metric in (name for name, about in hc.METRICS_OF_CONVERSATIONS.items() if about.needs == OF_VOICES):
            if metric != "character_drift":  # of two turns there is none
                hc.MEASURES[metric](conversation)
    assert encoder.asked == 3 * len(original)


@pytest.mark.parametrize("names", [("0", "1"), ("1", "0"), ("user", "model")])
def test_whoever_was_asked_may_answer(names):
    told, asked = turn("I have an old dog.", speaker=names[0]), turn("Which animal do I have?", speaker=names[0])
    answer = turn("A dog.", speaker=names[1])
    recognizer = Says("You have a dog.")
    for metric in ("content_recall", "content_recall_k2"):
        recall = hc.MEASURES[metric]
        assert recall(heard([told, asked, answer], name="recall-pet-2", recognizer=recognizer)) == 1.0
        silent = turn("", NOTHING, speaker=names[1])
        assert recall(heard([told, asked, silent], name="recall-pet-2", recognizer=recognizer)) == 0.0
        assert recall(heard([told, answer, asked], name="recall-pet-2", recognizer=recognizer)) == 0.0
    assert recognizer.asked == 2
    with pytest.raises(NotMeasurable, match="not asked: after 5 exchanges"):
        hc.MEASURES["content_recall_k5"](heard([told, asked, answer], name="recall-pet-2", recognizer=recognizer))


def test_a_package_that_is_not_there_leaves_out_its_metrics_only(monkeypatch):
    there = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "faster_whisper" else there(name))
    missing = hc.packages_missing()
    assert {"wer", "content_recall", *hc.RECALLED} <= set(missing) and "pitch" not in missing


def test_an_optional_model_that_is_not_there_leaves_out_its_metrics_only(tmp_path, monkeypatch):
    import torchaudio.pipelines

    class Offline:
        def get_model(self):
            raise OSError("no network")

    monkeypatch.setattr(torchaudio.pipelines, "SQUIM_OBJECTIVE", Offline())
    ears, missing = hc.Ears.to_be_had("bundled", str(tmp_path), True)
    assert ears == hc.Ears("bundled") and set(missing) == {"emotion_agreement", "squim_pesq", "squim_stoi"}
    assert f"--ser {tmp_path}" in missing["emotion_agreement"] and "--squim" in missing["squim_stoi"]
    assert hc.Ears.to_be_had("bundled", "", False) == (hc.Ears("bundled"), {})


def test_definitions_name_the_words_that_are_asked_for():
    asked = [each for each in sentences().values() if each.word.reliable and each.meant is not None]
    assert f"one of {len(asked)} sentences" in PRONUNCIATION_METRICS["homographs"].definition
    definitions = " ".join(metric.definition for metric in PRONUNCIATION_METRICS.values())
    for word in words().values():
        assert (f" {word.word}" in definitions.replace("(", " ")) == word.reliable, word.word
