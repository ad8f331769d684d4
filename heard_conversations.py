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
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

import conversation_metrics as cm
from audio import SAMPLE_RATE, resample
from command_line import MissingRequirement
from content_recall import CONTENT_RECALL, SYSTEM, answers_to, recalled
from conversations import Conversation
from listening_models import LISTENER_METRICS, EmotionRecognizer, Squim
from pronunciation import PRONUNCIATION_METRICS, PronunciationReader, homographs_right, pronunciation_kept
from speech_filters import RATE as DNSMOS_RATE
from speech_filters import dnsmos
from speech_metrics import METRICS, Metric, NotMeasurable, Recognizer, SpeakerEncoder, count_errors
from spoken_validation import NEEDS

PACKAGES = "python setup_environment.py --extras data eval filters"
NEEDED = {  # beside those of the tokenizer's metrics
    "dnsmos": ("speechmos",),
    "homographs": ("pocketsphinx",),
    "pronunciation_kept": ("pocketsphinx",),
}
OF_VOICES = ("speaker_similarity", "character_run", "character_half", "character_drift", "confusion")


@dataclass(frozen=True)
class Turn:
    """A turn as it is heard."""

    speaker: str
    text: str
    samples: np.ndarray  # (N,) at 24 kHz
    start: float | None  # s; None: nobody wrote down when

    @property
    def end(self) -> float:
        return self.start + len(self.samples) / SAMPLE_RATE

    @functools.cached_property
    def prosody(self) -> cm.Prosody | None:
        """None: not measurable. Measured once, whoever asks."""
        return _or_none(cm.prosody_of, self.samples, self.text)


Turns = list[Turn]


def turns_of(conversation: Conversation, audio: dict[str, np.ndarray], most: int | None = None) -> Turns:
    """The first `most` turns as they were spoken."""
    records = conversation.turns[:most]
    return [Turn(record.speaker_id, record.text, audio[record.utt_id], record.start_s) for record in records]


def hash_of(turns: Turns) -> str:
    digest = hashlib.sha256()
    for turn in turns:
        digest.update(f"{turn.speaker} {turn.text} {turn.start}".encode() + turn.samples.tobytes())
    return digest.hexdigest()


# ---- metrics of conversations ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ears:
    """The models that listen, loaded at the first use; those of "" and False are not asked."""

    asr: str = "bundled"
    ser: str = ""
    squim: bool = False

    @functools.cached_property
    def recognizer(self) -> Recognizer:
        return Recognizer(self.asr)

    @functools.cached_property
    def encoder(self) -> SpeakerEncoder:
        return SpeakerEncoder()

    @functools.cached_property
    def reader(self) -> PronunciationReader:
        return PronunciationReader()

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

    def embeddings(self, turns: Turns) -> tuple[np.ndarray, list[str]]:
        """(n, D) of the turns long enough, and their speakers."""
        found = [
            (each, turn.speaker) for turn in turns if (each := _or_none(self.encoder.embed, turn.samples)) is not None
        ]
        if not found:
            raise NotMeasurable("no turn is long enough for the speaker encoder")
        vectors, names = zip(*found, strict=True)
        return np.stack(vectors), list(names)


def _or_none(measure: Callable, *given: object) -> object | None:
    try:
        return measure(*given)
    except NotMeasurable:
        return None


def _mean(values: Iterable[float | None]) -> float:
    known = [value for value in values if value is not None and math.isfinite(value)]
    if not known:
        raise NotMeasurable("no turn of the conversation can be measured")
    return float(np.mean(known))


@dataclass(frozen=True)
class Human:
    """What degraded conversations are compared with: all others of the collection, as they are."""

    prosody: dict[str, list[tuple[str, cm.Prosody]]]  # conversation -> speaker and prosody of its turns
    gaps: dict[str, list[float]]

    def prosody_but(self, name: str) -> list[tuple[str, cm.Prosody]]:
        return [turn for other, turns in self.prosody.items() if other != name for turn in turns]

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
    """A degraded conversation beside the one it was made from."""

    def __init__(self, name: str, turns: Turns, original: Turns, human: Human, ears: Ears):
        self.name, self.turns, self.original, self.human, self.ears = name, turns, original, human, ears

    @functools.cached_property
    def prosody(self) -> list[tuple[str, cm.Prosody] | None]:
        return prosody_of_turns(self.turns)

    @functools.cached_property
    def gaps(self) -> list[float]:
        """NotMeasurable: nobody wrote down when the turns begin."""
        if any(turn.start is None for turn in self.turns):
            raise NotMeasurable("nothing says when the turns begin")
        return cm.gaps([cm.Span(turn.speaker, turn.start, turn.end) for turn in self.turns])

    @functools.cached_property
    def characters(self) -> list[cm.Character]:
        vectors, names = self.ears.embeddings(self.turns)
        own = (vectors[[name == each for each in names]] for name in sorted(set(names)))
        return [found for turns in own if (found := _or_none(cm.character, turns)) is not None]

    def mean_prosody(self, name: str) -> float:
        return _mean(getattr(turn[1], name) for turn in self.prosody if turn)

    def per_turn(self, measure: Callable[[Turn, Turn], float]) -> float:
        """Mean over the turns of a measure of a turn and the one it was made from."""
        return _mean(_or_none(measure, *pair) for pair in zip(self.turns, self.original, strict=True))

    def coherence(self) -> float:
        pairs = zip(self.prosody, prosody_of_turns(self.original), strict=True)
        whole = [pair for pair in pairs if pair[0] and pair[1]]
        if not whole:
            raise NotMeasurable("no turn of the conversation can be measured")
        heard, real = zip(*whole, strict=True)
        return cm.rank_correlation(cm.arousal(heard), cm.arousal(real))

    def errors(self) -> float:
        """Word error rate of all turns together."""
        counts = [
            count_errors(turn.text, self.ears.recognizer.transcribe(turn.samples) if len(turn.samples) else "")
            for turn in self.turns
        ]
        return sum(each.wrong for each in counts) / sum(each.words for each in counts)

    @functools.cached_property
    def quality(self) -> list[tuple[float, float]]:
        """SQUIM's STOI and PESQ of the turns that can be measured."""
        found = (_or_none(self.ears.quality.stoi_pesq, turn.samples) for turn in self.turns)
        return [each for each in found if each is not None]

    def style_kept(self) -> float:
        human = [prosody for _, prosody in self.human.prosody_but(self.name)]
        return _mean(cm.style_kept(self.prosody, human))

    def recall(self) -> float:
        answers_to(self.name)  # says so before anything is transcribed
        last = self.turns[-1]
        if last.speaker != str(SYSTEM) or not len(last.samples):
            return 0.0  # the system said nothing
        return recalled(self.name, self.ears.recognizer.transcribe(last.samples))

    def confusion(self) -> float:
        return _mean(cm.confused(*self.ears.embeddings(self.turns)).tolist())

    def similarity(self) -> float:
        """Of the turns to those they were made from."""
        return self.per_turn(
            lambda now, real: float(self.ears.encoder.embed(now.samples) @ self.ears.encoder.embed(real.samples))
        )


def prosody_of_turns(turns: Turns) -> list[tuple[str, cm.Prosody] | None]:
    """Speaker and prosody of every turn that can be measured, else None."""
    return [(turn.speaker, turn.prosody) if turn.prosody else None for turn in turns]


MEASURES: dict[str, Callable[[Heard], float]] = {
    **{name: functools.partial(lambda heard, name: heard.mean_prosody(name), name=name) for name in cm.DISTRIBUTED},
    "pitch_contour": lambda heard: heard.per_turn(lambda now, real: cm.pitch_contour(real.samples, now.samples)),
    "prosody_distance": lambda heard: cm.prosody_distance(
        [turn for turn in heard.prosody if turn], heard.human.prosody_but(heard.name)
    ),
    "emotional_coherence": Heard.coherence,
    "character_run": lambda heard: _mean(each.run for each in heard.characters),
    "character_half": lambda heard: _mean(each.half for each in heard.characters),
    "character_drift": lambda heard: _mean(each.drift for each in heard.characters),
    "confusion": Heard.confusion,
    "speaker_similarity": Heard.similarity,
    "style_kept": Heard.style_kept,
    "content_recall": Heard.recall,
    "gap": lambda heard: cm.gap(heard.gaps),
    "overlap": lambda heard: cm.overlap(heard.gaps),
    "gap_distance": lambda heard: cm.wasserstein(heard.gaps, heard.human.gaps_but(heard.name)),
    "emotion_agreement": lambda heard: heard.per_turn(
        lambda now, real: heard.ears.emotions.agreement(now.samples, real.samples)
    ),
    "squim_stoi": lambda heard: _mean(stoi for stoi, _ in heard.quality),
    "squim_pesq": lambda heard: _mean(pesq for _, pesq in heard.quality),
    "wer": Heard.errors,
    "homographs": lambda heard: homographs_right(
        heard.ears.reader, [(turn.text, turn.samples) for turn in heard.turns]
    ),
    "pronunciation_kept": lambda heard: pronunciation_kept(
        heard.ears.reader, [(turn.speaker, turn.text, turn.samples) for turn in heard.turns]
    ),
    "dnsmos": lambda heard: _mean(
        dnsmos(resample(turn.samples, SAMPLE_RATE, DNSMOS_RATE)) for turn in heard.turns if len(turn.samples)
    ),
}


METRICS_OF_CONVERSATIONS: dict[str, Metric] = {
    **{name: metric for name, metric in {**METRICS, **cm.CONVERSATION_METRICS}.items() if name in MEASURES},
    "content_recall": CONTENT_RECALL,
    **PRONUNCIATION_METRICS,
    **LISTENER_METRICS,
    "dnsmos": Metric(
        title="DNSMOS, overall",
        unit="MOS, 1 to 5",
        better="higher",
        definition="Quality that a network predicts from the first 9 s of a turn (16 kHz, repeated where shorter); "
        "sees noise and clipping, not prosody.",
        reference="3.2 to 3.4 good studio speech",
        source="Reddy et al., arXiv 2110.01763, P.835; speechmos",
    ),
}


def packages_missing() -> dict[str, str]:
    """metric -> what to install for it. MissingRequirement: what all of it needs is not there."""
    if absent := [
        name for name in ("parselmouth", "pyworld", "librosa", "scipy") if not importlib.util.find_spec(name)
    ]:
        raise MissingRequirement(f"{', '.join(absent)} not installed: {PACKAGES}")
    missing = {}
    for metric, packages in {**NEEDS, **NEEDED}.items():
        if absent := [name for name in packages if not importlib.util.find_spec(name)]:
            missing[metric] = f"{', '.join(absent)} not installed: {PACKAGES}"
    if "speaker_similarity" in missing:
        missing |= dict.fromkeys(OF_VOICES, missing["speaker_similarity"])
    return {metric: reason for metric, reason in missing.items() if metric in MEASURES}


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
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    start(*given)


def _end_with_parent() -> None:
    """A process whose parent was killed would wait for work for ever."""
    multiprocessing.parent_process().join()
    os._exit(1)
