"""Which of two pronunciations was said: homographs, and words that a speaker may say either way but should not mix.

The sentences (`corpus/pronunciation.json`) were written for this project, over the words that Sesame names for its two
tasks ("Crossing the Uncanny Valley of Conversational Voice", evaluation). A turn whose text is one of them is heard by
forced choice: pocketsphinx aligns the sentence with either pronunciation, and the difference of the two scores,
against a threshold fitted for the word on known audio (`benchmarks/known_pronunciations.py`), decides.

    python pronunciation.py --out homographs.json    # the sentences, for demo.py --mode batch --input homographs.json
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from audio import SAMPLE_RATE, resample
from checkpointing import write_atomically
from command_line import EXIT_CODES_HELP, EXIT_DONE, MissingRequirement, run
from phone_alignments import RATE, hear, tokens_of
from speech_metrics import EVALUATION_PACKAGES, NOT_ASKED, Metric, NotMeasurable, require_speech

SENTENCES = Path(__file__).parent / "corpus" / "pronunciation.json"
RELIABLE = 0.8  # share of known audio heard right, below which a word is not asked for
LEAD_SECONDS = 0.1  # of silence around a turn: the first and the last word need some

PRONUNCIATION_METRICS = {
    "homographs": Metric(
        title="Homographs",
        unit="share right",
        better="higher",
        definition="Share of turns that are one of 80 sentences on lead, bass, wound and row in which the word is "
        "pronounced as the sentence means it. Forced choice between the two by pocketsphinx, or with --phones by "
        "a phoneme recogniser.",
        reference="0.5 for a voice that does not read on; known audio: see README",
        source='Sesame, "Crossing the Uncanny Valley of Conversational Voice", evaluation; sentences of this project',
        needs=("pocketsphinx",),
    ),
    "pronunciation_kept": Metric(
        title="Pronunciation kept",
        unit="share of later turns",
        better="higher",
        definition="Share of turns with a word that can be said in two ways (aunt, data, envelope, mobile, route, "
        "vase, either, adult, caramel) in which it is said as in the first such turn of the conversation.",
        reference="a voice that always says one of the two has 1 as well: see how often it says either",
        source="as the homographs",
        needs=("pocketsphinx",),
    ),
}


@dataclass(frozen=True, kw_only=True)
class Word:
    """A word with two pronunciations."""

    word: str
    names: tuple[str, str]
    phones: tuple[str, str]  # ARPAbet, as in CMUdict
    ipa: tuple[str, str]  # for a voice that takes phonemes
    threshold: float  # difference of the scores above which the first one is heard
    known: float  # share of known audio that is heard right, by thresholds fitted on other sentences

    @property
    def reliable(self) -> bool:
        return self.known >= RELIABLE


class Asked(NamedTuple):
    """A sentence of the list."""

    word: Word
    meant: int | None  # which of the two its sense asks for; None: either will do


def words() -> dict[str, Word]:
    return _read()[0]


def sentences() -> dict[str, Asked]:
    """Text -> what it asks for."""
    return _read()[1]


def conversations() -> dict[str, tuple[str, ...]]:
    """Name -> the texts of one speaker's turns: one for every homograph sentence, two for a word said in two ways.

    Without the words whose pronunciations cannot be told apart reliably.
    """
    return {name: texts for name, texts in _read()[2].items() if sentences()[texts[0]].word.reliable}


@functools.cache
def _read() -> tuple[dict[str, Word], dict[str, Asked], dict[str, tuple[str, ...]]]:
    content = json.loads(SENTENCES.read_text(encoding="utf-8"))
    found, asked, spoken = {}, {}, {}
    for entry in (*content["homographs"], *content["words_said_in_two_ways"]):
        one, two = entry["variants"]
        pairs = {key: (one[key], two[key]) for key in ("name", "phones", "ipa")}
        facts = {"threshold": entry["threshold"], "known": entry["known"]}
        word = Word(word=entry["word"], names=pairs["name"], phones=pairs["phones"], ipa=pairs["ipa"], **facts)
        found[word.word] = word
        for meant, name in enumerate(word.names if "sentences" in entry else ()):
            for number, text in enumerate(entry["sentences"][name]):
                asked[text] = Asked(word, meant)
                spoken[f"{word.word}-{name}-{number}"] = (text,)
        for number, pair in enumerate(zip(entry.get("first", ()), entry.get("later", ()), strict=True)):
            asked |= dict.fromkeys(pair, Asked(word, None))
            spoken[f"{word.word}-kept-{number}"] = pair
    return found, asked, spoken


def with_either(tokens: Sequence[str], word: str, either: Sequence[str]) -> tuple[int, list[list[str]]]:
    """The place of a word in a sentence, and the sentence with one or the other of two things there."""
    place = tokens.index(word)
    return place, [[*tokens[:place], one, *tokens[place + 1 :]] for one in either]


class PronunciationReader:
    """Forced choice between the two pronunciations of a word; about 0.1 s per second of speech."""

    def __init__(self):
        if importlib.util.find_spec("pocketsphinx") is None:
            raise MissingRequirement(f"pocketsphinx not installed: {EVALUATION_PACKAGES}")
        import pocketsphinx

        paths = {"hmm": "en-us/en-us", "dict": "en-us/cmudict-en-us.dict"}
        paths = {name: pocketsphinx.get_model_path(path) for name, path in paths.items()}
        # wide beams: a sentence is to be aligned, not to be found
        beams = dict.fromkeys(("beam", "pbeam", "wbeam"), 1e-100)
        self.decoder = pocketsphinx.Decoder(lm=None, loglevel="FATAL", **paths, **beams)
        for word in words().values():
            for name, phones in zip(word.names, word.phones, strict=True):
                self.decoder.add_word(f"{word.word}_{name}", phones, True)

    def heard(self, samples: np.ndarray, text: str) -> int:
        """(N,) at 24 kHz of a sentence of the list -> 0 or 1, which pronunciation. NotMeasurable: see `margin`."""
        return int(self.margin(samples, text) <= self.threshold(sentences()[text].word))

    def threshold(self, word: Word) -> float:
        """The margin above which the first pronunciation is heard."""
        return word.threshold

    def margin(self, samples: np.ndarray, text: str) -> float:
        """Score of the first pronunciation less that of the second; a rank, without a unit.

        NotMeasurable: silent, or the sentence cannot be found in the audio with either.
        """
        word = sentences()[text].word
        audio = np.pad(resample(require_speech(samples), SAMPLE_RATE, RATE), int(LEAD_SECONDS * RATE))
        pcm = (audio.clip(-1, 1) * 32767).astype("<i2").tobytes()
        place, readings = with_either(tokens_of(text), word.word, [f"{word.word}_{name}" for name in word.names])
        one, two = (self._score(pcm, reading, place) for reading in readings)
        if one is two is None:
            raise NotMeasurable("the sentence cannot be aligned with the audio")
        return one - two if None not in (one, two) else math.inf if two is None else -math.inf

    def _score(self, pcm: bytes, spoken: Sequence[str], place: int) -> float | None:
        """None: not even the word at `place` is reached."""
        self.decoder.add_jsgf_string("sentence", f"#JSGF V1.0;\ngrammar g;\npublic <s> = {' '.join(spoken)};\n")
        self.decoder.activate_search("sentence")
        hear(self.decoder, pcm)
        found = self.decoder.hyp()
        if found is None or spoken[place] not in found.hypstr.split():
            return None
        return math.log(found.score)


class PhoneReader(PronunciationReader):
    """The same choice by how likely a phoneme recogniser holds the phones of the sentence with either."""

    def __init__(self, likelihoods: Callable[[np.ndarray, Sequence[Sequence[str]]], list[float]]):
        super().__init__()
        self._likelihoods = likelihoods

    def threshold(self, word: Word) -> float:
        return 0.0

    def margin(self, samples: np.ndarray, text: str) -> float:
        """Nats by which the first pronunciation is likelier. NotMeasurable: silent, or shorter than its phones."""
        word = sentences()[text].word
        place, readings = with_either(tokens_of(text), word.word, word.phones)
        phones = [
            [token if i == place else self.decoder.lookup_word(token) for i, token in enumerate(reading)]
            for reading in readings
        ]
        one, two = self._likelihoods(samples, phones)
        if max(one, two) == -math.inf:
            raise NotMeasurable("the sentence cannot be aligned with the audio")
        return one - two


class Said(NamedTuple):
    """A turn whose text is one of the sentences."""

    speaker: str
    asked: Asked
    heard: int | None  # which pronunciation; None: it could not be aligned


def is_asked(text: str) -> bool:
    """Whether it is one of the sentences whose word can be told apart reliably."""
    return text in sentences() and sentences()[text].word.reliable


def homographs_right(said: Sequence[Said]) -> float:
    """The sentences of a conversation -> PRONUNCIATION_METRICS["homographs"].

    NotMeasurable: none is about a homograph, or none can be aligned.
    """
    said = [each for each in said if each.asked.meant is not None]
    if not said:
        raise NotMeasurable(f"{NOT_ASKED}no turn is one of the homograph sentences")
    right = [each.heard == each.asked.meant for each in said if each.heard is not None]
    if not right:
        raise NotMeasurable("no homograph sentence can be aligned with the audio")
    return float(np.mean(right))


def pronunciation_kept(said: Sequence[Said]) -> float:
    """The sentences of a conversation -> PRONUNCIATION_METRICS["pronunciation_kept"].

    NotMeasurable: no speaker says one of the words in two turns, or they cannot be aligned.
    """
    said_words = [((each.speaker, each.asked.word.word), each.heard) for each in said if each.asked.meant is None]
    if len({word for word, _ in said_words}) == len(said_words):
        raise NotMeasurable(f"{NOT_ASKED}no speaker says a word of two pronunciations in two turns")
    first: dict[tuple[str, str], int] = {}
    kept = [heard == first.setdefault(word, heard) for word, heard in said_words if heard is not None]
    if len(kept) == len(first):
        raise NotMeasurable("no two turns with one word can be aligned with the audio")
    return float((sum(kept) - len(first)) / (len(kept) - len(first)))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Write the sentences as conversations that demo.py --mode batch speaks.", epilog=EXIT_CODES_HELP
    )
    parser.add_argument("--out", type=Path, default=Path("pronunciation.json"), help="(default: pronunciation.json)")
    args = parser.parse_args(argv)
    document = {
        "conversations": [
            {"id": name, "turns": [{"speaker": 0, "text": text} for text in texts]}
            for name, texts in conversations().items()
        ]
    }
    write_atomically(args.out, (json.dumps(document, indent=1) + "\n").encode())
    spoken = sum(len(texts) for texts in conversations().values())
    print(f"{args.out}: {len(document['conversations'])} conversations, {spoken} sentences")
    return EXIT_DONE


if __name__ == "__main__":
    raise SystemExit(run(main))
