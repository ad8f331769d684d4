"""demo.py: batches are answered whatever is wrong with some, resumed, and the same in several processes; the chat."""

import dataclasses
import errno
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jsonschema
import numpy as np
import pytest
import torch
from conftest import full_model, tiny_model, voice

import demo
import spoken_conversations
import terminal_chat
from architecture import load_model, save_model
from audio import SAMPLE_RATE, read_audio, write_wav
from command_line import EXIT_DONE, EXIT_INPUT, EXIT_PARTIAL, EXIT_STORAGE, run
from generation import Sampling
from spoken_conversations import Voice
from spoken_text import split_text
from terminal_chat import Chat, waveform

SHORT = Sampling(max_seconds=0.5, max_text_ids=6)
ROOT = Path(demo.__file__).parent


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> dict[str, Path]:
    """A model with every addition, and the published one."""
    folder = tmp_path_factory.mktemp("checkpoints")
    save_model(full_model(), folder / "full")
    save_model(tiny_model(), folder / "plain")
    return {name: folder / name for name in ("full", "plain")}


@pytest.fixture
def flags(checkpoints, tokenizer_folder, tmp_path):
    """Flags of a batch of these conversations, written to a file."""

    def make(conversations, checkpoint="full", **named) -> list[str]:
        path = tmp_path / "asked" / "conversations.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({"conversations": conversations}))
        values = {
            "mode": "batch",
            "input": path,
            "checkpoint": checkpoints[checkpoint],
            "tokenizer": tokenizer_folder,
            "out": tmp_path / "out",
            "max_seconds": 0.5,
            **named,
        }
        return [text for name, value in values.items() for text in (f"--{name}", str(value))]

    return make


@pytest.fixture
def clip(tmp_path) -> str:
    """A recording beside the file of conversations."""
    (tmp_path / "asked").mkdir()
    write_wav(tmp_path / "asked" / "ann.wav", voice(0.6, 150, rate=SAMPLE_RATE))
    return "ann.wav"


def summary(out: Path) -> list[dict]:
    return json.loads((out / "summary.json").read_text())["conversations"]


def spoken(text="Hello there.", **changes) -> dict:
    return {"turns": [{"speaker": 0, "text": text}], **changes}


def times_of(out: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in out.rglob("*.wav")}


# ---- batch -----------------------------------------------------------------------------------------------------------


def test_turns_are_spoken_heard_written_down_and_answered(flags, clip, tmp_path, capsys):
    turns = [
        {"speaker": 0, "text": "Who are you?"},
        {"speaker": 1, "audio": clip, "text": "I am Ann.", "gap_seconds": 0.1},
        {"speaker": 1, "audio": clip},
        {"speaker": 0, "gap_seconds": 0.5},
    ]
    talk = {"id": "meeting", "seed": 7, "voices": {"1": {"audio": clip, "text": "This is Ann."}}, "turns": turns}
    assert run(demo.main, flags([talk])) == EXIT_DONE
    (result,) = summary(tmp_path / "out")
    assert (result["id"], result["status"], len(result["turns"])) == ("meeting", "done", 4)
    own, known, written, answer = result["turns"]
    assert own["text"] == "Who are you?"
    assert (known["text"], known["heard"], known["seconds"]) == ("I am Ann.", clip, 0.6)
    assert written["heard"] == clip
    folder = tmp_path / "out" / "meeting"
    lengths = [row["seconds"] for row in result["turns"]]
    for row in (own, answer):
        assert row["file"] is None or len(read_audio(Path(row["file"]))[0]) == round(row["seconds"] * SAMPLE_RATE)
    whole = len(read_audio(folder / "conversation.wav")[0]) / SAMPLE_RATE
    assert whole == pytest.approx(sum(lengths) + 0.1 + 0.3 + 0.5, abs=1e-3)
    said = capsys.readouterr().out
    assert "meeting" in said and "heard" in said


BAD = [
    ({"turns": []}, "turns: "),
    ({"turns": [{"text": "Who?"}]}, "turns/0: 'speaker' is a required property"),
    ({"turns": [{"speaker": -1, "text": "Who?"}]}, "turns/0/speaker: -1 is less than the minimum"),
    ({"turns": [{"speaker": 0, "text": ""}]}, "turns/0/text"),
    ({"turns": [{"speaker": 0, "text": "x" * 20_001}]}, "turns/0/text"),
    ({"turns": [{"speaker": 0, "text": "?!"}]}, "turn 1: text '?!' holds no letter"),
    ({"turns": [{"speaker": 0, "audio": "nowhere.wav", "text": "x"}]}, "nowhere.wav"),
    ({"turns": [{"speaker": 0, "audio": "\0.wav", "text": "x"}]}, "null"),
    ({"turns": [{"speaker": 0, "audio": "\ud800.wav", "text": "x"}]}, "encode"),
    (spoken(id="Summary.json"), "or of the summary"),
    ({"turns": [{"speaker": 0, "audio": "conversations.json", "text": "x"}]}, "turn 1: "),
    ({"turns": [{"speaker": 1.0, "text": "Who?"}]}, "turns/0/speaker: 1.0 is not of type 'integer'"),
    ({"turns": [{"speaker": True, "text": "Who?"}]}, "turns/0/speaker: True is not of type 'integer'"),
    (spoken(seed=3.0), "seed: 3.0 is not of type 'integer'"),
    (spoken(id="../up"), "id: "),
    (spoken(id="up\n"), "id: "),
    (spoken(id="\ud800"), "id: "),
    (spoken(voices={"00": {"audio": "ann.wav", "text": "x"}}), "voices"),
    (spoken(tone="warm"), "'tone'"),
    (spoken(voices={"ann": {}}), "voices"),
    ("Hello.", "is not of type 'object'"),
    (None, "is not of type 'object'"),
]


def test_what_is_wrong_is_named_and_the_rest_is_done(flags, clip, tmp_path, capsys):
    conversations = [spoken(id="first"), *(item for item, _ in BAD), spoken("Goodbye."), spoken(id="FIRST")]
    assert run(demo.main, flags(conversations)) == EXIT_PARTIAL
    results = summary(tmp_path / "out")
    assert [result["index"] for result in results] == list(range(len(BAD) + 3))
    assert [result["status"] for result in results] == ["done", *["failed"] * len(BAD), "done", "failed"]
    reasons = [*(reason for _, reason in BAD), "", "that of an earlier"]
    for result, reason in zip(results[1:], reasons, strict=True):
        assert reason in result.get("reason", ""), result
        assert "\n" not in result.get("reason", "")
    captured = capsys.readouterr()
    assert f"2 conversations done, {len(BAD) + 1} failed" in captured.out
    assert "Traceback" not in captured.err


def test_a_model_that_only_speaks_fails_the_conversations_that_ask_for_more(flags, clip, tmp_path):
    asked = [spoken(), {"turns": [{"speaker": 0}]}, {"turns": [{"speaker": 0, "audio": clip}]}]
    assert run(demo.main, flags(asked, "plain")) == EXIT_PARTIAL
    results = summary(tmp_path / "out")
    assert [result["status"] for result in results] == ["done", "failed", "failed"]
    assert "the model cannot reply" in results[1]["reason"]
    assert "the model cannot listen" in results[2]["reason"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "is not JSON"),
        (b"\xff\xfe\x00", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b"", "is not JSON"),
        (b'{"conversations": [{"turns": [{"speaker": 0, "gap_seconds": NaN}]}]}', "NaN is no number"),
        (b"[]", "must be an object"),
        (b'{"conversations": []}', "must be an object"),
        (b'{"conversations": [{}], "voice": 1}', "must be an object"),
        (b'{"conversations": {"turns": []}}', "must be an object"),
    ],
)
def test_a_file_that_is_none_is_refused_in_one_line(flags, content, message, tmp_path, capsys):
    asked = flags([spoken()])
    (tmp_path / "asked" / "conversations.json").write_bytes(content)
    assert run(demo.main, asked) == EXIT_INPUT
    error = capsys.readouterr().err.strip()
    assert message in error and "\n" not in error
    assert not (tmp_path / "out").exists()


def test_what_lies_there_is_kept_and_what_changed_is_made_anew(flags, clip, tmp_path):
    turns = [{"speaker": 1, "audio": clip, "text": "I am Ann."}, {"speaker": 0, "text": "Oh."}]
    heard = {"id": "heard", "turns": turns}
    asked, out = [spoken(id="one"), spoken("And you?", id="two"), heard], tmp_path / "out"
    assert run(demo.main, flags(asked)) == EXIT_DONE
    before = times_of(out)
    assert run(demo.main, flags(asked)) == EXIT_DONE
    assert times_of(out) == before
    assert [result["status"] for result in summary(out)] == ["kept"] * 3
    first = summary(out)

    (out / "one" / "result.json").unlink()  # stopped before it was done
    write_wav(tmp_path / "asked" / clip, voice(0.7, 150, rate=SAMPLE_RATE))
    assert run(demo.main, flags(asked)) == EXIT_DONE
    assert [result["status"] for result in summary(out)] == ["done", "kept", "done"]
    assert summary(out)[1]["turns"] == first[1]["turns"]
    assert run(demo.main, flags(asked, temperature=0.5)) == EXIT_DONE
    assert [result["status"] for result in summary(out)] == ["done"] * 3
    (out / "two" / "result.json").write_text("{")  # torn
    (out / "two" / "turn-0-speaker-0.wav.partial").write_bytes(b"RI")  # the disk was full
    assert run(demo.main, flags(asked, temperature=0.5)) == EXIT_DONE
    (out / "one" / ".DS_Store").touch()  # a file browser was there
    next((out / "one").glob("turn-*.wav")).unlink()
    assert run(demo.main, flags(asked, temperature=0.5)) == EXIT_DONE
    assert [result["status"] for result in summary(out)] == ["done", "kept", "kept"]


def test_a_clip_is_heard_at_one_level_however_loud_it_is(flags, clip, tmp_path):
    turns = [{"speaker": 1, "audio": clip, "text": "I am Ann."}, {"speaker": 0, "text": "Oh."}]
    samples = np.round(read_audio(tmp_path / "asked" / clip)[0] * 4096) / 32768  # whole numbers, also times four
    said = []
    for gain in (1, 4):
        write_wav(tmp_path / "asked" / clip, gain * samples)
        assert run(demo.main, flags([{"id": "one", "turns": turns}])) == EXIT_DONE
        said.append((tmp_path / "out" / "one" / "turn-2-speaker-0.wav").read_bytes())
    assert said[0] == said[1]


def test_all_files_that_weights_are_read_from_say_which_they_are(tmp_path):
    for name in ("model.safetensors", "transformers-00001-of-00001.safetensors", "config.json", "ckpt.pt", "notes.txt"):
        (tmp_path / name).write_text("a")
    voice = spoken_conversations.Voice(str(tmp_path), "none", "cpu", Sampling(), 0)
    before = voice.identity()
    for name in ("model.safetensors", "transformers-00001-of-00001.safetensors", "config.json", "ckpt.pt"):
        (tmp_path / name).write_text("another")
        assert voice.identity() != before, name
        before = voice.identity()
    (tmp_path / "notes.txt").write_text("another")
    assert voice.identity() == before
    single = dataclasses.replace(voice, checkpoint=str(tmp_path / "ckpt.pt"))
    before = single.identity()
    (tmp_path / "ckpt.pt").write_text("a third")
    assert single.identity() != before


def test_weights_written_anew_change_nothing_others_do(flags, checkpoints, tmp_path):
    asked, out = flags([spoken()]), tmp_path / "out"
    own = shutil.copytree(checkpoints["full"], tmp_path / "own")
    asked[asked.index("--checkpoint") + 1] = str(own)
    for status in ("done", "kept"):
        assert run(demo.main, asked) == EXIT_DONE
        assert [result["status"] for result in summary(out)] == [status]
        weights = (own / "model.safetensors").read_bytes()
        (own / "model.safetensors").write_bytes(weights)
    model = load_model(own)
    with torch.no_grad():
        model.codebook0_head.weight.mul_(0.5)
    save_model(model, own)
    assert run(demo.main, asked) == EXIT_DONE
    assert [result["status"] for result in summary(out)] == ["done"]


def test_a_folder_of_something_else_is_left_alone(flags, tmp_path):
    (tmp_path / "out" / "mine").mkdir(parents=True)
    (tmp_path / "out" / "mine" / "thesis.txt").write_text("years of work")
    assert run(demo.main, flags([spoken(id="mine"), spoken()])) == EXIT_PARTIAL
    results = summary(tmp_path / "out")
    assert [result["status"] for result in results] == ["failed", "done"]
    assert "mine holds thesis.txt, which no batch wrote" in results[0]["reason"]
    assert (tmp_path / "out" / "mine" / "thesis.txt").read_text() == "years of work"


def test_several_processes_say_what_one_says(flags, tmp_path):
    asked = [spoken(f"This is number {number}.", seed=number) for number in range(3)] + [{"turns": []}]
    assert run(demo.main, flags(asked)) == EXIT_PARTIAL
    assert run(demo.main, flags(asked, out=tmp_path / "two", workers=2)) == EXIT_PARTIAL
    for number in range(3):
        one, other = (folder / f"{number:04d}" / "conversation.wav" for folder in (tmp_path / "out", tmp_path / "two"))
        assert one.read_bytes() == other.read_bytes()
    samples = [read_audio(tmp_path / "out" / f"{number:04d}" / "conversation.wav")[0] for number in range(3)]
    assert not np.array_equal(samples[0], samples[1])


def test_a_worker_that_cannot_load_ends_all_with_the_reason(flags, tmp_path, capsys):
    assert run(demo.main, flags([spoken(), spoken()], checkpoint="full", tokenizer=tmp_path, workers=2)) == EXIT_INPUT
    error = capsys.readouterr().err
    assert "error: no rvq_tokenizer at" in error and "Traceback" not in error


def test_a_full_disk_ends_the_batch_and_nothing_is_called_done(flags, tmp_path, monkeypatch, capsys):
    def full(path, samples):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(spoken_conversations, "write_wav", full)
    assert run(demo.main, flags([spoken(id="one")])) == EXIT_STORAGE
    assert "No space left on device" in capsys.readouterr().err
    assert not (tmp_path / "out" / "one" / "result.json").exists()


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_batch_goes_on_where_it_was(flags, workers, number, tmp_path):
    asked = flags([spoken(f"This is number {n}.", seed=n) for n in range(16)], max_seconds=2, min_seconds=2)
    command = [sys.executable, "demo.py", *asked, "--workers", str(workers)]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        deadline = time.monotonic() + 100
        while not any((tmp_path / "out").glob("*/result.json")) and time.monotonic() < deadline:
            time.sleep(0.01)
        os.killpg(process.pid, number)  # as a terminal does: to the workers too
        error = process.stderr.read()
    assert process.returncode == 128 + number, error
    assert "the same command goes on" in error and "Traceback" not in error
    done = {path.parent.name for path in (tmp_path / "out").glob("*/result.json")}
    assert 1 <= len(done) < 16
    assert run(demo.main, asked) == EXIT_DONE
    assert {result["id"] for result in summary(tmp_path / "out") if result["status"] == "kept"} == done


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--mode", "batch"], "--mode batch and --input"),
        (["--input", "x.json"], "--mode batch and --input"),
        (["--mode", "test", "--workers", "0"], "at least 1"),
        (["--mode", "test", "--voice", "x.wav"], "go together"),
        (["--mode", "web", "--voice", "x.wav", "--voice_text", "Hi."], "--voice is not for --mode web"),
        (["--mode", "batch", "--input", "x.json", "--voice", "x.wav", "--voice_text", "Hi."], "not for --mode batch"),
        (["--mode", "sing"], "invalid choice"),
    ],
)
def test_flags_that_cannot_be_are_refused(given, message, capsys):
    with pytest.raises(SystemExit) as end:
        demo.main(given)
    assert end.value.code == EXIT_INPUT
    assert message in capsys.readouterr().err


def test_the_schema_that_is_printed_is_one_and_fits_the_example_of_the_readme(capsys):
    assert demo.main(["--schema"]) == EXIT_DONE
    schema = json.loads(capsys.readouterr().out)
    jsonschema.Draft202012Validator.check_schema(schema)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    example = readme.split("```json\n", 1)[1].split("```", 1)[0]
    jsonschema.validate(json.loads(example), schema)
    for item, _ in BAD[:5]:
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({"conversations": [item]}, schema)


@pytest.mark.parametrize("raw", [False, True])
def test_long_texts_are_spoken_in_turns_of_their_speaker_and_numbers_in_words(flags, raw, tmp_path):
    text = "It is 5 o'clock, and we are late. " * 10
    asked = flags([{"turns": [{"speaker": 1, "text": text}]}], "plain", max_seconds=0.3)
    assert run(demo.main, asked + ["--raw_text"] * raw) == EXIT_DONE
    (row,) = summary(tmp_path / "out")[0]["turns"]
    assert row["text"] == (text if raw else text.replace("5", "five")).strip()
    pieces = split_text(row["text"], spoken_conversations.MOST_CHARACTERS)
    assert len(pieces) == 2
    assert row["seconds"] == pytest.approx(len(pieces) * 0.24)
    assert not row["ended_by_itself"]


def test_a_voice_of_single_sentences_speaks_one_a_turn_and_none_is_lost(flags, checkpoints, tmp_path):
    own = shutil.copytree(checkpoints["plain"], tmp_path / "own")
    (own / "speaking.json").write_text(json.dumps({"sampling": {"one_sentence": True}, "notes": ""}))
    turns = [{"speaker": 1, "text": "It is 3.50. Is it late? Yes!"}]
    asked = flags([{"turns": turns}], "plain", max_seconds=0.3, min_seconds=0.3)
    asked[asked.index("--checkpoint") + 1] = str(own)
    assert run(demo.main, asked) == EXIT_DONE
    (row,) = summary(tmp_path / "out")[0]["turns"]
    assert row["text"] == "It is three point five zero. Is it late? Yes!"
    assert row["seconds"] == pytest.approx(3 * 0.24)


# ---- chat ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def chat(checkpoints, tokenizer_folder, shared_data, tmp_path):
    """A chat and what it says."""

    def start(checkpoint="full", sampling=SHORT):
        engine = Voice(str(checkpoints[checkpoint]), str(tokenizer_folder), "cpu", sampling, 0).load()
        said: list[str] = []
        (tmp_path / "chat").mkdir(exist_ok=True)
        return Chat(engine, tmp_path / "chat", shared_data, play=False, say=said.append), said

    return start


def test_lines_are_spoken_by_the_current_speaker_and_written(chat, tmp_path):
    talk, said = chat()
    assert talk.run(iter(["At 10:30 or 10:45.", "", "1: And you?", "Fine.", "/quit", "Never said."])) == EXIT_DONE
    assert [line for line in said if line.startswith("speaker")] == [
        "speaker 0: At ten thirty or ten forty-five.",
        "speaker 1: And you?",
        "speaker 1: Fine.",
    ]
    files = sorted((tmp_path / "chat").glob("*.wav"))
    assert [file.name for file in files] == ["001-speaker-0.wav", "002-speaker-1.wav", "003-speaker-1.wav"]
    assert sum("real-time factor" in line for line in said) == 3
    assert len(talk.talk.turns) == 3
    chat()[0].run(iter(["Once more."]))  # another day
    assert len(sorted((tmp_path / "chat").glob("*.wav"))) == 4


def test_a_saved_chat_goes_on_where_it_was(chat, tmp_path):
    one, _ = chat()
    one.run(iter(["Hello.", "/reply", f"/save {tmp_path / 'talk'}", "And now?"]))
    other, said = chat()
    other.run(iter(["Something else.", f"/load {tmp_path / 'talk'}", "And now?"]))
    assert f"2 turns from {tmp_path / 'talk'}" in said
    assert one.talk.turns[-1].codes.equal(other.talk.turns[-1].codes)


def test_the_same_seed_says_the_same_after_a_reset(chat):
    talk, _ = chat()
    codes = []
    for seed in (5, 5, 6):
        talk.run(iter(["/reset", f"/seed {seed}", "Hello there, how are you?"]))
        codes.append(talk.talk.turns[-1].codes)
    assert codes[0].equal(codes[1]) and not codes[0].equal(codes[2])


def test_voices_are_clips_of_the_data_or_files_and_outlive_a_reset(chat, tmp_path):
    write_wav(tmp_path / "my clip.wav", voice(0.5, 200, rate=SAMPLE_RATE))
    talk, said = chat()
    talk.run(iter(["/voice", "/voice a", f'1: /voice "{tmp_path / "my clip.wav"}" Good day.', "/reset"]))
    talk.run(iter([f'/voice "{tmp_path / "my clip.wav"}" Good day.', "/reset"]))
    assert any(line.strip() == "test:a: no style" for line in said)
    assert any(line.startswith("speaker 0 sounds like test:a: turn ") for line in said)
    assert any(line.endswith("my clip.wav: Good day.") for line in said)
    assert sorted(talk.voices) == [0, 1]
    assert len(talk.talk.turns) == 2


def test_what_is_heard_joins_the_conversation(chat, tmp_path):
    write_wav(tmp_path / "clip.wav", voice(0.5, 200, rate=SAMPLE_RATE))
    talk, said = chat()
    talk.run(iter([f"/listen {tmp_path / 'clip.wav'} Good day.", f"/listen {tmp_path / 'clip.wav'}", "/reply 1"]))
    assert "speaker 0 (heard, 0.5 s): Good day." in said
    assert len(talk.talk.turns) == 3
    assert not any(line.startswith("error") for line in said)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/sing", "unknown command /sing"),
        ("/seed x", "expected a whole number"),
        ("/reply -1", "expected a whole number"),
        ("/load", "expected /load FILE"),
        ("/load nowhere", "no conversation at nowhere"),
        ("/save", "expected /save FILE"),
        ("/listen", "expected /listen FILE"),
        ("/listen nowhere.wav", "nowhere.wav"),
        ("/voice nobody", "holds no voice 'nobody'"),
        ("/voice a sad", "has no clip in the style 'sad', but in: no style"),
        ("/style sad", "needs a voice of the collected data"),
        ("?!", "holds no letter"),
    ],
)
def test_a_line_that_cannot_be_is_one_line_of_error_and_the_chat_goes_on(chat, line, message):
    talk, said = chat()
    talk.run(iter([line, "Hello."]))
    errors = [text for text in said if text.startswith("error")]
    assert len(errors) == 1 and message in errors[0] and "\n" not in errors[0]
    assert "speaker 0: Hello." in said


def test_a_voice_file_needs_its_text(chat, tmp_path):
    write_wav(tmp_path / "clip.wav", voice(0.5, 200, rate=SAMPLE_RATE))
    talk, said = chat()
    talk.run(iter([f"/voice {tmp_path / 'clip.wav'}"]))
    assert "needs what is said in it" in said[0]


def test_ctrl_c_interrupts_the_speaker_and_what_was_said_is_kept(chat, monkeypatch):
    talk, said = chat("plain", Sampling(max_seconds=16.0, min_seconds=16.0))
    decode, decoded = talk.engine.tokenizer.decode_frames, itertools.count()

    def decode_frames(*given):
        """Ctrl-C comes while the fifth frame is decoded, however fast the machine is."""
        if next(decoded) == 5:
            os.kill(os.getpid(), signal.SIGINT)
        return decode(*given)

    monkeypatch.setattr(talk.engine.tokenizer, "decode_frames", decode_frames)
    assert talk.run(iter(["Hello."])) == EXIT_DONE
    assert any("interrupted" in line for line in said)
    n_frames = len(talk.talk.turns[-1].codes)
    assert 0 < n_frames < 200
    talk.run(iter(["/reset", "/help"]))
    assert said[-1] == terminal_chat.HELP


def test_ctrl_c_at_the_prompt_ends_the_chat_at_the_second_time_only(chat, monkeypatch):
    """A moment earlier it would have interrupted the speaker."""
    talk, said = chat("plain")
    typed = iter([KeyboardInterrupt, "/help", KeyboardInterrupt, KeyboardInterrupt])

    def answer(prompt):
        if (line := next(typed)) is KeyboardInterrupt:
            raise KeyboardInterrupt
        return line

    monkeypatch.setattr("builtins.input", answer)
    with pytest.raises(KeyboardInterrupt):
        talk.run(demo.typed_lines(talk))
    assert [said[0], said[2]] == [said[0]] * 2 and "/save FILE keeps the conversation" in said[0]
    assert said[1] == terminal_chat.HELP and not list(typed)


def test_ctrl_c_while_something_is_heard_stops_that_alone(chat, monkeypatch):
    talk, said = chat()

    def stopped(rest):
        raise KeyboardInterrupt

    monkeypatch.setattr(talk, "do_record", stopped)
    assert talk.run(iter(["/record 5", "/help"])) == EXIT_DONE
    assert said == ["stopped", terminal_chat.HELP]


def test_a_waveform_shows_where_it_is_loud():
    samples = np.concatenate((np.zeros(6000), 0.05 * np.ones(6000), 0.5 * np.ones(12_000))).astype(np.float32)
    picture = waveform(samples)
    assert len(picture) == 60
    assert set(picture[:15]) == {" "} and set(picture[30:]) == {"█"}
    assert picture[20] in "▁▂"
    assert waveform(np.zeros(100, dtype=np.float32)) == " " * 60
    assert waveform(np.zeros(0, dtype=np.float32)) == ""


def test_lines_may_be_piped_into_the_script(checkpoints, tokenizer_folder, tmp_path):
    command = [sys.executable, "demo.py", "--checkpoint", checkpoints["plain"], "--tokenizer", tokenizer_folder]
    command += ["--out", tmp_path / "chat", "--max_seconds", "0.4", "--no-play"]
    done = subprocess.run(command, cwd=ROOT, input="Hello.\n/sing\n", capture_output=True, text=True, timeout=120)
    assert done.returncode == EXIT_DONE, done.stderr
    assert "speaker 0: Hello." in done.stdout and "error: unknown command /sing" in done.stdout
    assert (tmp_path / "chat" / "001-speaker-0.wav").is_file()
