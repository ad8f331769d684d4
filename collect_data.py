"""Collect spoken conversations into checked shards: python collect_data.py --sources synthetic --target_hours 0.5

Sources: `synthetic` speaks the dialogues of `corpus/`; `local` takes your own recordings (--input, see --help).
Running it again goes on where it stopped. Format: `turn_shards.py`.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import errno
import functools
import hashlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

import synthetic_voices
from audio import read_audio
from command_line import EXIT_CODES_HELP, EXIT_DONE, EXIT_PARTIAL, StopSignals, only_run_in, run
from dataset_pipeline import write_conversations
from turn_shards import (
    Collection,
    Reject,
    ShardWriter,
    TurnRecord,
    make_turn,
    read_ledger,
    summarize,
)

DIALOGUES = Path(__file__).parent / "corpus" / "dialogues.txt"
DEFAULT_HOURS = 0.5  # where a source has no end
BYTES_PER_HOUR = 130e6  # FLAC of 22.05 kHz speech with a reserve; for the check of free space only
AUDIO_SUFFIXES = (".wav", ".flac", ".ogg", ".mp3")
MANIFESTS = ("manifest.jsonl", "manifest.csv")
COLUMNS = ("audio", "text", "speaker", "conversation", "turn_index", "start", "language", "style", "licence")

FIRST_TURNS, MAX_REJECTED = 200, 0.2  # a source with more rejects among its first turns is stopped: it looks wrong

LOCAL_HELP = """\
--input DIR: wav, flac, ogg or mp3 files, each with its transcript in a .txt of the same name beside it; a sub-folder is
  a speaker, every file a conversation of its own; or a folder that holds manifest.jsonl or manifest.csv
--input FILE.jsonl|FILE.csv: one turn a line. Columns: audio (path, relative to the manifest), text; optional speaker,
  conversation, turn_index, start (seconds from the start of the conversation), language (BCP-47), style, licence (SPDX)
"""


class UnitResult(NamedTuple):
    turns: list[TurnRecord]
    rejects: list[Reject]


class Unit(NamedTuple):
    """A conversation: collected and committed as a whole."""

    id: str
    job: Callable[[], UnitResult]  # runs in a worker process


@dataclass
class Source:
    """Where units come from, and how far this run is with it."""

    name: str
    version: str
    units: Iterator[Unit]
    endless: bool
    writer: ShardWriter | None = None
    results: Iterator[tuple[Unit, UnitResult]] | None = None
    seen: int = 0  # turns of this run
    rejected: int = 0
    ended: str | None = None  # why it has nothing more to give


def sort_results(results: Iterable[TurnRecord | Reject]) -> UnitResult:
    results = list(results)
    return UnitResult(
        [result for result in results if isinstance(result, TurnRecord)],
        [result for result in results if isinstance(result, Reject)],
    )


# --- synthetic source ------------------------------------------------------------------------------------------------


def synthetic_source(seed: int, done: set[str]) -> Source:
    """Dialogues without end: every pass has each dialogue once, with new slot values and a new pair of speakers."""
    synthetic_voices.check_voice()
    dialogues = synthetic_voices.read_dialogues(DIALOGUES)

    def units() -> Iterator[Unit]:
        variant = 0
        while True:
            order = list(dialogues)
            random.Random(synthetic_voices.seed_of(seed, "order", variant)).shuffle(order)
            for dialogue in order:
                unit_id = f"{dialogue.name}-s{seed}-v{variant}"
                if unit_id not in done:
                    yield Unit(unit_id, functools.partial(collect_dialogue, dialogue, seed, variant, unit_id))
            variant += 1

    return Source("synthetic", "1", units(), endless=True)


def collect_dialogue(dialogue: synthetic_voices.Dialogue, seed: int, variant: int, unit_id: str) -> UnitResult:
    """Speak one variant of a dialogue."""
    turns = synthetic_voices.speak_dialogue(dialogue, seed, variant)
    return sort_results(
        make_turn(
            turn.samples,
            turn.sample_rate,
            turn.text,
            utt_id=f"synthetic:{unit_id}-{turn.index:02d}",
            source="synthetic",
            split_group=f"synthetic:{dialogue.name}",  # all variants share their words
            conv_key=f"synthetic:{unit_id}",
            turn_index=turn.index,
            start_s=round(turn.start_s, 4),
            end_s=round(turn.start_s + len(turn.samples) / turn.sample_rate, 4),
            speaker_id=f"synthetic:{turn.speaker}",
            style=turn.style,
            voice_parameters=json.dumps(turn.voice_parameters),
            license=synthetic_voices.LICENSE,
            license_url="https://creativecommons.org/publicdomain/zero/1.0/",
            attribution=synthetic_voices.ATTRIBUTION,
            redistributable=True,
            synthetic=True,
        )
        for turn in turns
    )


# --- local source ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class LocalTurn:
    """One row of a manifest, or one audio file of a folder. `text` None: its transcript could not be read."""

    audio: Path
    text: str | None
    speaker: str = "unknown"
    conversation: str
    turn_index: int = 0
    start: float | None = None
    language: str = "en"
    style: str | None = None
    licence: str = "NOASSERTION"
    name: str = field(default="")  # audio path as written, for ids


def local_source(given: Path, seed: int, done: set[str]) -> Source:
    """Units of a folder or manifest in an order drawn from `seed`. ValueError, FileNotFoundError: not usable at all."""
    if not given.exists():
        raise FileNotFoundError(f"--input {given} does not exist")
    manifests = [given] if given.is_file() else [given / name for name in MANIFESTS if (given / name).is_file()]
    rows = read_manifest(manifests[0]) if manifests else read_folder(given)
    if not any(row.audio.is_file() for row in rows):
        raise ValueError(f"none of the {len(rows)} audio files named in {manifests[0]} exist, e.g. {rows[0].audio}")
    conversations: dict[str, list[LocalTurn]] = {}
    for row in rows:
        conversations.setdefault(row.conversation, []).append(row)

    units = []
    for name, turns in conversations.items():
        turns.sort(key=lambda turn: turn.turn_index)
        # what the unit holds is part of its id: a mended transcript or file is collected on the next run
        facts = [(t.name, t.text, t.audio.stat().st_size if t.audio.is_file() else -1) for t in turns]
        digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:8]
        if f"{name}-{digest}" not in done:
            units.append(Unit(f"{name}-{digest}", functools.partial(collect_conversation, name, digest, turns)))
    units.sort(key=lambda unit: synthetic_voices.seed_of(seed, unit.id))
    return Source("local", "1", iter(units), endless=False)


def read_folder(folder: Path) -> list[LocalTurn]:
    """Audio files with a transcript of the same stem; the folder a file lies in names its speaker."""
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in AUDIO_SUFFIXES)
    if not files:
        raise ValueError(f"no audio ({', '.join(AUDIO_SUFFIXES)}) and no {' or '.join(MANIFESTS)} in {folder}")
    turns = []
    for path in files:
        name = path.relative_to(folder).with_suffix("").as_posix()
        try:
            text = path.with_suffix(".txt").read_text(encoding="utf-8-sig")
        except (FileNotFoundError, UnicodeDecodeError):
            text = None
        speaker = path.parent.relative_to(folder).as_posix()
        turns.append(
            LocalTurn(
                audio=path,
                text=text,
                speaker="unknown" if speaker == "." else speaker,
                conversation=path.relative_to(folder).as_posix(),
                name=name,
            )
        )
    if all(turn.text is None for turn in turns):
        raise ValueError(f"no transcripts in {folder}: expected {files[0].with_suffix('.txt')} beside {files[0].name}")
    return turns


def read_manifest(path: Path) -> list[LocalTurn]:
    """Rows of a JSONL or CSV manifest. ValueError names the columns that are missing, or the bad lines."""
    if path.suffix.lower() not in (".jsonl", ".csv"):
        raise ValueError(f"--input {path}: expected a folder, a .jsonl or a .csv manifest")
    try:
        content = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error})") from error
    rows: list[tuple[int, dict]] = []
    problems = []
    if path.suffix.lower() == ".csv":
        reader = csv.DictReader(content.splitlines(keepends=True))
        rows = [(reader.line_num, row) for row in reader]
    else:
        for number, line in enumerate(content.splitlines(), start=1):
            try:
                row = json.loads(line) if line.strip() else None
            except ValueError as error:
                problems.append(f"line {number}: {error}")
                continue
            if row is not None and not isinstance(row, dict):
                problems.append(f"line {number}: not an object")
            elif row is not None:
                rows.append((number, row))
    turns = []
    for number, row in rows:
        try:
            turns.append(local_turn(path.parent, row, number))
        except (ValueError, TypeError) as error:
            problems.append(f"line {number}: {error}")
    if problems or not turns:
        shown = "; ".join(problems[:3] or ["holds no turns"])
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise ValueError(f"{path}: {shown}{more}")
    return turns


def local_turn(folder: Path, row: dict, number: int) -> LocalTurn:
    """One manifest row; `number` places turns that say nothing of their order."""
    row = {name: value for name, value in row.items() if value not in (None, "") or name == "text"}
    missing = [name for name in ("audio", "text") if name not in row]
    if missing:
        found = ", ".join(map(str, row))
        raise ValueError(f"column {' and '.join(missing)} missing; found {found}; known are {', '.join(COLUMNS)}")
    name = str(row["audio"])
    return LocalTurn(
        audio=folder / name,
        text=str(row["text"] or ""),
        speaker=str(row.get("speaker", "unknown")),
        conversation=str(row.get("conversation", name)),
        turn_index=int(row.get("turn_index", number)),
        start=float(row["start"]) if "start" in row else None,
        language=str(row.get("language", "en")),
        style=str(row["style"]) if "style" in row else None,
        licence=str(row.get("licence", row.get("license", "NOASSERTION"))),
        name=name,
    )


def collect_conversation(conversation: str, digest: str, turns: list[LocalTurn]) -> UnitResult:
    """Read, trim and check the turns of one conversation; their level stays as it was recorded."""
    loaded: list[tuple[LocalTurn, str, np.ndarray, int]] = []
    results: list[TurnRecord | Reject] = []
    for position, turn in enumerate(turns):
        utt_id = f"local:{conversation}-{digest}-{position:04d}"
        try:
            samples, rate = read_audio(turn.audio, sample_rate=None)
        except FileNotFoundError as error:
            results.append(Reject(utt_id=utt_id, reason="missing_file", detail=str(error)))
        except ValueError as error:
            results.append(Reject(utt_id=utt_id, reason="unreadable_audio", detail=str(error)))
        else:
            if turn.text is None:
                detail = f"no UTF-8 transcript beside {turn.audio}"
                results.append(Reject(utt_id=utt_id, reason="missing_text", detail=detail))
            else:
                loaded.append((turn, utt_id, synthetic_voices.trim_silence(samples, rate), rate))
    for turn, utt_id, samples, rate in loaded:
        end = None if turn.start is None else turn.start + len(samples) / rate
        result = make_turn(
            samples,
            rate,
            turn.text or "",
            utt_id=utt_id,
            source="local",
            split_group=f"local:{conversation}",
            conv_key=f"local:{conversation}",
            turn_index=turn.turn_index,
            start_s=turn.start,
            end_s=end,
            speaker_id=f"local:{turn.speaker}",
            lang=turn.language,
            style=turn.style,
            license=turn.licence,
            origin_url=turn.name,
        )
        results.append(result)
    return sort_results(results)


# --- collecting ------------------------------------------------------------------------------------------------------


def results_in_order(units: Iterator[Unit], pool: ProcessPoolExecutor | None, ahead: int):
    """Yield (unit, result) in the order of the units; at most `ahead` units are worked on at a time."""
    if pool is None:
        for unit in units:
            yield unit, unit.job()
        return
    waiting: deque = deque()
    while True:
        while len(waiting) < ahead and (unit := next(units, None)) is not None:
            waiting.append((unit, pool.submit(unit.job)))
        if not waiting:
            return
        unit, future = waiting.popleft()
        yield unit, future.result()


def prepare_worker() -> None:
    """Ctrl-C is the parent's to handle; one thread each; end when the parent is gone, even after kill -9."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    import torch

    torch.set_num_threads(1)


@contextlib.contextmanager
def worker_pool(workers: int) -> Iterator[ProcessPoolExecutor | None]:
    """A pool of fresh processes, or None to work in this one; work under way is dropped at the end."""
    if workers <= 1:
        yield None
        return
    os.environ["OMP_NUM_THREADS"] = "1"  # inherited by the workers, read when their libraries load
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=prepare_worker)
    try:
        yield pool
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in multiprocessing.active_children():
            process.terminate()


def fill(source: Source, goal_s: float, known: dict[str, str], stop: StopSignals, bar: tqdm) -> None:
    """Collect from one source until it holds `goal_s` seconds, ends, or a stop signal comes."""
    writer = source.writer
    while writer.seconds < goal_s and not stop.received and source.ended is None:
        try:
            step = next(source.results, None)
        except BrokenProcessPool as error:
            if stop.received:  # Ctrl-C reached a worker that was still starting
                break
            writer.flush()
            raise ValueError("a worker process was killed, often for lack of memory; use fewer --workers") from error
        if step is None:
            source.ended = "has no more"
            break
        unit, result = step
        turns, rejects = drop_known(result, known)
        writer.add(unit.id, turns, rejects)
        bar.update(round(sum(turn.duration_s for turn in turns)))
        if source.seen < FIRST_TURNS:
            source.rejected += sum(reject.reason != "duplicate" for reject in rejects)
            if source.rejected > FIRST_TURNS * MAX_REJECTED:
                source.ended = f"stopped: {source.rejected} of its first {FIRST_TURNS} turns rejected, it looks wrong"
        source.seen += len(turns) + len(rejects)
    writer.flush()


def drop_known(result: UnitResult, known: dict[str, str]) -> UnitResult:
    """Refuse turns whose samples are in the collection already; remembers the others."""
    turns, rejects = [], list(result.rejects)
    for turn in result.turns:
        if turn.pcm_sha256 in known:
            detail = f"same samples as {known[turn.pcm_sha256]}"
            rejects.append(Reject(utt_id=turn.utt_id, reason="duplicate", detail=detail))
        else:
            known[turn.pcm_sha256] = turn.utt_id
            turns.append(turn)
    return UnitResult(turns, rejects)


def fill_all(sources: list[Source], target_s: float, known: dict[str, str], stop: StopSignals, bar: tqdm) -> None:
    """Equal shares first; what a source cannot give is asked of those that still have some."""
    for source in sources:
        fill(source, target_s / len(sources), known, stop, bar)
    while not stop.received:
        missing = target_s - sum(source.writer.seconds for source in sources)
        able = [source for source in sources if source.ended is None]
        if missing <= 0 or not able:
            return
        for source in able:
            fill(source, source.writer.seconds + missing / len(able), known, stop, bar)


def collect(args: argparse.Namespace) -> int:
    """Open the collection, fill it up to the target, say what is there."""
    with only_run_in(args.out):
        collection = Collection(args.out)
        if collection.adopted:
            print(f"took over {len(collection.adopted)} whole shard(s) left by an interrupted run")
        sources = open_sources(args, collection)
        hours = args.target_hours
        if hours is None:
            hours = DEFAULT_HOURS if any(source.endless for source in sources) else None
        target_s = float("inf") if hours is None else hours * 3600
        settings = {"sources": args.sources, "target_hours": hours, "seed": args.seed}
        have_s = sum(source.writer.seconds for source in sources)
        if have_s >= target_s:
            collection.write_summary(settings)
            write_conversations(args.out)
            print_summary(args.out)
            print(f"nothing to do: {have_s / 3600:.3f} of {hours:g} hours are collected already")
            return EXIT_DONE
        check_space(args.out, target_s - have_s)
        with StopSignals() as stop, worker_pool(args.workers) as pool:
            for source in sources:
                source.results = results_in_order(source.units, pool, args.workers + 1)
            with progress_bar(hours, have_s) as bar:
                fill_all(sources, target_s, collection.known_audio(), stop, bar)
        if collection.entries:
            collection.write_summary(settings)
            write_conversations(args.out)
        return conclude(args.out, sources, hours, stop)


def progress_bar(hours: float | None, have_s: float) -> tqdm:
    """Seconds of audio; without a target only counted."""
    total = None if hours is None else round(hours * 3600)
    return tqdm(total=total, initial=round(have_s), unit="s", desc="speech collected", dynamic_ncols=True)


def open_sources(args: argparse.Namespace, collection: Collection) -> list[Source]:
    """All requested sources, checked before anything is collected."""
    sources = []
    for name in dict.fromkeys(args.sources):
        done = collection.units(name)
        source = synthetic_source(args.seed, done) if name == "synthetic" else local_source(args.input, args.seed, done)
        source.writer = ShardWriter(collection, source.name, source.version, args.shard_minutes * 60)
        sources.append(source)
    return sources


def check_space(folder: Path, seconds: float) -> None:
    needed = seconds / 3600 * BYTES_PER_HOUR
    if np.isfinite(needed) and shutil.disk_usage(folder).free < needed:
        raise OSError(errno.ENOSPC, "No space", f"{folder}: about {needed / 1e6:.0f} MB needed")


def conclude(folder: Path, sources: list[Source], hours: float | None, stop: StopSignals) -> int:
    """Print the table and why the run ended; the exit code."""
    print_summary(folder)
    for source in sources:
        if source.ended and (source.ended != "has no more" or hours is not None):
            print(f"{source.name} {source.ended}")
    if stop.received:
        print("stopped; everything shown is kept, run the same command again to go on", file=sys.stderr)
        return stop.exit_code
    have = sum(source.writer.seconds for source in sources) / 3600
    if hours is not None and have < hours:
        print(f"target not reached: {have:.3f} of {hours:g} hours")
        return EXIT_PARTIAL
    if any(source.ended and source.ended.startswith("stopped") for source in sources):
        return EXIT_PARTIAL
    if hours is None and any(source.rejected for source in sources):
        print(f"some turns were rejected; they are listed in {folder / 'rejects'}")
        return EXIT_PARTIAL
    return EXIT_DONE


def print_summary(folder: Path) -> None:
    """One line per source of what is committed."""
    print(f"{'source':<12}{'hours':>8}{'turns':>8}{'speakers':>10}  {'licence':<22}rejected")
    for name, facts in summarize(read_ledger(folder)).items():
        rejected = ", ".join(f"{count} {reason}" for reason, count in sorted(facts["rejected"].items())) or "none"
        licences = ",".join(facts["licenses"]) + (" (synthetic)" if facts["synthetic"] else "")
        print(f"{name:<12}{facts['hours']:>8.3f}{facts['turns']:>8}{facts['speakers']:>10}  {licences:<22}{rejected}")


def verify(folder: Path) -> int:
    """Hash every shard; exit code 3 if one was damaged and put aside."""
    if not (folder / "shards.jsonl").is_file():
        raise FileNotFoundError(f"no collection in {folder}")
    with only_run_in(folder):
        collection = Collection(folder)
        problems = collection.verify()
        for problem in problems:
            print(problem)
        print(f"{len(collection.entries)} shard(s) are whole, {len(problems)} damaged")
        return EXIT_PARTIAL if problems else EXIT_DONE


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=LOCAL_HELP + "\n" + EXIT_CODES_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--sources", nargs="+", choices=["synthetic", "local"], default=["synthetic"], help="default: synthetic")
    hours_help = "hours of speech the sources shall hold together (default: 0.5; with local alone all there is)"
    add("--target_hours", type=float, metavar="H", help=hours_help)
    add("--input", type=Path, metavar="PATH", help="your folder or manifest, for the source local")
    add("--out", type=Path, default=Path("data"), metavar="DIR", help="the collection (default: data)")
    add(
        "--seed",
        type=int,
        default=0,
        help="of order, slot values, speakers and noise; another one adds other variants (default: 0)",
    )
    add("--workers", type=int, default=os.cpu_count() or 1, metavar="N", help="processes (default: number of cores)")
    loss_help = "audio per shard, the most a kill -9 loses (default: 3)"
    add("--shard_minutes", type=float, default=3.0, metavar="M", help=loss_help)
    add("--status", action="store_true", help="show what is collected and stop")
    add("--verify", action="store_true", help="hash every shard; a damaged one is put aside to be collected again")
    return parser


def main(argv: list[str] | None = None) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)
    if "local" in args.sources and args.input is None and not (args.status or args.verify):
        parser.error("--sources local needs --input DIR or a manifest")
    for name in ("target_hours", "workers", "shard_minutes"):
        value = getattr(args, name)
        if value is not None and not 0 < value < float("inf"):
            parser.error(f"--{name} must be above 0, got {value}")
    if args.status:
        if not (args.out / "shards.jsonl").is_file():
            raise FileNotFoundError(f"no collection in {args.out}")
        print_summary(args.out)
        return EXIT_DONE
    return verify(args.out) if args.verify else collect(args)


if __name__ == "__main__":
    raise SystemExit(run(main))
