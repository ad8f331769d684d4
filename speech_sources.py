"""Where speech is collected from: each source yields conversations as units of work.

A source is a function that returns a `Source`. For speech that lies in files it lists `Recording`s and leaves the rest
to `units_of`: reading, trimming, checks and ids are the same for all. See `debian_speech.py` for two examples.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import hashlib
import io
import itertools
import json
import math
import random
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile

import synthetic_voices
from audio import read_audio
from command_line import MissingRequirement
from conversation_formats import Recording, messages_of, recordings_of_csm, recordings_of_moshi
from turn_shards import MAX_S, NAMELESS, Reject, ShardWriter, TurnRecord, composed, make_turn

DIALOGUES = Path(__file__).parent / "corpus" / "dialogues.txt"
NUMBERS, QUESTIONS = DIALOGUES.with_name("numbers.txt"), DIALOGUES.with_name("questions.txt")
N_NUMBERS = 20_000  # sentences, 14 hours
N_QUESTIONS = 10_000  # and as many answers, 10 hours
AUDIO_SUFFIXES = (".wav", ".flac", ".ogg", ".mp3")
MANIFESTS = ("manifest.jsonl", "manifest.csv")
COLUMNS = ("audio", "text", "speaker", "conversation", "turn_index", "start", "language", "style", "licence", "trimmed")
CORPUS_FACTS = {
    "license": synthetic_voices.LICENSE,
    "license_url": "https://creativecommons.org/publicdomain/zero/1.0/",
    "attribution": f"texts of this project (CC0), {synthetic_voices.VOICE_ATTRIBUTION}",
    "redistributable": True,
}
WORDNET = Path("usr/share/wordnet")  # of the package wordnet-base
WORDNET_FACTS = {
    "license": "LicenseRef-WordNet-3.0",
    "license_url": "https://wordnet.princeton.edu/license-and-commercial-use",
    "attribution": f"examples of WordNet 3.0 (Princeton University), {synthetic_voices.VOICE_ATTRIBUTION}",
    "redistributable": True,
}
READ_TOGETHER = 8  # sentences of a conversation
PLAIN = re.compile(r"[A-Za-z][A-Za-z' ,;:?!.-]*")
MIN_WORDS, MAX_WORDS = 3, 25
MIN_RATE = 4_000  # Hz
MAX_SILENCE_S = 300.0  # around a turn
LEAST_BYTES_PER_S = 500  # of speech in any format
FEW_GROUPS = 20  # with a tenth of them held out
MAX_MISSING_S = 0.2  # of a span: word times are not exact to the end of a file


class UnitResult(NamedTuple):
    turns: list[TurnRecord]
    rejects: list[Reject]


class Unit(NamedTuple):
    """A conversation: collected and committed as a whole."""

    id: str
    job: Callable[[], UnitResult]  # runs in a worker process
    conversation: str = ""  # the same for every version of the unit; its id if there are no versions
    state: str = ""  # another one when its files were written again


@dataclass
class Source:
    """Where units come from, and how far this run is with it."""

    name: str
    version: str
    units: Iterator[Unit]
    endless: bool  # it has more than anyone collects without saying how much
    writer: ShardWriter | None = None
    results: Iterator[tuple[Unit, UnitResult]] | None = None
    seen: int = 0  # turns of this run
    rejected: int = 0
    ended: str | None = None  # why it has nothing more to give
    failure: MissingRequirement | ValueError | None = None  # what it lacks, or what is wrong with it


def sort_results(results: Iterable[TurnRecord | Reject]) -> UnitResult:
    results = list(results)
    return UnitResult(
        [result for result in results if isinstance(result, TurnRecord)],
        [result for result in results if isinstance(result, Reject)],
    )


# --- recordings ------------------------------------------------------------------------------------------------------


def units_of(source: str, recordings: Iterable[Recording], seed: int, done: set[str]) -> list[Unit]:
    """One unit a conversation, in an order drawn from `seed`, without those that are done."""
    conversations: dict[str, list[Recording]] = {}
    for recording in map(in_utf8, recordings):
        conversations.setdefault(recording.conversation, []).append(recording)
    units = []
    for name, turns in conversations.items():
        turns.sort(key=lambda turn: turn.turn_index)
        # what the unit holds is part of its id: turns that were refused are tried again once they are mended (by
        # `state` also where the sizes stay), those that were accepted stay as they are
        files = [state_of(t.audio) for t in turns]
        unit_id = f"{name}-{digest([(t.name, t.text, size) for t, (size, _) in zip(turns, files, strict=True)])}"
        if unit_id not in done:
            job = functools.partial(collect_recordings, source, unit_id, turns)
            units.append(Unit(unit_id, job, name, digest([written for _, written in files])))
    return sorted(units, key=lambda unit: synthetic_voices.seed_of(seed, unit.id))


def in_utf8(recording: Recording) -> Recording:
    """With names in one form (NFC), their bytes that are no UTF-8 written out; no halves of characters in the text."""
    names = ("name", "conversation", "group", "speaker")
    changed = {n: composed(getattr(recording, n).encode(errors="backslashreplace").decode()) for n in names}
    text = recording.text if recording.text is None else recording.text.encode(errors="ignore").decode()
    return dataclasses.replace(recording, text=text, **changed)


def digest(facts: list) -> str:
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:8]


def state_of(audio: Path | bytes) -> tuple[int, int]:
    """Bytes and when they were written; -1 if there is no such file."""
    if isinstance(audio, bytes):
        return len(audio), 0
    if not audio.is_file():
        return -1, 0
    found = audio.stat()
    return found.st_size, found.st_mtime_ns


def collect_recordings(source: str, unit_id: str, turns: list[Recording]) -> UnitResult:
    """Read, trim and check the turns of one conversation; their level stays as it was recorded."""
    return sort_results(
        collect_recording(source, f"{source}:{unit_id}-{position:04d}", turn) for position, turn in enumerate(turns)
    )


def collect_recording(source: str, utt_id: str, turn: Recording) -> TurnRecord | Reject:
    if (seconds := far_too_long(turn)) is not None:
        return Reject(utt_id=utt_id, reason="too_long", detail=f"{seconds:.2f} s, at most {MAX_S}")
    try:
        samples, rate = load(turn)
        if rate < MIN_RATE:
            raise ValueError(f"{turn.name}: {rate} samples per second, at least {MIN_RATE} are needed for speech")
    except FileNotFoundError as error:
        return Reject(utt_id=utt_id, reason="missing_file", detail=str(error))
    except (OSError, ValueError) as error:
        return Reject(utt_id=utt_id, reason="unreadable_audio", detail=str(error))
    if turn.text is None:
        return Reject(utt_id=utt_id, reason="missing_text", detail=f"no UTF-8 transcript beside {turn.name}")
    found = len(samples) / rate
    if turn.seconds is not None and abs(found - turn.seconds) > max(0.1, 0.02 * turn.seconds):
        detail = f"{found:.2f} s, its publisher says {turn.seconds:.2f} s"
        return Reject(utt_id=utt_id, reason="wrong_length", detail=detail)
    start = turn.start
    if turn.span is None and not turn.trimmed:
        spoken = synthetic_voices.where_spoken(samples, rate)
        samples, start = samples[spoken], None if start is None else start + spoken.start / rate
    facts = {
        "utt_id": utt_id,
        "source": source,
        "split_group": f"{source}:{turn.group or turn.conversation}",
        "conv_key": f"{source}:{turn.conversation}",
        "turn_index": turn.turn_index,
        "start_s": start,
        "end_s": None if start is None else start + len(samples) / rate,
        "speaker_id": f"{source}:{turn.speaker}",
        "lang": turn.language,
        "style": turn.style,
        "license": turn.licence,
        "origin_url": turn.name,
    }
    return make_turn(samples, rate, turn.text, **facts | dict(turn.facts))


def duration_of(audio: Path | bytes) -> float:
    """Seconds by the header; 0 where it cannot be read, which collecting reports."""
    try:
        return soundfile.info(io.BytesIO(audio) if isinstance(audio, bytes) else str(audio)).duration
    except (soundfile.LibsndfileError, OSError):
        return 0.0


def far_too_long(turn: Recording) -> float | None:
    """Seconds of a file that no cut of its silence makes a turn of, so that it need not be read; None of any other.

    A header that promises more than the file can hold is for the reader to refuse.
    """
    size, _ = state_of(turn.audio)
    if turn.span is not None or size < (MAX_S + MAX_SILENCE_S) * LEAST_BYTES_PER_S:
        return None
    seconds = duration_of(turn.audio)
    return seconds if MAX_S + MAX_SILENCE_S < seconds <= size / LEAST_BYTES_PER_S else None


def load(turn: Recording) -> tuple[np.ndarray, int]:
    """Samples (N,) at their own rate. FileNotFoundError, ValueError as `read_audio`."""
    if turn.channel is not None or turn.span is not None:
        return read_part(turn.audio, turn.channel, turn.span or (0.0, math.inf))
    if isinstance(turn.audio, Path) and turn.audio.suffix == ".g722":
        return read_g722(turn.audio)
    return read_audio(turn.audio, sample_rate=None)


def read_part(path: Path, channel: int | None, span: tuple[float, float]) -> tuple[np.ndarray, int]:
    """Samples (N,) of one channel, or of the mean of all, in a span of seconds; the rest of the file is not read.

    FileNotFoundError, ValueError as `read_audio`.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no audio file at {path}")
    try:
        with soundfile.SoundFile(path) as file:
            rate, seconds = file.samplerate, file.frames / file.samplerate
            if channel is not None and channel >= file.channels:
                raise ValueError(f"{path} has {file.channels} channel(s), number {channel + 1} is needed")
            if math.isfinite(span[1]) and span[1] - seconds > MAX_MISSING_S:
                raise ValueError(f"{path}: truncated, it ends at {seconds:.2f} s, the turn at {span[1]:.2f} s")
            first, stop = (round(min(edge, seconds) * rate) for edge in span)
            file.seek(first)
            samples = file.read(stop - first, dtype="float32", always_2d=True)
    except soundfile.LibsndfileError as error:
        raise ValueError(f"{path}: not readable as wav, flac, ogg or mp3 ({error})") from error
    if not np.isfinite(samples).all():
        raise ValueError(f"{path}: holds samples that are not finite")
    return samples.mean(axis=1) if channel is None else samples[:, channel], rate


def read_g722(path: Path) -> tuple[np.ndarray, int]:
    """Samples (N,) and 16,000 Hz of a raw G.722 file. FileNotFoundError, ValueError as `read_audio`."""
    try:
        import av
    except ImportError as error:
        raise MissingRequirement("G.722 audio needs the package av: pip install av") from error
    try:
        with av.open(str(path), format="g722") as container:
            frames = [frame.to_ndarray().ravel() for frame in container.decode(audio=0)]
    except av.error.FileNotFoundError as error:
        raise FileNotFoundError(f"{path} does not exist") from error
    except av.error.FFmpegError as error:
        raise ValueError(f"{path} cannot be decoded ({error})") from error
    if not frames:
        raise ValueError(f"{path} holds no audio")
    return (np.concatenate(frames) / 32768).astype(np.float32), 16_000


# --- synthetic source ------------------------------------------------------------------------------------------------


def synthetic_source(voices: list[str], seed: int, done: set[str]) -> Source:
    """Dialogues without end: every pass has each dialogue once, with new slot values and a new pair of `voices`."""
    if len(voices) < 2:
        raise ValueError("--voices names one voice and the dialogues of synthetic need two; name another one")
    synthetic_voices.check_voice()
    dialogues = synthetic_voices.read_dialogues(DIALOGUES)

    def units() -> Iterator[Unit]:
        variant = 0
        while True:
            order = list(dialogues)
            random.Random(synthetic_voices.seed_of(seed, "order", variant)).shuffle(order)
            for dialogue in order:
                unit = dialogue_unit("synthetic", dialogue, seed, variant, voices, CORPUS_FACTS)
                if unit.id not in done:
                    yield unit
            variant += 1

    return Source("synthetic", "1", units(), endless=True)


def dialogue_unit(
    source: str, dialogue: synthetic_voices.Dialogue, seed: int, variant: int, voices: list[str], facts: dict
) -> Unit:
    """One variant of a dialogue; `facts` say where its texts are from and what may be done with them."""
    unit_id = f"{dialogue.name}-s{seed}-v{variant}"
    spoken = functools.partial(synthetic_voices.speak_dialogue, dialogue, seed, variant, voices)
    return Unit(unit_id, functools.partial(collect_dialogue, source, dialogue.name, unit_id, spoken, facts))


def collect_dialogue(
    source: str, name: str, unit_id: str, speak: Callable[[], list[synthetic_voices.SpokenTurn]], facts: dict
) -> UnitResult:
    """Speak one variant of the dialogue `name`."""
    conversation = f"{source}:{unit_id}"
    return sort_results(
        make_turn(
            turn.samples,
            turn.sample_rate,
            turn.text,
            utt_id=f"{conversation}-{turn.index:02d}",
            source=source,
            split_group=f"{source}:{name}",  # all variants share their words
            conv_key=conversation,
            turn_index=turn.index,
            start_s=round(turn.start_s, 4),
            end_s=round(turn.start_s + len(turn.samples) / turn.sample_rate, 4),
            speaker_id=f"synthetic:{turn.speaker}",
            style=turn.style,
            voice_parameters=json.dumps(turn.voice_parameters),
            synthetic=True,
            **facts,
        )
        for turn in speak()
    )


# --- sentences read by the built-in voices ---------------------------------------------------------------------------


def sentences_source(given: Path, voices: list[str], styles: list[str], seed: int, done: set[str]) -> Source:
    """The sentences of a text file, or of WordNet where Debian's wordnet-base is unpacked under `given`.

    MissingRequirement: there is neither.
    """
    wordnet = given / WORDNET
    if given.is_file():
        attribution = f"sentences of {given.name}, {synthetic_voices.VOICE_ATTRIBUTION}"
        facts = {"license": "NOASSERTION", "license_url": "", "attribution": attribution, "redistributable": False}
        sentences = read_sentences(given)
    elif wordnet.is_dir():
        sentences, facts = read_wordnet(wordnet), WORDNET_FACTS
    else:
        raise MissingRequirement(
            f"{wordnet} is missing: apt-get download wordnet-base; dpkg-deb -x wordnet-base*.deb DIR; then "
            "--local sentences=DIR; or --local sentences=FILE.txt with a sentence a line"
        )
    if not sentences:
        raise ValueError(f"{given} holds no sentence of {MIN_WORDS} to {MAX_WORDS} words in plain English letters")
    units = read_in_groups("sentences", _alone(sentences), facts, voices, styles, seed, done)
    return Source("sentences", "1", units, endless=not given.is_file())


def numbers_source(voices: list[str], styles: list[str], seed: int, done: set[str]) -> Source:
    """Numbers, times, dates, prices and telephone numbers in sentences of few other words, a closed vocabulary."""
    units = read_in_groups("numbers", _alone(number_sentences()), CORPUS_FACTS, voices, styles, seed, done)
    return Source("numbers", "1", units, endless=True)


def number_sentences() -> list[str]:
    """`N_NUMBERS` sentences, each once, always the same: the patterns in turn, with slot values drawn anew."""
    said: dict[str, None] = {}
    for (text,) in _filled(NUMBERS):
        said[text] = None
        if len(said) == N_NUMBERS:
            break
    return list(said)


def questions_source(voices: list[str], styles: list[str], seed: int, done: set[str]) -> Source:
    """Questions and answers of the words of `numbers_source`: the first of `voices` answers, the others ask.

    ValueError: fewer than two voices.
    """
    if len(voices) < 2:
        raise ValueError("the source questions needs two --voices: the first answers, the others ask")
    exchanges = [
        [_line(question, voices[1 + number % (len(voices) - 1)]), _line(answer, voices[0])]
        for number, (question, answer) in enumerate(question_answers())
    ]
    units = read_in_groups("questions", exchanges, CORPUS_FACTS, voices, styles, seed, done)
    return Source("questions", "1", units, endless=True)


def question_answers() -> list[list[str]]:
    """`N_QUESTIONS` questions with their answers, always the same, all patterns equally often: short answers recur."""
    return list(itertools.islice(_filled(QUESTIONS), N_QUESTIONS))


def read_patterns(path: Path) -> list[list[str]]:
    """The patterns of a corpus file, a line each, in their parts between "|"."""
    lines = read_utf8(path).splitlines()
    return [line.split(" | ") for line in lines if line and not line.startswith("#")]


def _filled(path: Path) -> Iterator[list[str]]:
    """The parts of the file's patterns, those in turn and without end, with slot values drawn anew."""
    values = random.Random(0)
    for parts in itertools.cycle(read_patterns(path)):
        lines = [_line(part, "A") for part in parts]
        yield synthetic_voices.fill_slots(synthetic_voices.Dialogue("", "", lines), values)


def _line(text: str, role: str) -> synthetic_voices.Line:
    return synthetic_voices.Line(role, "neutral", text)


def _alone(sentences: list[str]) -> list[list[synthetic_voices.Line]]:
    return [[_line(text, "A")] for text in sentences]


def read_in_groups(
    source: str,
    pieces: list[list[synthetic_voices.Line]],
    facts: dict,
    voices: list[str],
    styles: list[str],
    seed: int,
    done: set[str],
) -> Iterator[Unit]:
    """Lines that belong together, eight lines at a time spoken by `voices` in one of `styles`, in an order drawn from
    `seed`, each once.

    Which eight does not depend on the seed, so that no eight are in two splits.
    """
    synthetic_voices.check_voice()
    random.Random(0).shuffle(pieces)
    lines = [line for piece in pieces for line in piece]
    groups = [lines[start : start + READ_TOGETHER] for start in range(0, len(lines), READ_TOGETHER)]
    random.Random(synthetic_voices.seed_of(seed, source)).shuffle(groups)

    def units() -> Iterator[Unit]:
        for group in groups:
            name = hashlib.sha256("\n".join(line.text for line in group).encode()).hexdigest()[:12]
            style = random.Random(synthetic_voices.seed_of(seed, name, "style")).choice(styles)
            lines = [line._replace(style=style) for line in group]
            unit = dialogue_unit(source, synthetic_voices.Dialogue(name, source, lines), seed, 0, voices, facts)
            if unit.id not in done:
                yield unit

    return units()


def read_sentences(path: Path) -> list[str]:
    """The lines of a UTF-8 text that can be read aloud as they stand, each once; says how many cannot.

    ValueError: not UTF-8.
    """
    lines = list(dict.fromkeys(line.strip().replace("\u2019", "'") for line in read_utf8(path).splitlines()))
    unread = [line for line in lines if line and not can_be_read(line)]
    if unread:
        print(
            f"{path}: {len(unread)} of {len(lines)} lines left out, not {MIN_WORDS} to {MAX_WORDS} words in plain "
            f"English letters; the first: {unread[0][:80]!r}"
        )
    return [line for line in lines if can_be_read(line)]


def read_wordnet(folder: Path) -> list[str]:
    """The sentences that WordNet gives as examples of its words, each once."""
    quoted = (
        text.strip()
        for path in sorted(folder.glob("data.*"))
        for line in path.read_text(encoding="latin-1").splitlines()
        for text in re.findall(r'"([^"]+)"', line.partition("| ")[2])
    )
    return list(dict.fromkeys(text for text in quoted if can_be_read(text)))


def can_be_read(text: str) -> bool:
    """Nothing that is said otherwise than it is spelt, nothing too short or long for a turn."""
    return PLAIN.fullmatch(text) is not None and MIN_WORDS <= len(text.split()) <= MAX_WORDS


# --- local source ----------------------------------------------------------------------------------------------------


def local_source(given: Path, seed: int, done: set[str]) -> Source:
    """Units of a folder or manifest in an order drawn from `seed`. ValueError, FileNotFoundError: not usable at all."""
    units = units_of("local", grouped_by_voice([*map(in_utf8, read_recordings(given))]), seed, done)
    return Source("local", "1", iter(units), endless=False)


def read_recordings(given: Path) -> list[Recording]:
    """What a manifest, a folder with one, or a folder of audio and text files names. ValueError, FileNotFoundError."""
    if not given.exists():
        raise FileNotFoundError(f"{given} does not exist")
    manifests = [given] if given.is_file() else [given / name for name in MANIFESTS if (given / name).is_file()]
    rows = read_manifest(manifests[0]) if manifests else read_folder(given)
    if not any(row.audio.is_file() for row in rows):
        raise ValueError(f"none of the {len(rows)} audio files named in {given} exist, e.g. {rows[0].audio}")
    return rows


def grouped_by_voice(recordings: list[Recording]) -> list[Recording]:
    """Recordings whose `group` holds all that their speakers, and those they speak with, have said.

    So no voice is in two splits. With fewer than `FEW_GROUPS` such groups a split could be empty, and conversations are
    parted instead. Speakers without a name are taken for different people.
    """
    parents: dict[str, str] = {}

    def root(node: str) -> str:
        while parents.setdefault(node, node) != node:
            parents[node] = node = parents[parents[node]]
        return node

    for recording in recordings:
        conversation = root(f"conversation {recording.conversation}")
        if recording.speaker != NAMELESS:
            one, other = sorted((conversation, root(f"voice {recording.speaker}")))
            parents[one] = other  # the last name in the alphabet, a voice if there is one, names the group
    groups = [root(f"conversation {recording.conversation}") for recording in recordings]
    if len(set(groups)) < FEW_GROUPS:
        return recordings
    return [dataclasses.replace(recording, group=group) for recording, group in zip(recordings, groups, strict=True)]


def read_folder(folder: Path) -> list[Recording]:
    """Audio files with a transcript of the same stem; the folder a file lies in names its speaker.

    A transcript beside a file of the same stem that is no such audio names one that does not exist, so that collecting
    lists it among the rejects.
    """
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
            Recording(
                audio=path,
                text=text,
                speaker=NAMELESS if speaker == "." else speaker,
                conversation=path.relative_to(folder).as_posix(),
                name=name,
            )
        )
    heard = {path.with_suffix(".txt") for path in files}
    unread = {path.with_suffix(".txt") for path in folder.rglob("*") if path.suffix.lower() != ".txt"} - heard
    for path in sorted(path for path in unread if path.is_file()):
        audio = path.with_suffix(f"{', '.join(AUDIO_SUFFIXES[:-1])} or {AUDIO_SUFFIXES[-1]}")
        name = path.relative_to(folder).with_suffix("").as_posix()
        turns.append(Recording(audio=audio, text="", conversation=name, name=name))
    if all(turn.text is None for turn in turns[: len(files)]):
        raise ValueError(f"no transcripts in {folder}: expected {files[0].with_suffix('.txt')} beside {files[0].name}")
    return turns


def read_utf8(path: Path) -> str:
    """With or without a byte order mark. ValueError: not UTF-8."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error})") from error


def read_manifest(path: Path) -> list[Recording]:
    """Turns of a JSONL or CSV manifest. ValueError names the columns that are missing, or the bad lines."""
    if path.suffix.lower() not in (".jsonl", ".csv"):
        raise ValueError(f"--input {path}: expected a folder, a .jsonl or a .csv manifest")
    content = read_utf8(path)
    rows: list[tuple[int, dict]] = []
    problems = []
    if path.suffix.lower() == ".csv":
        reader = csv.DictReader(io.StringIO(content, newline=""))
        try:
            for row in reader:
                if None in row:
                    problems.append(f"line {reader.line_num}: more fields than columns; a comma in a text needs quotes")
                rows.append((reader.line_num, row))
        except csv.Error as error:
            raise ValueError(f"{path} line {reader.line_num}: {error}") from error
    else:
        for number, line in enumerate(content.split("\n"), start=1):
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
            turns += manifest_turns(path, row, number)
        except (ValueError, TypeError, OverflowError) as error:
            problems.append(f"line {number}: {error}")
    if problems or not turns:
        shown = "; ".join(problems[:3] or ["holds no turns"])
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise ValueError(f"{path}: {shown}{more}")
    return turns


def manifest_turns(path: Path, row: dict, number: int) -> list[Recording]:
    """The turns of one line of `path`; its keys tell a line of `conversation_formats` from a row of `COLUMNS`."""
    if messages_of(row) is not None:
        return recordings_of_csm(row, path)
    if {"path", "duration"} <= row.keys() and not {"audio", "text"} & row.keys():
        return recordings_of_moshi(row, path)
    return [local_turn(path.parent, row, number)]


def local_turn(folder: Path, row: dict, number: int) -> Recording:
    """One manifest row; `number` places turns that say nothing of their order."""
    row = {name: value for name, value in row.items() if value not in (None, "") or name == "text"}
    missing = [name for name in ("audio", "text") if name not in row]
    if missing:
        found = ", ".join(map(str, row))
        raise ValueError(f"column {' and '.join(missing)} missing; found {found}; known are {', '.join(COLUMNS)}")
    name, trimmed = str(row["audio"]), str(row.get("trimmed", False)).lower()
    if trimmed not in ("true", "false"):
        raise ValueError(f"trimmed is {row['trimmed']!r}, expected true or false")
    index, start = int(row.get("turn_index", number)), float(row["start"]) if "start" in row else None
    if not 0 <= index < 2**31:
        raise ValueError(f"turn_index is {index}, expected a number from 0")
    if start is not None and not 0 <= start < math.inf:
        raise ValueError(f"start is {start}, expected seconds from the start of the conversation")
    return Recording(
        audio=folder / name,
        text=str(row["text"] or ""),
        speaker=str(row.get("speaker", NAMELESS)),
        conversation=str(row.get("conversation", name)),
        turn_index=index,
        start=start,
        language=str(row.get("language", "en")),
        style=str(row["style"]) if "style" in row else None,
        licence=str(row.get("licence", row.get("license", "NOASSERTION"))),
        name=name,
        trimmed=trimmed == "true",
    )
