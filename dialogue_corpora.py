"""Public corpora of real conversations: AMI (meetings of four people), DailyTalk (acted dialogues of two).

AMI is streamed from the Hugging Face hub or read from downloaded Parquet files; meetings with people in common share a
`split_group`, so its held-out speakers are never heard in training. DailyTalk has the same two actors in every
dialogue: its held-out dialogues are new texts in known voices, NOT speaker-disjoint.
"""

from __future__ import annotations

import itertools
import json
import re
import string
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import pyarrow
import pyarrow.parquet

from command_line import MissingRequirement, first_line
from conversation_formats import OVERLAP_S
from public_speech import WINDOW_SECONDS, stream_rows
from speech_sources import Recording, Source, Unit, units_of
from turn_shards import MIN_S

AMI_HUB = "hf://datasets/edinburghcstr/ami/ihm/train-*.parquet"  # NOT verified: never read from here
AMI_COLUMNS = ("meeting_id", "audio_id", "text", "audio", "begin_time", "end_time", "speaker_id")
AMI_FACTS = (
    ("license_url", "https://creativecommons.org/licenses/by/4.0/"),
    ("attribution", "AMI Corpus (Carletta et al. 2005)"),
    ("redistributable", True),
)
# Series of meetings with people of another one; those of IB, and those of IN, are connected among themselves
AMI_SHARED = {"EN2009": "EN2005", "IS1008": "IB", **dict.fromkeys((f"IS100{i}" for i in range(7)), "IN")}
SEXES = {"M": "male", "F": "female"}
DAILYTALK_FACTS = (
    ("license_url", "https://creativecommons.org/licenses/by-sa/4.0/"),
    ("attribution", "DailyTalk (Lee, Park, Kim 2023), for academic use"),
    ("redistributable", True),
)
DAILYTALK_TURN = re.compile(r"(\d+)_(\d+)_d(\d+)\.wav")


# ---- AMI -------------------------------------------------------------------------------------------------------------


class Segment(NamedTuple):
    """What one person says without a pause; times are seconds from the start of the meeting."""

    begin: float
    end: float
    id: str
    speaker: str
    text: str | None
    audio: bytes


def ami_source(local: Path | None, seed: int, done: set[str]) -> Source:
    """Meetings recorded by headsets, from a folder of Parquet files or else from the hub.

    FileNotFoundError, ValueError: the folder cannot be used.
    """
    if local is None:
        remedy = "download the Parquet files of its configuration ihm and give --local ami=DIR"
        rows = stream_rows("ami", AMI_HUB, set(AMI_COLUMNS), remedy)
        return Source("ami", "1", meeting_units(rows, seed, done), endless=True)  # tens of hours
    return Source("ami", "1", meeting_units(folder_rows(local), seed, done), endless=False)


def folder_rows(folder: Path) -> Iterator[dict]:
    """Rows of all Parquet files under `folder` by name; their columns and the order of meetings are checked first."""
    if not folder.is_dir():
        raise FileNotFoundError(f"--local ami={folder} is not a folder")
    files = sorted(folder.rglob("*.parquet"))
    if not files:
        raise ValueError(f"{folder} holds no *.parquet; expected those of edinburghcstr/ami, ihm/train-*.parquet")
    in_order = [meeting for meeting, _ in itertools.groupby(m for path in files for m in meetings_of(path))]
    if repeated := sorted({meeting for meeting in in_order if in_order.count(meeting) > 1}):
        raise ValueError(f"{folder}: the rows of {repeated[0]} are not together; give unshuffled files of ihm alone")
    return (row for path in files for row in rows_of(path))


def rows_of(path: Path) -> Iterator[dict]:
    """ValueError: damaged."""
    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=64, columns=list(AMI_COLUMNS)):
            yield from batch.to_pylist()
    except (OSError, pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged ({first_line(error)}); download it again") from error


def meetings_of(path: Path) -> list[str]:
    """The meeting of every row. ValueError names missing columns."""
    try:
        found = pyarrow.parquet.read_schema(path).names
        missing = [name for name in AMI_COLUMNS if name not in found]
        if missing:
            raise ValueError(f"{path}: column {', '.join(missing)} missing; found {', '.join(found)}")
        return pyarrow.parquet.read_table(path, columns=["meeting_id"])["meeting_id"].to_pylist()
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path} cannot be read as Parquet ({error}); download it again") from error


def meeting_units(rows: Iterable[dict], seed: int, done: set[str]) -> Iterator[Unit]:
    """Windows of meeting after meeting, one meeting in memory at a time."""
    for meeting, own in itertools.groupby(rows, key=lambda row: row["meeting_id"]):
        yield from units_of("ami", meeting_windows(meeting, [segment_of(row) for row in own]), seed, done)


def segment_of(row: dict) -> Segment:
    """Times are published in hundredths of a second, as 32-bit floats. ValueError: the row lacks something."""
    lacking = [name for name in AMI_COLUMNS if row[name] is None and name not in ("audio", "text")]
    if lacking:
        raise ValueError(f"ami: row {row['audio_id']} of meeting {row['meeting_id']} has no {', '.join(lacking)}")
    try:
        begin, end = round(row["begin_time"], 2), round(row["end_time"], 2)
        audio = (row["audio"] or {}).get("bytes") or b""
    except (TypeError, AttributeError) as error:
        raise ValueError(f"ami: times of {row['audio_id']} are no numbers, or its audio no struct of bytes") from error
    return Segment(begin, end, row["audio_id"], row["speaker_id"], row["text"], audio)


def meeting_windows(meeting: str, segments: list[Segment]) -> list[Recording]:
    """Segments of one meeting in time order, in windows of at most `WINDOW_SECONDS`; too short ones are left out."""
    segments = sorted(segments, key=lambda segment: (segment.begin, segment.id))
    overlapping = overlapping_ids(segments)
    recordings: list[Recording] = []
    window, origin = -1, float("-inf")
    for segment in segments:
        if round(segment.end - segment.begin, 2) < MIN_S:
            continue
        if segment.end - origin > WINDOW_SECONDS:
            window, origin = window + 1, segment.begin
        recordings.append(
            Recording(
                audio=segment.audio,
                text=segment.text,
                speaker=segment.speaker,
                conversation=f"{meeting}-{window:03d}",
                turn_index=len(recordings),
                start=round(segment.begin - origin, 2),
                seconds=segment.end - segment.begin,
                licence="CC-BY-4.0",
                name=segment.id,
                group=meeting_group(meeting),
                facts=(
                    *AMI_FACTS,
                    ("end_s", round(segment.end - origin, 2)),
                    ("overlap", segment.id in overlapping),
                    ("speaker_sex", SEXES.get(segment.speaker[:1])),
                ),
            )
        )
    return recordings


def overlapping_ids(segments: list[Segment]) -> set[str]:
    """Of segments in time order, those during which somebody else speaks for more than `OVERLAP_S`."""
    found: set[str] = set()
    for i, first in enumerate(segments):
        for second in itertools.islice(segments, i + 1, None):
            if second.begin >= first.end:
                break
            if second.speaker != first.speaker and round(min(first.end, second.end) - second.begin, 2) > OVERLAP_S:
                found |= {first.id, second.id}
    return found


def meeting_group(meeting: str) -> str:
    """One name for all meetings that are connected by people: a series such as ES2002a to ES2002d, sometimes more."""
    series = meeting.rstrip(string.ascii_lowercase)
    return series[:2] if series.startswith(("IB", "IN")) else AMI_SHARED.get(series, series)


# ---- DailyTalk -------------------------------------------------------------------------------------------------------


def dailytalk_source(local: Path | None, seed: int, done: set[str]) -> Source:
    """All dialogues of an unpacked archive. Two actors speak them all: dialogues are split, speakers are not.

    MissingRequirement: no folder given; ValueError: the folder holds none of it.
    """
    if local is None:
        raise MissingRequirement(
            "DailyTalk must be downloaded: follow github.com/keonlee9420/DailyTalk, unpack it, "
            "then give --local dailytalk=DIR"
        )
    emotions = read_emotions(local / "metadata.json")
    turns = [(path, DAILYTALK_TURN.fullmatch(path.name)) for path in sorted(local.glob("data/*/*.wav"))]
    recordings = [
        dailytalk_turn(path, *name.groups()[:2], emotions)
        for path, name in turns
        if name is not None and name[3] == path.parent.name
    ]
    if not recordings:
        expected = "data/<dialog>/<turn>_<speaker>_d<dialog>.wav with a .txt beside each, and metadata.json"
        raise ValueError(f"{local} holds no dialogues of DailyTalk; expected {expected}")
    return Source("dailytalk", "1", iter(units_of("dailytalk", recordings, seed, done)), endless=False)


def dailytalk_turn(path: Path, turn: str, speaker: str, emotions: dict[tuple[str, str], str]) -> Recording:
    """One turn with its transcript, None where that is missing or not UTF-8."""
    dialogue = path.parent.name
    try:
        text = path.with_suffix(".txt").read_text(encoding="utf-8-sig").strip()
    except (FileNotFoundError, UnicodeDecodeError):
        text = None
    return Recording(
        audio=path,
        text=text,
        speaker=speaker,
        conversation=dialogue,
        turn_index=int(turn),
        style=emotions.get((dialogue, turn)),
        licence="CC-BY-SA-4.0",
        name=f"data/{dialogue}/{path.name}",
        facts=DAILYTALK_FACTS,
    )


def read_emotions(path: Path) -> dict[tuple[str, str], str]:
    """(dialogue, turn) -> emotion, of turns that have one; empty without a file. ValueError: of another form."""
    if not path.is_file():
        return {}
    try:
        dialogues = json.loads(path.read_text(encoding="utf-8"))
        marked = {(d, t): turn.get("emotion") for d, turns in dialogues.items() for t, turn in turns.items()}
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path} is not JSON of the form dialog, turn, emotion ({error})") from error
    return {place: emotion for place, emotion in marked.items() if emotion not in (None, "no emotion")}
