"""The server: it says what a conversation says, also to many at once; errors are JSON, nothing hangs or leaks."""

import asyncio
import concurrent.futures
import contextlib
import http.client
import io
import json
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import wave
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import soundfile
import torch
import uvicorn
from conftest import full_model, voice

import demo
import speech_server
from architecture import save_model
from audio import FRAME_SAMPLES, SAMPLE_RATE, encode_pcm16, read_audio, to_pcm16
from command_line import EXIT_INPUT, run
from conversations import choose_clip
from generation import Sampling
from speech_server import Studio, collected_voices, make_app
from spoken_conversations import Clip, Voice, turns_of
from turn_shards import read_turns

SHORT = Sampling(max_seconds=0.6, max_text_ids=6)
LONG = "This is a sentence of some length, which is spoken in several turns of one speaker. " * 5
ROOT = Path(demo.__file__).parent


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("server") / "full"
    save_model(full_model(), folder)
    return folder


class Running:
    """A server on a free port of this machine, and what asks it."""

    def __init__(self, engine, voices, speaking=4, waiting=20, hosts=()):
        self.engine, self.voices = engine, voices
        self.studio = Studio(engine, speaking, waiting, threads=1)
        own = demo.listen_on("127.0.0.1", 0)
        self.port = own.getsockname()[1]
        app = make_app(engine, voices, self.studio, "tiny", hosts)
        self.server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [own]}, daemon=True)
        self.thread.start()

    def close(self) -> None:
        self.server.should_exit = True
        self.thread.join(20)
        self.studio.close()
        assert not self.thread.is_alive() and not self.studio.thread.is_alive()

    def connect(self, method: str, path: str, body=None, headers=None) -> http.client.HTTPResponse:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        content = json.dumps(body) if isinstance(body, dict) else body
        named = {"Content-Type": "application/json"} if isinstance(body, dict) else {}
        for attempt in range(50):  # the server is about to listen
            try:
                connection.request(method, path, content, named | (headers or {}))
                return connection.getresponse()
            except ConnectionRefusedError:
                time.sleep(0.05 * (attempt < 49))
        raise ConnectionRefusedError

    def ask(self, method: str, path: str, body=None, headers=None) -> tuple[int, bytes]:
        response = self.connect(method, path, body, headers)
        return response.status, response.read()

    def json(self, method: str, path: str, body=None, headers=None):
        status, content = self.ask(method, path, body, headers)
        assert status == 200, content
        return json.loads(content)

    def error(self, path: str, body=None, method="POST", headers=None) -> tuple[int, dict]:
        status, content = self.ask(method, path, body, headers)
        found = json.loads(content)["error"]
        assert set(found) == {"message", "type", "param", "code"} and "\n" not in found["message"]
        return status, found

    def alone(self, text: str, seed: int = 0, heard: str | None = None) -> np.ndarray:
        """What a conversation says, as 16-bit samples."""
        talk = self.engine.conversation(seed)
        if heard:
            talk.add_turn(0, self.voices[heard].text, codes=self.voices[heard].codes)
        return to_pcm16(talk.speak(0, text).samples)

    def idle(self) -> bool:
        deadline = time.monotonic() + 20
        while (self.studio.live or self.studio.waiting or len(self.studio.together)) and time.monotonic() < deadline:
            time.sleep(0.01)
        return not self.studio.live and not self.studio.waiting and not len(self.studio.together)


@pytest.fixture(scope="module")
def engine(checkpoint, tokenizer_folder):
    return Voice(str(checkpoint), str(tokenizer_folder), "cpu", SHORT, 0).load()


@pytest.fixture(scope="module")
def server(engine, shared_data):
    with contextlib.closing(Running(engine, collected_voices(engine, shared_data))) as running:
        yield running


def samples_of(content: bytes) -> np.ndarray:
    return np.frombuffer(content, "<i2")


def until(condition, seconds: float = 20.0):
    """What the condition comes to once it holds."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.001)
    return found


def close_to(found: np.ndarray, expected: np.ndarray) -> bool:
    return len(found) == len(expected) and int(np.abs(found.astype(int) - expected).max(initial=0)) <= 1


def test_speech_is_what_a_conversation_says_in_every_format(server):
    expected = server.alone("Hello there.", seed=3)
    asked = {"model": "tiny", "input": "Hello there.", "seed": 3}
    status, content = server.ask("POST", "/v1/audio/speech", {**asked, "response_format": "pcm"})
    assert status == 200 and close_to(samples_of(content), expected)
    response = server.connect("POST", "/v1/audio/speech", asked)
    content = response.read()
    assert response.headers["content-type"] == "audio/wav" and content[:4] == b"RIFF" and content[8:16] == b"WAVEfmt "
    assert struct.unpack("<IHHIIHH", content[16:36]) == (16, 1, 1, SAMPLE_RATE, 2 * SAMPLE_RATE, 2, 16)
    assert close_to(samples_of(content[44:]), expected)
    for container in ("flac", "mp3"):
        status, content = server.ask("POST", "/v1/audio/speech", {**asked, "response_format": container})
        heard = read_audio(content)[0]
        assert status == 200 and abs(len(heard) - len(expected)) <= (0 if container == "flac" else 4000)
    assert not close_to(server.alone("Hello there.", seed=4), expected)


def test_voices_are_heard_before_what_is_said(server):
    assert server.json("GET", "/v1/voices") == {"voices": ["none", "a", "b"], "replies": True}
    asked = {"input": "Hello there.", "voice": "b", "response_format": "pcm"}
    status, content = server.ask("POST", "/v1/audio/speech", asked)
    assert status == 200 and close_to(samples_of(content), server.alone("Hello there.", heard="b"))


def test_without_collected_voices_any_name_means_the_models_own(engine):
    with contextlib.closing(Running(engine, {})) as running:
        status, content = running.ask(
            "POST", "/v1/audio/speech", {"input": "Hello.", "voice": "alloy", "response_format": "pcm"}
        )
        assert status == 200 and close_to(samples_of(content), running.alone("Hello."))


def test_speakers_sound_as_the_checkpoint_has_it_until_another_voice_is_asked_for(engine, shared_data):
    """As the page asks, with a voice each time; "none" brings the first one back."""
    turns = list(read_turns(shared_data, with_audio=False))
    a, b = engine.clips(shared_data, turns, [choose_clip(turns, name) for name in "ab"])
    own = engine._replace(own_clips=(a, b))
    talks, talk = speech_server.Talks(own, {"b": b}), own.conversation(0)
    for speaker, name, expected in (
        (0, "none", a),
        (0, "none", a),
        (0, "b", b),
        (0, "", b),
        (0, "none", a),
        (1, "alloy", b),
        (2, "", a),
    ):
        before = len(talk.turns)
        talks.with_voice(talk, speaker, name)
        assert torch.equal(talk.voices[speaker].codes, expected.codes)
        assert len(talk.turns) <= before + 1
    assert len(talk.turns) == 5  # none was pinned twice in a row
    with pytest.raises(ValueError, match="no voice 'bela'; the voices: none, b"):
        talks.with_voice(talk, 0, "bela")
    few = engine.conversation(0, max_seconds=0.4)  # its window holds only so many clips
    names = [own.introduce(few, speaker) for speaker in range(20)]
    assert names[:2] == ["a", "b"] and names[-1] is None
    assert len(few.speak(19, "Hello.").codes)


def test_the_model_and_the_page_are_there(server):
    (model,) = server.json("GET", "/v1/models")["data"]
    assert model["id"] == "tiny"
    status, content = server.ask("GET", "/")
    page = content.decode()
    assert status == 200 and "<title>" in page
    assert not re.search(r"https?://", page), "the page must work without a network"


def test_a_voice_is_found_however_its_accents_are_written():
    talk, clip = Mock(voices={}), Clip("Am\u00e9lie", torch.zeros(1, 8), "Hello.")
    speech_server.Talks(None, {"Am\u00e9lie": clip}).with_voice(talk, 0, "Ame\u0301lie")
    talk.add_turn.assert_called_once()


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({}, 400, "input: Field required"),
        ({"input": ""}, 400, "input: String should have at least 1"),
        ({"input": "   "}, 400, "input: String should have at least 1"),
        ({"input": "?!"}, 400, "holds no letter or digit"),
        ({"input": "x" * 4097}, 400, "input: String should have at most 4096"),
        ({"input": 5}, 400, "input: Input should be a valid string"),
        ({"input": "Hi.", "voice": "nobody"}, 400, "no voice 'nobody'; the voices: none, a, b"),
        ({"input": "Hi.", "response_format": "ogg"}, 400, "response_format"),
        ({"input": "Hi.", "speed": 2}, 400, "speed"),
        ({"input": "Hi.", "seed": -1}, 400, "seed"),
        (b"{", 400, "JSON"),
        (b"[]", 400, ""),
        (b"\xff\xfe", 400, ""),
    ],
)
def test_what_cannot_be_asked_is_a_json_error(server, body, status, message):
    headers = {"Content-Type": "application/json"}
    found, error = server.error("/v1/audio/speech", body, headers=headers)
    assert found == status and message in error["message"] and error["type"] == "invalid_request_error"
    assert server.idle()


def test_wrong_addresses_methods_and_sizes_are_json_errors(server):
    assert server.error("/nowhere", method="GET")[0] == 404
    assert server.error("/v1/audio/speech", method="GET")[0] == 405
    assert server.error("/v1/audio/speech", b"x", headers={"Content-Length": str(2**30)})[0] == 413
    assert server.error("/talk/x/hear", b"this is no audio")[0] == 400
    for speaker in ("me", "-1", "100"):
        status, error = server.error(f"/talk/x/hear?speaker={speaker}", b"x")
        assert status == 400 and "speaker" in error["message"]


@pytest.mark.parametrize(("seconds", "rate", "channels"), [(61, SAMPLE_RATE, 1), (30, 192_000, 8), (3600, 8000, 1)])
def test_a_small_file_that_unpacks_to_much_is_refused_unread(server, seconds, rate, channels, monkeypatch):
    packed = io.BytesIO()
    with soundfile.SoundFile(packed, "w", rate, channels, format="FLAC") as file:
        for _ in range(seconds):
            file.write(np.zeros((rate, channels), dtype=np.int16))
    assert len(packed.getvalue()) < speech_server.MOST_BYTES / 10
    monkeypatch.setattr(speech_server, "read_audio", lambda content: pytest.fail("it was unpacked"))
    status, error = server.error("/talk/x/hear", packed.getvalue())
    assert status == 413 and f"{seconds} s of {channels} channels" in error["message"]


def test_a_body_without_a_length_is_refused(server):
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as own:
        head = b"POST /v1/audio/speech HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n"
        own.sendall(head)
        assert own.recv(4096).startswith(b"HTTP/1.1 411")
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as own:  # the length says nothing then
        own.sendall(head.replace(b"Transfer", b"Content-Length: 5\r\nTransfer"))
        assert own.recv(4096).startswith(b"HTTP/1.1 411")


def test_who_asks_by_another_name_is_refused_where_names_are_given(engine):
    """A page elsewhere whose name leads to this machine could else use the server."""
    with contextlib.closing(Running(engine, {}, hosts=demo.LOCAL)) as running:
        for host in ("127.0.0.1", "localhost:8000", "[::1]:8000"):
            assert running.connect("GET", "/v1/models", headers={"Host": host}).status == 200
        for headers in ({"Host": "evil.example"}, {"Origin": "https://evil.example"}, {"Origin": "null"}):
            refused = running.connect("GET", "/v1/models", headers=headers)
            assert refused.status == 403 and b"--names NAME" in refused.read()
        assert running.connect("GET", "/v1/models", headers={"Origin": "http://localhost:8000"}).status == 200
    with contextlib.closing(Running(engine, {}, hosts=(*demo.LOCAL, "Proxy.Example"))) as running:
        assert running.connect("GET", "/v1/models", headers={"Host": "proxy.example"}).status == 200


def test_a_talk_goes_on_from_turn_to_turn_with_words_and_voices(server):
    path = "/talk/one"
    status, said = server.ask("POST", f"{path}/say", {"speaker": 0, "text": "Hello, it is 5.", "voice": "a"})
    assert status == 200 and len(samples_of(said))
    body = encode_pcm16(voice(0.5, 150, rate=SAMPLE_RATE), SAMPLE_RATE, "WAV")
    heard = server.json("POST", f"{path}/hear?speaker=1", body)
    assert isinstance(heard["text"], str)
    assert server.ask("POST", f"{path}/say", {"speaker": 0, "text": None})[0] == 200
    turns = server.json("GET", path)["turns"]
    assert len(turns) == 4  # the clip of the voice too
    assert turns[1]["text"] == "Hello, it is five." and turns[2]["seconds"] == pytest.approx(0.5, abs=0.08)
    assert server.json("GET", "/talk/two")["turns"] == []
    assert server.json("DELETE", path) == {} and server.json("GET", path)["turns"] == []


def test_talks_are_forgotten_when_there_are_too_many(server, monkeypatch):
    monkeypatch.setattr(speech_server, "MOST_TALKS", 2)
    for name in ("x", "y", "z"):
        assert server.ask("POST", f"/talk/{name}/say", {"text": "Hi."})[0] == 200
    assert [len(server.json("GET", f"/talk/{name}")["turns"]) for name in ("x", "y", "z")] == [0, 1, 1]


def test_long_texts_are_spoken_to_their_end(server):
    status, content = server.ask("POST", "/v1/audio/speech", {"input": LONG, "response_format": "pcm"})
    pieces = turns_of(LONG, raw_text=False)
    talk = server.engine.conversation(0)
    expected = np.concatenate([to_pcm16(talk.speak(0, piece).samples) for piece in pieces])
    assert status == 200 and len(pieces) == 3 and close_to(samples_of(content), expected)


def test_a_hundred_at_once_are_served_or_told_to_come_back(server):
    expected = {seed: server.alone("Hello.", seed) for seed in range(5)}

    def ask(number: int):
        return server.ask("POST", "/v1/audio/speech", {"input": "Hello.", "seed": number % 5, "response_format": "pcm"})

    with concurrent.futures.ThreadPoolExecutor(100) as pool:
        found = list(pool.map(ask, range(100)))
    statuses = [status for status, _ in found]
    assert set(statuses) == {200, 429}
    for number, (status, content) in enumerate(found):
        if status == 200:
            assert close_to(samples_of(content), expected[number % 5])
        else:
            assert json.loads(content)["error"]["type"] == "rate_limit_error"
    assert statuses.count(200) >= 20 and server.idle()
    assert ask(0)[0] == 200


@pytest.mark.parametrize("container", ["wav", "pcm", "flac", "mp3"])
def test_who_hangs_up_is_spoken_to_no_longer(server, container):
    asked = json.dumps({"input": LONG * 8, "response_format": container})
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)) as connection:
        connection.request("POST", "/v1/audio/speech", asked, {"Content-Type": "application/json"})
        job = until(lambda: next(iter(server.studio.live), None))
    assert server.idle() and len(job.acts) > 10, "the text was spoken to its end, or nearly"
    assert server.ask("POST", "/v1/audio/speech", {"input": "Hi.", "response_format": "pcm"})[0] == 200


def test_who_hangs_up_while_he_is_heard_has_said_nothing(engine):
    body = encode_pcm16(voice(0.5, 150, rate=SAMPLE_RATE), SAMPLE_RATE, "WAV")
    with contextlib.closing(Running(engine, {})) as running:
        free = threading.Event()
        running.studio.calls.append((lambda: free.wait(20), concurrent.futures.Future()))
        running.studio.woken.set()
        until(lambda: not running.studio.calls and running.server.started)
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", running.port, timeout=60)) as connection:
            connection.request("POST", "/talk/x/hear", body)
            (job,) = until(lambda: list(running.studio.waiting))
        until(lambda: job.cancelled)
        free.set()
        assert running.ask("POST", "/talk/x/say", {"text": "Hi."})[0] == 200 and running.idle()
        assert [turn["text"] for turn in running.json("GET", "/talk/x")["turns"]] == ["Hi."]


def test_who_hangs_up_while_he_sends_his_voice_is_no_error_of_the_server(engine):
    """Raised through the application, it would be a traceback in the log."""
    sent, parts = [], iter([{"type": "http.request", "body": b"RIFF", "more_body": True}, {"type": "http.disconnect"}])
    scope = {"type": "http", "method": "POST", "path": "/talk/x/hear", "query_string": b"", "http_version": "1.1"}
    scope |= {"headers": [(b"content-length", b"1000")], "scheme": "http", "server": ("127.0.0.1", 80), "root_path": ""}

    async def receive() -> dict:
        return next(parts)

    async def send(message: dict) -> None:
        sent.append(message)

    with contextlib.closing(Studio(engine, 1, 1, threads=1)) as studio:
        asyncio.run(make_app(engine, {}, studio, "tiny")(scope, receive, send))
    assert sent[0]["status"] == 499


@pytest.mark.parametrize("container", ["flac", "mp3"])
def test_nothing_said_is_a_file_of_silence(container):
    samples, _ = soundfile.read(io.BytesIO(speech_server.encoded(b"", container)))
    assert len(samples) >= FRAME_SAMPLES and not samples.any()


def test_refused_is_who_is_beyond_those_who_speak_and_those_who_wait(engine):
    with contextlib.closing(Running(engine, {}, speaking=2, waiting=1)) as running:
        free, asked = threading.Event(), {"input": "Hi."}
        running.studio.calls.append((lambda: free.wait(20), concurrent.futures.Future()))
        running.studio.woken.set()
        until(lambda: not running.studio.calls and running.server.started)
        with concurrent.futures.ThreadPoolExecutor() as pool:
            first = [pool.submit(running.ask, "POST", "/v1/audio/speech", asked) for _ in range(3)]
            until(lambda: len(running.studio.waiting) == 3)  # two of them are about to be spoken
            assert running.error("/v1/audio/speech", asked)[0] == 429
            free.set()
            assert [answer.result()[0] for answer in first] == [200] * 3


def test_who_hangs_up_before_the_first_sample_makes_room(engine):
    with contextlib.closing(Running(engine, {}, speaking=1, waiting=0)) as running:
        free = threading.Event()
        running.studio.calls.append((lambda: free.wait(20), concurrent.futures.Future()))
        running.studio.woken.set()
        until(lambda: not running.studio.calls)
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", running.port, timeout=60)) as connection:
            asked = json.dumps({"input": "Hi."})
            until(lambda: running.thread.is_alive() and running.server.started)
            connection.request("POST", "/v1/audio/speech", asked, {"Content-Type": "application/json"})
            (job,) = until(lambda: list(running.studio.waiting))
            assert running.error("/v1/audio/speech", {"input": "Hi."})[0] == 429 and not job.cancelled
        until(lambda: job.cancelled)
        with concurrent.futures.ThreadPoolExecutor() as pool:
            later = pool.submit(running.ask, "POST", "/v1/audio/speech", {"input": "Hi."})
            until(lambda: running.studio.waiting and job not in running.studio.waiting)  # nor are its samples
            free.set()
            assert later.result()[0] == 200
        assert running.idle() and job.conversation is None, "nothing was done for who had left"


def test_who_chooses_no_voice_is_held_to_none(server, monkeypatch):
    jobs, submit, name = [], server.studio.submit, next(iter(server.voices))
    monkeypatch.setattr(server.studio, "submit", lambda job: jobs.append(job) or submit(job))
    for chosen, pinned in ((name, 1), (None, 1), (speech_server.NO_VOICE, 0)):
        assert server.ask("POST", "/talk/plain/say", {"text": "Hi.", "voice": chosen})[0] == 200 and server.idle()
        assert len(jobs[-1].conversation.voices) == pinned


def test_a_voice_that_is_named_every_time_is_heard_once(server):
    name = next(iter(server.voices))
    for text in ("Hi.", "There.", "You."):
        assert server.ask("POST", "/talk/steady/say", {"text": text, "voice": name})[0] == 200 and server.idle()
    assert [turn["text"] for turn in server.json("GET", "/talk/steady")["turns"]][1:] == ["Hi.", "There.", "You."]


def test_an_error_of_the_pass_that_all_share_ends_who_speaks_and_nobody_else(server, monkeypatch):
    draw, speakers = server.studio.together._draw, 2

    def fail(asked):
        if len(asked) < speakers:
            return draw(asked)
        monkeypatch.undo()
        raise MemoryError("no room")

    monkeypatch.setattr(server.studio.together, "_draw", fail)
    with concurrent.futures.ThreadPoolExecutor(speakers) as pool:
        long = {"input": LONG * 8, "response_format": "flac"}
        asked = [pool.submit(server.ask, "POST", "/v1/audio/speech", long) for _ in range(speakers)]
        concurrent.futures.wait(asked)
    for each in asked:  # an error status, or a body that breaks off
        error = each.exception()
        broken = error and isinstance(error, (http.client.IncompleteRead, http.client.RemoteDisconnected))
        assert broken or each.result()[0] == 500, error or each.result()
    assert server.studio.thread.is_alive() and server.idle()
    assert server.ask("POST", "/v1/audio/speech", {"input": "Hi."})[0] == 200


@pytest.mark.parametrize("container", ["wav", "mp3"])
def test_a_response_that_breaks_off_does_not_look_whole(server, monkeypatch, container):
    draw, calls = server.studio.together._draw, []

    def fail_later(asked):
        calls.append(asked)
        if len(calls) > 8:
            raise MemoryError("no room")
        return draw(asked)

    monkeypatch.setattr(server.studio.together, "_draw", fail_later)
    response = server.connect("POST", "/v1/audio/speech", {"input": LONG * 8, "response_format": container})
    assert response.status == 200
    with pytest.raises(http.client.IncompleteRead):
        response.read()
    assert server.idle()


def test_who_interrupts_may_speak_at_once(server):
    """Both requests come while the studio is busy with something else: the interrupted turn ends before the next."""
    asked = json.dumps({"text": LONG * 8})
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)) as connection:
        connection.request("POST", "/talk/cut/say", asked, {"Content-Type": "application/json"})
        connection.getresponse().read(100)
        (job,) = server.studio.live
        free = threading.Event()
        with concurrent.futures.ThreadPoolExecutor() as pool:
            server.studio.calls.append((lambda: free.wait(20), concurrent.futures.Future()))
            until(lambda: not server.studio.calls)
            connection.close()
            until(lambda: job.cancelled)
            next_one = pool.submit(server.ask, "POST", "/talk/cut/say", {"text": "Hi."})
            until(lambda: server.studio.waiting)
            free.set()
            assert next_one.result()[0] == 200


def test_a_turn_of_a_conversation_is_drawn_no_faster_than_it_is_heard(server, monkeypatch):
    monkeypatch.setattr(speech_server, "MOST_AHEAD", 0.3)
    began = time.monotonic()
    status, sound = server.ask("POST", "/talk/slow/say", {"text": LONG * 2})
    assert status == 200 and server.idle()
    seconds = len(sound) / 2 / SAMPLE_RATE
    assert seconds > 1 and time.monotonic() - began > seconds - 0.3 - 0.2


def test_calls_come_one_at_a_round_and_too_many_are_told_to_come_back(engine):
    with contextlib.closing(Running(engine, {}, waiting=2)) as running:
        free, rounds, seen = threading.Event(), [], []
        studio, usual = running.studio, running.studio.together.round
        studio.together.round = lambda resting: rounds.append(1) or usual(resting)
        futures = [concurrent.futures.Future() for _ in range(3)]
        studio.calls.append((lambda: free.wait(20), concurrent.futures.Future()))
        studio.woken.set()
        until(lambda: not studio.calls)
        futures[0].cancel()
        studio.calls.extend((lambda: seen.append(len(rounds)), future) for future in futures)
        status, error = running.error("/talk/x", method="GET")
        assert status == 429 and "wait" in error["message"]
        free.set()
        until(lambda: len(seen) == 2)
        assert seen[1] == seen[0] + 1, "a call that nobody waits for is not made, the others take a round each"
        assert running.json("GET", "/talk/x") == {"turns": []}


def test_a_conversation_that_speaks_is_not_forgotten(server, monkeypatch):
    monkeypatch.setattr(speech_server, "MOST_TALKS", 2)
    with contextlib.closing(server.connect("POST", "/talk/old/say", {"text": LONG * 8})) as response:
        response.read(100)
        for name in ("p", "q"):
            assert server.ask("POST", f"/talk/{name}/say", {"text": "Hi."})[0] == 200
        assert server.studio.live, "the long turn is still spoken"
        status, error = server.error("/talk/old/say", {"text": "Hi."})
        assert status == 400 and "speaks in this conversation already" in error["message"]
    assert server.idle()
    assert server.json("GET", "/talk/p")["turns"] == [] and server.json("GET", "/talk/old")["turns"]


def test_one_conversation_speaks_once_at_a_time(server):
    first = server.connect("POST", "/talk/both/say", {"text": LONG})
    first.read(100)
    status, error = server.error("/talk/both/say", {"text": "Hi."})
    assert status == 400 and "speaks in this conversation already" in error["message"]
    first.read()
    assert server.ask("POST", "/talk/both/say", {"text": "Hi."})[0] == 200


def test_the_script_takes_its_threads_before_the_model(monkeypatch):
    before, seen = torch.get_num_threads(), []
    monkeypatch.setattr(Voice, "load", lambda self: seen.append(torch.get_num_threads()) or int("no model"))
    try:
        assert run(demo.main, ["--mode", "web", "--port", "0", "--threads", "3"]) == EXIT_INPUT
    finally:
        torch.set_num_threads(before)
    assert seen == [3]


def test_the_script_serves_until_it_is_interrupted(checkpoint, tokenizer_folder, shared_data):
    command = [sys.executable, "demo.py", "--mode", "web", "--port", "0", "--checkpoint", checkpoint]
    command += ["--tokenizer", tokenizer_folder, "--data", shared_data, "--max_seconds", "4"]
    with (
        subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process,
        contextlib.ExitStack() as stack,
    ):
        stack.callback(process.kill)  # where a line below fails, nobody waits for ever
        line = process.stdout.readline()
        port = int(re.search(r"http://127\.0\.0\.1:(\d+)/ with 2 voices", line)[1])
        taken = ["--mode", "web", "--port", str(port), "--checkpoint", str(checkpoint)]
        assert run(demo.main, taken) == EXIT_INPUT
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        connection.request(
            "POST", "/v1/audio/speech", json.dumps({"input": "Hi."}), {"Content-Type": "application/json"}
        )
        content = connection.getresponse().read()
        assert content[:4] == b"RIFF"
        with wave.open(io.BytesIO(content)) as file:
            assert file.getframerate() == SAMPLE_RATE
        connection.request(
            "POST", "/v1/audio/speech", json.dumps({"input": LONG * 9}), {"Content-Type": "application/json"}
        )
        connection.getresponse()  # of minutes, and nobody reads it: it ends with the server
        process.send_signal(signal.SIGINT)
        assert process.wait(20) in (0, 130)
        connection.close()
        assert "Traceback" not in process.stderr.read()
