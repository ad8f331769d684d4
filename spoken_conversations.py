"""Conversations as they are requested -> wav files and measurements; many of them, in several processes, resumable.

A turn of a request is one of four: text alone is spoken; audio with text was heard and is known; audio alone is heard
and written down by the model; neither lets the model answer with text and voice of its own.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import functools
import json
import math
import multiprocessing
import signal
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from architecture import load_model
from audio import SAMPLE_RATE, at_loudness, read_audio, rms_dbfs, write_wav
from audio_tokenizer import AudioTokenizer
from checkpointing import file_digest, write_atomically
from command_line import EXIT_INPUT, describe, end_with_parent, exit_code_of
from conversation_formats import RESULT, SUMMARY
from conversations import choose_clip, read_chosen
from fine_tuning import find_weights
from generation import SPEAKING, VOICES, Conversation, Reply, Sampling, read_speaking
from inference_model import InferenceModel
from ranks import pick_device
from rvq_tokenizer import load_tokenizer
from spoken_text import read_aloud, split_sentences, split_text
from text_tokenizer import TextTokenizer, clean_text, load_text_tokenizer
from turn_shards import TurnRecord, composed, read_turns
from weight_layouts import is_ours, load_published

LONGEST_GAP = 600.0  # seconds between two turns that can be asked for
GAP_SECONDS = 0.3  # of silence between two turns of a conversation's file, unless a turn asks for another
CSM_1B = "sesame/csm-1b"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MOST_CHARACTERS = 200  # of a turn, about 13 s of speech; longer texts become several turns of their speaker

AUDIO = {"type": "string", "minLength": 1, "description": "wav, flac, ogg or mp3, relative to the folder of this file"}
TEXT = {"type": "string", "minLength": 1, "maxLength": 20_000}
TURN = {
    "type": "object",
    "required": ["speaker"],
    "additionalProperties": False,
    "properties": {
        "speaker": {"type": "integer", "minimum": 0, "maximum": 99},
        "text": TEXT,
        "audio": AUDIO,
        "gap_seconds": {
            "type": "number",
            "minimum": 0,
            "maximum": LONGEST_GAP,
            "description": "of silence before the turn",
        },
    },
    "description": "text: is spoken; audio and text: was heard; audio: is written down; neither: the model answers",
}
CONVERSATION = {
    "type": "object",
    "required": ["turns"],
    "additionalProperties": False,
    "properties": {
        "id": {
            "type": "string",
            "pattern": "^[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}$(?!\\n)",
            "description": "name of its folder",
        },
        "seed": {"type": "integer", "minimum": 0, "maximum": 2**32 - 1},
        "voices": {
            "type": "object",
            "additionalProperties": False,
            "patternProperties": {
                "^(?:0|[1-9][0-9]?)$(?!\\n)": {
                    "type": "object",
                    "required": ["audio", "text"],
                    "additionalProperties": False,
                    "properties": {"audio": AUDIO, "text": TEXT},
                }
            },
            "description": "speaker -> a clip that he is to sound like, and what is said in it",
        },
        "turns": {"type": "array", "minItems": 1, "maxItems": 10_000, "items": TURN},
    },
}
SCHEMA = {  # of a file of requests; each conversation is checked alone, so that one that is wrong spoils no other
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "type": "object",
    "required": ["conversations"],
    "additionalProperties": False,
    "properties": {"conversations": {"type": "array", "minItems": 1, "items": CONVERSATION}},
}


class Request(NamedTuple):
    """One conversation of a file."""

    index: int  # its place there
    id: str
    content: dict  # of the form `CONVERSATION`
    base: Path  # what paths are relative to


@dataclass(frozen=True)
class Voice:
    """What speaks: where model and tokenizer lie, and how codes are drawn."""

    checkpoint: str
    tokenizer: str
    device: str
    sampling: Sampling
    seed: int  # of conversations that name none
    dtype: str = "fp32"
    int8: bool = False  # weights of 8 bits, on a CPU
    raw_text: bool = False  # texts are spoken as they are written
    compiled: bool | None = None  # as `InferenceModel`

    def load(self) -> Engine:
        device = pick_device(self.device)
        path = find_weights(self.checkpoint) if self.checkpoint == CSM_1B else Path(self.checkpoint)
        model = load_published(path) if path.exists() and not is_ours(path) else load_model(path)
        text_tokenizer = load_text_tokenizer(model.config.text_tokenizer)
        inference = InferenceModel(model.to(device, DTYPES[self.dtype]), self.int8, self.compiled)
        engine = Engine(inference, load_tokenizer(self.tokenizer, str(device)), text_tokenizer, self)
        own, chosen = self.own_turns()
        clips = engine.clips(Path(self.checkpoint) / VOICES, own, chosen) if chosen else []
        return engine._replace(own_clips=tuple(clips))

    def own_turns(self) -> tuple[list[TurnRecord], list[TurnRecord]]:
        """The clips beside the weights, and those of them that speakers 0, 1, ... sound like. ValueError: they are not
        as the weights say."""
        folder, names = Path(self.checkpoint) / VOICES, read_speaking(self.checkpoint).voices
        if not names:
            return [], []
        try:
            turns = list(read_turns(folder, with_audio=False))
            return turns, [choose_clip(turns, name) for name in names]
        except (OSError, ValueError) as error:
            lacks = f"{folder} lacks clips that {SPEAKING} beside it names ({describe(error)})"
            raise ValueError(f"{lacks}; copy or export the voice anew") from error

    def identity(self) -> dict:
        """What the results depend on beside the request: settings, and which weights lie there."""
        facts: dict[str, object] = {**dataclasses.asdict(self)}
        for name in ("checkpoint", "tokenizer"):
            for file in files_of(Path(getattr(self, name))):
                now = file.stat()
                facts[f"{name}/{file.name}"] = digest_of(file, now.st_size, now.st_mtime_ns)
        return facts | {"clips": [turn.pcm_sha256 for turn in self.own_turns()[1]]}


def files_of(weights: Path) -> list[Path]:
    """What is read of weights: the file itself, or those of a folder that hold weights or their config."""
    if weights.is_file():
        return [weights]
    return [file for kind in ("*.safetensors", "ckpt.pt", "config.json") for file in sorted(weights.glob(kind))]


@functools.cache
def digest_of(path: Path, size: int, time_ns: int) -> str:
    """Of a file as it was then: one that was written anew with the same content changes nothing."""
    return file_digest(path)


class Clip(NamedTuple):
    """What a voice sounds like."""

    name: str
    codes: torch.Tensor  # (T, K)
    text: str


class Engine(NamedTuple):
    """A loaded `Voice`."""

    model: InferenceModel
    tokenizer: AudioTokenizer
    text_tokenizer: TextTokenizer
    voice: Voice
    own_clips: tuple[Clip, ...] = ()  # of who speakers 0, 1, ... sound like, unless another voice is asked for

    @property
    def device(self) -> torch.device:
        return next(self.model.model.parameters()).device

    def conversation(self, seed: int, **changes: object) -> Conversation:
        """A new one; `changes` of the sampling."""
        sampling = dataclasses.replace(self.voice.sampling, **changes)
        return Conversation(self.model, self.tokenizer, self.text_tokenizer, sampling=sampling, seed=seed)

    def clips(self, data: Path, turns: list[TurnRecord], chosen: list[TurnRecord]) -> list[Clip]:
        """Of some of all `turns` of collected data."""
        found = []
        for turn, samples in zip(chosen, read_chosen(data, turns, chosen), strict=True):
            wave = torch.from_numpy(np.ascontiguousarray(samples, dtype=np.float32))[None]
            with torch.inference_mode():
                codes = self.tokenizer.encode(wave.to(self.device))[0].cpu()
            found.append(Clip(composed(turn.speaker_id).split(":")[-1], codes, turn.text))
        return found

    def own_clip(self, speaker: int) -> Clip | None:
        """What the speaker sounds like unless another voice is asked for; None: whatever the model draws."""
        return self.own_clips[speaker % len(self.own_clips)] if self.own_clips else None

    def introduce(self, talk: Conversation, speaker: int) -> str | None:
        """Let a speaker who is not in the window sound like his `own_clip`; its name, if there is one and there is
        room: such clips take about half of the window at most."""
        clip = self.own_clip(speaker)
        if clip is None or talk.has_spoken(speaker) or 2 * talk.pinned_rows() > talk.model.config.max_positions:
            return None
        talk.add_turn(speaker, clip.text, codes=clip.codes, pinned=True)
        return clip.name

    def warm_up(self) -> None:
        """One short turn, so that the first measured turn does not pay for first calls."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.conversation(0, max_seconds=0.4, min_seconds=0.0).speak(0, "Hello.")


# ---- a file of requests ----------------------------------------------------------------------------------------------


def no_number(name: str) -> None:
    raise ValueError(f"{name} is no number")


def read_requests(path: Path) -> tuple[list[Request], list[dict]]:
    """The conversations of a file of the form `SCHEMA`, and a failure for each that is not as it should be.

    ValueError: the file is no JSON or holds no list of conversations.
    """
    import jsonschema

    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"), parse_constant=no_number)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({describe(error) or 'nested too deeply'})") from error
    items = content.get("conversations") if isinstance(content, dict) else None
    if not isinstance(items, list) or not items or len(content) != 1:
        raise ValueError(
            f'{path} must be an object {{"conversations": [...]}} with at least one and nothing else; '
            "python demo.py --schema prints its form"
        )
    draft = jsonschema.Draft202012Validator
    types = draft.TYPE_CHECKER.redefine("integer", lambda _, value: type(value) is int)  # the draft takes 3.0 for one
    checker = jsonschema.validators.extend(draft, type_checker=types)(CONVERSATION)
    requests, failures, names = [], [], {SUMMARY}
    for index, item in enumerate(items):
        name = item.get("id", f"{index:04d}") if isinstance(item, dict) else f"{index:04d}"
        problems = [problem(error) for error in checker.iter_errors(item)]
        if not problems and name.lower() in names:  # file systems may not tell a from A
            problems = [f"id {name!r} is that of an earlier conversation too, or of the summary"]
        if problems:
            failures.append(failure(index, str(name), "; ".join(problems[:3])))
        else:
            names.add(name.lower())
            requests.append(Request(index, name, item, path.parent))
    return requests, failures


def problem(error) -> str:
    """One line for what jsonschema found."""
    place = "/".join(str(part) for part in error.absolute_path)
    message = error.message if len(error.message) <= 160 else error.message[:157] + "..."
    return f"{place}: {message}" if place else message


def failure(index: int, name: str, reason: str) -> dict:
    return {"index": index, "id": name, "status": "failed", "reason": " ".join(reason.split())}


def wanted(request: Request, voice: Voice) -> dict:
    """All that a result depends on, as JSON: a result made with the same is kept."""
    clips = [turn["audio"] for turn in request.content["turns"] if "audio" in turn]
    clips += [clip["audio"] for clip in request.content.get("voices", {}).values()]
    digests = {clip: file_digest(request.base / clip) for clip in clips}
    everything = {"request": request.content, "audio": digests, "made_with": voice.identity()}
    return json.loads(json.dumps(everything, default=str))


# ---- speaking --------------------------------------------------------------------------------------------------------


def answer(request: Request, voice: Voice, engine: Callable[[], Engine], out: Path) -> dict:
    """Speak one conversation into its folder, unless it lies there already; what came of it.

    What is wrong with the request is a failure among the results; other errors, as that of a full disk, are raised.
    """
    folder, head = out / request.id, {"index": request.index, "id": request.id}
    try:
        want = wanted(request, voice)
    except (OSError, ValueError) as error:  # a clip that cannot be read, or whose name no file can have
        return failure(request.index, request.id, describe(error))
    if (kept := kept_result(folder, want)) is not None:
        return {**head, "status": "kept", **kept}
    loaded = engine()
    try:
        clear(folder)
        talk = loaded.conversation(request.content.get("seed", voice.seed))
        for speaker, clip in request.content.get("voices", {}).items():
            samples = at_loudness(read_audio(request.base / clip["audio"])[0])
            talk.add_turn(int(speaker), clip["text"], samples=samples, pinned=True)
        with warnings.catch_warnings(record=True) as notices:
            warnings.simplefilter("always")
            rows = speak_turns(loaded, talk, request.content["turns"], request.base, folder)
        result = {"turns": rows, "notices": [str(notice.message) for notice in notices]}
        write_atomically(folder / RESULT, (json.dumps({**want, **result}, indent=2) + "\n").encode())
    except (OSError, ValueError) as error:
        return failure_or_raise(request, error)
    return {**head, "status": "done", **result}


def failure_or_raise(request: Request, error: Exception) -> dict:
    """An error of the request's own; any other, as that of a full disk, is everybody's."""
    if exit_code_of(error) != EXIT_INPUT:
        raise error
    return failure(request.index, request.id, describe(error))


def clear(folder: Path) -> None:
    """Delete what an earlier run left. ValueError, and nothing deleted, where anything else lies there."""
    own = [path for pattern in ("conversation.wav*", "turn-*.wav*", f"{RESULT}*") for path in folder.glob(pattern)]
    others = sorted({path.name for path in folder.glob("[!.]*")} - {path.name for path in own})
    if others:
        raise ValueError(f"{folder} holds {others[0]}, which no batch wrote; choose another id or another --out")
    for path in own:
        path.unlink()


def kept_result(folder: Path, want: dict) -> dict | None:
    """What was made of the same before."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        found = json.loads((folder / RESULT).read_text(encoding="utf-8"))
        files = [folder / Path(turn["file"]).name for turn in found["turns"] if turn.get("file")]
        whole = all(file.is_file() for file in (folder / "conversation.wav", *files))
        if whole and {name: found[name] for name in want} == want:
            return {"turns": found["turns"], "notices": found["notices"]}
    return None


def turns_of(text: str, raw_text: bool, one_sentence: bool = False) -> list[str]:
    """A text of any length in turns of at most `MOST_CHARACTERS`, or of a sentence, read aloud unless `raw_text`.

    ValueError if nothing in it can be spoken.
    """
    words = clean_text(text if raw_text else read_aloud(text))
    parts = split_sentences(words) if one_sentence else [words]
    pieces = [piece for part in parts for piece in split_text(part, MOST_CHARACTERS)]
    return [piece for piece in pieces if any(character.isalnum() for character in piece)]


def speak_whole(
    talk: Conversation,
    speaker: int,
    text: str | None,
    raw_text: bool = False,
    gap: float = 0.0,
    hear: Callable[[np.ndarray], bool] = lambda samples: True,
) -> Reply:
    """A text of any length as one reply, read aloud unless `raw_text`; None lets the model answer.

    `hear` as in `Conversation.speak`.
    """
    if text is None:
        return talk.speak(speaker, None, gap, hear)
    going = True

    def and_note(samples: np.ndarray) -> bool:
        nonlocal going
        going = hear(samples)
        return going

    replies: list[Reply] = []
    for piece in turns_of(text, raw_text, talk.sampling.one_sentence):
        if going:
            replies.append(talk.speak(speaker, piece, 0.0 if replies else gap, and_note))
    first = next((reply.seconds_to_first_audio for reply in replies if len(reply.samples)), math.nan)
    return Reply(
        np.concatenate([reply.samples for reply in replies]),
        torch.cat([reply.codes for reply in replies]),
        " ".join(reply.text for reply in replies),
        all(reply.ended for reply in replies),
        first,
        sum(reply.seconds for reply in replies),
    )


def speak_turns(engine: Engine, talk: Conversation, turns: list[dict], base: Path, folder: Path) -> list[dict]:
    """Take the turns, of the form `TURN`; writes a wav of each one spoken and `conversation.wav`, a row for each turn.

    ValueError or OSError names the turn that cannot be.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pieces, rows = [], []
    for number, turn in enumerate(turns, start=1):
        speaker, gap = turn["speaker"], turn.get("gap_seconds", 0.0)
        path = folder / f"turn-{number}-speaker-{speaker}.wav"
        try:
            if "audio" in turn:
                samples = at_loudness(read_audio(base / turn["audio"])[0])
                rows.append(hear(talk, turn, samples))
            else:
                engine.introduce(talk, speaker)
                reply = speak_whole(talk, speaker, turn.get("text"), engine.voice.raw_text, gap)
                samples = reply.samples
                if len(samples):
                    write_wav(path, samples)
                rows.append(measure(reply, speaker, path))
        except ValueError as error:
            raise ValueError(f"turn {number}: {error}") from error
        silence = np.zeros(round(turn.get("gap_seconds", GAP_SECONDS) * SAMPLE_RATE), dtype=np.float32)
        pieces += [silence[: len(silence) if pieces else 0], samples]
    write_wav(folder / "conversation.wav", np.concatenate(pieces))
    return rows


def hear(talk: Conversation, turn: dict, samples: np.ndarray) -> dict:
    """Take in a turn that somebody else spoke."""
    text, gap = turn.get("text"), turn.get("gap_seconds", 0.0)
    if text is None:
        text = talk.listen(turn["speaker"], samples=samples, gap_seconds=gap)
    else:
        talk.add_turn(turn["speaker"], text, samples=samples, gap_seconds=gap)
    return {"speaker": turn["speaker"], "text": text, "heard": turn["audio"], "seconds": len(samples) / SAMPLE_RATE}


def measure(reply: Reply, speaker: int, path: Path) -> dict:
    """What is reported of a turn; numbers that an empty turn does not have are None."""
    numbers = {
        "seconds": reply.duration,
        "seconds_to_first_audio": reply.seconds_to_first_audio,
        "real_time_factor": reply.real_time_factor,
        "level_dbfs": float(rms_dbfs(reply.samples)),
    }
    finite = {name: round(value, 4) if math.isfinite(value) else None for name, value in numbers.items()}
    file = str(path) if len(reply.samples) else None
    return {"speaker": speaker, "text": reply.text, "file": file, **finite, "ended_by_itself": reply.ended}


# ---- in several processes --------------------------------------------------------------------------------------------


class Worker:
    """What a process speaks with, loaded when it is first needed."""

    def __init__(self, voice: Voice, out: Path, threads: int):
        self.voice, self.out, self.threads = voice, out, threads
        self.engine: Engine | None = None

    def load(self) -> Engine:
        if self.engine is None:
            torch.set_num_threads(self.threads)
            self.engine = self.voice.load()
            self.engine.warm_up()
        return self.engine

    def answer(self, request: Request) -> dict:
        return answer(request, self.voice, self.load, self.out)


WORKERS: list[Worker] = []  # of a process that a pool started, its own


@contextlib.contextmanager
def held_signals() -> Iterator[None]:
    """SIGINT and SIGTERM wait, also, for good, in processes started meanwhile: they cannot ignore them from the first
    moment on."""
    if not hasattr(signal, "pthread_sigmask"):  # on Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def start_worker(voice: Voice, out: Path, threads: int) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):  # also sent to the workers; the process that started them decides
        signal.signal(number, signal.SIG_IGN)
    end_with_parent()
    WORKERS[:] = [Worker(voice, out, threads)]


def answer_in_worker(request: Request) -> dict:
    return WORKERS[0].answer(request)


def answer_all(requests: list[Request], worker: Worker, processes: int) -> Iterator[dict]:
    """The results as they come; the same ones, wherever they are made. ValueError: a process died."""
    if processes == 1:
        yield from map(worker.answer, requests)
        return
    settings = (worker.voice, worker.out, worker.threads)
    pool = concurrent.futures.ProcessPoolExecutor(
        processes, multiprocessing.get_context("spawn"), initializer=start_worker, initargs=settings
    )
    with held_signals():
        futures = [pool.submit(answer_in_worker, request) for request in requests]  # starts the processes
    try:
        for future in concurrent.futures.as_completed(futures):
            yield future.result()
    except concurrent.futures.process.BrokenProcessPool as error:
        raise ValueError("a worker was ended from outside, perhaps for lack of memory; lower --workers") from error
    finally:
        pool.shutdown(cancel_futures=True)
