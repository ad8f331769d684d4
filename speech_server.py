"""A server on this machine: a page to talk with the model, and the speech endpoint of OpenAI's API.

    GET  /                        the page
    POST /v1/audio/speech         {"input": TEXT, "voice": NAME, "response_format": "wav"|"pcm"|"flac"|"mp3", "seed": N}
                                  (no format is wav, where OpenAI's own endpoint gives mp3)
    GET  /v1/models, /v1/voices
    POST /talk/ID/say             {"speaker": N, "text": TEXT or null, "voice": NAME or null} -> 16-bit PCM as it comes
    POST /talk/ID/hear?speaker=N  a wav, flac, ogg or mp3 file -> {"text": what the model heard}
    GET  /talk/ID                 the turns of a conversation; DELETE forgets it

PCM is 24 kHz, mono. wav and pcm are sent while they are spoken. One thread does all of torch's work; up to `speaking`
requests share each pass of both stages, `waiting` more queue, others are told to come back (429). A file to be
heard lasts at most a minute (413). Errors are JSON as OpenAI's: {"error": {"message", "type", "param", "code"}}.
"""

from __future__ import annotations

import asyncio
import collections
import concurrent.futures
import contextlib
import io
import logging
import struct
import threading
import time
from collections.abc import AsyncIterator, Callable, Collection, Generator, Iterable
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

import numpy as np
import soundfile
import torch
from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Receive, Scope, Send

from audio import FRAME_RATE, FRAME_SAMPLES, SAMPLE_RATE, at_loudness, read_audio, to_pcm16
from command_line import describe, exit_code_of
from conversations import choose_clip
from frames import Turn
from generation import Conversation
from speaking_together import Together
from spoken_conversations import Clip, Engine, turns_of
from text_tokenizer import turn_text
from turn_shards import composed, ledgers, read_turns

PAGE = Path(__file__).with_name("web_page.html")
MOST_INPUT = 4096  # characters, as OpenAI's
MOST_BYTES = 10 * 2**20  # of a body
MOST_SECONDS = 60  # of a file to be heard, and its samples in all channels: silence is packed a thousandfold
MOST_SAMPLES = MOST_SECONDS * 2 * 96_000
MOST_AHEAD = 1.0  # s of sound that a listener has not heard yet
MOST_TALKS = 8  # conversations kept, each with its keys and values; the silent one longest unused is forgotten
MOST_VOICES = 50
NO_VOICE = "none"  # the name of the voice that the checkpoint has for a speaker, or else of whatever the model draws
OPENAI_VOICES = ["alloy", "ash", "ballad", "coral", "echo", "fable", "nova", "onyx", "sage", "shimmer", "verse"]
MEDIA = {"wav": "audio/wav", "pcm": "audio/pcm", "flac": "audio/flac", "mp3": "audio/mpeg"}


class Strict(BaseModel):
    model_config = ConfigDict(extra="ignore", str_strip_whitespace=True)


class SpeechRequest(Strict):
    input: str = Field(min_length=1, max_length=MOST_INPUT)
    model: str = ""
    voice: str = NO_VOICE
    response_format: Literal["wav", "pcm", "flac", "mp3"] = "wav"
    speed: float = Field(default=1.0, ge=1.0, le=1.0)  # the model has one
    seed: int | None = Field(default=None, ge=0, lt=2**32)


class SayRequest(Strict):
    speaker: int = Field(default=0, ge=0, le=99)
    text: str | None = Field(default=None, max_length=MOST_INPUT)
    voice: str | None = None  # of the speaker, heard before he says the first thing


def collected_voices(engine: Engine, data: Path) -> dict[str, Clip]:
    """One clip of each of the first `MOST_VOICES` speakers of the collected data; none where there is no data."""
    if not ledgers(data):
        return {}
    turns = list(read_turns(data, with_audio=False))
    chosen = [choose_clip(turns, name) for name in sorted({turn.speaker_id for turn in turns})[:MOST_VOICES]]
    return {clip.name: clip for clip in sorted(engine.clips(data, turns, chosen), key=lambda clip: clip.name)}


class Busy(RuntimeError):
    """More requests wait than the server takes."""


Act = Callable[[Conversation], Generator]  # one turn of a conversation, `steps` or `listening` of it


def saying(speaker: int, texts: Iterable[str | None]) -> list[Act]:
    """The pieces of a long text are turns of the same speaker."""
    return [lambda talk, text=text: talk.steps(speaker, text) for text in texts]


class Job:
    """Turns being taken for a request: samples arrive in `chunks`, then None, the text that was heard, or an error.

    A `live` one is drawn little faster than it can be heard, so that who stops it keeps no more than was heard.
    """

    def __init__(self, talk: Callable[[], Conversation], acts: Iterable[Act], live: bool = False):
        self.talk, self.acts = talk, collections.deque(acts)
        self.loop = asyncio.get_running_loop()
        self.chunks: asyncio.Queue[np.ndarray | str | Exception | None] = asyncio.Queue()
        self.cancelled = False
        self.conversation: Conversation | None = None
        self.live, self.first_at, self.seconds = live, 0.0, 0.0  # when the first samples left, and how much there was

    @property
    def early(self) -> bool:
        """Whether its next batch of frames would put it too far before somebody who listens to it."""
        if not self.live or not self.seconds:
            return False
        batch = self.conversation.acoustic_batch / FRAME_RATE
        return self.seconds + batch > MOST_AHEAD + time.monotonic() - self.first_at

    def put(self, found: np.ndarray | str | Exception | None) -> None:
        if isinstance(found, np.ndarray):
            self.first_at = self.first_at or time.monotonic()
            self.seconds += len(found) / SAMPLE_RATE
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
            self.loop.call_soon_threadsafe(self.chunks.put_nowait, found)


class Studio:
    """The thread that speaks."""

    def __init__(self, engine: Engine, speaking: int, waiting: int, threads: int):
        self.engine, self.speaking, self.most_waiting, self.threads = engine, speaking, waiting, threads
        self.together = Together()
        self.live: dict[Job, None] = {}
        self.waiting: collections.deque[Job] = collections.deque()
        self.calls: collections.deque[tuple[Callable, concurrent.futures.Future]] = collections.deque()
        self.closed = False
        self.woken = threading.Event()
        self.thread = threading.Thread(target=self.run, name="studio", daemon=True)
        self.thread.start()

    def submit(self, job: Job) -> None:
        """Let a job be spoken when its turn comes. Busy: too many wait."""
        for other in self.waiting.copy():
            if other.cancelled:  # and its samples with it
                with contextlib.suppress(ValueError):  # the other thread has just taken it
                    self.waiting.remove(other)
        waiting = len(self.waiting)
        free = max(0, self.speaking - len(self.live))  # begin with the next round
        if waiting >= self.most_waiting + free:
            raise Busy(f"{len(self.live)} requests are spoken and {waiting} wait; try again later")
        self.waiting.append(job)
        self.woken.set()

    async def call(self, function: Callable):
        """Run something in the thread that owns the model; its result or error. Busy: too many wait."""
        if len(self.calls) >= self.most_waiting:
            raise Busy(f"{len(self.calls)} calls wait; try again later")
        future: concurrent.futures.Future = concurrent.futures.Future()
        self.calls.append((function, future))
        self.woken.set()
        return await asyncio.wrap_future(future)

    def close(self) -> None:
        self.closed = True
        self.woken.set()
        self.thread.join()

    def run(self) -> None:
        torch.set_num_threads(self.threads)
        while not self.closed:
            if not self.live and not self.waiting and not self.calls:
                self.woken.wait()
            self.woken.clear()
            try:
                self.round()
            except Exception as error:  # nobody's own
                for job in list(self.live):  # each is given one of its own: two requests must not raise the same
                    self.end(job, RuntimeError(f"{type(error).__name__}: {error}"))
        for job in list(self.live):
            self.end(job, None)

    def round(self) -> None:
        """One call is answered, who waits begins, and all speak on."""
        self.end_cancelled()
        if self.calls:
            self.answer(*self.calls.popleft())
        while self.waiting and len(self.live) < self.speaking:
            self.start(self.waiting.popleft())
        resting = [job for job in self.live if job.early]
        if resting and len(resting) == len(self.live):
            self.woken.wait(0.02)
        for job, found in self.together.round(resting):
            if isinstance(found, np.ndarray):
                job.put(found)
            elif found is None and job.acts and not job.cancelled:
                self.next_act(job)
            else:
                self.end(job, found)

    def answer(self, function: Callable, future: concurrent.futures.Future) -> None:
        self.end_cancelled()
        if not future.set_running_or_notify_cancel():
            return
        try:
            future.set_result(function())
        except Exception as error:
            future.set_exception(error)

    def start(self, job: Job) -> None:
        self.end_cancelled()  # perhaps an interrupted turn of the same conversation
        if job.cancelled:
            return
        self.live[job] = None
        try:
            job.conversation = job.talk()
            self.next_act(job)
        except Exception as error:
            self.end(job, error)

    def next_act(self, job: Job) -> None:
        self.together.begin(job, job.conversation, job.acts.popleft()(job.conversation))

    def end_cancelled(self) -> None:
        for job in [job for job in self.live if job.cancelled]:
            self.end(job, None)

    def end(self, job: Job, found: str | Exception | None) -> None:
        self.live.pop(job, None)
        try:
            self.together.stop(job)  # decodes what was drawn
        except Exception as error:
            found = found if isinstance(found, Exception) else error
        job.put(found)


# ---- audio -----------------------------------------------------------------------------------------------------------


def wav_header() -> bytes:
    """Of a stream of 16-bit PCM whose length is not known yet."""
    rate = struct.pack("<IHHIIHH", 16, 1, 1, SAMPLE_RATE, 2 * SAMPLE_RATE, 2, 16)
    return b"RIFF" + b"\xff\xff\xff\xff" + b"WAVEfmt " + rate + b"data" + b"\xff\xff\xff\xff"


async def pcm_of(job: Job) -> AsyncIterator[bytes]:
    """Little-endian 16-bit samples as they come; who stops reading stops the speaker."""
    try:
        while isinstance(found := await job.chunks.get(), np.ndarray):
            yield to_pcm16(found).astype("<i2").tobytes()
        if found is not None:
            raise found
    finally:
        job.cancelled = True


def encoded(pcm: bytes, container: str) -> bytes:
    """A whole file; a frame of silence where there is nothing, as a file without samples is none."""
    file = io.BytesIO()
    samples = np.frombuffer(pcm or bytes(2 * FRAME_SAMPLES), "<i2")
    soundfile.write(file, samples, SAMPLE_RATE, format=container.upper())
    return file.getvalue()


def heard(content: bytes) -> np.ndarray:
    """The samples of an uploaded file. HTTPException 413: it is too long; ValueError: it is no audio."""
    with contextlib.suppress(soundfile.LibsndfileError):  # `read_audio` says what is wrong
        info = soundfile.info(io.BytesIO(content))
        if info.duration > MOST_SECONDS or info.frames * info.channels > MOST_SAMPLES:
            found = f"{info.duration:.0f} s of {info.channels} channels at {info.samplerate} Hz"
            raise HTTPException(413, f"{found}; at most {MOST_SECONDS} s and {MOST_SAMPLES} samples are heard")
    return at_loudness(read_audio(content)[0])


async def comes_before_hanging_up(wanted: asyncio.Future, request: Request) -> bool:
    """Whether it came before the client was gone; if not it is cancelled."""
    gone = asyncio.ensure_future(request.receive())
    try:
        await asyncio.wait({wanted, gone}, return_when=asyncio.FIRST_COMPLETED)
        return wanted.done()
    finally:  # nothing for what is done
        wanted.cancel()
        gone.cancel()


async def streamed(job: Job, container: str, request: Request) -> Response:
    """A response that begins once there are samples, so that an error before them has its own status. A client that
    hangs up ends it, also while it waits for its turn or a whole file is collected."""
    parts = pcm_of(job)
    begun = asyncio.ensure_future(anext(parts, b""))
    if not await comes_before_hanging_up(begun, request):
        return Response(status_code=499)  # nobody reads it
    first = begun.result()

    async def body() -> AsyncIterator[bytes]:
        async with contextlib.aclosing(parts):
            if container in ("flac", "mp3"):
                whole = first + b"".join([part async for part in parts])
                yield await asyncio.to_thread(encoded, whole, container)
                return
            yield (wav_header() if container == "wav" else b"") + first
            async for part in parts:
                yield part

    return StreamingResponse(body(), media_type=MEDIA[container])


# ---- the application -------------------------------------------------------------------------------------------------


def failure(status: int, message: str, param: str | None = None) -> JSONResponse:
    kind = "invalid_request_error" if status < 500 and status != 429 else "server_error"
    kind = "rate_limit_error" if status == 429 else kind
    error = {"message": " ".join(message.split()), "type": kind, "param": param, "code": None}
    return JSONResponse({"error": error}, status, headers={"Retry-After": "1"} if status == 429 else None)


def host_of(origin: str) -> str | None:
    with contextlib.suppress(ValueError):
        return urlsplit(origin).hostname
    return None


class Limited:
    """Refuses bodies that are too long, unread, and requests by other names than `hosts` or from pages of others, if
    there are any. Not one of Starlette's own, behind which a response that breaks off with an error looks whole."""

    def __init__(self, app: ASGIApp, hosts: Collection[str] = ()):
        self.app, self.hosts = app, [name.lower() for name in hosts]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = self.refusal(Request(scope)) if scope["type"] == "http" else None
        await (refusal or self.app)(scope, receive, send)

    def refusal(self, request: Request) -> Response | None:
        asked = [request.url.hostname, *map(host_of, request.headers.getlist("origin"))]
        if self.hosts and not all(name in self.hosts for name in asked):  # a page elsewhere, or whose name leads here
            return failure(403, f"this server answers to {', '.join(self.hosts)} only; a proxy's name: --names NAME")
        length = request.headers.get("content-length", "0")
        counted = "content-length" in request.headers and "transfer-encoding" not in request.headers
        if not length.isdigit() or (request.method == "POST" and not counted):
            return failure(411, "a body needs its length")
        if int(length) > MOST_BYTES:
            return failure(413, f"the body has {length} bytes, at most {MOST_BYTES} are taken")
        return None


class Talks:
    """Conversations of the page, each by a name that the page has chosen."""

    def __init__(self, engine: Engine, voices: dict[str, Clip]):
        self.engine, self.voices = engine, voices
        self.kept: collections.OrderedDict[str, Conversation] = collections.OrderedDict()

    def get(self, name: str, live: Iterable[Job]) -> Conversation:
        """The conversation of that name, a new one if there is none. ValueError if one of the jobs speaks in it."""
        speaking = {id(job.conversation) for job in live}
        if name not in self.kept:
            silent = [other for other, talk in self.kept.items() if id(talk) not in speaking]
            for other in silent[: max(0, len(self.kept) + 1 - MOST_TALKS)]:
                del self.kept[other]
            self.kept[name] = self.engine.conversation(self.engine.voice.seed)
        self.kept.move_to_end(name)
        if id(self.kept[name]) in speaking:
            raise ValueError("somebody speaks in this conversation already")
        return self.kept[name]

    def with_voice(self, talk: Conversation, speaker: int, voice: str | None) -> Conversation:
        """A conversation in which the speaker was heard in that voice; in none, as the checkpoint has it. ValueError
        for one that is not there; where there are no others, and of the names that clients of OpenAI's endpoint must
        take one of, every name means none."""
        voice = composed(voice or "")
        if not voice:
            self.engine.introduce(talk, speaker)
            return talk
        if not self.voices or (voice in OPENAI_VOICES and voice not in self.voices):
            voice = NO_VOICE
        if voice != NO_VOICE and voice not in self.voices:
            raise ValueError(f"there is no voice {voice!r}; the voices: {', '.join([NO_VOICE, *self.voices])}")
        clip = self.engine.own_clip(speaker) if voice == NO_VOICE else self.voices[voice]
        heard = talk.voices.get(speaker)
        if clip is None:
            talk.unpin(speaker)
        elif heard is None or not torch.equal(heard.codes, clip.codes.to(heard.codes)):
            talk.add_turn(speaker, clip.text, codes=clip.codes, pinned=True)
        return talk


def hide_interruptions() -> None:
    """Responses that the end of the server cuts off are no errors to be logged with a traceback."""
    cut = asyncio.CancelledError
    logging.getLogger("uvicorn.error").addFilter(lambda line: not (line.exc_info and isinstance(line.exc_info[1], cut)))


def make_app(
    engine: Engine, voices: dict[str, Clip], studio: Studio, model_name: str = "csm", hosts: Collection[str] = ()
) -> FastAPI:
    """The server's routes; `studio` is to be closed by who made it. By other names than `hosts` it cannot be asked."""
    app = FastAPI(title="Conversational Speech Model", openapi_url=None)
    talks, began = Talks(engine, voices), int(time.time())

    app.add_middleware(Limited, hosts=hosts)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError):
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"] if part != "body")
        return failure(400, f"{place}: {first['msg']}" if place else str(first["msg"]), place or None)

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException):
        return failure(error.status_code, str(error.detail))

    @app.exception_handler(Busy)
    async def busy(request: Request, error: Busy):
        return failure(429, str(error))

    @app.exception_handler(ClientDisconnect)  # while he still sent his voice
    async def gone(request: Request, error: ClientDisconnect):
        return Response(status_code=499)

    @app.exception_handler(Exception)
    async def wrong(request: Request, error: Exception):
        known = exit_code_of(error) is not None
        return failure(400 if known else 500, describe(error) if known else f"internal error: {type(error).__name__}")

    for kind in (ValueError, OSError):
        app.add_exception_handler(kind, wrong)

    @app.get("/", response_class=HTMLResponse)
    async def page() -> str:
        return PAGE.read_text(encoding="utf-8")

    @app.get("/v1/models")
    async def models() -> dict:
        return {"object": "list", "data": [{"id": model_name, "object": "model", "created": began, "owned_by": "you"}]}

    @app.get("/v1/voices")
    async def list_voices() -> dict:
        return {"voices": [NO_VOICE, *voices], "replies": engine.model.config.text_head}

    @app.post("/v1/audio/speech")
    async def speech(wanted: SpeechRequest, request: Request) -> Response:
        seed = engine.voice.seed if wanted.seed is None else wanted.seed
        texts = turns_of(wanted.input, engine.voice.raw_text, engine.voice.sampling.one_sentence)
        job = Job(lambda: talks.with_voice(engine.conversation(seed), 0, wanted.voice), saying(0, texts))
        studio.submit(job)
        return await streamed(job, wanted.response_format, request)

    @app.post("/talk/{name}/say")
    async def say(name: str, wanted: SayRequest, request: Request) -> Response:
        texts: list[str | None] = [None]
        if wanted.text is not None:
            texts = list(turns_of(wanted.text, engine.voice.raw_text, engine.voice.sampling.one_sentence))

        def talk() -> Conversation:
            return talks.with_voice(talks.get(name, studio.live), wanted.speaker, wanted.voice)

        job = Job(talk, saying(wanted.speaker, texts), live=True)
        studio.submit(job)
        return await streamed(job, "pcm", request)

    @app.post("/talk/{name}/hear")
    async def hear(name: str, request: Request, speaker: Annotated[int, Query(ge=0, le=99)] = 0) -> Response:
        samples = await asyncio.to_thread(heard, await request.body())

        job = Job(lambda: talks.get(name, studio.live), [lambda talk: talk.listening(speaker, samples=samples)])
        studio.submit(job)
        text = asyncio.ensure_future(job.chunks.get())
        try:
            if not await comes_before_hanging_up(text, request):  # whoever spoke has hung up: the turn is none
                return Response(status_code=499)
        finally:
            job.cancelled = not text.done()
        if isinstance(text.result(), Exception):
            raise text.result()
        return JSONResponse({"text": text.result()})

    @app.get("/talk/{name}")
    async def turns(name: str) -> dict:
        def read() -> list[dict]:
            kept = talks.kept[name].turns if name in talks.kept else []
            return [{"text": text_of(turn), "seconds": len(turn.codes) / FRAME_RATE} for turn in kept]

        def text_of(turn: Turn) -> str:
            return turn_text(engine.text_tokenizer, 0, turn.text_ids[turn.n_prompt :])

        return {"turns": await studio.call(read)}

    @app.delete("/talk/{name}")
    async def forget(name: str) -> dict:
        await studio.call(lambda: talks.kept.pop(name, None))
        return {}

    return app
