"""Public corpora of read speech: LibriSpeech and LibriTTS-R (chapters of books), Common Voice (single sentences).

LibriSpeech and LibriTTS-R are streamed from the Hugging Face hub at a pinned revision, or read from an unpacked archive
of OpenSLR. Common Voice comes from Mozilla Data Collective or from an unpacked release. Neither holds conversations:
consecutive utterances of a chapter become monologues, clips of one Common Voice speaker become sets of one voice.
"""

from __future__ import annotations

import csv
import itertools
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import filelock

from command_line import MissingRequirement, first_line
from speech_sources import Recording, Source, Unit, digest, duration_of, units_of

WINDOW_SECONDS = 110.0  # of a monologue: what fits into the context of a speech model
VOICE_SET = 6  # clips of one speaker in a set
CC_BY = (
    ("license_url", "https://creativecommons.org/licenses/by/4.0/"),
    ("attribution", "LibriVox readers; V. Panayotov et al., LibriSpeech; Y. Koizumi et al., LibriTTS-R"),
    ("redistributable", True),
)
CC0 = (
    ("license_url", "https://creativecommons.org/publicdomain/zero/1.0/"),
    ("attribution", "Mozilla Common Voice"),
    ("redistributable", False),  # the licence allows it, the terms of Mozilla Data Collective do not
)
COMMON_VOICE_COLUMNS = ("client_id", "path", "sentence")


class Hub(NamedTuple):
    """Where a corpus lies on the Hugging Face hub, and what its columns are called."""

    files: str
    text: str


HUBS = {
    "librispeech": Hub(
        "hf://datasets/openslr/librispeech_asr@71cacbfb7e2354c4226d01e70d77d5fca3d04ba1/clean/train.100/*.parquet",
        "text",
    ),
    "libritts_r": Hub(
        "hf://datasets/mythicinfinity/libritts_r/data/train.clean.100/train.clean.100*.parquet", "text_normalized"
    ),
}


# ---- LibriSpeech, LibriTTS-R -----------------------------------------------------------------------------------------


class Utterance(NamedTuple):
    """One utterance of a chapter, as its publisher names it."""

    id: str  # speaker-chapter-... or speaker_chapter_...
    audio: Path | bytes
    text: str
    subset: str


def libri_source(name: str, local: Path | None, seed: int, done: set[str]) -> Source:
    """`librispeech` or `libritts_r`, from a folder or else from the hub. ValueError: the folder holds none of it."""
    if local is None:
        return Source(name, "1", hub_units(name, seed, done), endless=True)  # hundreds of hours
    chapters = tree_chapters(name, local)
    recordings = (r for chapter in chapters for r in monologues(name, chapter))
    return Source(name, "1", iter(units_of(name, recordings, seed, done)), endless=False)


def tree_chapters(name: str, folder: Path) -> Iterator[list[Utterance]]:
    """Chapters of an unpacked archive, in order. ValueError if there is none."""
    if not folder.is_dir():
        raise FileNotFoundError(f"--local {name}={folder} is not a folder")
    pattern = "*.trans.txt" if name == "librispeech" else "*.normalized.txt"
    found = sorted(folder.rglob(pattern))
    if not found:
        raise ValueError(
            f"{folder} holds no {pattern}; expected the unpacked archive, <subset>/<speaker>/<chapter>/..."
        )
    if name == "librispeech":
        return (read_transcripts(path) for path in found)
    by_chapter = itertools.groupby(found, key=lambda path: path.parent)
    return ([read_normalized(path) for path in paths] for _, paths in by_chapter)


def read_transcripts(path: Path) -> list[Utterance]:
    """Lines `ID TEXT` of a chapter of LibriSpeech."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    pairs = [line.split(maxsplit=1) for line in lines if line.strip()]
    subset = path.resolve().parents[2].name
    return [Utterance(p[0], path.with_name(f"{p[0]}.flac"), p[1] if len(p) > 1 else "", subset) for p in pairs]


def read_normalized(path: Path) -> Utterance:
    """One utterance of LibriTTS-R; the audio lies beside its text."""
    name = path.name.removesuffix(".normalized.txt")
    text = path.read_text(encoding="utf-8", errors="replace").strip()
    return Utterance(name, path.with_name(f"{name}.wav"), text, path.resolve().parents[2].name)


def hub_units(name: str, seed: int, done: set[str]) -> Iterator[Unit]:
    """Monologues in the order of the hub's files. MissingRequirement: the hub cannot be reached."""
    for (_, _), rows in itertools.groupby(hub_rows(name), key=lambda row: (row["speaker_id"], row["chapter_id"])):
        chapter = [Utterance(str(r["id"]), r["audio"]["bytes"], r[HUBS[name].text], "train-clean-100") for r in rows]
        yield from units_of(name, monologues(name, chapter), seed, done)


def hub_rows(name: str) -> Iterator[dict]:
    """Rows of `HUBS[name]`; errors as `stream_rows`."""
    columns = {"audio", "speaker_id", "chapter_id", "id", HUBS[name].text}
    remedy = f"unpack its archive from openslr.org and give --local {name}=DIR"
    return stream_rows(name, HUBS[name].files, columns, remedy)


def stream_rows(name: str, files: str, columns: set[str], remedy: str) -> Iterator[dict]:
    """Rows of Parquet `files` with undecoded audio. MissingRequirement: out of reach; ValueError: `columns` missing."""
    import datasets
    from huggingface_hub.errors import HTTPError  # of whatever library it speaks HTTP with

    def unreachable(error: Exception) -> MissingRequirement:
        reason = first_line(error)
        return MissingRequirement(f"{name} cannot be read from the Hugging Face hub ({reason}); {remedy}")

    try:
        rows = datasets.load_dataset("parquet", data_files={"wanted": files}, split="wanted", streaming=True)
    except (OSError, RuntimeError, ValueError, HTTPError) as error:
        raise unreachable(error) from error
    missing = columns - set(rows.column_names or ())
    if rows.column_names and missing:
        lacking, found = ", ".join(sorted(missing)), ", ".join(rows.column_names)
        raise ValueError(f"{name} on the hub lacks {lacking}; found {found}; {remedy}")
    try:
        yield from rows.cast_column("audio", datasets.Audio(decode=False))
    except (OSError, RuntimeError, HTTPError) as error:
        raise unreachable(error) from error


def monologues(name: str, chapter: Iterable[Utterance]) -> list[Recording]:
    """Consecutive utterances of one chapter, cut where a number is missing and at `WINDOW_SECONDS`."""
    recordings: list[Recording] = []
    window, seconds, previous = 0, 0.0, None
    for utterance in sorted(chapter, key=lambda u: number_of(u.id)):
        speaker, book = utterance.id.replace("_", "-").split("-")[:2]
        duration, number = duration_of(utterance.audio), number_of(utterance.id)
        gap = name == "librispeech" and previous is not None and number[-1] != previous + 1
        if previous is not None and (gap or seconds + duration > WINDOW_SECONDS):
            window, seconds = window + 1, 0.0
        previous, seconds = number[-1], seconds + duration
        recordings.append(
            Recording(
                audio=utterance.audio,
                text=utterance.text,
                conversation=f"{utterance.subset}-{speaker}-{book}-{window:03d}",
                turn_index=len(recordings),
                licence="CC-BY-4.0",
                name=utterance.id,
                # both corpora have the same readers: one name for each, or a voice would be in two splits
                facts=(
                    *CC_BY,
                    ("speaker_id", f"libri:{speaker}"),
                    ("split_group", f"libri:{speaker}"),
                    ("split_native", utterance.subset),
                ),
            )
        )
    return recordings


def number_of(utterance: str) -> tuple[int, ...]:
    """Place of an utterance in its chapter, by its id."""
    return tuple(int(part) if part.isdigit() else 0 for part in utterance.replace("_", "-").split("-"))


# ---- Common Voice ----------------------------------------------------------------------------------------------------


def common_voice_source(local: Path | None, release: str | None, seed: int, done: set[str]) -> Source:
    """Validated clips of an unpacked release, or of one fetched from Mozilla Data Collective.

    MissingRequirement: neither a folder nor a key; ValueError: the folder holds no release.
    """
    folder = local if local is not None else fetch_release(release)
    tables = sorted(folder.rglob("validated.tsv"))
    if not tables:
        raise ValueError(
            f"{folder} holds no validated.tsv; expected an unpacked release, cv-corpus-<version>/<language>"
        )
    recordings = [recording for table in tables for recording in voice_sets(table)]
    if not any(recording.audio.is_file() for recording in recordings):
        raise ValueError(f"none of the {len(recordings)} clips of {tables[0]} exist, e.g. {recordings[0].audio}")
    return Source("common_voice", "1", iter(units_of("common_voice", recordings, seed, done)), endless=False)


def fetch_release(release: str | None) -> Path:
    """The folder of a release that Mozilla's client has downloaded; an interrupted download goes on.

    Of several processes one downloads, the others wait for it.
    """
    if not os.environ.get("MDC_API_KEY") or not release:
        raise MissingRequirement(
            "Common Voice is only given out by Mozilla Data Collective since October 2025, the copies on the Hugging "
            "Face hub are gone: accept its terms at datacollective.mozillafoundation.org, set MDC_API_KEY and give "
            "--common_voice_release ID, or unpack a release and give --local common_voice=DIR"
        )
    try:
        from datacollective import download_dataset
    except ImportError as error:
        remedy = "python setup_environment.py --extras data eval common-voice (Python 3.12 or later)"
        raise MissingRequirement(f"Common Voice needs Mozilla's client: {remedy}") from error
    folder = Path(os.environ.get("MDC_DOWNLOAD_PATH") or "~/.mozdata/datasets").expanduser()  # the client's
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(folder / f".{digest([release])}.lock"):
            return download_dataset(release, extract=True)
    except (RuntimeError, PermissionError, FileNotFoundError) as error:
        raise MissingRequirement(f"Common Voice release {release} cannot be had: {error}") from error


def voice_sets(table: Path) -> list[Recording]:
    """Rows of `validated.tsv`, by speaker in sets of up to `VOICE_SET`. ValueError names missing columns."""
    with open(table, encoding="utf-8", newline="") as file:  # sentences hold bare quotes
        reader = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE, restval="")  # a last line may be cut
        found = reader.fieldnames or []
        missing = [name for name in COMMON_VOICE_COLUMNS if name not in found]
        if missing:
            raise ValueError(f"{table}: column {', '.join(missing)} missing; found {', '.join(found)}")
        rows = sorted(reader, key=lambda row: (row["client_id"], row["path"]))
    language, durations = table.parent.name, clip_durations(table.with_name("clip_durations.tsv"))
    recordings = []
    for client, own in itertools.groupby(rows, key=lambda row: row["client_id"]):
        for index, row in enumerate(own):
            recordings.append(
                Recording(
                    audio=table.parent / "clips" / row["path"],
                    text=row["sentence"],
                    speaker=client[:24],
                    conversation=f"{language}-{client[:24]}-{index // VOICE_SET:03d}",
                    turn_index=index % VOICE_SET,
                    language=row.get("locale") or language,
                    licence="CC0-1.0",
                    name=row["path"],
                    group=client[:24],
                    seconds=durations.get(row["path"]),
                    facts=(*CC0, ("speaker_sex", sex_of(row.get("gender") or ""))),
                )
            )
    return recordings


def clip_durations(table: Path) -> dict[str, float]:
    """Clip -> seconds, where the release tells them; the first column has had several names."""
    if not table.is_file():
        return {}
    with open(table, encoding="utf-8", newline="") as file:
        rows = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        next(rows, None)
        return {row[0]: int(row[1]) / 1000 for row in rows if len(row) > 1 and row[1].isdigit()}


def sex_of(gender: str) -> str | None:
    """What Common Voice writes, in the words of the shards; None where it is not told."""
    return {"male": "male", "male_masculine": "male", "female": "female", "female_feminine": "female"}.get(gender)
