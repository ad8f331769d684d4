"""Write collected conversations in other formats: python export_conversations.py --to wav --out exported

    csm     data.jsonl in the chat format of transformers' CsmProcessor; a 24 kHz wav per turn in audio/
    moshi   data.jsonl of moshi-finetune; a 24 kHz stereo wav per dialogue in stereo/, first speaker left, with its
            words in a .json beside it; only for conversations of two speakers
    wav     manifest.jsonl; a folder per conversation, a wav per turn, bit by bit as stored, and its text in a .txt
    batch   conversations.json of demo.py --mode batch: the texts, and a clip of every speaker from elsewhere
    replies the same, but who speaks second is left to answer with words of the model's own; the others are heard

Levels stay as they were recorded. `collect_data.py --sources local --input FILE.jsonl` reads the first three back. The
folder appears when all of it is written. With --tokenizer, what is written are not the recordings
but what the tokenizer makes of them. What a model says to the batch can be compared with the wav of the same split:
evaluation_framework.py --systems human=exported spoken=runs/demo/batch
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import hashlib
import io
import json
import os
import re
import shutil
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import soundfile
from tqdm import tqdm

from audio import SAMPLE_RATE, encode_pcm16, read_audio, write_wav
from audio_tokenizer import AudioTokenizer
from checkpointing import write_atomically
from command_line import EXIT_CODES_HELP, EXIT_DONE, only_run_in, run
from conversation_formats import MAIN_SPEAKER, MARGIN_S
from conversations import SPLITS, Conversation, build_conversations, loudness_gains, read_clips
from rvq_tokenizer import load_tokenizer
from spoken_conversations import LONGEST_GAP
from turn_shards import TurnRecord, read_turns

REQUESTS = "conversations.json"
INDEX = {
    "csm": "data.jsonl",
    "moshi": "data.jsonl",
    "wav": "manifest.jsonl",
    "batch": REQUESTS,
    "replies": REQUESTS,
}
PARTIAL = ".partial"  # behind the name of a folder that is being written
LONGEST_CLIP_S = 8.0  # that shows a voice
GAP_S = 0.3  # between turns whose times are not known
LONGEST_SILENCE_S = 60.0  # before a dialogue, kept


def export(
    data_dir: Path,
    out: Path,
    kind: str,
    split: str,
    tokenizer: AudioTokenizer | None = None,
    codebooks: int | None = None,
) -> int:
    """Write the conversations of a split as a kind of `INDEX` into a new or empty folder; returns their number.

    With a `tokenizer`, as its first `codebooks`, or all of them, give them back. Prints how many were left out.
    FileNotFoundError, ValueError: no such data, or the folder is in use.
    """
    if kind not in INDEX or split not in SPLITS:
        raise ValueError(f"unknown kind {kind!r} or split {split!r}; known are {', '.join((*INDEX, *SPLITS))}")
    found = build_conversations(read_turns(data_dir, with_audio=False), pseudo=False)
    conversations = [conversation for conversation in found if conversation.split == split]
    if not conversations:
        raise ValueError(f"{data_dir} has no turns in split {split!r}; collect more with collect_data.py")
    if kind in ("moshi", "replies"):
        conversations = with_two_speakers(conversations, or_more=kind == "replies")
    if tokenizer is not None and (codebooks or 1) > tokenizer.config.n_codebooks:
        raise ValueError(f"codebooks={codebooks} must be at most the tokenizer's {tokenizer.config.n_codebooks}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is not empty; choose another --out or delete what an earlier export left there")
    names, partial = file_names(conversations), begun(out.resolve())
    depth = 0 if tokenizer is None else codebooks or tokenizer.config.n_codebooks
    clips = clips_of(conversations) if INDEX[kind] == REQUESTS else {}
    gains = loudness_gains(turn for conversation in conversations for turn in conversation.turns)
    heard = read_clips(data_dir, {clip.utt_id: gains[clip.utt_id] for clip in clips.values()}) if clips else []
    samples = {t.utt_id: tokenizer.copies(wave, [depth])[depth] if tokenizer else wave for t, wave in heard}
    requests = functools.partial(write_requests, clips=clips, samples=samples, answered=kind == "replies")
    write = {"csm": write_csm, "moshi": write_moshi, "wav": write_folder}.get(kind, requests)
    rows: dict[int, list[dict]] = {}
    whole = with_audio(data_dir, conversations)
    for number, conversation in tqdm(whole, total=len(conversations), desc="exporting", unit="conversation"):
        copied = tokenizer is not None and kind != "batch"
        heard = through(tokenizer, depth, conversation, gains) if copied else conversation
        rows[number] = write(partial, names[number], heard)
    ordered = [row for number in sorted(rows) for row in rows[number]]
    content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ordered)
    if INDEX[kind] == REQUESTS:
        content = json.dumps({"conversations": ordered}, ensure_ascii=False, indent=1) + "\n"
    write_atomically(partial / INDEX[kind], content.encode())
    if out.is_dir():
        out.rmdir()  # it is empty
    os.replace(partial, out)
    return len(rows)


def begun(out: Path) -> Path:
    """An empty folder beside `out` to write into, so that `out` is whole or not there."""
    partial = out.with_name(out.name + PARTIAL)
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    return partial


def with_two_speakers(conversations: list[Conversation], or_more: bool) -> list[Conversation]:
    """Those in which two speak, `or_more`; prints how many are left out. ValueError if all are."""
    numbers = [len(set(conversation.speakers)) for conversation in conversations]
    kept = [c for c, n in zip(conversations, numbers, strict=True) if n == 2 or (or_more and n > 2)]
    wanted = "two speakers or more" if or_more else "two speakers"
    if not kept:
        raise ValueError(f"none of the {len(conversations)} conversations has {wanted}; use --to csm or wav")
    print(f"{len(conversations) - len(kept)} of {len(conversations)} conversations left out: not of {wanted}")
    return kept


def with_audio(data_dir: Path, conversations: list[Conversation]) -> Iterator[tuple[int, Conversation]]:
    """(place in the list, the same conversation with its audio), each as soon as its last turn was read."""
    places = {(c.source, c.conv_id): number for number, c in enumerate(conversations)}
    parts: dict[int, list[TurnRecord]] = defaultdict(list)
    for turn in read_turns(data_dir, with_audio=True):
        number = places.get((turn.source, turn.conv_key))
        if number is None:
            continue
        parts[number].append(turn)
        if len(parts[number]) == len(conversations[number].turns):
            yield number, build_conversations(parts.pop(number))[0]


def through(tokenizer: AudioTokenizer, depth: int, conversation: Conversation, gains: dict[str, float]) -> Conversation:
    """The conversation as the first codebooks give it back, 24 kHz, at the level that tokenizers know."""
    turns = []
    for turn in conversation.turns:
        copy = tokenizer.copies(read_audio(turn.audio)[0] * np.float32(gains[turn.utt_id]), [depth])[depth]
        turns.append(dataclasses.replace(turn, audio=encode_pcm16(copy, SAMPLE_RATE), sample_rate=SAMPLE_RATE))
    return dataclasses.replace(conversation, turns=tuple(turns))


def clips_of(conversations: list[Conversation]) -> dict[tuple[str, str], TurnRecord]:
    """(conversation, speaker) -> the longest of his turns elsewhere that can show his voice, if there is one."""
    turns: dict[str, list[tuple[str, TurnRecord]]] = defaultdict(list)
    for conversation in conversations:
        for turn in conversation.turns:
            if turn.duration_s <= LONGEST_CLIP_S:
                turns[turn.speaker_id].append((conversation.conv_id, turn))
    found = {}
    for conversation in conversations:
        for speaker in {turn.speaker_id for turn in conversation.turns}:
            others = [turn for name, turn in turns[speaker] if name != conversation.conv_id]
            if others:
                found[conversation.conv_id, speaker] = max(others, key=lambda turn: (turn.duration_s, turn.utt_id))
    return found


def file_names(conversations: list[Conversation]) -> list[str]:
    """A name for each that every file system takes, also one that does not tell upper from lower case."""
    names: list[str] = []
    taken = set()
    for conversation in conversations:
        name = re.sub(r"[^\w.-]+", "_", conversation.conv_id, flags=re.ASCII)[:60].strip("._") or "conversation"
        if name.lower() in taken:
            name = f"{name[:51]}-{hashlib.sha256(conversation.conv_id.encode()).hexdigest()[:8]}"
        taken.add(name.lower())
        names.append(name)
    return names


# --- formats ---------------------------------------------------------------------------------------------------------


def write_csm(out: Path, name: str, conversation: Conversation) -> list[dict]:
    """The wav files of a conversation; its line of the index."""
    (out / "audio").mkdir(exist_ok=True)
    messages = []
    for index, (turn, speaker) in enumerate(zip(conversation.turns, conversation.speakers, strict=True)):
        path = f"audio/{name}-{index:03d}.wav"
        write_wav(out / path, read_audio(turn.audio)[0])
        content = [{"type": "text", "text": turn.text}, {"type": "audio", "path": path}]
        messages.append({"role": str(speaker), "content": content})
    return [{"conversation": messages}]


def write_folder(out: Path, name: str, conversation: Conversation) -> list[dict]:
    """A folder with the wav and text files of a conversation; its rows of the manifest."""
    (out / name).mkdir()
    rows = []
    for index, (turn, speaker) in enumerate(zip(conversation.turns, conversation.speakers, strict=True)):
        path = out / name / f"{index:03d}_{speaker}.wav"
        samples, rate = soundfile.read(io.BytesIO(turn.audio), dtype="int16")  # as floats they would be rounded again
        content = io.BytesIO()
        soundfile.write(content, samples, rate, format="WAV", subtype="PCM_16")
        path.write_bytes(content.getvalue())
        path.with_suffix(".txt").write_text(turn.text + "\n", encoding="utf-8")
        rows.append(
            {
                "audio": f"{name}/{path.name}",
                "text": turn.text,
                "speaker": turn.speaker_id,
                "conversation": name,
                "turn_index": index,
                "start": turn.start_s,
                "language": turn.lang,
                "style": turn.style,
                "licence": turn.license,
                "trimmed": True,
            }
        )
    return rows


def write_requests(
    out: Path,
    name: str,
    conversation: Conversation,
    clips: dict[tuple[str, str], TurnRecord],
    samples: dict[str, np.ndarray],
    answered: bool,
) -> list[dict]:
    """The clips of a conversation's speakers; its request, of the form `spoken_conversations.CONVERSATION`.

    If it is `answered`, the second speaker's turns are left to the model, and those of the others are written as wav.
    """
    voices, turns, end = {}, [], None
    second = next((speaker for speaker in conversation.speakers if speaker != conversation.speakers[0]), None)
    for index, (turn, speaker) in enumerate(zip(conversation.turns, conversation.speakers, strict=True)):
        heard = answered and speaker != second
        clip = clips.get((conversation.conv_id, turn.speaker_id))
        if clip is not None and str(speaker) not in voices and not heard:
            write_wav(out / f"{name}-{speaker}.wav", samples[clip.utt_id])
            voices[str(speaker)] = {"audio": f"{name}-{speaker}.wav", "text": clip.text}
        request = {"speaker": speaker}
        if heard or not answered:
            request["text"] = turn.text
        if heard:
            request["audio"] = f"{name}-turn-{index:03d}.wav"
            write_wav(out / request["audio"], read_audio(turn.audio)[0])
        if end is not None and turn.start_s is not None:
            request["gap_seconds"] = round(min(LONGEST_GAP, max(0.0, turn.start_s - end)), 3)
        turns.append(request)
        end = turn.end_s
    return [{"id": name, "voices": voices, "turns": turns}]


def write_moshi(out: Path, name: str, conversation: Conversation) -> list[dict]:
    """The stereo file of a dialogue and its words; its line of the index.

    Turns begin at their `start_s`, else `GAP_S` after all before them. Where the times of the words are not known, they
    are not measured but spread over the turn; see `spread_words`.
    """
    (out / "stereo").mkdir(exist_ok=True)
    placed, alignments, end = [], [], 0
    begin_s = min((turn.start_s for turn in conversation.turns if turn.start_s is not None), default=0.0)
    origin_s = begin_s if begin_s > LONGEST_SILENCE_S else 0.0  # times of day, or of a whole recording
    for turn, speaker in zip(conversation.turns, conversation.speakers, strict=True):
        samples, _ = read_audio(turn.audio)
        gap = round(GAP_S * SAMPLE_RATE) if placed else 0
        first = end + gap if turn.start_s is None else round((turn.start_s - origin_s) * SAMPLE_RATE)
        placed.append((first, speaker, samples))
        end = max(end, first + len(samples))
        words = json.loads(turn.words) if turn.words else spread_words(turn.text, len(samples) / SAMPLE_RATE)
        label = (MAIN_SPEAKER, "SPEAKER_OTHER")[speaker]
        origin = first / SAMPLE_RATE
        alignments += [(word, (round(origin + a, 6), round(origin + b, 6)), label) for word, a, b in words]
    alignments.sort(key=lambda alignment: alignment[1])  # readers search them by time
    tracks = np.zeros((end, 2), dtype=np.float32)
    for first, speaker, samples in placed:
        tracks[first : first + len(samples), speaker] += samples
    path = out / "stereo" / f"{name}.wav"
    write_wav(path, tracks)
    path.with_suffix(".json").write_text(json.dumps({"alignments": alignments}, ensure_ascii=False), encoding="utf-8")
    return [{"path": f"stereo/{name}.wav", "duration": end / SAMPLE_RATE}]


def spread_words(text: str, seconds: float) -> list[tuple[str, float, float]]:
    """Words with a share of the turn in proportion to their letters, but for `MARGIN_S` at both ends: a guess."""
    words = text.split()
    letters = np.cumsum([0, *map(len, words)])
    times = (MARGIN_S + (seconds - 2 * MARGIN_S) * letters / letters[-1]).tolist()
    return list(zip(words, times[:-1], times[1:], strict=True))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXIT_CODES_HELP, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", type=Path, default=Path("data"), metavar="DIR", help="folder of collect_data.py (default: data)")
    add("--to", choices=list(INDEX), required=True, help="the format to write")
    add("--split", choices=SPLITS, default="train", help="conversations to write (default: train)")
    add("--out", type=Path, required=True, metavar="DIR", help="a new or empty folder")
    add("--tokenizer", metavar="DIR", help="write what this tokenizer, or kyutai/mimi, makes of the recordings")
    add("--codebooks", type=int, metavar="K", help="of its first codebooks only (default: all)")
    args = parser.parse_args(argv)
    if args.codebooks is not None and (not args.tokenizer or args.codebooks < 1):
        raise ValueError(f"--codebooks {args.codebooks} must be at least 1 and needs --tokenizer")
    tokenizer = load_tokenizer(args.tokenizer) if args.tokenizer else None
    with only_run_in(args.out.resolve(), beside=True):
        count = export(args.data, args.out, args.to, args.split, tokenizer, args.codebooks)
    print(f"{count} conversations in {args.out / INDEX[args.to]}")
    return EXIT_DONE


if __name__ == "__main__":
    raise SystemExit(run(main))
