"""terminal_chat.py: sound devices that are missing or fail end no conversation; voices and who speaks are saved."""

import sys
import types

import numpy as np
import pytest
from conftest import full_model, voice

from audio import SAMPLE_RATE, write_wav
from command_line import EXIT_DONE
from conversation_state import load_conversation, save_conversation
from conversations import choose_clip
from generation import Sampling
from inference_model import InferenceModel
from spoken_conversations import Engine, Voice
from terminal_chat import Chat
from text_tokenizer import ByteTokenizer
from turn_shards import read_turns

TEXT = ByteTokenizer()
SHORT = Sampling(max_seconds=0.5, min_seconds=0.5, max_text_ids=6)


@pytest.fixture
def chat(tokenizer, shared_data, tmp_path):
    """A chat and what it says."""
    inference = InferenceModel(full_model(max_positions=1024))

    def start(play=False):
        said: list[str] = []
        (tmp_path / "chat").mkdir(exist_ok=True)
        engine = Engine(inference, tokenizer, TEXT, Voice("", "", "cpu", SHORT, 0))
        return Chat(engine, tmp_path / "chat", shared_data, play, said.append), said

    return start


class PortAudioError(Exception):
    """As that of sounddevice: of no kind that the chat could know."""


class Device(types.ModuleType):
    """A stand-in for the package sounddevice that fails where it is told to."""

    PortAudioError = PortAudioError

    def __init__(self, *fails: str):
        super().__init__("sounddevice")
        self.fails, self.played = fails, []
        device = self

        class OutputStream:
            def __init__(self, **form):
                device.attempt("open")

            def __enter__(self):
                return self

            def __exit__(self, *exception):
                pass

            def write(self, samples: np.ndarray) -> None:
                device.played.append(len(samples))
                device.attempt("write")

        self.OutputStream = OutputStream

    def attempt(self, what: str) -> None:
        if what in self.fails:
            raise PortAudioError(f"Error at {what} [PaErrorCode -1]")

    def query_devices(self, kind: str) -> None:
        self.attempt(kind)

    def rec(self, n: int, **form) -> np.ndarray:
        self.attempt("rec")
        return voice(n / SAMPLE_RATE, 150, rate=SAMPLE_RATE)[:, None]

    def wait(self) -> None:
        self.attempt("wait")


def test_no_reply_is_overwritten_however_many_there_are(chat, tmp_path):
    (tmp_path / "chat").mkdir()
    for name in ("999-speaker-0.wav", "1000-speaker-0.wav", "my-speaker-1.wav"):
        (tmp_path / "chat" / name).touch()
    talk, _ = chat()
    assert talk.run(iter(["Hello."])) == EXIT_DONE
    assert (tmp_path / "chat" / "1001-speaker-0.wav").stat().st_size


@pytest.mark.parametrize(
    ("fails", "note"),
    [
        ("output", "no sound device"),
        ("open", "does not play (Error at open"),
        ("write", "does not play (Error at write"),
    ],
)
def test_a_device_that_does_not_play_is_said_once_and_replies_are_written(chat, monkeypatch, tmp_path, fails, note):
    device = Device(fails)
    monkeypatch.setitem(sys.modules, "sounddevice", device)
    talk, said = chat(play=True)
    assert talk.run(iter(["Hello.", "And you?"])) == EXIT_DONE
    notes = [line for line in said if "written to files only" in line]
    assert len(notes) == 1 and note in notes[0]
    assert len(talk.talk.turns) == 2 and not any(line.startswith("error") for line in said)
    assert [path.name for path in sorted((tmp_path / "chat").iterdir())] == ["001-speaker-0.wav", "002-speaker-0.wav"]
    assert len(device.played) == (fails == "write")


def test_a_device_that_plays_is_given_every_sample(chat, monkeypatch):
    device = Device()
    monkeypatch.setitem(sys.modules, "sounddevice", device)
    talk, _ = chat(play=True)
    talk.run(iter(["Hello."]))
    assert sum(device.played) == round(0.48 * SAMPLE_RATE)


@pytest.mark.parametrize("fails", ["input", "rec", "wait"])
def test_recording_without_a_microphone_is_one_line_and_the_conversation_goes_on(chat, monkeypatch, fails):
    monkeypatch.setitem(sys.modules, "sounddevice", Device(fails, "output"))
    talk, said = chat()
    assert talk.run(iter(["Hello.", "/record 0.5", "And you?"])) == EXIT_DONE
    (error,) = [line for line in said if line.startswith("error")]
    assert "microphone" in error and "\n" not in error
    assert len(talk.talk.turns) == 2


def test_a_microphone_is_heard_where_nothing_plays(chat, monkeypatch):
    monkeypatch.setitem(sys.modules, "sounddevice", Device("output"))
    talk, said = chat()
    talk.run(iter(["/record 0.5"]))
    assert len(talk.talk.turns) == 1 and said[-1].startswith("speaker 0 (heard, 0.5 s): ")


def test_voices_speaker_and_seed_come_back_from_a_file(chat, tmp_path):
    clip, file = tmp_path / "clip.wav", tmp_path / "talk"
    write_wav(clip, voice(0.5, 200, rate=SAMPLE_RATE))
    one, _ = chat()
    one.run(iter(["/voice a", f"1: /voice {clip} Good day.", "/seed 5", "Hello.", f"/save {file}"]))
    other, said = chat()
    other.run(iter([f"/load {file}", "/reset"]))
    assert (other.speaker, other.seed) == (1, 5)
    assert other.voices == one.voices == {0: "test:a", 1: str(clip)}
    assert said[-1] == f"a new conversation; voices: test:a, {clip}"
    for mine, theirs in zip(other.talk.turns, one.talk.turns[:2], strict=True):
        assert mine.codes.equal(theirs.codes) and mine.text_ids == theirs.text_ids
    other.run(iter(["0: /style no style"]))
    assert "has no clip in the style 'no style'" in said[-1]


@pytest.mark.filterwarnings("ignore:.*oldest turns left")
def test_a_voice_outlives_a_long_conversation(chat, tmp_path):
    talk, _ = chat()
    talk.run(iter(["/voice a", *["What a long sentence this is, is it not?"] * 20]))
    assert len(talk.talk.turns) < 21
    assert list(talk.talk.voices) == [0] and talk.talk.turns[0] is talk.talk.voices[0]


@pytest.mark.parametrize(
    "notes", [{"seed": None}, {"seed": "x"}, {"voices": [1]}, {"voices": {"ann": "Ann"}}, {"speaker": {}}]
)
def test_notes_that_cannot_be_are_refused_and_change_nothing(chat, tmp_path, notes):
    talk, said = chat()
    talk.run(iter(["Hello."]))
    save_conversation(talk.talk, tmp_path / "talk", notes)
    talk.run(iter(["1: And you?", f"/load {tmp_path / 'talk'}"]))
    assert said[-1].startswith("error: ") and "is damaged (notes of the chat" in said[-1] and "\n" not in said[-1]
    assert (talk.speaker, talk.seed, len(talk.talk.turns)) == (1, 0, 2)


def test_a_file_without_notes_leaves_speaker_and_seed(chat, tmp_path):
    talk, _ = chat()
    talk.run(iter(["1: Hello.", "/seed 4"]))
    save_conversation(talk.talk, tmp_path / "talk")
    talk.run(iter([f"/load {tmp_path / 'talk'}"]))
    assert (talk.speaker, talk.seed, talk.voices) == (1, 4, {})
    parts = talk.engine.model, talk.engine.tokenizer, TEXT
    assert len(load_conversation(tmp_path / "talk", *parts).turns) == 1


def test_speakers_sound_as_the_checkpoint_has_it_and_take_its_styles(chat, shared_data):
    talk, said = chat()
    turns = list(read_turns(shared_data, with_audio=False))
    clips = talk.engine.clips(shared_data, turns, [choose_clip(turns, name) for name in "ba"])
    talk.engine = talk.engine._replace(own_clips=tuple(clips))
    talk.run(iter(["Hello.", "1: And you?", "Fine.", "2: /style sad"]))
    assert [line for line in said if "sounds like" in line] == [
        "speaker 0 sounds like b; /voice lists others",
        "speaker 1 sounds like a; /voice lists others",
        "speaker 2 sounds like b; /voice lists others",
    ]
    assert said[-1].startswith("error: test:b has no clip in the style 'sad', but in: no style")
    assert [talk.talk.voices[speaker].codes.tolist() for speaker in (0, 1)] == [clip.codes.tolist() for clip in clips]
