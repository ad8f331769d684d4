"""Which of two pronunciations was said, on audio whose pronunciation is known."""

import re

import numpy as np
import pytest

import pronunciation
from audio import SAMPLE_RATE, resample
from heard_conversations import Ears, Heard, Human, Turn
from pronunciation import PronunciationReader, homographs_right, pronunciation_kept, sentences, words
from speech_metrics import NotMeasurable
from spoken_conversations import read_requests
from synthetic_voices import load_voice, speak


def said(reader: PronunciationReader, *turns: tuple[str, str, np.ndarray]) -> Heard:
    """A conversation of (speaker, text, samples)."""
    ears = Ears()
    ears.__dict__["reader"] = reader
    spoken = [Turn(speaker, text, samples, None) for speaker, text, samples in turns]
    return Heard("this", spoken, spoken, Human({}, {}), ears)


METAL, GUIDE = "He melted lead in a pot and poured it into a mold.", "Please lead the way and I will follow you."
NOTHING = np.zeros(0, np.float32)
FIRST, LATER = "Which route is the fastest today?", "I think the other route is better."


@pytest.fixture(scope="module")
def reader():
    return PronunciationReader()


@pytest.fixture(scope="module")
def say():
    voice = load_voice(0)

    def said(text: str, which: int) -> np.ndarray:
        word = sentences()[text].word
        samples, rate = speak(voice, re.sub(rf"\b{word.word}\b", f"[[{word.ipa[which]}]]", text, flags=re.IGNORECASE))
        return resample(samples, rate, SAMPLE_RATE)

    return said


def test_homographs_are_right_as_the_sentence_means_them_and_wrong_otherwise(reader, say):
    right = [("a", text, say(text, sentences()[text].meant)) for text in (METAL, GUIDE)]
    wrong = [("a", text, say(text, 1 - sentences()[text].meant)) for text in (METAL, GUIDE)]
    assert homographs_right(said(reader, *right).sentences()) == 1.0
    assert homographs_right(said(reader, *wrong).sentences()) == 0.0
    assert homographs_right(said(reader, right[0], wrong[1]).sentences()) == 0.5
    silent = said(reader, right[0], ("a", GUIDE, np.zeros(SAMPLE_RATE, np.float32)), ("a", GUIDE, NOTHING))
    assert homographs_right(silent.sentences()) == 1.0 and silent.left_out == {"the clip is silent": 2}


def test_a_pronunciation_is_kept_or_not(reader, say):
    def turns(*which: int) -> list[tuple[str, str, np.ndarray]]:
        return [("a", text, say(text, w)) for text, w in zip((FIRST, LATER), which, strict=False)]

    def kept(*given: tuple[str, str, np.ndarray]) -> float:
        return pronunciation_kept(said(reader, *given).sentences())

    assert kept(*turns(0, 0)) == kept(*turns(1, 1)) == 1.0
    assert kept(*turns(0, 1)) == kept(*turns(1, 0)) == 0.0
    assert kept(("a", FIRST, NOTHING), *turns(1, 1)) == 1.0
    with pytest.raises(NotMeasurable, match="aligned"):
        kept(("a", FIRST, NOTHING), turns(1, 1)[1])
    (_, *first), second = turns(0, 1)
    with pytest.raises(NotMeasurable, match="two turns"):  # another speaker may say it his way
        kept(("b", *first), second)


def test_what_is_no_such_sentence_is_named(reader, say):
    speech = say(GUIDE, 1)
    with pytest.raises(NotMeasurable, match="no turn is one of the homograph sentences"):
        homographs_right(said(reader, ("a", "Nothing of the kind.", speech)).sentences())
    with pytest.raises(NotMeasurable):
        homographs_right(said(reader, ("a", METAL, np.zeros(SAMPLE_RATE, np.float32))).sentences())
    with pytest.raises(NotMeasurable):
        homographs_right(said(reader, ("a", METAL, speech[:1200])).sentences())  # 50 ms


def test_the_list_is_whole(reader):
    asked = sentences()
    assert len(words()) == 15 and len(asked) == 180
    for text, (word, meant) in asked.items():
        assert pronunciation.tokens_of(text).count(word.word) == 1, text
        assert all(reader.decoder.lookup_word(token) for token in pronunciation.tokens_of(text)), text
        assert meant in (0, 1, None)
    assert sum(word.reliable for word in words().values()) >= 13
    assert words()["lead"].reliable and words()["route"].reliable  # what the tests above listen to


def test_the_sentences_can_be_spoken_by_the_demo(tmp_path):
    out = tmp_path / "sentences.json"
    assert pronunciation.main(["--out", str(out)]) == 0
    requests, refused = read_requests(out)
    assert not refused
    texts = {turn["text"] for each in requests for turn in each.content["turns"]}
    assert texts == {text for text, asked in sentences().items() if asked.word.reliable}
