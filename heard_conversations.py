"""Conversations as they are heard, and every metric as a function of one conversation.

`Heard` holds the turns of one conversation beside those they are compared with: the real ones in the same places.
`MEASURES` is the table of metrics that `metric_validation.py` proves and `system_comparison.py` applies.
What cannot be measured raises `NotMeasurable`. Knows nothing of models, tokenizers or reports.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import json
import math
import multiprocessing
import os
import signal
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from tqdm import tqdm

import conversation_metrics as cm
from audio import SAMPLE_RATE, resample
from command_line import MissingRequirement, end_with_parent
from content_recall import CONTENT_RECALL, USER, answers_to, most_between, recalled, turns_between
from conversations import Conversation
from listening_models import LISTENER_METRICS, EmotionRecognizer, PhoneRecognizer, Squim
from pronunciation import (
    PRONUNCIATION_METRICS,
    PhoneReader,
    PronunciationReader,
    Said,
    homographs_right,
    is_asked,
    pronunciation_kept,
    sentences,
)
from speech_filters import DNSMOS_SAMPLES, dnsmos
from speech_filters import RATE as DNSMOS_RATE
from speech_metrics import (
    METRICS,
    NOT_ASKED,
    Metric,
    NotMeasurable,
    Recognizer,
    SpeakerEncoder,
    TextErrors,
    count_errors,
    distill_mos,
    require_english,
    require_speech,
)

VERSION = 10  # of what the metrics mean; values that were kept under another one are measured anew
PACKAGES = "python setup_environment.py --extras data eval filters"
LEFT_OUT = "turn left out: "  # before the reason, where a conversation was measured without it
RECALLED = {f"content_recall_k{k}": k for k in range(most_between() + 1)}  # metric -> exchanges between
MOST_RATED = DNSMOS_SAMPLES * SAMPLE_RATE // DNSMOS_RATE  # samples that DNSMOS hears
Value = TypeVar("Value")


@dataclass(frozen=True)
class Turn:
    """A turn as it is heard."""

    speaker: str
    text: str
    samples: np.ndarray  # (N,) at 24 kHz
    start: float | None  # s; None: nobody wrote down when
    first_audio: float | None = None  # s from the request to the first samples; None: nobody held a stop-watch
    real_time_factor: float | None = None
    language: str = "en"

    @property
    def end(self) -> float:
        return self.start + len(self.samples) / SAMPLE_RATE

    @functools.cached_property
    def _known(self) -> dict[str, Any]:
        return {}

    def once(self, name: str, measure: Callable[..., Value], *given: object) -> Value:
        """`measure(*given)`, or its NotMeasurable, measured once for every `name`, whoever asks."""
        if name not in self._known:
            try:
                self._known[name] = measure(*given)
            except NotMeasurable as reason:
                self._known[name] = NotMeasurable(str(reason))
        if isinstance(self._known[name], NotMeasurable):
            raise NotMeasurable(str(self._known[name]))
        return self._known[name]

    def prosody(self) -> cm.Prosody:
        return self.once("prosody", cm.prosody_of, self.samples, self.text)


Turns = list[Turn]


def turns_of(conversation: Conversation, audio: dict[str, np.ndarray], most: int | None = None) -> Turns:
    """The first `most` turns as they were spoken."""
    records = conversation.turns[:most]
    return [Turn(r.speaker_id, r.text, audio[r.utt_id], r.start_s, language=r.lang) for r in records]


def timed(turns: Turns) -> bool:
    """Whether somebody wrote down when all the turns begin; where not, no metric of the gaps is measurable."""
    return all(turn.start is not None for turn in turns)


def hash_of(turns: Turns) -> str:
    digest = hashlib.sha256()
    for turn in turns:
        told = f"{turn.speaker} {turn.text} {turn.start} {turn.first_audio} {turn.real_time_factor} {turn.language}"
        digest.update(told.encode() + turn.samples.tobytes())
    return digest.hexdigest()


# ---- metrics of conversations ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ears:
    """The models that listen, loaded at the first use; those of "" and False are not asked."""

    asr: str = "bundled"
    ser: str = ""
    squim: bool = False
    phones: str = ""  # "": pocketsphinx

    @classmethod
    def to_be_had(cls, asr: str, ser: str, squim: bool, phones: str = "") -> tuple[Ears, dict[str, str]]:
        """With the optional models that can be loaded here, and why the metrics of the others are missing."""
        ears, missing = cls(asr, ser, squim, phones), {}
        optional = {
            "ser": (lambda: EmotionRecognizer(ser), ("emotion_agreement",)),
            "squim": (Squim, ("squim_pesq", "squim_stoi")),
            "phones": (lambda: PhoneRecognizer(phones), PRONUNCIATION_METRICS),
        }
        for flag, (load, metrics) in optional.items():
            if getattr(ears, flag):
                try:
                    load()
                except MissingRequirement as reason:
                    ears = replace(ears, **{flag: getattr(cls, flag)})  # as if nobody had asked
                    missing |= dict.fromkeys(metrics, str(reason))
        return ears, missing

    @functools.cached_property
    def recognizer(self) -> Recognizer:
        return Recognizer(self.asr)

    @functools.cached_property
    def encoder(self) -> SpeakerEncoder:
        return SpeakerEncoder()

    @functools.cached_property
    def reader(self) -> PronunciationReader:
        return PhoneReader(PhoneRecognizer(self.phones).likelihoods) if self.phones else PronunciationReader()

    @functools.cached_property
    def emotions(self) -> EmotionRecognizer:
        return EmotionRecognizer(self.ser)

    @functools.cached_property
    def quality(self) -> Squim:
        return Squim()

    def missing(self) -> dict[str, str]:
        """Metrics that nobody asked for, and how to."""
        absent = {} if self.ser else {"emotion_agreement": "--ser MODEL"}
        return absent | ({} if self.squim else dict.fromkeys(("squim_pesq", "squim_stoi"), "--squim"))

    def embed(self, turn: Turn) -> np.ndarray:
        """(D,) of its voice. NotMeasurable: silent or too short."""
        return turn.once("embedding", lambda: self.encoder.embed(turn.samples))

    def stoi_pesq(self, turn: Turn) -> tuple[float, float]:
        """As SQUIM hears it. NotMeasurable: silent."""
        return turn.once("stoi_pesq", lambda: self.quality.stoi_pesq(turn.samples))

    def pronounced(self, turn: Turn) -> int:
        """Which of the two pronunciations. NotMeasurable: silent, or it cannot be aligned with its text."""
        return turn.once("pronounced", lambda: self.reader.heard(turn.samples, turn.text))

    def errors(self, turn: Turn) -> TextErrors:
        """NotMeasurable: the text has no words, or is not English."""
        require_english(turn.language)
        return count_errors(turn.text, self.recognizer.transcribe(turn.samples) if len(turn.samples) else "")


def _or_none(measure: Callable[..., Value], *given: object) -> Value | None:
    try:
        return measure(*given)
    except NotMeasurable:
        return None


def _mean(values: Iterable[float]) -> float:
    """Without those that are nan: what a turn cannot show in its place, e.g. confusion where nobody else speaks."""
    known = [value for value in values if math.isfinite(value)]
    if not known:
        raise NotMeasurable("no turn of the conversation can be measured")
    return float(np.mean(known))


@dataclass(frozen=True)
class Human:
    """What degraded conversations are compared with: all others of the collection, as they are."""

    prosody: dict[str, list[tuple[str, cm.Prosody]]]  # conversation -> speaker and prosody of its turns
    gaps: dict[str, list[float]]

    def prosody_but(self, name: str) -> list[tuple[str, cm.Prosody]]:
        """Speakers by conversation too: other people may go by the same name elsewhere."""
        return [
            (f"{other}/{speaker}", prosody)
            for other, turns in self.prosody.items()
            if other != name
            for speaker, prosody in turns
        ]

    @classmethod
    def of(cls, conversations: dict[str, Turns]) -> Human:
        found = cls(
            {name: [turn for turn in prosody_of_turns(turns) if turn] for name, turns in conversations.items()}, {}
        )
        for name, turns in conversations.items():
            with contextlib.suppress(NotMeasurable):
                found.gaps[name] = Heard(name, turns, turns, found, Ears()).gaps
        return found

    def gaps_but(self, name: str) -> list[float]:
        return [gap for other, gaps in self.gaps.items() if other != name for gap in gaps]


class Heard:
    """A degraded conversation beside the one it was made from.

    `left_out` counts, reason by reason, the turns that the metrics measured so far had to do without.
    """

    def __init__(self, name: str, turns: Turns, original: Turns, human: Human, ears: Ears):
        self.name, self.turns, self.original, self.human, self.ears = name, turns, original, human, ears
        self.left_out: Counter[str] = Counter()

    def each(self, measure: Callable[..., Value], *sets: Turns) -> list[Value | None]:
        """`measure` of every turn, or of those in the same place of several sets; None: left out, and counted."""
        found: list[Value | None] = []
        for turns in zip(*sets or (self.turns,), strict=True):
            try:
                found.append(measure(*turns))
            except NotMeasurable as reason:
                self.left_out[str(reason)] += 1
                found.append(None)
        return found

    def known(self, measure: Callable[..., Value], *sets: Turns) -> list[Value]:
        """As `each`, without those left out."""
        return [value for value in self.each(measure, *sets) if value is not None]

    def prosody(self) -> list[tuple[str, cm.Prosody] | None]:
        return self.each(lambda turn: (turn.speaker, turn.prosody()))

    @functools.cached_property
    def spans(self) -> list[cm.Span]:
        """NotMeasurable: nobody wrote down when the turns begin."""
        if not timed(self.turns):
            raise NotMeasurable("nothing says when the turns begin")
        return [cm.Span(turn.speaker, turn.start, turn.end) for turn in self.turns]

    @functools.cached_property
    def gaps(self) -> list[float]:
        return cm.gaps(self.spans)

    def turn_seconds(self) -> float:
        return float(np.median([len(turn.samples) / SAMPLE_RATE for turn in self.turns]))

    def first_audio(self) -> float:
        """Median over the turns. NotMeasurable: not timed."""
        return float(np.median(self.clocked(lambda turn: turn.first_audio)))

    def real_time_factor(self) -> float:
        """Of all turns together. NotMeasurable: not timed."""
        factors = self.clocked(lambda turn: turn.real_time_factor)
        return float(np.average(factors, weights=[len(turn.samples) for turn in self.turns if len(turn.samples)]))

    def clocked(self, value: Callable[[Turn], float | None]) -> list[float]:
        """Of the turns in which something was said."""
        found = [value(turn) for turn in self.turns if len(turn.samples)]
        if not found or None in found:
            raise NotMeasurable("nobody wrote down how long it took")
        return found

    def embeddings(self) -> tuple[np.ndarray, list[str]]:
        """(n, D) of the turns long enough, and their speakers."""
        found = self.known(lambda turn: (self.ears.embed(turn), turn.speaker))
        if not found:
            raise NotMeasurable("no turn is long enough for the speaker encoder")
        vectors, names = zip(*found, strict=True)
        return np.stack(vectors), list(names)

    def characters(self) -> list[cm.Character]:
        vectors, names = self.embeddings()
        own = (vectors[[name == each for each in names]] for name in sorted(set(names)))
        return [found for turns in own if (found := _or_none(cm.character, turns)) is not None]

    def mean_prosody(self, name: str) -> float:
        return _mean(getattr(prosody, name) for prosody in self.known(Turn.prosody))

    def per_turn(self, measure: Callable[[Turn, Turn], float]) -> float:
        """Mean over the turns of a measure of a turn and the one it was made from."""
        return _mean(self.known(measure, self.turns, self.original))

    def prosody_distance(self) -> float:
        ours = self.known(lambda turn: (turn.speaker, turn.prosody()))
        return cm.prosody_distance(ours, self.human.prosody_but(self.name))

    def coherence(self) -> float:
        def both(now: Turn, real: Turn) -> tuple[tuple[str, cm.Prosody], tuple[str, cm.Prosody]]:
            return (now.speaker, now.prosody()), (real.speaker, real.prosody())

        pairs = self.known(both, self.turns, self.original)
        if not pairs:
            raise NotMeasurable("no turn of the conversation can be measured")
        heard, real = zip(*pairs, strict=True)
        return cm.rank_correlation(cm.arousal(heard), cm.arousal(real))

    def errors(self) -> float:
        """Word error rate of all turns with words together. NotMeasurable: none has words."""
        counts = self.known(self.ears.errors)
        if not counts:
            raise NotMeasurable("no text of the conversation has words")
        return sum(each.wrong for each in counts) / sum(each.words for each in counts)

    def style_kept(self) -> float:
        return _mean(cm.style_kept(self.prosody(), self.human.prosody_but(self.name)))

    @functools.cached_property
    def recalled(self) -> float:
        answers_to(self.name)  # says so before anything is transcribed
        first, last = self.turns[0].speaker, self.turns[-1]
        alone = all(turn.speaker == first for turn in self.turns)  # a batch lacks the turns that it only heard
        asker = str(USER) if alone else first
        if last.speaker == asker or not len(last.samples):
            return 0.0  # the system said nothing
        return recalled(self.name, self.ears.recognizer.transcribe(last.samples))

    def recall(self, between: int) -> float:
        """Where the answer is asked for after so many other exchanges."""
        if turns_between(self.name) != between:
            raise NotMeasurable(f"{NOT_ASKED}after {between} exchanges")
        return self.recalled

    def sentences(self) -> list[Said]:
        """The turns that are sentences about a pronunciation, and which of the two is heard."""
        asked = [turn for turn in self.turns if is_asked(turn.text)]
        found = self.each(self.ears.pronounced, asked) if asked else []
        return [Said(turn.speaker, sentences()[turn.text], heard) for turn, heard in zip(asked, found, strict=True)]

    def confusion(self) -> float:
        return _mean(cm.confused(*self.embeddings()).tolist())

    def similarity(self) -> float:
        """Of the turns to those they were made from."""
        return self.per_turn(lambda now, real: float(self.ears.embed(now) @ self.ears.embed(real)))


def prosody_of_turns(turns: Turns) -> list[tuple[str, cm.Prosody] | None]:
    """Speaker and prosody of every turn that can be measured, else None."""
    found = [_or_none(turn.prosody) for turn in turns]
    return [(turn.speaker, prosody) if prosody else None for turn, prosody in zip(turns, found, strict=True)]


MEASURES: dict[str, Callable[[Heard], float]] = {
    **{name: functools.partial(lambda heard, name: heard.mean_prosody(name), name=name) for name in cm.DISTRIBUTED},
    "pitch_contour": lambda heard: heard.per_turn(lambda now, real: cm.pitch_contour(real.samples, now.samples)),
    "prosody_distance": Heard.prosody_distance,
    "emotional_coherence": Heard.coherence,
    "character_run": lambda heard: _mean(each.run for each in heard.characters()),
    "character_half": lambda heard: _mean(each.half for each in heard.characters()),
    "character_drift": lambda heard: _mean(each.drift for each in heard.characters()),
    "confusion": Heard.confusion,
    "character_other": lambda heard: _mean(cm.to_others(*heard.embeddings()).tolist()),
    "speaker_similarity": Heard.similarity,
    "style_kept": Heard.style_kept,
    "content_recall": lambda heard: heard.recalled,
    **{name: functools.partial(Heard.recall, between=k) for name, k in RECALLED.items()},
    "turn_seconds": Heard.turn_seconds,
    "first_audio": Heard.first_audio,
    "real_time_factor": Heard.real_time_factor,
    "backchannels": lambda heard: cm.backchannels(heard.spans),
    "gap": lambda heard: cm.gap(heard.gaps),
    "overlap": lambda heard: cm.overlap(heard.gaps),
    "gap_distance": lambda heard: cm.energy_distance(heard.gaps, heard.human.gaps_but(heard.name)),
    "emotion_agreement": lambda heard: heard.per_turn(
        lambda now, real: heard.ears.emotions.agreement(now.samples, real.samples)
    ),
    "squim_stoi": lambda heard: _mean(stoi for stoi, _ in heard.known(heard.ears.stoi_pesq)),
    "squim_pesq": lambda heard: _mean(pesq for _, pesq in heard.known(heard.ears.stoi_pesq)),
    "wer": Heard.errors,
    "homographs": lambda heard: homographs_right(heard.sentences()),
    "pronunciation_kept": lambda heard: pronunciation_kept(heard.sentences()),
    "distill_mos": lambda heard: _mean(heard.known(lambda turn: distill_mos(turn.samples))),
    "dnsmos": lambda heard: _mean(
        heard.known(lambda turn: dnsmos(resample(require_speech(turn.samples[:MOST_RATED]), SAMPLE_RATE, DNSMOS_RATE)))
    ),
}


METRICS_OF_CONVERSATIONS: dict[str, Metric] = {
    **{name: metric for name, metric in {**METRICS, **cm.CONVERSATION_METRICS}.items() if name in MEASURES},
    "wer": replace(
        METRICS["wer"],
        definition=METRICS["wer"].definition.replace("summed over all clips", "summed over a conversation")
        + " Here the mean over conversations, a turn whose text has no words left out.",
    ),
    "content_recall": CONTENT_RECALL,
    **{
        name: replace(CONTENT_RECALL, title=f"Content recall, {k} exchanges between", source="as the content recall")
        for name, k in RECALLED.items()
    },
    **PRONUNCIATION_METRICS,
    **LISTENER_METRICS,
    "dnsmos": Metric(
        title="DNSMOS, overall",
        unit="MOS, 1 to 5",
        better="higher",
        definition="Quality that a network predicts from the first 9 s of a turn (16 kHz, repeated where shorter, "
        "brought to one level); sees noise and clipping, not prosody.",
        reference="3.2 to 3.4 good studio speech",
        source="Reddy et al., arXiv 2110.01763, P.835; speechmos",
        needs=("speechmos",),
    ),
}


def packages_missing() -> dict[str, str]:
    """metric -> what to install for it. MissingRequirement: what all of it needs is not there."""
    if absent := [
        name for name in ("parselmouth", "pyworld", "librosa", "scipy") if not importlib.util.find_spec(name)
    ]:
        raise MissingRequirement(f"{', '.join(absent)} not installed: {PACKAGES}")
    missing = {}
    for metric, about in METRICS_OF_CONVERSATIONS.items():
        absent = [name for name in about.needs if not importlib.util.find_spec(name)]
        if absent and metric not in LISTENER_METRICS:  # which are only had by asking, and say then what they lack
            missing[metric] = f"{', '.join(absent)} not installed: {PACKAGES}"
    return missing


# ---- what is kept from run to run ------------------------------------------------------------------------------------


def kept_lines(path: Path, parse: Callable[[Any], Any]) -> list:
    """What earlier runs wrote, a JSON value a line, as `parse` reads it; what it cannot read is measured again.

    What a kill cut off is removed, so that more can follow.
    """
    content = path.read_bytes() if path.is_file() else b""
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        os.truncate(path, len(whole))
    found = []
    for line in whole.splitlines():
        with contextlib.suppress(ValueError, KeyError, TypeError):
            found.append(parse(json.loads(line)))
    return found


# ---- in several processes --------------------------------------------------------------------------------------------


def in_processes(
    work: Callable, jobs: Sequence[tuple], workers: int, start: Callable, given: tuple, title: str
) -> Iterator[tuple[int, Any]]:
    """`work(*job)` of every job with its number, as they end, in processes that begin with `start(*given)`.

    ValueError: a process was ended from outside.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, _start, (start, given)) as pool:
        numbers = {pool.submit(work, *job): number for number, job in enumerate(jobs)}
        try:
            for future in tqdm(as_completed(numbers), total=len(numbers), desc=title, unit="conversation"):
                yield numbers[future], future.result()
        except BrokenProcessPool as error:
            raise ValueError("a worker was ended from outside, perhaps for lack of memory; lower --workers") from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _start(start: Callable, given: tuple) -> None:
    import torch

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that started this one
    end_with_parent()
    torch.set_num_threads(1)
    start(*given)
