"""Systems that speak the same conversations, side by side: any system's audio, not only this project's.

A system is a folder or manifest as `collect_data.py --input` reads it: audio, text, and for conversations who speaks
when. The first system is the reference, best human recordings; the others are measured beside it, conversation by
conversation, and each is tested against it over the conversations they share: paired bootstrap interval, and the
sign-flip permutation test (Fisher 1935), its p values by Holm's method over all comparisons.

`write_listening_page` makes a blind comparison by ear, in the manner of CMOS with and without context; what listeners
answered is counted by `preferences`. Knows nothing of models or tokenizers.
"""

from __future__ import annotations

import dataclasses
import hashlib
import html
import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import matplotlib.figure
import numpy as np

from audio import SAMPLE_RATE, at_loudness, resample, rms_dbfs, write_wav
from checkpointing import file_digest, write_atomically
from content_recall import is_recall
from conversation_formats import RESULT, SUMMARY, Recording
from evaluation_report import STYLE, plot_bars, save_plot, table, tag
from heard_conversations import (
    LEFT_OUT,
    MEASURES,
    METRICS_OF_CONVERSATIONS,
    RECALLED,
    VERSION,
    Ears,
    Heard,
    Human,
    Turn,
    Turns,
    hash_of,
    in_processes,
    kept_lines,
)
from speech_metrics import (
    FEWEST_CONVERSATIONS,
    NOT_ASKED,
    RESAMPLES,
    SILENCE_DBFS,
    Figure,
    Item,
    NotMeasurable,
    bootstrap,
    normalise,
)
from speech_sources import load, read_recordings

AGAINST_REFERENCE = ("pitch_contour", "emotional_coherence", "emotion_agreement", "speaker_similarity")  # turn by turn
OF_SENTENCES = ("homographs", "pronunciation_kept", "content_recall", *RECALLED)  # that were written for them
TIMES = {"seconds_to_first_audio": "first_audio", "real_time_factor": "real_time_factor"}  # in a batch's results
OF_TIMES = tuple(TIMES.values())  # that the system itself wrote down
FLIPS = 10_000  # of the signs of the differences
ALL_SIGNS = 13  # differences up to which all signs are tried
SURE = 0.05  # p, corrected, below which a difference is told from chance
MEASURED = "measured.jsonl"
KEY = "listening_key.json"  # which system is A and which B
PLAYED = 8  # conversations that the page plays
CONTEXT_TURNS = 3  # that a listener hears before the turn in question
CORPUS = Path(__file__).parent / "corpus"
GAIN = {"higher": 1, "lower": -1}
NOTHING = np.zeros(0, np.float32)  # what a system says that does not answer
Conversations = dict[str, Turns]


# ---- reading ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class System:
    """What one system said, and what of it could not be read."""

    name: str
    conversations: Conversations
    refused: list[str]  # "file: reason"


def read_system(name: str, path: Path) -> System:
    """ValueError if none of it can be read; single bad files are named in `refused`."""
    conversations: Conversations = {}
    failed = failures_of(path)
    refused = [f"{name}: the batch failed to speak it: {reason}" for name, reason in failed.items()]
    places, torn = set(), set()
    for recording in sorted(recordings_of(path, set(failed)), key=lambda r: (r.conversation, r.turn_index)):
        name_said, text = name_of(recording), (recording.text or "").strip()
        turns = conversations.setdefault(name_said, [])
        try:
            if (name_said, recording.turn_index) in places:
                raise ValueError(f"conversation {name_said} has a turn {recording.turn_index} already")
            places.add((name_said, recording.turn_index))
            samples = NOTHING if recording.audio == b"" else resample(*load(recording), SAMPLE_RATE)
            if not text and not (is_recall(name_said) or recording.audio == b""):  # an answer without words is one
                raise ValueError("no transcript")
        except (OSError, ValueError) as error:
            refused.append(f"{recording.name or recording.audio}: {error}")
            if is_recall(name_said):  # who answered with what cannot be read has not forgotten it
                torn.add(name_said)
            continue
        about = {"language": recording.language, **times_of(recording)}
        turns.append(Turn(recording.speaker, text, samples, recording.start, **about))
    for name_said in sorted(torn):
        del conversations[name_said]
        refused.append(f"{name_said}: the whole conversation, as what is recalled in it cannot be judged")
    conversations = {key: turns for key, turns in conversations.items() if turns}
    if not any(len(turn.samples) for turns in conversations.values() for turn in turns):
        raise ValueError(f"nothing of {path} can be heard: {refused[0] if refused else 'all of its turns are empty'}")
    return System(name, conversations, refused)


def times_of(recording: Recording) -> dict[str, float | None]:
    return {name: value for name, value in recording.facts if name in OF_TIMES}


def name_of(recording: Recording) -> str:
    """Of its conversation; where that is the name of the file, without the suffix: a.wav and a.flac say the same."""
    suffix = recording.audio.suffix if isinstance(recording.audio, Path) else ""
    return recording.conversation.removesuffix(suffix)


def recordings_of(path: Path, but: set[str]) -> list[Recording]:
    """As `collect_data.py --input`, or what `demo.py --mode batch` wrote, `but` for these. ValueError: neither.

    A turn in which a system said nothing has no bytes of audio.
    """
    results = [result for result in sorted(path.glob(f"*/{RESULT}")) if result.parent.name not in but]
    if not results or (path / "manifest.jsonl").is_file():
        return read_recordings(path)
    recordings = []
    for result in results:
        try:
            content = json.loads(result.read_text(encoding="utf-8"))
            asked = [turn.get("text") for turn in content["request"]["turns"]]  # as written, not as it is read aloud
            for index, turn in enumerate(content["turns"]):
                if "file" in turn:  # else it was only heard
                    file = turn["file"]  # None: nothing was said
                    place = {"conversation": result.parent.name, "turn_index": index}
                    place["name"] = file or f"{result.parent.name}, turn {index}"
                    place["facts"] = tuple((ours, turn.get(theirs)) for theirs, ours in TIMES.items())
                    audio = result.with_name(Path(file).name) if file else b""
                    text = asked[index] or turn["text"]
                    if not isinstance(text, str) or not all(is_seconds(value) for _, value in place["facts"]):
                        raise TypeError(f"turn {index} has no text, or times that are no numbers")
                    recordings.append(Recording(audio=audio, text=text, speaker=str(turn["speaker"]), **place))
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise ValueError(f"{result} is not what demo.py --mode batch writes: {error}") from error
    return recordings


def failures_of(path: Path) -> dict[str, str]:
    """The conversations that the last batch in this folder failed to speak, and why: what lies there of them is older.
    None where there was no batch."""
    try:
        told = json.loads((path / SUMMARY).read_text(encoding="utf-8"))["conversations"]
        return {str(each["id"]): str(each["reason"]) for each in told if each["status"] == "failed"}
    except (OSError, ValueError, LookupError, TypeError):
        return {}


def is_seconds(value: object) -> bool:
    """Whether it is a time, or none."""
    return value is None or (isinstance(value, (int, float)) and math.isfinite(value))


def aligned(turns: Turns, real: Turns | None) -> bool:
    """Whether both say the same texts in the same order, so that turns can be compared one by one."""
    if real is None or len(turns) != len(real):
        return False
    return all(words_of(a.text) == words_of(b.text) for a, b in zip(turns, real, strict=True))


def words_of(text: str) -> str:
    """As for word errors; where their normaliser is not installed, lower-case words."""
    try:
        return normalise(text)
    except ModuleNotFoundError:
        return " ".join(re.findall(r"[\w']+", text.lower()))


# ---- measuring -------------------------------------------------------------------------------------------------------

_WORKER: dict = {}


class Measured(NamedTuple):
    """One metric of one conversation."""

    value: float | None
    reason: str  # why there is none
    left_out: dict[str, int]  # reason -> turns that the value knows nothing of


Table = dict[str, dict[str, dict[str, Measured]]]  # system -> conversation -> metric


def start_worker(human: Human, ears: Ears) -> None:
    _WORKER.update(human=human, ears=ears)


def measure_in_worker(name: str, turns: Turns, real: Turns | None, metrics: Sequence[str]) -> dict[str, Measured]:
    same = aligned(turns, real)
    heard = Heard(name, turns, real if same else turns, _WORKER["human"], _WORKER["ears"])
    found = {}
    for metric in metrics:
        heard.left_out.clear()
        try:
            if metric in AGAINST_REFERENCE and not same:
                raise NotMeasurable("the reference does not say the same turns")
            found[metric] = Measured(MEASURES[metric](heard), "", dict(heard.left_out))
        except NotMeasurable as reason:
            found[metric] = Measured(None, str(reason), {})
    return found


def measure_systems(systems: Sequence[System], missing: Iterable[str], ears: Ears, workers: int, out: Path) -> Table:
    """Values are kept in `out` by a hash of the audio and the names."""
    reference, metrics = systems[0], [m for m in MEASURES if m not in set(missing)]
    real = sorted((name, hash_of(turns)) for name, turns in reference.conversations.items())
    told = [file_digest(path) for path in sorted(CORPUS.glob("*.json"))]  # what is asked for, and thresholds
    shared = f"{VERSION} {digest(str(real))} {ears} {sorted(metrics)} {told}"
    known = dict(kept_lines(out / MEASURED, lambda row: (row["key"], plain_to_measured(row["values"]))))
    jobs = {}
    for system in systems:
        for name, turns in system.conversations.items():
            key = digest(f"{name!r} {hash_of(turns)} {shared}")
            jobs[system.name, name] = (key, turns, reference.conversations.get(name))
    new = {key: (name, turns, real, metrics) for (_, name), (key, turns, real) in jobs.items() if key not in known}
    keys, work = list(new), list(new.values())
    human = Human.of(reference.conversations) if new else Human({}, {})
    with open(out / MEASURED, "a", encoding="utf-8") as file:
        for number, values in in_processes(measure_in_worker, work, workers, start_worker, (human, ears), "measuring"):
            known[keys[number]] = values
            file.write(json.dumps({"key": keys[number], "values": values}) + "\n")
            file.flush()
    found: Table = {}
    for (system, name), (key, _, _) in jobs.items():
        found.setdefault(system, {})[name] = known[key]
    return found


def plain_to_measured(values: dict[str, list]) -> dict[str, Measured]:
    return {metric: Measured(*value) for metric, value in values.items()}


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


# ---- statistics ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A system less the reference, over the conversations of both."""

    system: str
    metric: str
    value: float
    low: float  # 95 % paired bootstrap over conversations
    high: float
    p: float  # sign-flip permutation test
    p_holm: float
    conversations: int


def figures_of(measured: Table, seed: int) -> dict[str, dict[str, Figure]]:
    """metric -> system -> mean over conversations with a bootstrap interval, and why what was left out.

    A metric of special sentences is there only if somebody said some, one of times if somebody wrote them down.
    """
    table: dict[str, dict[str, Figure]] = {}
    for system, conversations in measured.items():
        for metric in next(iter(conversations.values())):
            values = {name: found[metric] for name, found in conversations.items()}
            items = [Item(name, each.value) for name, each in values.items() if each.value is not None]
            excluded = Counter(each.reason for each in values.values() if each.value is None)
            for each in values.values():
                excluded.update({LEFT_OUT + reason: turns for reason, turns in each.left_out.items()})
            table.setdefault(metric, {})[system] = bootstrap(items, excluded, seed)
    return {metric: systems for metric, systems in table.items() if not is_unasked(metric, systems)}


def is_unasked(metric: str, by_system: dict[str, Figure]) -> bool:
    """Whether nobody said sentences for it, or wrote its times down."""
    if any(figure.value is not None for figure in by_system.values()):
        return False
    reasons = [reason for figure in by_system.values() for reason in figure.excluded]
    return metric in OF_TIMES or (metric in OF_SENTENCES and all(each.startswith(NOT_ASKED) for each in reasons))


def unlike(system: System, reference: System) -> set[str]:
    """Shared conversations of which it says more or fewer turns, or with more or fewer voices: of replies alone, say,
    which would be compared with what others said."""
    shared = {name: (turns, reference.conversations.get(name)) for name, turns in system.conversations.items()}
    shapes = {n: [(len(t), len({turn.speaker for turn in t})) for t in pair] for n, pair in shared.items() if pair[1]}
    return {name for name, (ours, theirs) in shapes.items() if ours != theirs}


def differences(measured: Table, seed: int, apart: dict[str, set[str]] | None = None) -> list[Difference]:
    """Every other system against the first, metric by metric; those with two shared conversations or more.

    `apart`: conversations of a system that are not to be compared.
    """
    (reference, real), *others = measured.items()
    found = []
    for system, conversations in others:
        for metric in next(iter(conversations.values())):
            if metric in AGAINST_REFERENCE:
                continue  # the reference is 1 by definition
            shared = [name for name in conversations if name in real and name not in (apart or {}).get(system, ())]
            pairs = [(conversations[name][metric].value, real[name][metric].value) for name in shared]
            changes = np.array([ours - theirs for ours, theirs in pairs if ours is not None and theirs is not None])
            if len(changes) >= 2:
                low, high, p = paired(changes, seed)
                facts = {"system": system, "metric": metric, "conversations": len(changes)}
                found.append(Difference(**facts, value=float(changes.mean()), low=low, high=high, p=p, p_holm=p))
    corrected = holm([each.p for each in found])
    return [dataclasses.replace(each, p_holm=p) for each, p in zip(found, corrected, strict=True)]


def paired(changes: np.ndarray, seed: int) -> tuple[float, float, float]:
    """(n,) differences -> 95 % bootstrap interval of their mean, and p of a mean as far from 0 with signs at random.

    With up to `ALL_SIGNS` differences all signs are tried, above that `FLIPS` at random.
    """
    random = np.random.default_rng(seed)
    n = len(changes)
    means = changes[random.integers(n, size=(RESAMPLES, n))].mean(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    exact = n <= ALL_SIGNS
    signs = np.array(list(itertools.product((-1, 1), repeat=n))) if exact else random.choice((-1, 1), (FLIPS, n))
    flipped = np.abs((signs * changes).mean(axis=1))
    as_far = (flipped >= abs(changes.mean()) - 1e-12).sum()
    p = as_far / len(signs) if exact else (as_far + 1) / (FLIPS + 1)
    return float(low), float(high), float(p)


def least_p(n: int) -> float:
    """The smallest p that `paired` can find in n differences."""
    return 2 / 2**n if n <= ALL_SIGNS else 1 / (FLIPS + 1)


def holm(p_values: Sequence[float]) -> list[float]:
    """p values corrected for their number (Holm 1979), in the same order."""
    order = np.argsort(p_values)
    steps = np.array(p_values)[order] * (len(p_values) - np.arange(len(p_values)))
    corrected = np.empty(len(p_values))
    corrected[order] = np.minimum(np.maximum.accumulate(steps), 1.0)
    return corrected.tolist()


def warnings_of(
    systems: Sequence[System], figures: dict[str, dict[str, Figure]], found: Sequence[Difference]
) -> list[str]:
    """What a reader must know before quoting a figure."""
    reference = systems[0]
    lines = [f"{system.name}: left out {entry}." for system in systems for entry in system.refused]
    for system in systems[1:]:
        absent = sorted(set(reference.conversations) - set(system.conversations))
        if absent:
            lines.append(f"{system.name} lacks {len(absent)} conversations of {reference.name}, e.g. {absent[0]}.")
        if others := sorted(unlike(system, reference)):
            lines.append(
                f"{system.name} says other turns than {reference.name} in {len(others)} conversations, e.g. "
                f"{others[0]}: its figures are of its own turns, and no difference is told there."
            )
    for system in systems:
        turns = [turn for turns in system.conversations.values() for turn in turns]
        if silent := sum(rms_dbfs(turn.samples) < SILENCE_DBFS for turn in turns):
            lines.append(f"{system.name}: {silent} of {len(turns)} turns are silent; figures of sound leave them out.")
    counts = [figure.n for by_system in figures.values() for figure in by_system.values() if figure.value is not None]
    fewest = min([len(reference.conversations), *counts, *(each.conversations for each in found)])
    if fewest < FEWEST_CONVERSATIONS:
        lines.append(
            f"Some figures rest on {fewest} conversation(s) (n= beside them); below {FEWEST_CONVERSATIONS} the "
            "intervals are too narrow to be trusted."
        )
    if hopeless := sum(is_hopeless(each, found) for each in found):
        lines.append(
            f"{hopeless} of {len(found)} differences rest on so few conversations that, corrected for so many "
            "comparisons, none of them could be told from chance."
        )
    return lines


def is_hopeless(one: Difference, found: Sequence[Difference]) -> bool:
    """Whether no values could tell it from chance: its least p, times it and what Holm's method looks at later."""
    least = least_p(one.conversations)
    return least * (1 + sum(each is not one and each.p >= least for each in found)) >= SURE


# ---- showing ---------------------------------------------------------------------------------------------------------


def shown(figure: Figure) -> str:
    if figure.value is None:
        return f"not measurable: {', '.join(figure.excluded)};"
    interval = "" if figure.low is None else f" [{figure.low:.3f}, {figure.high:.3f}]"
    return f"{figure.value:.3f}{interval}"


def counted(figure: Figure) -> str:
    """How many conversations, and how many turns of them the value knows nothing of."""
    turns = sum(n for reason, n in figure.excluded.items() if reason.startswith(LEFT_OUT))
    return f"n={figure.n}" + (f" without {turns} turn(s)" if turns else "")


def verdict(found: Difference) -> str:
    """ "better", "worse", "different" or "" where chance cannot be ruled out."""
    if found.p_holm >= SURE:
        return ""
    sense = GAIN.get(METRICS_OF_CONVERSATIONS[found.metric].better.split(",")[0])
    return "different" if sense is None else "better" if sense * found.value > 0 else "worse"


def rows_of(figures: dict, found: Sequence[Difference]) -> list[list[str]]:
    """Metric, then every system's value and how it differs from the reference."""
    rows = []
    for metric, systems in figures.items():
        about = METRICS_OF_CONVERSATIONS[metric]
        cells = [f"{about.title} ({about.unit})"]
        for system, figure in systems.items():
            cells.append(f"{shown(figure)} {counted(figure)}")
            for each in found:
                if (each.system, each.metric) == (system, metric):
                    said = f"; {verdict(each)}" if verdict(each) else ""
                    cells[-1] += f"; {each.value:+.3f} [{each.low:+.3f}, {each.high:+.3f}], "
                    cells[-1] += f"n={each.conversations}, p={each.p_holm:.3f}{said}"
        rows.append(cells)
    return rows


def print_comparison(report: dict, figures: dict, found: Sequence[Difference]) -> None:
    for metric, *cells in rows_of(figures, found):
        print(metric)
        for name, cell in zip(report["systems"], cells, strict=True):
            print(f"  {name:20} {cell}")
    for line in report["warnings"]:
        print(f"warning: {line}")


def write_comparison(
    out: Path, systems: Sequence[System], report: dict, figures: dict, found: list[Difference]
) -> None:
    """`comparison.json`, `comparison.md` and `comparison.html` with plots and players."""
    names, rows = [system.name for system in systems], rows_of(figures, found)
    content = {**report, "metrics": {name: dataclasses.asdict(METRICS_OF_CONVERSATIONS[name]) for name in figures}}
    write_atomically(out / "comparison.json", (json.dumps(content, indent=1, allow_nan=False) + "\n").encode())
    lines = ["# Comparison", "", *(f"- {line}" for line in report["warnings"]), ""]
    lines += ["| " + " | ".join(row) + " |" for row in [["metric", *names], ["---"] * (1 + len(names)), *rows]]
    lines += [
        "",
        *(
            f"- {about.title}: {about.definition} Better: {about.better}. Compare: {about.reference}. Source: "
            f"{about.source}. Needs: {', '.join(about.needs) or 'nothing more'}."
            for about in (METRICS_OF_CONVERSATIONS[metric] for metric in figures)
        ),
    ]
    write_atomically(out / "comparison.md", ("\n".join(lines) + "\n").encode())
    pictures = draw_comparison(out, systems, figures)
    warn = tag("ul", "".join(tag("li", html.escape(line)) for line in report["warnings"]))
    about = [
        [html.escape(x) for x in (m.title, m.definition, m.better, m.reference, m.source, ", ".join(m.needs))]
        for m in (METRICS_OF_CONVERSATIONS[metric] for metric in figures)
    ]
    body = tag("h1", "Comparison") + tag("p", html.escape(report["note"]), class_="note")
    body += tag("div", warn, class_="warn") if report["warnings"] else ""
    cells = [[html.escape(cell).replace("; ", "<br>") for cell in row] for row in rows]  # so that all are seen at once
    body += tag("section", tag("h2", "Figures") + table(["metric", *names], cells))
    body += tag("section", "".join(f'<img src="{path}" alt="{path}">' for path in pictures))
    body += tag("section", tag("h2", "Listen") + players(out, systems))
    body += tag(
        "section",
        tag("h2", "What is measured") + table(["metric", "definition", "better", "compare", "source", "needs"], about),
    )
    write_atomically(out / "comparison.html", page("Comparison", body).encode())


def page(title: str, body: str) -> str:
    head = f'<meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>'
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{tag("main", body)}</body></html>\n'


def draw_comparison(out: Path, systems: Sequence[System], figures: dict) -> list[str]:
    """A bar of every system for every metric, and spectrograms of one turn; paths relative to the page."""
    (out / "plots").mkdir(exist_ok=True)
    colours = ["#4b5563", "#dc2626", "#2563eb", "#059669", "#d97706", "#7c3aed"]
    made = []
    for metric, by_system in figures.items():
        rows = [(n, dataclasses.asdict(f), colours[i % len(colours)]) for i, (n, f) in enumerate(by_system.items())]
        if any(row[1]["value"] is not None for row in rows):
            about = METRICS_OF_CONVERSATIONS[metric]
            made.append(f"plots/{metric}.png")
            plot_bars(rows, f"{about.title}, {about.unit}; better: {about.better}", out / made[-1])
    figure = matplotlib.figure.Figure(figsize=(11, 2.8))
    axes = figure.subplots(1, len(systems), sharey=True, squeeze=False)[0]
    name, turns = next(iter(systems[0].conversations.items()))  # its last turn, the first of those that are played
    for axis, system in zip(axes, systems, strict=True):
        samples = audible(last_of(system, name, turns[-1]))
        hiss = np.random.default_rng(0).normal(0, 1e-6, len(samples))  # below what is drawn; silence has no logarithm
        axis.specgram(samples + hiss, NFFT=1024, Fs=SAMPLE_RATE, noverlap=768, vmin=-140, vmax=-40, cmap="magma")
        axis.set(title=system.name, xlabel="s")
    save_plot(figure, out / "plots" / "spectrograms.png")
    return [*made, "plots/spectrograms.png"]


def counterpart(system: System, name: str, wanted: Turn) -> Turn | None:
    """What the system says of a turn of the reference; None where it lacks it."""
    words = words_of(wanted.text)
    return next((turn for turn in system.conversations.get(name, []) if words_of(turn.text) == words), None)


def last_of(system: System, name: str, wanted: Turn) -> Turn | None:
    """What it says of the last turn; where it has words of its own, its own last turn."""
    return counterpart(system, name, wanted) or next(reversed(system.conversations.get(name, [])), None)


def audible(turn: Turn | None) -> np.ndarray:
    """Its samples; half a second of silence where nothing was said, so that there is something to show and to play."""
    return turn.samples if turn is not None and len(turn.samples) else np.zeros(SAMPLE_RATE // 2, np.float32)


def audible_at_one_level(turn: Turn) -> np.ndarray:
    """As `audible`, no system and no turn louder than another: the louder one would be preferred, and known again."""
    return at_loudness(audible(turn))


def players(out: Path, systems: Sequence[System]) -> str:
    """The last turns of the first conversations of every system."""
    folder = out / "audio"
    folder.mkdir(exist_ok=True)
    rows = []
    for place, name in enumerate(list(systems[0].conversations)[:PLAYED]):
        wanted = systems[0].conversations[name][-1]
        cells = [html.escape(f"{name}: {wanted.text}")]
        for number, system in enumerate(systems):
            turn = last_of(system, name, wanted)
            if turn is None:
                cells.append("nothing said")
                continue
            write_wav(folder / f"{place}-{number}.wav", audible(turn))
            own = "" if words_of(turn.text) == words_of(wanted.text) else f"<br>{html.escape(turn.text)}"
            cells.append(f'<audio controls preload="none" src="audio/{place}-{number}.wav"></audio>{own}')
        rows.append(cells)
    return table(["last turn of", *(system.name for system in systems)], rows)


# ---- listening -------------------------------------------------------------------------------------------------------

LISTENING_PAGE = Path(__file__).parent / "listening_page.html"
QUESTIONS = {
    False: "Which of the two sounds more like a human being?",
    True: "Which of the two is the more appropriate continuation of the conversation?",
}
ANSWERS = ((-3, "A much better"), (-2, "A better"), (-1, "A a little better"), (0, "equal"),
           (1, "B a little better"), (2, "B better"), (3, "B much better"))  # fmt: skip


def write_listening_page(out: Path, one: System, other: System, limit: int, seed: int) -> int:
    """A page of pairs in random order and place, with and without what was said before; how many pairs.

    Names of files and places tell nothing of the systems; `listening_key.json` does, and is not for listeners.
    ValueError: the systems share no turn.
    """
    random = np.random.default_rng(seed)
    pairs = [
        (name, index)
        for name, turns in one.conversations.items()
        if aligned(turns, other.conversations.get(name))
        for index in range(len(turns))
    ]
    if not pairs:
        raise ValueError(
            f"{one.name} and {other.name} say no conversation with the same texts; nothing to compare by ear"
        )
    chosen = [pairs[i] for i in random.permutation(len(pairs))[:limit]]
    folder = out / "listening"
    folder.mkdir(parents=True, exist_ok=True)
    items, key = [], {}
    asked = [(name, index, context) for name, index in chosen for context in ((False, True) if index else (False,))]
    first = random.permutation(np.arange(len(asked)) % 2)  # each system is A in half of the pairs
    for (name, index, context), swap in zip(asked, first, strict=True):
        order = [other, one] if swap else [one, other]
        heard = [(system.name, hash_of(system.conversations[name])) for system in order]
        item = digest(f"{seed} {name!r} {index} {context} {heard}")[:12]  # answers to it count for nothing else
        for letter, system in zip("AB", order, strict=True):
            write_wav(folder / f"{item}-{letter}.wav", audible_at_one_level(system.conversations[name][index]))
        before = one.conversations[name][max(0, index - CONTEXT_TURNS) : index] if context else []
        if before:
            write_wav(folder / f"{item}-before.wav", np.concatenate([audible_at_one_level(turn) for turn in before]))
        items.append({"item": item, "context": bool(before), "text": one.conversations[name][index].text})
        key[item] = {
            "A": order[0].name,
            "B": order[1].name,
            "conversation": name,
            "turn": index,
            "context": context,
        }
    items = [items[i] for i in random.permutation(len(items))]
    write_atomically(out / KEY, json.dumps({"systems": [one.name, other.name], "items": key}).encode())
    name = digest(json.dumps(items))[:12]
    data = {
        "items": items,
        "questions": [QUESTIONS[False], QUESTIONS[True]],
        "answers": ANSWERS,
        "name": f"listening-{name}",
    }
    filled = json.dumps(data).replace("<", "\\u003c")  # no text may end the element it stands in
    write_atomically(
        out / "listening.html", LISTENING_PAGE.read_text(encoding="utf-8").replace("DATA", filled, 1).encode()
    )
    return len(items)


def preferences(key: Path, answers: Sequence[Path], seed: int) -> dict[str, dict]:
    """What listeners preferred: by kind of question the mean score for the first system, -3 to 3, and its share.

    Interval over conversations, as listeners of one item agree, and its items share speakers; above 0 the first
    system is preferred. ValueError: not such files, or one given twice.
    """
    try:
        content = json.loads(key.read_text(encoding="utf-8"))
        first, items = content["systems"][0], content["items"]
        saved = [json.loads(path.read_text(encoding="utf-8")) for path in answers]
        scores = [(item, float(score)) for one in saved for item, score in one["answers"].items()]
        listeners = [one.get("listener", number) for number, one in enumerate(saved)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"the answers or their key {key} cannot be read: {error}") from error
    strange = [item for item, score in scores if item not in items or not abs(score) <= 3]
    if strange or not scores:
        raise ValueError(f"the answers are not about {key}: {strange[0] if strange else 'there are none'}")
    if twice := [str(path) for path, one in zip(answers, listeners, strict=True) if listeners.count(one) > 1]:
        raise ValueError(f"{' and '.join(twice)} are of one listener; give the file that was saved last")
    found = {}
    for context, title in ((False, "without context"), (True, "with context")):
        given = [(items[item], score) for item, score in scores if items[item]["context"] == context]
        own = [Item(of["conversation"], -score if of["A"] == first else score) for of, score in given]
        if own:
            mean = bootstrap(own, seed=seed)
            share = bootstrap([Item(name, 0.5 + 0.5 * np.sign(score)) for name, score, _ in own], seed=seed)
            found[title] = {"cmos": dataclasses.asdict(mean), "preferred": dataclasses.asdict(share)}
    return {"systems": content["systems"], "listeners": len(answers), **found}


def print_preferences(found: dict) -> None:
    first, second = found["systems"]
    for title in (title for title in found if title not in ("systems", "listeners")):
        score, share = (Figure(**found[title][name]) for name in ("cmos", "preferred"))
        print(f"{title}: {first} against {second}: {shown(score)} of -3 to 3; preferred in {shown(share)}")
        print(f"  {score.n} answers about {score.conversations} conversation(s)")
        if score.conversations < FEWEST_CONVERSATIONS:
            print(f"warning: below {FEWEST_CONVERSATIONS} conversations the interval is too narrow to be trusted")
    print(f"{found['listeners']} listener(s); above 0 {first} is preferred; an interval that holds 0 decides nothing")
