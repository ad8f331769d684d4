"""How conversations sound: prosody, arousal, character, timing; each a function of samples, texts or times.

No weights are needed but those of the speaker encoder, which the caller runs. What a metric can and cannot tell is
measured by `metric_validation.py`. Samples are float32 (N,) at 24 kHz. What cannot be measured raises `NotMeasurable`.
Knows nothing of data sets, models or reports.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from audio import SAMPLE_RATE
from speech_metrics import OF_VOICES, Metric, NotMeasurable, require_speech
from synthetic_voices import track_f0

HOP_SECONDS = 0.01
ACTIVE_DB = 35.0  # a hop is speech if it is at most this far below the loudest
SHORTEST_PAUSE = 0.15  # s of silence within a turn; shorter ones are stops of consonants
PITCH_RANGE = (60.0, 500.0)  # Hz
FEWEST_VOICED = 10  # hops
SHORTEST_SECONDS = 0.3
ALIGNED_BANDS = 20  # mel bands of the alignment of two readings of a text
FEWEST_TURNS = 4  # of a rank correlation
MOST_COMPARED = 1000  # human turns whose pairs are compared
LATER = 4  # turns after a speaker's first one, from which on the style is a matter of memory
BREAK = 0.2  # s; silences in one speaker's turn that are shorter do not end it (dGSLM, arXiv 2203.16502, 3.2)
TILT_HZ = 1000.0
AROUSAL = ("pitch", "pitch_spread", "level", "level_spread", "rate", "tilt")  # features that rise with arousal

CONVERSATION_METRICS = {
    "pitch": Metric(
        title="Pitch",
        unit="semitones from 100 Hz",
        better="as in human speech",
        definition="Median of F0 over voiced frames (Praat's autocorrelation, 60 to 500 Hz).",
        reference="about 2 for men, 12 for women",
        source="Boersma 1993, IFA Proceedings 17; praat-parselmouth",
        needs=("parselmouth",),
    ),
    "pitch_spread": Metric(
        title="Pitch spread",
        unit="semitones",
        better="as in human speech; lower is monotonous",
        definition="Standard deviation of F0 in semitones over voiced frames, the highest and the lowest 5 % "
        "taken for their bounds. Deaf to where the pitch moves: see the pitch contour.",
        reference="2 to 4 in conversation, 0 monotone",
        source="as the pitch",
        needs=("parselmouth",),
    ),
    "level_spread": Metric(
        title="Level spread",
        unit="dB",
        better="as in human speech",
        definition="Standard deviation of the level of 10 ms hops that are at most 35 dB below the loudest.",
        reference="7 to 10 in clean speech; loud noise lowers it",
        source="root mean square",
        needs=("parselmouth",),
    ),
    "rate": Metric(
        title="Articulation rate",
        unit="characters/s",
        better="as in human speech",
        definition="Letters and digits of the text / seconds of speech, pauses above 0.15 s left out.",
        reference="12 to 17 in English",
        source="count",
        needs=("parselmouth",),
    ),
    "pause_share": Metric(
        title="Pause share",
        unit="share of the turn",
        better="as in human speech",
        definition="Silence of at least 0.15 s between the first and the last speech / time between these.",
        reference="0.02 to 0.2 in conversation",
        source="level",
        needs=("parselmouth",),
    ),
    "pitch_contour": Metric(
        title="Pitch contour",
        unit="correlation",
        better="higher",
        definition="Pearson correlation of log F0 with that of another reading of the text over frames voiced "
        "in both, after dynamic time warping on 20 mel bands. 0 where either is monotone.",
        reference="1 identity, 0 unrelated, -1 turned upside down; two good readings of a text may well differ",
        source="VERSA's F0 correlation, on voiced frames only",
        needs=("parselmouth", "librosa"),
    ),
    "prosody_distance": Metric(
        title="Distance of the prosody to human speech",
        unit="standard deviations",
        better="lower",
        definition="Energy distance between the values of two sets of turns, E|x-y| - E|x-x'|/2 - E|y-y'|/2 over "
        "pairs of different turns, in standard deviations of the human set (at least 0.5 st, 0.3 st, 0.5 dB, "
        "0.5 characters/s, 0.02); mean over pitch (less the speaker's median), spread of pitch and level, rate and "
        "pause share.",
        reference="0 on average for speech of the same kind, however few the turns (single conversations lie around "
        "it, also below); 0.23 if nothing ever varies, 0.27 for a shift by one human standard deviation, 0.97 by two",
        source="Szekely and Rizzo 2013, J. Stat. Plan. Inference 143(8); after TTSDS (arXiv 2407.12707), with human "
        "units in place of a noise anchor",
        needs=("parselmouth",),
    ),
    "character_run": Metric(
        title="Character consistency",
        unit="cosine",
        better="higher, read between the two baselines",
        definition="Cosine of a turn's speaker embedding to the mean of that character's turns before it.",
        reference="real turns of the same and of other speakers",
        source="speaker similarity over a conversation",
        needs=OF_VOICES,
    ),
    "character_half": Metric(
        title="Character, first half against second",
        unit="cosine",
        better="higher",
        definition="Cosine of the mean speaker embeddings of the first and the second half of a character's turns.",
        reference="real conversations",
        source="as character consistency",
        needs=OF_VOICES,
    ),
    "character_drift": Metric(
        title="Character drift",
        unit="cosine per turn",
        better="0; below 0 the voice goes away",
        definition="Slope of the cosine of a character's turns to its first one over the number of the turn.",
        reference="0",
        source="least squares",
        needs=OF_VOICES,
    ),
    "confusion": Metric(
        title="Speaker confusion",
        unit="share of turns",
        better="lower",
        definition="Share of turns whose speaker embedding is nearer to the mean of another character of the "
        "conversation than to the mean of its own other turns.",
        reference="0 to 0.05 in real conversations; voices drawn at random 0.5 with two characters, 1 - 1/n with n, "
        "and more where turns are few",
        source="nearest centroid",
        needs=OF_VOICES,
    ),
    "character_other": Metric(
        title="Likeness to the other characters",
        unit="cosine",
        better="lower, far below the character consistency",
        definition="Cosine of a turn's speaker embedding to the mean of the turns of each other character of the "
        "conversation, the nearest one.",
        reference="what the character consistency is where a voice is lost: real conversations",
        source="as the confusion",
        needs=OF_VOICES,
    ),
    "emotional_coherence": Metric(
        title="Emotional coherence",
        unit="rank correlation",
        better="higher",
        definition="Spearman correlation over the turns of a conversation between the arousal heard and the arousal "
        "of the real turn in the same place, which is what the context called for. Arousal: mean z score within the "
        "speaker of pitch, its spread, level, its spread, rate and tilt.",
        reference="1 as the human speaker; not 0 but about 0.5 for two readers without any emotion, as the words set "
        "rate, level and tilt too: to be read beside another system that says the same words",
        source="acoustic arousal, e.g. Juslin and Laukka 2003, Psychological Bulletin 129(5)",
        needs=("parselmouth", "scipy"),
    ),
    "style_kept": Metric(
        title="Style kept",
        unit="share",
        better="higher where a style was asked for",
        definition="For every turn four or more turns after a speaker's first one: share of the pairs of turns of "
        "different speakers in other human conversations that sound less alike than these two do (distance of pitch, "
        "its spread, level, its spread, rate and tilt in human standard deviations). Mean over the turns.",
        reference="0.5 as any two turns of anybody; real conversations of the same kind",
        source="after Style Amnesia, arXiv 2512.23578: is an instructed style still there some turns later?",
        needs=("parselmouth",),
    ),
    "gap": Metric(
        title="Gap between turns",
        unit="s",
        better="as in human speech",
        definition="Median of start of a turn - end of the turn before by somebody else; below 0 is overlap. "
        "Turns that lie wholly within one of somebody else (backchannels) are set aside.",
        reference="about 0.2 across languages (Stivers et al. 2009)",
        source="Levinson and Torreira 2015",
    ),
    "gap_distance": Metric(
        title="Distance of the gaps to human ones",
        unit="s",
        better="lower",
        definition="Energy distance between the gaps of two sets of conversations, as the distance of the prosody.",
        reference="0 on average for conversations of the same kind; sees what the median cannot, e.g. gaps that are "
        "all alike",
        source="as the gap",
    ),
    "overlap": Metric(
        title="Overlapping turns",
        unit="share of speaker changes",
        better="as in human speech",
        definition="Share of changes of the speaker with a gap below 0.",
        reference="0.1 to 0.4 in telephone conversation; 0 for half-duplex systems by construction",
        source="as the gap",
    ),
    "turn_seconds": Metric(
        title="Length of turns",
        unit="s",
        better="as in human speech",
        definition="Median length of the turns.",
        reference="the human system beside it: it follows from what is said",
        source="as the gap",
    ),
    "backchannels": Metric(
        title="Backchannels",
        unit="share of turns",
        better="as in human speech",
        definition='Share of the turns that lie wholly within one of somebody else: "mm", "yes".',
        reference="0 for half-duplex systems by construction",
        source="as the gap",
    ),
}
# What `prosody_distance` compares, and the least standard deviation it believes: a few turns may be alike by chance
LEAST_SPREAD = {"pitch": 0.5, "pitch_spread": 0.3, "level_spread": 0.5, "rate": 0.5, "pause_share": 0.02}
DISTRIBUTED = tuple(LEAST_SPREAD)


# ---- one turn --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Prosody:
    """How one turn sounds. Units as in `CONVERSATION_METRICS`."""

    pitch: float
    pitch_spread: float
    level: float  # dBFS of speech
    level_spread: float
    rate: float
    pause_share: float
    tilt: float  # dB, speech above 1 kHz against below


def levels(samples: np.ndarray) -> np.ndarray:
    """(N,) -> (T,) dBFS of 10 ms hops."""
    hop = int(HOP_SECONDS * SAMPLE_RATE)
    hops = samples[: len(samples) // hop * hop].reshape(-1, hop).astype(np.float64)
    return 10 * np.log10(np.square(hops).mean(axis=1) + 1e-10)


def pitch_track(samples: np.ndarray) -> np.ndarray:
    """(N,) -> (T,) F0 in semitones from 100 Hz every 10 ms, nan where unvoiced.

    In two passes: what is found in the wide range first says where the second one looks (De Looze and Hirst 2008).
    NotMeasurable: shorter than 0.3 s.
    """
    if len(samples) < SHORTEST_SECONDS * SAMPLE_RATE:
        raise NotMeasurable(f"shorter than {SHORTEST_SECONDS} s for prosody")
    floor, ceil = PITCH_RANGE
    first = track_f0(samples, SAMPLE_RATE, floor, ceil)
    if (voiced := first[first > 0]).size >= FEWEST_VOICED:
        low, high = np.quantile(voiced, (0.25, 0.75))
        floor, ceil = max(floor, 0.7 * low), min(ceil, 1.6 * high)
        first = track_f0(samples, SAMPLE_RATE, floor, ceil)
    hertz = first[::2]  # its hops are 5 ms
    return 12 * np.log2(np.where(hertz > 0, hertz, np.nan) / 100)


def prosody_of(samples: np.ndarray, text: str) -> Prosody:
    """(N,) of a text. NotMeasurable: silent, shorter than 0.3 s, hardly any voice, or a text without letters."""
    require_speech(samples)
    letters = sum(character.isalnum() for character in text)
    if not letters:
        raise NotMeasurable("the text has no letters to speak at a rate")
    pitch = pitch_track(samples)
    level = levels(samples)
    active = level > level.max() - ACTIVE_DB
    first, last = np.flatnonzero(active)[[0, -1]]
    pauses = sum(n for n in silences(active[first : last + 1]) if n * HOP_SECONDS >= SHORTEST_PAUSE)
    span = last + 1 - first
    voiced = pitch[np.isfinite(pitch)]
    if voiced.size < FEWEST_VOICED:
        raise NotMeasurable("hardly any voiced speech for prosody")
    low, high = np.quantile(voiced, (0.05, 0.95))
    return Prosody(
        pitch=float(np.median(voiced)),
        pitch_spread=float(np.clip(voiced, low, high).std()),
        level=float(level[active].mean()),
        level_spread=float(level[active].std()),
        rate=letters / ((span - pauses) * HOP_SECONDS),
        pause_share=float(pauses / span),
        tilt=tilt_of(samples),
    )


def silences(active: np.ndarray) -> list[int]:
    """(T,) of bool -> lengths in hops of the runs that are False."""
    return [len(list(run)) for speech, run in itertools.groupby(active) if not speech]


def tilt_of(samples: np.ndarray) -> float:
    """dB by which the power above 1 kHz exceeds that below."""
    power = np.square(np.abs(np.fft.rfft(samples.astype(np.float64))))
    edge = int(TILT_HZ * len(samples) / SAMPLE_RATE)
    return float(10 * np.log10((power[edge:].sum() + 1e-10) / (power[1:edge].sum() + 1e-10)))


def pitch_contour(reference: np.ndarray, samples: np.ndarray) -> float:
    """(N,), (M,) of the same text -> CONVERSATION_METRICS["pitch_contour"]. NotMeasurable: too little voice."""
    import librosa

    waves = [require_speech(wave) for wave in (reference, samples)]
    settings = {"sr": SAMPLE_RATE, "n_fft": 1024, "hop_length": int(2 * HOP_SECONDS * SAMPLE_RATE)}
    tracks = [pitch_track(wave)[::2] for wave in waves]
    mels = [librosa.feature.melspectrogram(y=wave, n_mels=ALIGNED_BANDS, **settings) for wave in waves]
    logs = [librosa.power_to_db(mel, ref=np.max, top_db=50) for mel in mels]
    _, path = librosa.sequence.dtw(*logs)  # (steps, 2) frames of 20 ms
    steps = path[(path[:, 0] < len(tracks[0])) & (path[:, 1] < len(tracks[1]))]
    ours, theirs = tracks[0][steps[:, 0]], tracks[1][steps[:, 1]]
    both = np.isfinite(ours) & np.isfinite(theirs)
    if both.sum() < FEWEST_VOICED:
        raise NotMeasurable("hardly any frame voiced in both readings")
    ours, theirs = ours[both], theirs[both]
    if min(ours.std(), theirs.std()) < 0.25:  # semitones: monotone, all that is left are errors of the tracker
        return 0.0
    return float(np.corrcoef(ours, theirs)[0, 1])


# ---- sets of turns ---------------------------------------------------------------------------------------------------


def energy_distance(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Energy distance of what two samples of numbers are drawn from, in their unit; without the bias of few numbers.

    A distance of the samples themselves would say that few numbers without any variation are nearer than as many good
    ones. NotMeasurable: one side has fewer than 2.
    """
    if min(len(ours), len(theirs)) < 2:
        raise NotMeasurable("fewer than 2 values to compare")
    n, m = len(ours), len(theirs)
    own, other, all_of_them = map(_sum_of_differences, (ours, theirs, [*ours, *theirs]))
    return (all_of_them - own - other) / (n * m) - own / (n * (n - 1)) - other / (m * (m - 1))


def _sum_of_differences(values: Sequence[float]) -> float:
    """Sum of |x - x'| over the pairs of numbers, each pair once."""
    n = len(values)
    return float(np.dot(2 * np.arange(n) - n + 1, np.sort(np.asarray(values, dtype=np.float64))))


def prosody_distance(ours: Sequence[tuple[str, Prosody]], human: Sequence[tuple[str, Prosody]]) -> float:
    """(speaker, prosody) of two sets of turns -> CONVERSATION_METRICS["prosody_distance"]."""
    if len(human) < FEWEST_TURNS:
        raise NotMeasurable(f"fewer than {FEWEST_TURNS} human turns to compare with")
    distances = []
    for feature in DISTRIBUTED:
        values = [_values(turns, feature) for turns in (ours, human)]
        unit = max(float(values[1].std()), LEAST_SPREAD[feature])
        distances.append(energy_distance(*values) / unit)
    return float(np.mean(distances))


def _values(turns: Sequence[tuple[str, Prosody]], feature: str) -> np.ndarray:
    """The feature of all turns; pitch without the speaker's median."""
    values = np.array([getattr(prosody, feature) for _, prosody in turns])
    if feature == "pitch":
        speakers = np.array([speaker for speaker, _ in turns])
        for speaker in set(speakers):
            values[speakers == speaker] -= np.median(values[speakers == speaker])
    return values


# ---- emotion ---------------------------------------------------------------------------------------------------------


def arousal(turns: Sequence[tuple[str, Prosody]]) -> np.ndarray:
    """(speaker, prosody) of turns -> (n,) mean z score within the speaker over `AROUSAL`; nan where he has one turn.

    A louder or higher voice as such is no arousal: only what a speaker changes counts.
    """
    speakers = np.array([speaker for speaker, _ in turns])
    values = np.array([[getattr(prosody, name) for name in AROUSAL] for _, prosody in turns])  # (n, features)
    scores = np.full_like(values, np.nan)
    for speaker in set(speakers):
        own = speakers == speaker
        if own.sum() > 1:
            spread = values[own].std(axis=0)
            scores[own] = (values[own] - values[own].mean(axis=0)) / np.where(spread > 1e-6, spread, np.inf)
    return scores.mean(axis=1)


def rank_correlation(ours: np.ndarray, theirs: np.ndarray) -> float:
    """(n,), (n,) with nan where unknown -> Spearman; 0 where ours never changes. NotMeasurable: under 4 pairs, or
    theirs never changes."""
    from scipy.stats import spearmanr

    known = np.isfinite(ours) & np.isfinite(theirs)
    if known.sum() < FEWEST_TURNS:
        raise NotMeasurable(f"fewer than {FEWEST_TURNS} turns for a rank correlation")
    ours, theirs = ours[known], theirs[known]
    if np.ptp(theirs) < 1e-9:
        raise NotMeasurable("what it is compared with never changes")
    if np.ptp(ours) < 1e-9:
        return 0.0
    return float(spearmanr(ours, theirs).statistic)


def style_kept(turns: Sequence[tuple[str, Prosody] | None], human: Sequence[tuple[str, Prosody]]) -> list[float]:
    """Speaker and prosody of a conversation's turns in order (None: not measurable), and of other conversations ->
    CONVERSATION_METRICS["style_kept"] of each later turn. NotMeasurable: no speaker comes back so late.

    Turns are compared within the system and within human speech, never across: a system that is louder or higher than
    the human speakers keeps a style no better for that.
    """
    human = human[:: 1 + len(human) // MOST_COMPARED]
    names = np.array([speaker for speaker, _ in human])
    if len(human) < FEWEST_TURNS or len(set(names)) < 2:
        raise NotMeasurable(f"fewer than {FEWEST_TURNS} human turns, or all of one speaker, to compare with")
    others = _features([prosody for _, prosody in human])  # (m, features)
    spread = np.maximum(others.std(axis=0), 1e-3)
    others = others / spread
    apart = np.linalg.norm(others[:, None] - others, axis=2)[names[:, None] != names]  # of any two people's turns
    first: dict[str, tuple[int, np.ndarray]] = {}
    kept = []
    for place, turn in enumerate(turns):
        if turn is None:
            continue
        began, wanted = first.setdefault(turn[0], (place, _features([turn[1]])[0]))
        if place - began >= LATER:
            away = np.linalg.norm((_features([turn[1]])[0] - wanted) / spread)
            kept.append(float((apart > away).mean()))
    if not kept:
        raise NotMeasurable(f"no speaker comes back after {LATER} turns")
    return kept


def _features(turns: Sequence[Prosody]) -> np.ndarray:
    return np.array([[getattr(prosody, name) for name in AROUSAL] for prosody in turns])


# ---- character -------------------------------------------------------------------------------------------------------


class Character(NamedTuple):
    """Consistency of one character's turns in one conversation; nan where it has too few."""

    run: float
    half: float
    drift: float


def _unit(x: np.ndarray) -> np.ndarray:
    return x / max(float(np.linalg.norm(x)), 1e-9)


def character(turns: np.ndarray) -> Character:
    """(n, D) speaker embeddings of a character in order. NotMeasurable: fewer than 2 turns."""
    if len(turns) < 2:
        raise NotMeasurable("a character with one turn cannot change")
    run = np.mean([turns[i] @ _unit(turns[:i].mean(axis=0)) for i in range(1, len(turns))])
    halves = (_unit(part.mean(axis=0)) for part in np.array_split(turns, 2))
    to_first = turns[1:] @ turns[0]
    slope = np.polyfit(np.arange(1, len(turns)), to_first, 1)[0] if len(to_first) > 1 else math.nan
    return Character(float(run), float(np.dot(*halves)), float(slope))


def confused(turns: np.ndarray, speakers: Sequence[str]) -> np.ndarray:
    """(n, D) embeddings of a conversation's turns -> (n,) 1 where another character is nearer, nan if it is alone."""
    names = np.array(speakers)
    nearest, found = to_others(turns, speakers), np.full(len(turns), np.nan)
    for i, name in enumerate(names):
        own = (names == name) & (np.arange(len(names)) != i)
        if own.any() and np.isfinite(nearest[i]):
            found[i] = nearest[i] > turns[i] @ _unit(turns[own].mean(axis=0))
    return found


def to_others(turns: np.ndarray, speakers: Sequence[str]) -> np.ndarray:
    """(n, D) embeddings of a conversation's turns -> (n,) cosine to the nearest other character, nan if it is alone."""
    names = np.array(speakers)
    found = np.full(len(turns), np.nan)
    for i, name in enumerate(names):
        others = [turns[names == other] for other in sorted(set(names) - {name})]
        if others:
            found[i] = max(turns[i] @ _unit(other.mean(axis=0)) for other in others)
    return found


# ---- timing ----------------------------------------------------------------------------------------------------------


class Span(NamedTuple):
    """When a turn is spoken."""

    speaker: str
    start: float  # s
    end: float


def whole_turns(turns: Sequence[Span]) -> list[Span]:
    """Speaker by speaker, what follows each other within 0.2 s as one."""
    by_speaker = [[turn for turn in turns if turn.speaker == name] for name in dict.fromkeys(t.speaker for t in turns)]
    return [turn for own in by_speaker for turn in joined(sorted(own, key=lambda turn: turn.start))]


def gaps(turns: Sequence[Span]) -> list[float]:
    """Start - end of the turn before, at every change of the speaker, in s; without turns within another's."""
    in_order = joined(outer(whole_turns(turns)))
    return [b.start - a.end for a, b in itertools.pairwise(in_order) if a.speaker != b.speaker]


def backchannels(turns: Sequence[Span]) -> float:
    """CONVERSATION_METRICS["backchannels"]. NotMeasurable: one speaker alone."""
    if len({turn.speaker for turn in turns}) < 2:
        raise NotMeasurable("nobody else speaks")
    whole = whole_turns(turns)
    return 1 - len(outer(whole)) / len(whole)


def outer(turns: Sequence[Span]) -> list[Span]:
    """In order, without those that lie wholly within one before: "yes" and "mm" while somebody else goes on."""
    kept: list[Span] = []
    for turn in sorted(turns, key=lambda turn: (turn.start, -turn.end)):
        if not kept or turn.end > kept[-1].end:
            kept.append(turn)
    return kept


def joined(turns: Sequence[Span]) -> list[Span]:
    """Turns of one speaker that follow each other within 0.2 s are one."""
    whole: list[Span] = []
    for turn in turns:
        if whole and whole[-1].speaker == turn.speaker and turn.start - whole[-1].end < BREAK:
            whole[-1] = whole[-1]._replace(end=max(whole[-1].end, turn.end))
        else:
            whole.append(turn)
    return whole


def gap(found: Sequence[float]) -> float:
    if not len(found):
        raise NotMeasurable("the speaker never changes")
    return float(np.median(found))


ADJOINING_S = 0.01  # turns laid end to end do not overlap, whatever the rounding


def overlap(found: Sequence[float]) -> float:
    if not len(found):
        raise NotMeasurable("the speaker never changes")
    return float(np.mean(np.asarray(found) < -ADJOINING_S))
