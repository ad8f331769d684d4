"""Collect spoken conversations into checked shards: python collect_data.py --sources synthetic --target_hours 0.5

Sources: `synthetic` speaks the dialogues of `corpus/`, `numbers` its sentences of numbers, times and prices,
`questions` its questions about these with their answers, `sentences` the examples of WordNet (Debian package
wordnet-base), or the lines of a text file (--local sentences=FILE.txt), with the same voices; `librispeech` and
`libritts_r` are streamed from the Hugging Face hub, or read from an unpacked archive (--local librispeech=DIR);
`common_voice` comes from Mozilla Data Collective or an unpacked release; `ami` holds meetings, `dailytalk` acted
dialogues; `fillets` and `asterisk` are recorded speech in Debian packages; `local` takes your own recordings (--input,
see below).
Running it again goes on where it stopped. Format: `turn_shards.py`.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import errno
import functools
import hashlib
import itertools
import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

from command_line import (
    EXIT_CODES_HELP,
    EXIT_DONE,
    EXIT_PARTIAL,
    PART_HELP,
    MissingRequirement,
    Several,
    StopSignals,
    default_part,
    describe,
    only_run_in,
    part,
    run,
)
from conversations import VOICE_SETS, write_conversations
from debian_speech import asterisk_source, fillets_source
from dialogue_corpora import ami_source, dailytalk_source
from public_speech import common_voice_source, libri_source
from speech_filters import Cleaning, cleaned
from speech_sources import (
    Source,
    Unit,
    UnitResult,
    digest,
    local_source,
    numbers_source,
    questions_source,
    read_utf8,
    sentences_source,
    synthetic_source,
)
from synthetic_voices import SPEAKERS, STYLES
from turn_shards import (
    Collection,
    Reject,
    ShardWriter,
    TurnRecord,
    composed,
    ledgers,
    read_columns,
    read_ledger,
    summarize,
)

DEFAULT_HOURS = 0.5  # where a source has no end
BYTES_PER_HOUR = 130e6  # FLAC of 22.05 kHz speech with a reserve; for the check of free space only

RULED_OUT = ("duplicate", "duplicate_text", "excluded", "dnsmos")  # no sign of a source that looks wrong
TAKEN = (
    "the conversation has this turn already: give every turn of a manifest its turn_index, and the files and "
    "conversations of all inputs names of their own; or collect into a new --out"
)
COMMENT = re.compile(r"\s#")
FIRST_TURNS, MAX_REJECTED = 200, 0.2  # a source with more rejects among its first turns is stopped: it looks wrong

SOURCES = {
    "synthetic": lambda args, done: synthetic_source(sorted(args.voices), args.seed, done),
    "numbers": lambda args, done: numbers_source(sorted(args.voices), sorted(args.styles), args.seed, done),
    "questions": lambda args, done: questions_source(args.voices, sorted(args.styles), args.seed, done),
    "sentences": lambda args, done: sentences_source(
        args.local.get("sentences", Path("/")), sorted(args.voices), sorted(args.styles), args.seed, done
    ),
    "librispeech": lambda args, done: libri_source("librispeech", args.local.get("librispeech"), args.seed, done),
    "libritts_r": lambda args, done: libri_source("libritts_r", args.local.get("libritts_r"), args.seed, done),
    "common_voice": lambda args, done: common_voice_source(
        args.local.get("common_voice"), args.common_voice_release, args.seed, done
    ),
    "ami": lambda args, done: ami_source(args.local.get("ami"), args.seed, done),
    "dailytalk": lambda args, done: dailytalk_source(args.local.get("dailytalk"), args.seed, done),
    "fillets": lambda args, done: fillets_source(args.local.get("fillets", Path("/")), args.seed, done),
    "asterisk": lambda args, done: asterisk_source(args.local.get("asterisk", Path("/")), args.seed, done),
    "local": lambda args, done: local_source(args.input, args.seed, done),
}
LOCAL_HELP = """\
--input DIR: wav, flac, ogg or mp3 files, each with its transcript in a .txt of the same name beside it; a sub-folder is
  a speaker, every file a conversation of its own; or a folder that holds manifest.jsonl or manifest.csv
--input FILE.jsonl|FILE.csv: one turn a line. Columns: audio (path, relative to the manifest), text; optional speaker,
  conversation, turn_index (else the line's number), start (seconds from the start of the conversation), language
  (BCP-47), style, licence (SPDX), trimmed (true: its silence is not cut). Or lines in the chat format of
  transformers' CsmProcessor, or of moshi-finetune
"""


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


@dataclass
class Rules:
    """What may not come in, and how much may."""

    known: dict[str, tuple[str, str, str]] = field(default_factory=dict)  # samples -> id, speaker, text of the turn
    excluded: frozenset[str] = frozenset()  # ids of turns, conversations or speakers
    unmatched: set[str] = field(init=False)  # those of `excluded` that have kept nothing out
    mark: str = field(init=False)  # of `excluded`
    max_bytes: float = float("inf")  # of all shards together
    ids: set[str] = field(default_factory=set)  # of all turns
    said: set[tuple[str, str]] = field(default_factory=set)  # speaker and text of the single sentences
    places: set[tuple[str, int]] = field(default_factory=set)  # conversation and index of turns of earlier runs
    groups: dict[str, str] = field(default_factory=dict)  # conversation -> `split_group` of its turns of earlier runs

    def __post_init__(self) -> None:
        self.unmatched, self.mark = set(self.excluded), digest(sorted(self.excluded))

    def learn(self, pcm_sha256: str, utt_id: str, source: str, speaker_id: str, text: str) -> None:
        """What is in the collection, or comes in now, is known from then on."""
        self.known[pcm_sha256] = utt_id, speaker_id, text
        self.ids.add(utt_id)
        if source in VOICE_SETS:
            self.said.add((speaker_id, text.casefold()))

    def has_said(self, turn: TurnRecord) -> bool:
        """Only asked of single sentences: in a conversation people repeat themselves."""
        return turn.source in VOICE_SETS and (turn.speaker_id, turn.text.casefold()) in self.said

    def is_taken(self, turn: TurnRecord) -> bool:
        """Not asked of single sentences: a larger release counts them anew, and their order means nothing."""
        return turn.source not in VOICE_SETS and (turn.conv_key, turn.turn_index) in self.places

    def is_changed(self, turn: TurnRecord) -> bool:
        """Whether the source has given the same samples with another text or speaker."""
        utt_id, *told = self.known.get(turn.pcm_sha256, ("", "", ""))
        return utt_id.split(":")[0] == turn.utt_id.split(":")[0] and told != [turn.speaker_id, turn.text]

    def against(self, turn: TurnRecord) -> Reject | None:
        """Why a turn may not come in; None if it may."""
        named = {turn.utt_id, turn.conv_key, turn.speaker_id} & self.excluded
        self.unmatched -= named
        twin = self.known.get(turn.pcm_sha256, ("",))[0]
        changed = (
            f"the collection holds it as {twin} with another text or speaker; collect into a new --out to change it"
        )
        reasons = [
            (bool(named), "excluded", f"by {', '.join(sorted(named))}"),
            (self.is_changed(turn), "changed", changed),
            (bool(twin), "duplicate", f"same samples as {twin}"),
            (
                turn.utt_id in self.ids,
                "id_conflict",
                "another turn has this id; collect into a new --out if its audio was changed",
            ),
            (self.is_taken(turn), "id_conflict", TAKEN),
            (self.has_said(turn), "duplicate_text", "a sentence that this speaker has said before"),
        ]
        return next((Reject(utt_id=turn.utt_id, reason=r, detail=d) for found, r, d in reasons if found), None)


def fill(source: Source, goal_s: float, rules: Rules, stop: StopSignals, bar: tqdm) -> None:
    """Collect from one source until it holds `goal_s` seconds, ends, or a stop signal comes."""
    writer = source.writer
    while writer.seconds < goal_s and not stop.received and source.ended is None:
        if sum(entry.bytes for entry in writer.collection.entries) >= rules.max_bytes:
            source.ended = f"stopped: the shards take {rules.max_bytes / 1e9:g} GB, the limit of --max_disk_gb"
            break
        try:
            step = next(source.results, None)
        except BrokenProcessPool as error:
            if stop.received:  # Ctrl-C reached a worker that was still starting
                break
            writer.flush()
            raise ValueError("a worker process was killed, often for lack of memory; use fewer --workers") from error
        except (MissingRequirement, ValueError, OSError) as error:
            source.ended, source.failure = f"stopped: {describe(error)}", error
            break
        if step is None:
            source.ended = "has no more"
            break
        unit, result = step
        turns, rejects = apply_rules(result, rules)
        writer.add(name_done(unit, rejects, rules), turns, rejects)
        bar.update(round(sum(turn.duration_s for turn in turns)))
        source.rejected += sum(reject.reason not in RULED_OUT for reject in rejects)
        if source.seen < FIRST_TURNS and source.rejected > FIRST_TURNS * MAX_REJECTED:
            source.ended = f"stopped: {source.rejected} of its first {FIRST_TURNS} turns rejected, it looks wrong"
        source.seen += len(turns) + len(rejects)
    writer.flush()


def name_done(unit: Unit, rejects: list[Reject], rules: Rules) -> str:
    """The ledger's name; a unit with refused turns is done until its files, or the ids that kept it out, change."""
    if any(reject.reason == "excluded" for reject in rejects):
        return f"{unit.id}@{unit.state}@{rules.mark}"
    return f"{unit.id}@{unit.state}" if rejects and unit.state else unit.id


def new_units(units: Iterator[Unit], done: set[str], rules: Rules) -> Iterator[Unit]:
    """Those that would not be refused as they were before."""
    for unit in units:
        if done.isdisjoint((f"{unit.id}@{unit.state}", f"{unit.id}@{unit.state}@{rules.mark}")):
            yield unit


def apply_rules(result: UnitResult, rules: Rules) -> UnitResult:
    """Refuse turns that may not come in; remembers the others. A conversation that grows stays in its split."""
    turns, rejects = [], list(result.rejects)
    for turn in result.turns:
        turn = dataclasses.replace(turn, split_group=rules.groups.get(turn.conv_key, turn.split_group))
        reject = rules.against(turn)
        if reject is not None:
            rejects.append(reject)
            continue
        rules.learn(turn.pcm_sha256, turn.utt_id, turn.source, turn.speaker_id, turn.text)
        turns.append(turn)
    return UnitResult(turns, rejects)


def read_excluded(path: Path | None) -> frozenset[str]:
    """One id a line: of a turn, a conversation or a speaker; a line that begins with # is a comment. Where a # behind
    white space stands within a line, what is before it is kept out too: a comment may have been meant."""
    if path is None:
        return frozenset()
    lines = [line.strip() for line in composed(read_utf8(path)).splitlines()]
    ids = [line for line in lines if line and not line.startswith("#")]
    before = [name[: sign.start()].rstrip() for name in ids for sign in COMMENT.finditer(name)]
    return frozenset([*ids, *before])


def tell_unmatched(folder: Path, rules: Rules) -> None:
    """One line about excluded ids that have kept nothing out of a collection, in this run or before."""
    told = [
        f", {reject['detail'].removeprefix('by ')}, "
        for path in (place for ledger in ledgers(folder) for place in ledger.parent.glob("rejects/*/*.jsonl"))
        for reject in map(json.loads, path.read_text(encoding="utf-8").splitlines())
        if reject["reason"] == "excluded"
    ]
    if unmatched := sorted(name for name in rules.unmatched if not any(f", {name}, " in names for names in told)):
        hint = "; a comment is better on a line of its own" if any(map(COMMENT.search, unmatched)) else ""
        print(f"--exclude_ids: {len(unmatched)} id(s) have kept nothing out so far, the first: {unmatched[0]}{hint}")


def fill_all(sources: list[Source], target_s: float, rules: Rules, stop: StopSignals, bar: tqdm) -> None:
    """Equal shares first; what a source cannot give is asked of those that still have some."""
    for source in sources:
        fill(source, target_s / len(sources), rules, stop, bar)
    while not stop.received:
        missing = target_s - sum(source.writer.seconds for source in sources)
        able = [source for source in sources if source.ended is None]
        if missing <= 0 or not able:
            return
        for source in able:
            fill(source, source.writer.seconds + missing / len(able), rules, stop, bar)


def part_folder(out: Path, index: int, of: int) -> Path:
    """Where this part is collected: `out` itself, or a whole collection in a folder of its own.

    ValueError: `out` was filled by another number of parts, which would collect the same conversations again.
    """
    folder = out / f"part-{index:03d}-of-{of:03d}" if of > 1 else out
    expected = {f"part-{i:03d}-of-{of:03d}" for i in range(of)} if of > 1 else {out.name}
    if strange := [path.parent.name for path in ledgers(out) if path.parent.name not in expected]:
        raise ValueError(
            f"{out} was collected as {strange[0]}, not as {folder.name}: go on as before, or give another --out"
        )
    return folder


def belongs(unit: Unit, index: int, of: int) -> bool:
    """Whether this part collects the unit: a function of its name, so parts agree without talking."""
    return int(hashlib.sha1((unit.conversation or unit.id).encode()).hexdigest()[:8], 16) % of == index


def collect(args: argparse.Namespace) -> int:
    """Open the collection, fill it up to the target, say what is there."""
    (index, of), whole = args.shard, args.out
    args.out = part_folder(whole, index, of)
    with only_run_in(args.out):
        collection = Collection(args.out)
        if collection.adopted:
            print(f"took over {len(collection.adopted)} whole shard(s) left by an interrupted run")
        rules = Rules(excluded=read_excluded(args.exclude_ids))
        sources = open_sources(args, collection, rules)
        hours = args.target_hours
        if hours is None:
            hours = DEFAULT_HOURS if any(source.endless for source in sources) else None
        hours = None if hours is None else hours / of
        target_s = float("inf") if hours is None else hours * 3600
        settings = {"sources": args.sources, "target_hours": hours, "seed": args.seed}
        have_s = sum(source.writer.seconds for source in sources)
        if have_s >= target_s:
            collection.write_summary(settings)
            write_conversations(args.out)
            print_summary(args.out)
            print(f"nothing to do: {have_s / 3600:.3f} of {hours:g} hours are collected already")
            return EXIT_DONE
        if args.dry_run:
            return show_plan(args.out, sources, target_s - have_s)
        check_space(args.out, target_s - have_s)
        if args.max_disk_gb is not None:
            rules.max_bytes = 1e9 * args.max_disk_gb / of
        columns = ["pcm_sha256", "utt_id", "source", "speaker_id", "text", "conv_key", "turn_index", "split_group"]
        for *facts, conversation, place, group in (
            read_columns(whole, columns) if ledgers(whole) else ()
        ):  # of all parts
            rules.learn(*facts)
            rules.places.add((conversation, place))
            rules.groups[conversation] = group
        with StopSignals() as stop, worker_pool(args.workers) as pool:
            for source in sources:
                source.results = results_in_order(source.units, pool, args.workers + 1)
            with progress_bar(hours, have_s) as bar:
                fill_all(sources, target_s, rules, stop, bar)
        if collection.entries:
            collection.write_summary(settings)
            write_conversations(args.out)
            tell_unmatched(whole, rules)
        elif (failed := next((source.failure for source in sources if source.failure), None)) is not None:
            raise failed
        code = conclude(args.out, sources, hours, stop)
        return EXIT_PARTIAL if code == EXIT_DONE and len(sources) < len(set(args.sources)) else code


def show_plan(folder: Path, sources: list[Source], seconds: float) -> int:
    """What would be collected; nothing is."""
    for source in sources:
        first = [unit.id for unit in itertools.islice(source.units, 3)]
        if source.endless:
            count = "conversations without end"
        else:
            count = f"{len(first) + sum(1 for _ in source.units)} conversations to collect"
        print(f"{source.name}: {count}{', first ' + ', '.join(first) if first else ''}")
    free = shutil.disk_usage(folder).free
    hours = seconds / 3600
    need = f"about {hours * BYTES_PER_HOUR / 1e9:.2f} GB for {hours:.2f} hours, " if np.isfinite(seconds) else ""
    print(f"{need}{free / 1e9:.1f} GB free in {folder}")
    return EXIT_DONE


def progress_bar(hours: float | None, have_s: float) -> tqdm:
    """Seconds of audio; without a target only counted."""
    total = None if hours is None else round(hours * 3600)
    return tqdm(total=total, initial=round(have_s), unit="s", desc="speech collected", dynamic_ncols=True)


def open_sources(args: argparse.Namespace, collection: Collection, rules: Rules) -> list[Source]:
    """All requested sources that can be used, checked before anything is collected; the error if there is none."""
    sources, problems = [], []
    cleaning = Cleaning(args.vad, args.min_dnsmos, args.words)
    cleaning.check()
    for name in dict.fromkeys(args.sources):
        done = collection.units(name)
        try:
            source = SOURCES[name](args, done)
        except (MissingRequirement, ValueError, OSError) as error:
            if len(set(args.sources)) == 1:
                raise
            problems.append((name, error))
            continue
        own = (unit for unit in new_units(source.units, done, rules) if belongs(unit, *args.shard))
        if any(cleaning):
            own = (unit._replace(job=functools.partial(cleaned, unit.job, cleaning)) for unit in own)
        source.units = own
        source.writer = ShardWriter(collection, source.name, source.version, args.shard_minutes * 60)
        sources.append(source)
    if not sources:
        raise problems[0][1]
    for name, error in problems:
        print(f"{name} left out: {describe(error)}", file=sys.stderr)
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
    print(f"{'source':<12}{'hours':>8}{'turns':>8}{'speakers':>10}  {'licence':<22} rejected")
    for name, facts in summarize(read_ledger(folder)).items():
        rejected = ", ".join(f"{count} {reason}" for reason, count in sorted(facts["rejected"].items())) or "none"
        licences = ",".join(facts["licenses"]) + (" (synthetic)" if facts["synthetic"] else "")
        print(f"{name:<12}{facts['hours']:>8.3f}{facts['turns']:>8}{facts['speakers']:>10}  {licences:<22} {rejected}")


def verify(folder: Path) -> int:
    """Hash every shard, of all parts; exit code 3 if one was damaged and put aside."""
    if not ledgers(folder):
        raise FileNotFoundError(f"no collection in {folder}")
    whole, damaged = 0, 0
    for ledger in ledgers(folder):
        with only_run_in(ledger.parent):
            collection = Collection(ledger.parent)
            problems = collection.verify()
        for problem in problems:
            print(problem)
        whole, damaged = whole + len(collection.entries), damaged + len(problems)
    print(f"{whole} shard(s) are whole, {damaged} damaged")
    return EXIT_PARTIAL if damaged else EXIT_DONE


def place(text: str) -> tuple[str, Path]:
    """SOURCE=DIR of the command line."""
    name, sign, folder = text.partition("=")
    made_here = ("synthetic", "numbers", "questions", "local")
    if not sign or name not in SOURCES or name in made_here:
        known = ", ".join(name for name in SOURCES if name not in made_here)
        raise argparse.ArgumentTypeError(f"{text!r} is not SOURCE=DIR with a source of {known}")
    return name, Path(folder)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=LOCAL_HELP + "\n" + EXIT_CODES_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--sources", action=Several, choices=list(SOURCES), default=["synthetic"], help="default: synthetic")
    hours_help = "hours of speech the sources shall hold together (default: 0.5, or all where every source has an end)"
    add("--target_hours", type=float, metavar="H", help=hours_help)
    input_help = (
        "your folder or manifest, for the source local; names of files and conversations must be unique over all "
        "inputs that are collected into one --out"
    )
    add("--input", type=Path, metavar="PATH", help=input_help)
    local_help = "read a source from a place: an unpacked archive, or where Debian packages are unpacked (default: /)"
    add("--local", action=Several, type=place, default=[], metavar="SOURCE=DIR", help=local_help)
    voices_help = f"who speaks in synthetic, numbers, questions and sentences (default: all of {', '.join(SPEAKERS)})"
    add("--voices", action=Several, choices=list(SPEAKERS), default=list(SPEAKERS), metavar="NAME", help=voices_help)
    styles_help = f"how numbers, questions and sentences are read, of {', '.join(STYLES)} (default: neutral)"
    add("--styles", action=Several, choices=list(STYLES), default=["neutral"], metavar="NAME", help=styles_help)
    add("--common_voice_release", metavar="ID", help="of Mozilla Data Collective; needs MDC_API_KEY")
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
    add("--max_disk_gb", type=float, metavar="G", help="stop when the shards take so much (default: no limit)")
    exclude_help = (
        "file with an id a line, of turns, conversations or speakers that must not come in; "
        "lines that begin with # are comments"
    )
    add("--exclude_ids", type=Path, metavar="FILE", help=exclude_help)
    add("--shard", type=part, default=default_part(), metavar="I/N", help=PART_HELP + "; each has a folder in --out")
    vad_help = "cut silence by voice activity (silero-vad) instead of by level alone; refuse turns without speech"
    add("--vad", action="store_true", help=vad_help)
    add("--words", action="store_true", help="store when each word is said, by Whisper tiny.en (English turns)")
    add("--min_dnsmos", type=float, metavar="Q", help="refuse turns with a DNSMOS overall quality (1 to 5) under Q")
    add("--dry_run", action="store_true", help="show what would be collected and stop")
    add("--status", action="store_true", help="show what is collected and stop")
    add("--verify", action="store_true", help="hash every shard; a damaged one is put aside to be collected again")
    return parser


def main(argv: list[str] | None = None) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)
    args.local, args.voices, args.styles = (
        dict(args.local),
        list(dict.fromkeys(args.voices)),
        list(dict.fromkeys(args.styles)),
    )
    if "local" in args.sources and args.input is None and not (args.status or args.verify):
        parser.error("--sources local needs --input DIR or a manifest")
    for name in ("target_hours", "workers", "shard_minutes", "max_disk_gb"):
        value = getattr(args, name)
        if value is not None and not 0 < value < float("inf"):
            parser.error(f"--{name} must be above 0, got {value}")
    if args.min_dnsmos is not None and not 1 <= args.min_dnsmos <= 5:
        parser.error(f"--min_dnsmos must lie in 1..5, got {args.min_dnsmos}")
    if args.status:
        if not ledgers(args.out):
            raise FileNotFoundError(f"no collection in {args.out}")
        print_summary(args.out)
        return EXIT_DONE
    return verify(args.out) if args.verify else collect(args)


if __name__ == "__main__":
    raise SystemExit(run(main))
