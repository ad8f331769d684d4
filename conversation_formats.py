"""A turn that lies in a file, and two published formats of conversations read as such turns.

    csm     the chat format of transformers' CsmProcessor, one conversation a line:
            {"conversation": [{"role": "0", "content": [{"type": "text", "text": "Hello."},
                                                        {"type": "audio", "path": "audio/x.wav"}]}, ...]}
    moshi   moshi-finetune, one stereo file a line: {"path": "stereo/x.wav", "duration": 61.2}; its words lie beside it
            in x.json: {"alignments": [["Hello.", [0.31, 0.52], "SPEAKER_MAIN"], ...]}

Paths are relative to the JSONL file, times are seconds. Audio is not read here.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from turn_shards import MAX_S, NAMELESS

RESULT, SUMMARY = "result.json", "summary.json"  # of a conversation that a batch of demo.py spoke, and of all of it
AUDIO_KEYS = ("path", "url", "audio")  # of an item of type audio
MAIN_SPEAKER = "SPEAKER_MAIN"  # is heard in the left channel, everybody else in the right one
PAUSE_S = 0.8  # of a speaker between two turns
MARGIN_S = 0.1  # of audio before the first and after the last word of a turn
OVERLAP_S = 0.1  # two people speak at once for longer than this: their turns overlap


@dataclass(frozen=True, kw_only=True)
class Recording:
    """One turn that lies in a file, or is the bytes of one. `text` None: its transcript could not be read."""

    audio: Path | bytes
    text: str | None
    speaker: str = NAMELESS
    conversation: str
    turn_index: int = 0
    start: float | None = None
    language: str = "en"
    style: str | None = None
    licence: str = "NOASSERTION"
    name: str = ""  # path as its publisher writes it
    group: str = ""  # recordings of a group land in the same split; the conversation if there is none
    facts: tuple[tuple[str, object], ...] = ()  # further fields of `TurnRecord`
    channel: int | None = None  # of a file, from 0; the mean of all if None
    span: tuple[float, float] | None = None  # seconds of a file, taken as they are; all of it if None
    trimmed: bool = False  # also taken as it is; else silence at both ends is cut
    seconds: float | None = None  # how long its publisher says it is


# --- csm -------------------------------------------------------------------------------------------------------------


def messages_of(row: dict) -> list | None:
    """The turns in a line of this format, under one of two names; None where a line is of another format."""
    return next((row[key] for key in ("conversation", "messages") if isinstance(row.get(key), list)), None)


def recordings_of_csm(row: dict, path: Path) -> list[Recording]:
    """The turns of one line of `path`. ValueError: it is not of the format, or none of its turns has audio.

    A turn without audio names a file that does not exist, so that collecting lists it among the rejects. Roles number
    the speakers of one conversation: role 0 of another line is somebody else.
    """
    messages = messages_of(row)
    turns = [csm_turn(message, index) for index, message in enumerate(messages)]
    if all(audio is None for _, _, audio in turns):
        raise ValueError("no turn has audio, an item of type audio with a path")
    digest = hashlib.sha256(json.dumps(messages, sort_keys=True).encode()).hexdigest()[:12]
    recordings = []
    for index, (role, text, audio) in enumerate(turns):
        name = audio if audio is not None else f"turn-{index}-has-no-audio"
        recordings.append(
            Recording(
                audio=path.parent / name,
                text=text,
                speaker=f"{path.stem}-{digest}/{role}",
                conversation=f"{path.stem}-{digest}",
                turn_index=index,
                name=name,
            )
        )
    return recordings


def csm_turn(message: object, index: int) -> tuple[str, str | None, str | None]:
    """Role, text and path of the audio; None where there is no such item. ValueError names what is wrong."""
    content = message.get("content") if isinstance(message, dict) else None
    if not isinstance(content, list) or not all(isinstance(item, dict) for item in content) or "role" not in message:
        raise ValueError(f"turn {index} is not an object with a role and a list of items as content")
    # tables with one schema for all items write null where an item has no such key
    texts = [item.get("text") for item in content if item.get("type") == "text"]
    items = [item for item in content if item.get("type") == "audio"]
    audio = [item[key] for item in items for key in AUDIO_KEYS if item.get(key) is not None]
    if not all(isinstance(value, str) for value in (*texts, *audio)) or len(texts) > 1 or len(audio) > 1:
        raise ValueError(f"turn {index} needs one text and one audio file at most, both as strings")
    if audio and "://" in audio[0]:
        raise ValueError(f"turn {index}: {audio[0]} is no file; download it and give its path")
    return str(message["role"]), texts[0] if texts else None, audio[0] if audio else None


# --- moshi -----------------------------------------------------------------------------------------------------------


class Word(NamedTuple):
    text: str
    start: float
    end: float


def recordings_of_moshi(row: dict, path: Path) -> list[Recording]:
    """The turns of the stereo file that one line of `path` names. ValueError: its alignments are damaged.

    Words of one speaker with pauses under `PAUSE_S` are a turn. A file without alignments gives one recording without
    text, so that collecting lists it among the rejects.
    """
    name = str(row["path"])
    audio, conversation = path.parent / name, Path(name).with_suffix("").as_posix()
    channels = read_alignments(audio.with_suffix(".json"))
    spoken = [turns_of(words) for words in channels]
    recordings = []
    for channel, turns in enumerate(spoken):
        others = [(turn[0].start, turn[-1].end) for turn in spoken[1 - channel]]
        for turn, (start, end) in zip(turns, spans_of(turns), strict=True):
            words = [(word.text, round(word.start - start, 4), round(word.end - start, 4)) for word in turn]
            shared = (min(turn[-1].end, b) - max(turn[0].start, a) for a, b in others)
            recordings.append(
                Recording(
                    audio=audio,
                    text=" ".join(word.text for word in turn),
                    speaker=f"{conversation}/{('main', 'other')[channel]}",
                    conversation=conversation,
                    start=start,
                    name=f"{name}#t={start:.3f},{end:.3f}&track={('left', 'right')[channel]}",
                    facts=(
                        ("words", json.dumps(words, ensure_ascii=False)),
                        ("overlap", any(seconds > OVERLAP_S for seconds in shared)),
                    ),
                    channel=channel,
                    span=(start, end),
                )
            )
    if not recordings:
        return [Recording(audio=audio, text=None, conversation=conversation, name=name)]
    recordings.sort(key=lambda recording: recording.span)
    return [dataclasses.replace(recording, turn_index=index) for index, recording in enumerate(recordings)]


def read_alignments(path: Path) -> tuple[list[Word], list[Word]]:
    """Words of the left and of the right channel by time; none if there is no such file. ValueError: damaged."""
    channels: tuple[list[Word], list[Word]] = ([], [])
    if not path.is_file():
        return channels
    try:
        for text, (start, end), label in json.loads(path.read_text(encoding="utf-8"))["alignments"]:
            if not 0 <= start <= end < math.inf:
                raise ValueError(f"{text!r} is said from {start} to {end} s")
            if text.strip():
                channels[label != MAIN_SPEAKER].append(Word(text.strip(), start, end))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        expected = '{"alignments": [["word", [start, end], "SPEAKER_MAIN"], ...]}'
        raise ValueError(f"{path} is not of the form {expected} ({error})") from error
    for words in channels:
        words.sort(key=lambda word: word.start)
    return channels


def turns_of(words: list[Word]) -> list[list[Word]]:
    """Words of one speaker by time -> turns of at most `MAX_S`, cut at their widest pause while they are longer."""
    ends = [i for i in range(1, len(words)) if round(words[i].start - words[i - 1].end, 4) >= PAUSE_S]
    turns = []
    waiting = [words[a:b] for a, b in itertools.pairwise((0, *ends, len(words))) if b][::-1]
    while waiting:
        turn = waiting.pop()
        if len(turn) == 1 or round(turn[-1].end - turn[0].start, 4) <= round(MAX_S - 2 * MARGIN_S, 4):
            turns.append(turn)
            continue
        pauses = [round(b.start - a.end, 4) for a, b in itertools.pairwise(turn)]
        # of equally wide ones, that nearest to the middle
        cut = max(range(1, len(turn)), key=lambda i: (pauses[i - 1], -abs(i - len(turn) / 2)))
        waiting += [turn[cut:], turn[:cut]]
    return turns


def spans_of(turns: list[list[Word]]) -> list[tuple[float, float]]:
    """Where the turns of one speaker begin and end, with `MARGIN_S` around them or what the next one leaves of it."""
    if not turns:
        return []
    middles = [(a[-1].end + b[0].start) / 2 for a, b in itertools.pairwise(turns)]
    edges = itertools.pairwise((0.0, *middles, math.inf))
    return [
        (round(max(low, turn[0].start - MARGIN_S), 6), round(min(high, turn[-1].end + MARGIN_S), 6))
        for turn, (low, high) in zip(turns, edges, strict=True)
    ]
