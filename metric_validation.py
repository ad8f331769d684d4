"""Does each metric tell good from bad? Controlled degradations of real conversations, with what is expected of each.

For every degradation and metric it is written down beforehand whether the metric must rise, must fall or must not care.
A metric that must move has to (1) change in that direction at the strongest level, with a 95 % bootstrap interval over
conversations that leaves out 0, (2) by at least 0.8 standard deviations of the paired change, and (3) follow the
severity: Spearman of at least 0.9 over five levels. One that must not care may move by at most 0.3 standard deviations
between conversations at the level where it moves most. Every level is compared with severity 0, which passes the same
analysis and synthesis.

What is done is kept in `validation.jsonl` and not done again. Knows nothing of models or tokenizers.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

import degradations
from audio import SAMPLE_RATE
from conversation_metrics import FEWEST_TURNS
from conversations import build_conversations, loudness_gains, read_clips
from evaluation_report import save_plot
from heard_conversations import (
    LEFT_OUT,
    MEASURES,
    METRICS_OF_CONVERSATIONS,
    VERSION,
    Ears,
    Heard,
    Human,
    Turn,
    Turns,
    hash_of,
    in_processes,
    kept_lines,
    timed,
    turns_of,
)
from speech_metrics import NotMeasurable
from turn_shards import read_turns

LEAST_EFFECT = 0.8  # standard deviations of the paired change (large: Cohen 1988)
LEAST_ORDER = 0.9  # Spearman of severity and mean
ROUNDING = 1e-9  # five levels of which two neighbours are exchanged have 0.9 less a little
MOST_BLIND = 0.3  # standard deviations between conversations
RESAMPLES = 2000
RECORDS = "validation.jsonl"
MOST_TURNS = 8  # of a conversation
MURMUR_SECONDS = 0.3
MOST_SHOWN = 99.0  # standard deviations, where the change is the same in all conversations
FEWEST = 4  # conversations, for a verdict
RISES, FALLS, BLIND = 1, -1, 0


# ---- degradations of conversations -----------------------------------------------------------------------------------


def each_turn(degrade: degradations.Degrade) -> Callable[[Turns, float, np.random.Generator], Turns]:
    """All turns degraded alike."""

    def changed(turns: Turns, severity: float, lots: np.random.Generator) -> Turns:
        made = [dataclasses.replace(turn, samples=degrade(turn.samples, severity, lots)) for turn in turns]
        return spaced_as(turns, made)

    return changed


def spaced_as(turns: Turns, made: Turns) -> Turns:
    """Turns made longer or shorter, with the silences between them that there were."""
    return with_silences(made, silences_of(turns)) if timed(turns) else made


def silences_of(turns: Turns) -> list[float]:
    """Seconds from every turn to the next one; below 0 where they overlap."""
    return [after.start - before.end for before, after in itertools.pairwise(turns)]


def with_silences(turns: Turns, silences: Iterable[float]) -> Turns:
    """The turns one after the other from where the first one is, with these seconds between them."""
    made = turns[:1]
    for turn, silence in zip(turns[1:], silences, strict=True):
        made.append(same_sound(turn, start=made[-1].end + silence))
    return made


def same_sound(turn: Turn, **changes: object) -> Turn:
    """The turn elsewhere or by another name; what is known of its sound is not measured again."""
    made = dataclasses.replace(turn, **changes)
    vars(made)["_known"] = turn._known  # one for both, also of what is measured later
    return made


def from_the_middle(degrade: degradations.Degrade) -> Callable[[Turns, float, np.random.Generator], Turns]:
    """The second half of the turns degraded; the first one as at severity 0, which is made and measured once."""

    def changed(turns: Turns, severity: float, lots: np.random.Generator) -> Turns:
        def as_at_zero(turn: Turn) -> Turn:
            return turn.once(f"{degrade.__name__} 0", lambda: each_turn(degrade)([turn], 0.0, lots)[0])

        half = len(turns) // 2
        made = [*map(as_at_zero, turns[:half]), *each_turn(degrade)(turns[half:], severity, lots)]
        return spaced_as(turns, made)

    return changed


def voices_swapped(turns: Turns, severity: float, lots: np.random.Generator) -> Turns:
    """A share of the turns is spoken by the other character: their names are exchanged."""
    names = sorted({turn.speaker for turn in turns})
    other = dict(zip(names, names[1:] + names[:1], strict=True))
    moved = lots.permutation(len(turns)) < severity * len(turns)
    return [
        same_sound(turn, speaker=other[turn.speaker]) if move else turn for turn, move in zip(turns, moved, strict=True)
    ]


def emotion_shuffled(turns: Turns, severity: float, lots: np.random.Generator) -> Turns:
    """The way of speaking of a share of the turns goes to other turns of the same speaker; times stay."""
    sounds = list(turns)
    for name in sorted({turn.speaker for turn in turns}):
        places = [i for i, turn in enumerate(turns) if turn.speaker == name]
        moved = degradations.shuffled([sounds[i] for i in places], severity, lots)
        for place, sound in zip(places, moved, strict=True):
            sounds[place] = sound
    return [same_sound(sound, start=turn.start) for turn, sound in zip(turns, sounds, strict=True)]


def some_excited(turns: Turns, severity: float, lots: np.random.Generator) -> Turns:
    """A half of every speaker's turns, drawn at random, is excited; the other one as at severity 0."""
    strengths = np.zeros(len(turns))
    for name in sorted({turn.speaker for turn in turns}):
        places = lots.permutation([i for i, turn in enumerate(turns) if turn.speaker == name])
        strengths[places[: len(places) // 2]] = severity
    made = [each_turn(degradations.excite)([turn], each, lots)[0] for turn, each in zip(turns, strengths, strict=True)]
    return spaced_as(turns, made)


def gaps_longer(turns: Turns, severity: float, lots: np.random.Generator) -> Turns:
    """Every turn starts `severity` seconds later after the one before."""
    if not timed(turns):
        return turns
    return [same_sound(turn, start=turn.start + severity * i) for i, turn in enumerate(turns)]


def gaps_alike(turns: Turns, severity: float, lots: np.random.Generator) -> Turns:
    """The silences between turns move towards their median."""
    if not timed(turns):
        return turns
    silences = np.array(silences_of(turns))
    return with_silences(turns, silences + severity * (np.median(silences) - silences))


def murmured_at(turns: Turns, severity: float, lots: np.random.Generator) -> Turns:
    """In the middle of a share of the turns the other character murmurs: 0.3 s of what it says elsewhere."""
    if not timed(turns):
        return turns
    murmur = int(MURMUR_SECONDS * SAMPLE_RATE)
    moved = lots.permutation(len(turns)) < severity * len(turns)
    made = list(turns)
    for turn, chosen in zip(turns, moved, strict=True):
        others = [other for other in turns if other.speaker != turn.speaker and len(other.samples) > 2 * murmur]
        if chosen and others and len(turn.samples) > 3 * murmur:
            said, middle = others[0], (turn.start + turn.end) / 2
            made.append(Turn(said.speaker, "Mm.", said.samples[murmur : 2 * murmur], middle))
    return sorted(made, key=lambda turn: turn.start)


@dataclass(frozen=True, kw_only=True)
class Degradation:
    """What is done, how strongly, and what is expected of the metrics, written down before they are measured."""

    title: str
    change: Callable[[Turns, float, np.random.Generator], Turns]
    severities: tuple[float, ...]  # the first is 0
    expected: dict[str, int]


SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
DEGRADATIONS = {
    "flat pitch": Degradation(
        title="pitch moves less, by the share",
        change=each_turn(degradations.flatten_pitch),
        severities=SHARES,
        expected={
            "pitch_spread": FALLS, "pitch_contour": FALLS, "prosody_distance": RISES, "rate": BLIND,
            "pause_share": BLIND,
        },
    ),
    "exaggerated pitch": Degradation(
        title="pitch moves more, by the share",
        change=each_turn(lambda samples, severity, lots: degradations.flatten_pitch(samples, -severity, lots)),
        severities=SHARES,
        expected={"pitch_spread": RISES, "prosody_distance": RISES, "rate": BLIND},
    ),
    "misplaced pitch": Degradation(
        title="contour mixed with its mirror image",
        change=each_turn(degradations.misplace_pitch),
        severities=(0.0, 0.25, 0.5, 0.75, 1.0),
        expected={"pitch_contour": FALLS, "rate": BLIND},
    ),
    "upside-down pitch": Degradation(
        title="contour turned upside down: as wide as before, in the wrong places",
        change=each_turn(lambda samples, severity, lots: degradations.misplace_pitch(samples, severity > 0, lots)),
        severities=(0.0, 1.0),
        expected={"pitch_spread": BLIND, "prosody_distance": BLIND},
    ),
    "higher pitch": Degradation(
        title="all pitch higher, semitones",
        change=each_turn(degradations.shift_pitch),
        severities=(0.0, 1.0, 2.0, 3.0, 4.0),
        expected={
            "pitch": RISES, "speaker_similarity": FALLS, "pitch_spread": BLIND, "emotional_coherence": BLIND,
            "prosody_distance": BLIND, "style_kept": BLIND,
        },
    ),
    "slower": Degradation(
        title="slower, by the share",
        change=each_turn(degradations.stretch),
        severities=(0.0, 0.1, 0.2, 0.3, 0.4),
        expected={"rate": FALLS, "turn_seconds": RISES, "prosody_distance": RISES, "pitch_spread": BLIND},
    ),
    "pauses": Degradation(
        title="silences of 0.3 s within the turn",
        change=each_turn(degradations.insert_pauses),
        severities=(0.0, 1.0, 2.0, 3.0, 4.0),
        expected={"pause_share": RISES, "prosody_distance": RISES, "pitch_spread": BLIND, "pitch_contour": BLIND},
    ),
    "no pauses": Degradation(
        title="silences within the turn shorter, by the share",
        change=each_turn(degradations.remove_pauses),
        severities=SHARES,
        expected={"pause_share": FALLS, "pitch_spread": BLIND},
    ),
    "noise": Degradation(
        title="white noise, dB above 40 dB below the speech",
        change=each_turn(degradations.add_noise),
        severities=(0.0, 10.0, 20.0, 30.0, 40.0),
        expected={"dnsmos": FALLS, "distill_mos": FALLS, "wer": RISES, "speaker_similarity": FALLS},
    ),
    "clipping": Degradation(
        title="share of the samples that are cut off",
        change=each_turn(degradations.clip),
        severities=(0.0, 0.02, 0.05, 0.15, 0.4),
        expected={"dnsmos": FALLS, "distill_mos": FALLS, "rate": BLIND},
    ),
    "dropped words": Degradation(
        title="share of pieces of 0.35 s that are missing",
        change=each_turn(degradations.drop_words),
        severities=(*SHARES[:-1], 0.9),
        expected={"wer": RISES, "rate": RISES},
    ),
    "codec depth": Degradation(
        title="codebooks left out of 32, of the tokenizer in this repository",
        change=each_turn(degradations.leave_out_codebooks),
        severities=(0.0, 16.0, 24.0, 28.0, 30.0),
        expected={
            "dnsmos": FALLS, "distill_mos": FALLS, "wer": RISES, "speaker_similarity": FALLS, "pitch_contour": FALLS,
        },
    ),
    "even level": Degradation(
        title="level of the speech moves less, by the share",
        change=each_turn(degradations.flatten_level),
        severities=(0.0, 0.15, 0.3, 0.45, 0.6),
        expected={"level_spread": FALLS, "prosody_distance": RISES, "pitch_spread": BLIND},
    ),
    "louder": Degradation(
        title="louder, dB",
        change=each_turn(degradations.gain),
        severities=(0.0, -6.0, -3.0, 3.0, 6.0),
        expected={
            "dnsmos": BLIND, "distill_mos": BLIND, "wer": BLIND, "pitch_spread": BLIND, "level_spread": BLIND,
            "rate": BLIND, "pause_share": BLIND, "prosody_distance": BLIND, "pitch_contour": BLIND,
            "speaker_similarity": BLIND, "emotional_coherence": BLIND, "character_run": BLIND, "style_kept": BLIND,
        },
    ),
    "another voice from the middle on": Degradation(
        title="distance to another voice in the second half",
        change=from_the_middle(degradations.change_speaker),
        severities=SHARES,
        expected={"character_run": FALLS, "character_half": FALLS, "character_drift": FALLS},
    ),
    "another style from the middle on": Degradation(
        title="excitement of the second half",
        change=from_the_middle(degradations.excite),
        severities=(0.0, 0.5, 1.0, 1.5, 2.0),
        expected={"style_kept": FALLS, "gap": BLIND},
    ),
    "exchanged speakers": Degradation(
        title="share of the turns spoken by the other character",
        change=voices_swapped,
        severities=(0.0, 0.125, 0.25, 0.375, 0.5),
        expected={"confusion": RISES, "character_run": FALLS, "character_other": RISES},
    ),
    "shuffled emotion": Degradation(
        title="share of the turns whose way of speaking goes elsewhere",
        change=emotion_shuffled,
        severities=SHARES,
        expected={"emotional_coherence": FALLS, "character_run": BLIND},
    ),
    "emotion out of place": Degradation(
        title="excitement of half of the turns, drawn at random; texts stay",
        change=some_excited,
        severities=(0.0, 0.5, 1.0, 1.5, 2.0),
        expected={"emotional_coherence": FALLS},
    ),
    "longer gaps": Degradation(
        title="s between turns beside those there were",
        change=gaps_longer,
        severities=(0.0, 0.25, 0.5, 1.0, 2.0),
        expected={"gap": RISES, "gap_distance": RISES},
    ),
    "talking over each other": Degradation(
        title="s that turns start earlier",
        change=lambda turns, severity, lots: gaps_longer(turns, -severity, lots),
        severities=(0.0, 0.2, 0.4, 0.6, 0.8),
        expected={"gap": FALLS, "overlap": RISES, "gap_distance": RISES},
    ),
    "murmurs": Degradation(
        title="share of the turns in which the other one murmurs",
        change=murmured_at,
        severities=SHARES,
        expected={"backchannels": RISES, "gap": BLIND, "overlap": BLIND, "gap_distance": BLIND},
    ),
    "gaps all alike": Degradation(
        title="share of the way to the median gap",
        change=gaps_alike,
        severities=SHARES,
        expected={"gap_distance": RISES, "gap": BLIND, "overlap": BLIND},
    ),
}  # fmt: skip


# ---- measuring -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Record:
    """One metric of one conversation, at every severity of one degradation."""

    conversation: str
    degradation: str
    metric: str
    values: list[float | None]  # None: not measurable
    reasons: list[str]
    severities: list[float]
    left_out: dict[str, int] = field(default_factory=dict)  # reason -> turns that the values know nothing of

    def is_current(self) -> bool:
        """Whether the degradation is applied at the same severities today."""
        known = DEGRADATIONS.get(self.degradation)
        return known is not None and list(known.severities) == self.severities


def measure_one(
    name: str, original: Turns, which: str, metrics: Sequence[str], human: Human, ears: Ears, seed: int
) -> list[Record]:
    """All metrics of one conversation under one degradation."""
    degradation = DEGRADATIONS[which]
    found: dict[str, list[float | None]] = {metric: [] for metric in metrics}
    reasons: dict[str, list[str]] = {metric: [] for metric in metrics}
    left_out: dict[str, Counter] = {metric: Counter() for metric in metrics}
    for severity in degradation.severities:
        lots = np.random.default_rng(
            int.from_bytes(hashlib.sha256(f"{seed}/{name}/{which}".encode()).digest()[:4], "big")
        )
        heard = Heard(name, degradation.change(original, severity, lots), original, human, ears)
        for metric in metrics:
            heard.left_out.clear()
            try:
                value = MEASURES[metric](heard)
            except NotMeasurable as reason:
                reasons[metric].append(str(reason))
                value = None
            found[metric].append(value)
            left_out[metric].update(heard.left_out)
    severities = list(degradation.severities)
    return [
        Record(name, which, metric, found[metric], reasons[metric], severities, dict(left_out[metric]))
        for metric in metrics
    ]


def conversations_of(data: Path, most_turns: int, seed: int) -> dict[str, Turns]:
    """Held-out conversations of several speakers, about `most_turns` turns in all but 4 conversations or more.

    ValueError: there are fewer than 4.
    """
    rows = build_conversations(read_turns(data, with_audio=False), pseudo=False)
    able = [c for c in rows if c.split != "train" and c.structure == "dialogue" and len(c.turns) >= FEWEST_TURNS]
    random.Random(seed).shuffle(able)
    before = np.cumsum([0] + [min(len(c.turns), MOST_TURNS) for c in able])
    if len(able) < FEWEST:
        raise ValueError(
            f"{data} holds {len(able)} held-out conversations of {FEWEST_TURNS} turns or more between several "
            f"speakers, {FEWEST} are needed; collect more, e.g. --sources synthetic"
        )
    chosen = [c for i, c in enumerate(able) if before[i] < most_turns or i < FEWEST]
    gains = loudness_gains(turn for c in chosen for turn in c.turns)
    audio = {turn.utt_id: samples for turn, samples in read_clips(data, gains)}
    return {c.conv_id: turns_of(c, audio, MOST_TURNS) for c in chosen}


def wanted(missing: Iterable[str]) -> dict[str, list[str]]:
    """degradation -> metrics that are expected to do something and can be measured here."""
    return {name: [m for m in d.expected if m not in set(missing)] for name, d in DEGRADATIONS.items()}


_WORKER: dict = {}


def start_worker(human: Human, ears: Ears, seed: int) -> None:
    _WORKER.update(human=human, ears=ears, seed=seed)


def measure_in_worker(name: str, original: Turns, which: str, metrics: Sequence[str]) -> list[Record]:
    return measure_one(name, original, which, metrics, _WORKER["human"], _WORKER["ears"], _WORKER["seed"])


def measure_all(
    conversations: dict[str, Turns], missing: Iterable[str], ears: Ears, seed: int, workers: int, out: Path
) -> list[Record]:
    """Every degradation of every conversation; what `out` holds already from the same audio is not measured again."""
    of = [VERSION, degradations.VERSION, seed, str(ears), [hash_of(turns) for turns in conversations.values()]]
    path = out / f"{hashlib.sha256(json.dumps(of).encode()).hexdigest()[:12]}-{RECORDS}"
    done = [record for record in kept_lines(path, lambda row: Record(**row)) if record.is_current()]
    seen = {(record.conversation, record.degradation, record.metric) for record in done}
    jobs = [
        (name, turns, which, left)
        for which, metrics in wanted(missing).items()
        for name, turns in conversations.items()
        if (left := [metric for metric in metrics if (name, which, metric) not in seen])
    ]
    if not jobs:
        return done
    human = Human.of(conversations)
    with open(path, "a", encoding="utf-8") as file:
        for _, found in in_processes(measure_in_worker, jobs, workers, start_worker, (human, ears, seed), "validating"):
            file.writelines(json.dumps(dataclasses.asdict(record)) + "\n" for record in found)
            file.flush()
            done += found
    return done


# ---- judging ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What one degradation did to one metric, and whether that was expected."""

    degradation: str
    metric: str
    expected: int
    severities: list[float]
    means: list[float]  # over the conversations, at every severity
    change: float  # mean over the conversations at the strongest severity; of BLIND: at that of the largest change
    low: float  # 95 % bootstrap interval of it
    high: float
    effect: float  # change / standard deviation of the paired changes
    drift: float  # change / standard deviation between conversations
    order: float  # Spearman of severity and mean
    conversations: int
    excluded: dict[str, int]
    passed: bool | None  # None: too few conversations could be measured
    why: str


def judge(records: Sequence[Record], seed: int) -> list[Verdict]:
    """A verdict for everything that was expected."""
    table: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        table.setdefault((record.degradation, record.metric), []).append(record)
    return [
        verdict_on(name, metric, expected, sorted(table[name, metric], key=lambda r: r.conversation), seed)
        for name, degradation in DEGRADATIONS.items()
        for metric, expected in degradation.expected.items()
        if (name, metric) in table
    ]


def verdict_on(name: str, metric: str, expected: int, records: Sequence[Record], seed: int) -> Verdict:
    from scipy.stats import spearmanr

    severities = DEGRADATIONS[name].severities
    whole = np.array([record.values for record in records if None not in record.values], dtype=float)  # (C, levels)
    excluded = Counter(reason for record in records for reason in set(record.reasons))
    for record in records:
        excluded.update({LEFT_OUT + reason: turns for reason, turns in record.left_out.items()})
    facts = {"degradation": name, "metric": metric, "expected": expected, "severities": list(severities)}
    facts |= {"conversations": len(whole), "excluded": dict(excluded)}
    if len(whole) < FEWEST:
        none = dict.fromkeys(("change", "low", "high", "effect", "drift", "order"), math.nan)
        return Verdict(**facts, **none, means=[], passed=None, why=f"fewer than {FEWEST} conversations measurable")
    means = whole.mean(axis=0)
    level = -1 if expected else int(np.abs(means - means[0]).argmax())
    changes = whole[:, level] - whole[:, 0]
    draws = np.random.default_rng(seed).integers(len(changes), size=(RESAMPLES, len(changes)))
    low, high = np.percentile(changes[draws].mean(axis=1), [2.5, 97.5])
    change = changes.mean()
    spreads = (changes.std(ddof=1), whole[:, 0].std(ddof=1))
    effect, drift = (float(np.clip(change / max(spread, 1e-9), -MOST_SHOWN, MOST_SHOWN)) for spread in spreads)
    order = float(spearmanr(severities, means).statistic) if len(severities) > 2 and np.ptp(means) > 0 else 0.0
    values = {"change": float(change), "low": float(low), "high": float(high), "effect": effect, "drift": drift}
    why = why_not(expected, values, order) if expected else why_not_blind(change, whole[:, 0], drift)
    return Verdict(**facts, **values, order=order, means=means.tolist(), passed=not why, why=why)


def why_not(expected: int, values: dict[str, float], order: float) -> str:
    """What keeps a metric that must move from passing; "" if nothing."""
    toward_zero = values["low"] if expected > 0 else -values["high"]
    if toward_zero <= 0:
        return "the interval of the change holds 0, or it goes the wrong way"
    if expected * values["effect"] < LEAST_EFFECT:
        return f"effect below {LEAST_EFFECT}"
    if expected * order < LEAST_ORDER - ROUNDING:
        return f"does not follow the severity (order below {LEAST_ORDER})"
    return ""


def why_not_blind(change: float, clean: np.ndarray, drift: float) -> str:
    """What keeps a metric that must not care from passing; "" if nothing.

    Where conversations do not differ, as in what is 1 by definition at severity 0, a fiftieth of the value counts.
    """
    alike = clean.std(ddof=1) < 0.01 * abs(clean.mean())
    small = abs(change) <= 0.02 * abs(clean.mean()) if alike else abs(drift) <= MOST_BLIND
    return "" if small else f"moves by more than {MOST_BLIND} standard deviations between conversations"


def plain_verdict(verdict: Verdict) -> dict:
    """As values for JSON, which has no nan."""
    values = dataclasses.asdict(verdict)
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}


# ---- showing ---------------------------------------------------------------------------------------------------------

WORDS = {RISES: "rises", FALLS: "falls", BLIND: "does not care"}


def print_verdicts(verdicts: Sequence[Verdict]) -> None:
    print(f"{'degradation':34}{'metric':40}{'must':15}{'from':>9}{'to':>9}{'effect':>8}{'order':>7}{'n':>4}  verdict")
    for v in verdicts:
        ends = f"{v.means[0]:9.3f}{v.means[0] + v.change:9.3f}" if v.means else " " * 18
        said = "passed" if v.passed else "not measured: " + v.why if v.passed is None else "FAILED: " + v.why
        row = f"{v.degradation:34}{METRICS_OF_CONVERSATIONS[v.metric].title:40}{WORDS[v.expected]:15}{ends}"
        print(f"{row}{v.effect if v.expected else v.drift:8.2f}{v.order:7.2f}{v.conversations:4}  {said}")
    counts = Counter(v.passed for v in verdicts)
    print(f"{counts[True]} of {len(verdicts)} expectations hold, {counts[False]} fail, {counts[None]} not measured")


def draw_verdicts(verdicts: Sequence[Verdict], path: Path) -> None:
    """Effect of every degradation on every metric, in standard deviations; a frame where it is not as expected."""
    import matplotlib.figure

    metrics = list(dict.fromkeys(v.metric for v in verdicts))
    rows = list(dict.fromkeys(v.degradation for v in verdicts))
    size = (1.5 + 0.62 * len(metrics), 1.8 + 0.36 * len(rows))
    figure = matplotlib.figure.Figure(figsize=size, layout="constrained")  # before a colour bar is made
    axis = figure.subplots()
    shown = np.full((len(rows), len(metrics)), np.nan)
    for v in verdicts:
        blind = 0.0 if v.passed else v.drift  # also where all conversations have one value and no drift can be said
        shown[rows.index(v.degradation), metrics.index(v.metric)] = v.effect if v.expected else blind
    picture = axis.imshow(np.clip(shown, -4, 4), cmap="RdBu_r", vmin=-4, vmax=4, aspect="auto")
    for v in verdicts:
        y, x = rows.index(v.degradation), metrics.index(v.metric)
        mark = {RISES: "+", FALLS: "-", BLIND: "0"}[v.expected] + {True: "", False: "!", None: "?"}[v.passed]
        colour = "white" if abs(shown[y, x]) > 2.5 else "black"
        axis.text(x, y, mark, ha="center", va="center", color=colour, fontweight="normal" if v.passed else "bold")
    axis.set_xticks(
        range(len(metrics)), [METRICS_OF_CONVERSATIONS[metric].title for metric in metrics], rotation=60, ha="right"
    )
    axis.set_yticks(range(len(rows)), rows)
    axis.set_title("expected: + rises, - falls, 0 does not care; ! otherwise")
    figure.colorbar(picture, label="change, standard deviations (cut at 4)")
    save_plot(figure, path)
