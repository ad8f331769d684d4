"""Spoken turns on disk: checks at the door, Parquet shards, a ledger of what is committed, and lists of rejects.

    data/shards.jsonl                          one line per committed shard, the only truth about progress
    data/turns/<source>/turns-00042.parquet    audio and metadata of whole units (a unit is one conversation)
    data/rejects/<source>/rejects-00042.jsonl  turns of the same units that were refused, with the reason
    data/collection.json                       licence summary, for people

Commit order: rejects, shard under a temporary name, fsync, re-open and check, rename, fsync of the folder, ledger line,
fsync. A kill at any moment loses at most the shard being written. Knows nothing of where turns come from, of splits or
of tokens. Times are seconds, levels are dB relative to full scale.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import hashlib
import json
import os
import re
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet

from audio import MIN_RMS_DBFS, encode_pcm16, loudness_lufs, rms_dbfs, to_pcm16
from checkpointing import file_digest, write_atomically
from command_line import first_line

SCHEMA_VERSION = 2  # 2: words and dnsmos_ovrl; shards of version 1 are read without them
LEDGER = "shards.jsonl"
PARTS = "part-*-of-*"  # folders in a collection that several processes filled
MIN_S, MAX_S = 0.4, 30.0  # of a turn
NAMELESS = "unknown"  # a speaker of whom nothing is known; two of them may be two people
MAX_CLIPPED = 0.01
CHARS_PER_S = (3.0, 30.0)
ENTRY_KEY = b"collection_entry"  # a shard carries its own ledger line, so that it can be adopted after a crash


def is_named(speaker_id: str) -> bool:
    return speaker_id.rpartition(":")[2] != NAMELESS


@dataclass(frozen=True, kw_only=True, slots=True)  # hours of speech are thousands of them
class TurnRecord:
    """One spoken turn. `audio` is the bytes of a mono 16-bit FLAC at `sample_rate`, or None when read without audio."""

    utt_id: str  # "source:native id", stable and unique
    source: str
    source_version: str = "1"
    split_native: str | None = None  # the split its publisher gave it
    split_group: str  # turns of one group always land in the same split
    conv_key: str  # the conversation
    turn_index: int = 0  # its place in the conversation
    start_s: float | None = None  # seconds from the start of the conversation, None if unknown
    end_s: float | None = None
    overlap: bool = False  # somebody else speaks at the same time
    speaker_id: str  # namespaced by source
    speaker_sex: str | None = None
    text: str  # as spoken
    text_raw: str  # as found
    text_form: str = "cased_punct"  # or "upper_nopunct", "lower": how the text was found
    lang: str = "en"  # BCP-47
    style: str | None = None
    voice_parameters: str | None = None  # JSON of the numbers a synthetic voice was made with
    words: str | None = None  # JSON [[word, start, end], ...], seconds from the first sample of `audio`
    dnsmos_ovrl: float | None = None  # DNSMOS P.835 overall quality, 1 to 5; None: not measured
    audio: bytes | None
    sample_rate: int  # native, resampled once when tokens are made
    num_samples: int
    duration_s: float
    pcm_sha256: str  # of the decoded int16 samples
    lufs: float | None = None
    peak_dbfs: float
    clip_frac: float
    chars_per_s: float
    license: str = "NOASSERTION"  # SPDX
    license_url: str = ""
    attribution: str = ""
    redistributable: bool = False
    noncommercial: bool = False
    origin_url: str = ""
    retrieved_at: datetime.datetime
    synthetic: bool = False
    schema_version: int = SCHEMA_VERSION


ARROW_TYPES = {
    "str": pyarrow.string(),
    "str | None": pyarrow.string(),
    "int": pyarrow.int64(),
    "bool": pyarrow.bool_(),
    "float": pyarrow.float64(),
    "float | None": pyarrow.float64(),
    "datetime.datetime": pyarrow.timestamp("us", tz="UTC"),
    "bytes | None": pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())]),
}
SCHEMA = pyarrow.schema(
    [(f.name, ARROW_TYPES[f.type], f.type.endswith("None")) for f in dataclasses.fields(TurnRecord)],
)
METADATA_COLUMNS = [name for name in SCHEMA.names if name != "audio"]


@dataclass(frozen=True, kw_only=True)
class Reject:
    """A turn that was refused; `reason` is one of a few words to count by, `detail` is for people."""

    utt_id: str
    reason: str
    detail: str = ""


def composed(name: str) -> str:
    """One form (NFC) of what is written with accents: file systems and keyboards give several."""
    return unicodedata.normalize("NFC", name)


def clean_text(raw: str) -> tuple[str, str]:
    """Text as spoken and the form it was found in; the text is empty when it holds no letter or digit."""
    text = composed(raw)
    text = re.sub(r"\[[^\]]*\]|<[^>]*>", " ", text)  # [noise], <unk>
    text = "".join(" " if unicodedata.category(c)[0] == "C" else c for c in text)
    text = " ".join(text.split())
    if text.lower() in ("nan", "none", "null") or not any(c.isalnum() for c in text):
        return "", "lower"
    if text.isupper() and len(text) > 3:
        return text[0] + text[1:].lower(), "upper_nopunct"
    return text, "lower" if text.islower() else "cased_punct"


def make_turn(samples: np.ndarray, rate: int, text_raw: str, utt_id: str, **facts: Any) -> TurnRecord | Reject:
    """(N,) trimmed samples and a transcript -> a checked record, or the first reason to refuse it."""
    text, form = clean_text(text_raw)
    duration = len(samples) / rate
    clipped = float(np.mean(np.abs(samples) >= 0.999)) if len(samples) else 0.0
    chars_per_s = len(text) / max(duration, 1e-9)
    level = rms_dbfs(samples)
    problems = [
        (not text, "empty_text", f"{text_raw[:60]!r}"),
        (duration < MIN_S, "too_short", f"{duration:.2f} s, at least {MIN_S}"),
        (duration > MAX_S, "too_long", f"{duration:.2f} s, at most {MAX_S}"),
        (level < MIN_RMS_DBFS, "too_quiet", f"{level:.1f} dBFS, at least {MIN_RMS_DBFS}"),
        (clipped > MAX_CLIPPED, "clipped", f"{clipped:.1%} of the samples at full scale"),
        (not CHARS_PER_S[0] <= chars_per_s <= CHARS_PER_S[1], "chars_per_second", f"{chars_per_s:.1f} characters/s"),
    ]
    for found, reason, detail in problems:
        if found:
            return Reject(utt_id=utt_id, reason=reason, detail=detail)
    return TurnRecord(
        utt_id=utt_id,
        text=text,
        text_raw=text_raw,
        text_form=form,
        audio=encode_pcm16(samples, rate),
        sample_rate=rate,
        num_samples=len(samples),
        duration_s=duration,
        pcm_sha256=hashlib.sha256(to_pcm16(samples).tobytes()).hexdigest(),
        lufs=round(loudness_lufs(samples, rate), 2),
        peak_dbfs=round(20 * float(np.log10(np.abs(samples).max())), 2),
        clip_frac=clipped,
        chars_per_s=round(chars_per_s, 2),
        retrieved_at=datetime.datetime.now(datetime.timezone.utc),
        **facts,
    )


@dataclass(frozen=True, kw_only=True)
class LedgerEntry:
    """One line of the ledger: a committed shard. `path` is None when every turn of its units was rejected."""

    source: str
    source_version: str
    number: int
    path: str | None  # relative to the data folder
    sha256: str | None
    bytes: int
    rows: int
    seconds: float
    units: list[str]
    rejected: dict[str, int]  # turns by reason
    licenses: list[str]
    speakers: list[str]
    synthetic: bool
    committed_at: str
    schema_version: int = SCHEMA_VERSION


class Collection:
    """The ledger of a data folder, mended on opening: a torn last line is cut, a whole shard without a line adopted.

    Only one process may have it open for writing (hold `command_line.only_run_in`). ValueError: the ledger is damaged
    before its last line, or was written by a newer version.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.ledger = folder / LEDGER
        cut_torn_line(self.ledger)
        self.entries = read_lines(self.ledger)
        for partial in [*folder.glob("turns/*/.tmp-*"), *folder.glob("turns/*/.*.partial")]:
            partial.unlink()
        self.adopted = [path for path in self._unlisted_shards() if self._adopt(path)]

    def units(self, source: str) -> set[str]:
        """Units that are done, whether or not any of their turns were accepted."""
        return {unit for entry in self.entries if entry.source == source for unit in entry.units}

    def seconds(self, source: str) -> float:
        return sum(entry.seconds for entry in self.entries if entry.source == source)

    def commit(
        self, source: str, source_version: str, units: list[str], turns: list[TurnRecord], rejects: list[Reject]
    ) -> LedgerEntry:
        """Make `turns` and `rejects` of whole `units` durable, or raise OSError and leave what was committed before."""
        number = max((entry.number for entry in self.entries if entry.source == source), default=-1) + 1
        entry = LedgerEntry(
            source=source,
            source_version=source_version,
            number=number,
            path=f"turns/{source}/turns-{number:05d}.parquet" if turns else None,
            sha256=None,
            bytes=0,
            rows=len(turns),
            seconds=sum(turn.duration_s for turn in turns),
            units=units,
            rejected=dict(Counter(reject.reason for reject in rejects)),
            licenses=sorted({turn.license for turn in turns}),
            speakers=sorted({turn.speaker_id for turn in turns}),
            synthetic=any(turn.synthetic for turn in turns),
            committed_at=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        )
        if rejects:
            path = self.folder / "rejects" / source / f"rejects-{number:05d}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            lines = [json.dumps(dataclasses.asdict(reject), ensure_ascii=False) + "\n" for reject in rejects]
            write_atomically(path, "".join(lines).encode())
        if turns:
            entry = _write_shard(self.folder, entry, turns)
        self._append(entry)
        return entry

    def _append(self, entry: LedgerEntry) -> None:
        with open(self.ledger, "ab") as file:
            file.write((json.dumps(dataclasses.asdict(entry), ensure_ascii=False) + "\n").encode())
            file.flush()
            os.fsync(file.fileno())
        _fsync_folder(self.folder)
        self.entries.append(entry)

    def _unlisted_shards(self) -> list[Path]:
        listed = {entry.path for entry in self.entries}
        found = sorted(self.folder.glob("turns/*/turns-*.parquet"))
        return [path for path in found if path.relative_to(self.folder).as_posix() not in listed]

    def _adopt(self, path: Path) -> bool:
        """List a shard that was renamed into place before a crash; a file that cannot be it is deleted."""
        try:
            metadata = pyarrow.parquet.read_schema(path).metadata or {}
            entry = LedgerEntry(**json.loads(metadata[ENTRY_KEY]))
            _check_shard(path, entry.rows)
        except (pyarrow.ArrowInvalid, OSError, KeyError, ValueError, TypeError):
            path.unlink()
            return False
        if self.units(entry.source) & set(entry.units) or entry.path != path.relative_to(self.folder).as_posix():
            path.unlink()  # its units were collected again in the meantime
            return False
        content = path.read_bytes()
        self._append(replace(entry, sha256=hashlib.sha256(content).hexdigest(), bytes=len(content)))
        return True

    def verify(self) -> list[str]:
        """Hash every shard; a damaged one moves to `quarantine/` and leaves the ledger, so that a run collects it anew.

        Returns one line per damaged shard.
        """
        problems, kept = [], []
        for entry in self.entries:
            problem = _damage(self.folder, entry)
            if problem is None:
                kept.append(entry)
                continue
            problems.append(f"{entry.path}: {problem}; its {len(entry.units)} units will be collected again")
            path = self.folder / entry.path
            if path.is_file():
                target = self.folder / "quarantine" / f"{entry.source}-{path.name}"
                target.parent.mkdir(exist_ok=True)
                os.replace(path, target)
        if problems:
            lines = [json.dumps(dataclasses.asdict(entry), ensure_ascii=False) + "\n" for entry in kept]
            write_atomically(self.ledger, "".join(lines).encode())
            self.entries = kept
        return problems

    def write_summary(self, settings: dict) -> None:
        """Rewrite `collection.json`: hours, turns, speakers, licences and rejects per source, for people."""
        content = {"schema_version": SCHEMA_VERSION, "settings": settings, "sources": summarize(self.entries)}
        write_atomically(self.folder / "collection.json", (json.dumps(content, indent=2) + "\n").encode())


@dataclass
class ShardWriter:
    """Buffers whole units of one source and commits a shard whenever `shard_seconds` of audio are together."""

    collection: Collection
    source: str
    source_version: str
    shard_seconds: float
    units: list[str] = field(default_factory=list)
    turns: list[TurnRecord] = field(default_factory=list)
    rejects: list[Reject] = field(default_factory=list)
    committed: float = field(init=False)  # seconds
    buffered: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        self.committed = self.collection.seconds(self.source)

    @property
    def seconds(self) -> float:
        """Committed and buffered audio of this source."""
        return self.committed + self.buffered

    def add(self, unit: str, turns: list[TurnRecord], rejects: list[Reject]) -> None:
        self.units.append(unit)
        self.turns += turns
        self.rejects += rejects
        self.buffered += sum(turn.duration_s for turn in turns)
        if self.buffered >= self.shard_seconds:
            self.flush()

    def flush(self) -> None:
        """Commit what is buffered, if anything."""
        if self.units:
            self.collection.commit(self.source, self.source_version, self.units, self.turns, self.rejects)
            self.committed += self.buffered
            self.units, self.turns, self.rejects, self.buffered = [], [], [], 0.0


def read_turns(data_dir: Path, with_audio: bool, entries: list[LedgerEntry] | None = None) -> Iterator[TurnRecord]:
    """Turns of all committed shards (or of some `entries`) in ledger order; without audio, the metadata columns only.

    FileNotFoundError: no collection there, or a shard is gone. ValueError: a shard or the ledger is damaged.
    """
    columns = SCHEMA.names if with_audio else METADATA_COLUMNS
    for table in _tables(data_dir, whole_shards(data_dir) if entries is None else entries, columns):
        for row in table.to_pylist():
            audio = row.pop("audio", None)
            row = {name: sys.intern(value) if type(value) is str else value for name, value in row.items()}
            yield TurnRecord(**row, audio=audio["bytes"] if audio else None)  # most strings are those of other turns


def read_columns(data_dir: Path, columns: list[str]) -> Iterator[tuple]:
    """Some metadata of all turns, many times faster than whole records; errors as `read_turns`."""
    for table in _tables(data_dir, whole_shards(data_dir), columns):
        yield from zip(*(table[name].to_pylist() for name in columns), strict=True)


def whole_shards(data_dir: Path) -> list[LedgerEntry]:
    """The shards that hold audio. FileNotFoundError: no collection there."""
    if not ledgers(data_dir):
        raise FileNotFoundError(f"no collected data in {data_dir}; collect some with: python collect_data.py")
    return [entry for entry in read_ledger(data_dir) if entry.path is not None]


def ledgers(data_dir: Path) -> list[Path]:
    """The ledger of a folder and those of its parts, each collected by a process of its own."""
    return [path for path in (data_dir / LEDGER, *sorted(data_dir.glob(f"{PARTS}/{LEDGER}"))) if path.is_file()]


def read_ledger(data_dir: Path) -> list[LedgerEntry]:
    """Committed shards of a folder and its parts, paths relative to the folder. ValueError: a ledger is damaged."""
    entries = []
    for ledger in ledgers(data_dir):
        place = ledger.parent.relative_to(data_dir)
        listed = read_lines(ledger)
        entries += [replace(e, path=None if e.path is None else (place / e.path).as_posix()) for e in listed]
    return entries


def data_digest(data_dir: Path) -> str:
    """16 hexadecimal digits that stand for the content of all committed shards."""
    content = " ".join(entry.sha256 or "" for entry in read_ledger(data_dir))
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def read_lines(path: Path) -> list[LedgerEntry]:
    """All whole lines; a last line torn by a crash is left out. ValueError: an earlier line is damaged."""
    entries: list[LedgerEntry] = []
    lines = path.read_bytes().split(b"\n") if path.is_file() else [b""]
    for number, line in enumerate(lines[:-1], start=1):  # what follows the last newline is not a whole line
        try:
            content = json.loads(line)
            version = content["schema_version"]
            if version <= SCHEMA_VERSION:
                entries.append(LedgerEntry(**content))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} line {number} is damaged ({error})") from error
        if version > SCHEMA_VERSION:
            raise ValueError(f"{path} has schema version {version}, this code reads up to {SCHEMA_VERSION}")
    return entries


def summarize(entries: Iterable[LedgerEntry]) -> dict[str, dict]:
    """Per source: hours, turns, units, speakers, licences, whether synthetic, turns rejected by reason."""
    summary: dict[str, dict] = {}
    for source in sorted({entry.source for entry in entries}):
        own = [entry for entry in entries if entry.source == source]
        rejected: Counter[str] = Counter()
        for entry in own:
            rejected.update(entry.rejected)
        summary[source] = {
            "hours": round(sum(entry.seconds for entry in own) / 3600, 4),
            "turns": sum(entry.rows for entry in own),
            "units": sum(len(entry.units) for entry in own),
            "speakers": len({speaker for entry in own for speaker in entry.speakers}),
            "licenses": sorted({license_id for entry in own for license_id in entry.licenses}),
            "synthetic": any(entry.synthetic for entry in own),
            "rejected": dict(rejected),
        }
    return summary


def _tables(folder: Path, entries: list[LedgerEntry], columns: list[str]) -> Iterator[pyarrow.Table]:
    for entry in entries:
        if entry.path is None:
            continue
        remedy = remedy_of(folder)
        if not (folder / entry.path).is_file():
            raise FileNotFoundError(f"shard {folder / entry.path} is listed but gone; {remedy}")
        try:
            with pyarrow.parquet.ParquetFile(folder / entry.path) as file:
                there = [name for name in columns if name in file.schema_arrow.names]  # older shards have fewer
                table = file.read(columns=there, use_threads=False)
                table.validate(full=True)  # texts are UTF-8
        except (pyarrow.ArrowException, OSError) as error:
            raise ValueError(f"shard {folder / entry.path} is damaged ({first_line(error)}); {remedy}") from error
        yield table


def _write_shard(folder: Path, entry: LedgerEntry, turns: list[TurnRecord]) -> LedgerEntry:
    rows = []
    for turn in turns:
        name = turn.utt_id.replace(":", "/") + ".flac"
        rows.append({**dataclasses.asdict(turn), "audio": {"bytes": turn.audio, "path": name}})
    own = {ENTRY_KEY: json.dumps(dataclasses.asdict(entry))}
    table = pyarrow.Table.from_pylist(rows, schema=SCHEMA.with_metadata(own))
    sink = pyarrow.BufferOutputStream()
    compression = {**dict.fromkeys(METADATA_COLUMNS, "zstd"), "audio.bytes": "none", "audio.path": "zstd"}
    pyarrow.parquet.write_table(table, sink, row_group_size=50, compression=compression)
    content = sink.getvalue().to_pybytes()

    path = folder / entry.path
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".tmp-{path.name}")
    try:
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        _check_shard(partial, entry.rows)
        if partial.read_bytes() != content:
            raise ValueError(f"{partial} does not read back as it was written; check the disk")
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise
    os.replace(partial, path)
    _fsync_folder(path.parent)
    return replace(entry, sha256=hashlib.sha256(content).hexdigest(), bytes=len(content))


def _check_shard(path: Path, rows: int) -> None:
    found = pyarrow.parquet.read_metadata(path).num_rows
    if found != rows:
        raise ValueError(f"{path} holds {found} rows, {rows} were written")


def refuse_damaged(folder: Path, entry: LedgerEntry) -> None:
    """ValueError: a shard is not what was written. Single flipped bits can be read as another text."""
    if problem := _damage(folder, entry):
        raise ValueError(f"shard {folder / entry.path} {problem}; {remedy_of(folder)}")


def remedy_of(folder: Path) -> str:
    return f"mend with: python collect_data.py --verify --out {folder}"


def _damage(folder: Path, entry: LedgerEntry) -> str | None:
    if entry.path is None:
        return None
    path = folder / entry.path
    if not path.is_file():
        return "is gone"
    return None if file_digest(path) == entry.sha256 else "does not have the recorded SHA-256"


def cut_torn_line(ledger: Path) -> None:
    """Drop what follows the last newline: a crash came before the line was whole."""
    if not ledger.is_file():
        return
    with open(ledger, "rb+") as file:
        content = file.read()
        whole = content.rfind(b"\n") + 1
        if whole != len(content):
            file.truncate(whole)
            os.fsync(file.fileno())


def _fsync_folder(folder: Path) -> None:
    if os.name == "nt":  # Windows has no handle on a folder to sync
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
