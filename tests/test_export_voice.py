"""A voice to pass on: half the size, loads everywhere, speaks as it says, and says where it comes from."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import full_model, tiny_tokenizer

import demo
import export_voice
from architecture import load_model, save_model
from command_line import EXIT_DONE, EXIT_INPUT, run
from generation import SPEAKING, VOICES, Sampling, check_tokenizer, read_speaking
from rvq_tokenizer import load_tokenizer, save_tokenizer
from turn_shards import read_turns


@pytest.fixture
def trained(tmp_path, shared_data):
    """A run of train.py and its tokenizer, as flags."""
    tokenizer = tiny_tokenizer()
    save_tokenizer(tokenizer, tmp_path / "tokenizer")
    save_model(full_model(audio_tokenizer=tokenizer.fingerprint()), tmp_path / "run")
    environment = {"command": "train.py --max_steps 7", "commit": "abc1234", "device": "a cpu", "threads": 1}
    settings = {"train": {"max_steps": 7, "seed": 3}, "environment": environment}
    (tmp_path / "run" / "settings.json").write_text(json.dumps(settings))
    spoken = {"step": 6, "spoken/wer": 0.123, "val/codebook0": 2.5}
    (tmp_path / "run" / "metrics.jsonl").write_text(json.dumps(spoken) + "\n")
    folders = {"checkpoint": tmp_path / "run", "tokenizer": tmp_path / "tokenizer", "data": shared_data}
    return [text for name, path in folders.items() for text in (f"--{name}", str(path))]


def test_an_exported_voice_is_the_trained_one_in_half_the_size(trained, tmp_path):
    out = tmp_path / "voice"
    assert (
        run(
            export_voice.main,
            [
                *trained,
                "--out",
                str(out),
                "--codebooks",
                "2",
                "--temperature",
                "0.5",
                "--notes",
                "It reads numbers.",
                "--text_per_chunk",
                "200",
            ],
        )
        == EXIT_DONE
    )
    model, tokenizer = load_model(out), load_tokenizer(out / "tokenizer")
    check_tokenizer(model.config, tokenizer)
    before = load_model(tmp_path / "run")
    assert (model.config.text_per_chunk, before.config.text_per_chunk) == (200, 3)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, before.state_dict()[name], rtol=1e-3, atol=1e-6)
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (out, tmp_path / "run")]
    assert sizes[0] < 0.7 * sizes[1]
    card = (out / "README.md").read_text()
    assert read_speaking(out).notes == "It reads numbers." and "It reads numbers." in card
    for fact in ("train.py --max_steps 7", "abc1234", "a cpu", "0.123", "CC0-1.0", "| model | 7 | 3 |"):
        assert fact in card


def test_tensors_that_a_voice_does_not_use_take_a_quarter(trained, tmp_path):
    flags = ["--out", str(tmp_path / "voice"), "--codebooks", "1", "--float8"]
    assert run(export_voice.main, [*trained, *flags, "depth_heads"]) == EXIT_DONE
    exported, before = (load_model(tmp_path / name).depth_heads for name in ("voice", "run"))
    torch.testing.assert_close(exported, before, rtol=0.13, atol=1e-4)
    assert run(export_voice.main, [*trained, *flags, "no_such_tensor"]) == EXIT_INPUT


def test_the_demo_speaks_as_the_voice_says_unless_told_otherwise(trained, tmp_path):
    out = tmp_path / "voice"
    run(export_voice.main, [*trained, "--out", str(out), "--codebooks", "2", "--temperature", "0.5"])
    told = demo.voice_of(demo.parse_flags(["--checkpoint", str(out)]))
    assert (told.sampling.codebooks, told.sampling.temperature) == (2, 0.5)
    assert told.tokenizer == str(out / "tokenizer")
    flags = ["--checkpoint", str(out), "--temperature", "0", "--codebooks", "1", "--tokenizer", "elsewhere"]
    other = demo.voice_of(demo.parse_flags(flags))
    assert (other.sampling.codebooks, other.sampling.temperature, other.tokenizer) == (1, 0.0, "elsewhere")
    assert read_speaking(tmp_path) == ({}, "", ())
    plain = demo.voice_of(demo.parse_flags(["--checkpoint", str(tmp_path)]))
    assert (plain.sampling.temperature, plain.sampling.codebooks) == (Sampling.temperature, None)
    (out / SPEAKING).write_text('{"loudness": 3}')
    assert run(demo.main, ["--checkpoint", str(out), "--mode", "test", "--out", str(tmp_path / "demo")]) == EXIT_INPUT


def test_the_card_of_the_best_weights_has_their_step_and_their_figures(trained, tmp_path):
    (tmp_path / "run" / "best.json").write_text('{"step": 3, "values": {"spoken/wer": 0.1}}')
    with open(tmp_path / "run" / "metrics.jsonl", "w") as log:
        for step, wer in ((2, 0.125), (6, 0.875)):
            log.write(json.dumps({"step": step, "spoken/wer": wer, "val/loss": 5.0}) + "\n")
    run(export_voice.main, [*trained, "--out", str(tmp_path / "voice")])
    card = (tmp_path / "voice" / "README.md").read_text()
    assert "| spoken/wer | 0.125 |" in card and "0.875" not in card and "| model | 3 of " in card


def test_the_card_names_what_the_weights_began_with(trained, tmp_path):
    assert run(export_voice.main, [*trained, "--out", str(tmp_path / "voice")]) == EXIT_DONE
    assert ", trained from scratch by this repository." in (tmp_path / "voice" / "README.md").read_text()
    (tmp_path / "run" / "settings.json").write_text('{"init_from": "sesame/csm-1b"}')
    assert run(export_voice.main, [*trained, "--out", str(tmp_path / "voice")]) == EXIT_DONE
    card = (tmp_path / "voice" / "README.md").read_text()
    assert ", trained by this repository, the model further from sesame/csm-1b." in card and "scratch" not in card


def test_the_card_has_the_training_of_the_codes_before_that_of_their_decoder(trained, tmp_path):
    codes = {"max_steps": 9, "seed": 0, "init_from": "", "environment": {"command": "train_tokenizer.py --max_steps 9"}}
    decoder = {"max_steps": 4, "seed": 0, "keep_codes": True, "init_from": str(tmp_path / "codes")}
    for name, settings in (("codes", codes), ("tokenizer", decoder)):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "settings.json").write_text(json.dumps(settings))
    assert run(export_voice.main, [*trained, "--out", str(tmp_path / "voice")]) == EXIT_DONE
    card = (tmp_path / "voice" / "README.md").read_text()
    assert card.index("| tokenizer | 9 |") < card.index("| its decoder | 4 |")
    assert "    train_tokenizer.py --max_steps 9" in card and "trained from scratch" in card


def test_what_would_be_overwritten_or_not_be_spoken_is_refused(trained, tmp_path, capsys):
    for flags, message in (
        (["--out", str(tmp_path)], "would overwrite"),
        (["--out", str(tmp_path / "run")], "would overwrite"),
        (["--out", str(tmp_path / "tokenizer")], "would overwrite"),
        (["--out", str(tmp_path / "voice"), "--codebooks", "99"], "codebooks=99 must be at most the tokenizer's 4"),
    ):
        before = sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*.safetensors"))
        assert run(export_voice.main, [*trained, *flags]) == EXIT_INPUT
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
        assert before == sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*.safetensors"))


def test_what_cannot_be_exported_is_refused_in_one_line(trained, tmp_path, capsys):
    save_tokenizer(tiny_tokenizer(seed=1), tmp_path / "tokenizer")
    assert run(export_voice.main, [*trained, "--out", str(tmp_path / "voice")]) == EXIT_INPUT
    assert "another tokenizer" in capsys.readouterr().err
    assert not (tmp_path / "voice").exists()
    tokenizer = tiny_tokenizer()
    save_tokenizer(tokenizer, tmp_path / "tokenizer")
    broken = full_model(audio_tokenizer=tokenizer.fingerprint())
    with torch.no_grad():
        next(broken.parameters()).fill_(1e6)
    save_model(broken, tmp_path / "run")
    assert run(export_voice.main, [*trained, "--out", str(tmp_path / "voice")]) == EXIT_INPUT
    error = capsys.readouterr().err
    assert "float16" in error and error.count("\n") == 1


def with_facts(monkeypatch, **facts):
    """Let the collected turns have other facts."""
    changed = lambda *given: [dataclasses.replace(turn, **facts) for turn in read_turns(*given)]  # noqa: E731
    monkeypatch.setattr(export_voice, "read_turns", lambda data, with_audio: changed(data, with_audio))


def test_a_voice_goes_with_its_clips_and_speaks_like_them(trained, tmp_path, monkeypatch):
    with_facts(monkeypatch, redistributable=True)
    out = tmp_path / "voice"
    flags = [*trained, "--out", str(out), "--voices", "b", "a"]
    for _ in range(2):  # the second one takes the place of the first
        assert run(export_voice.main, flags) == EXIT_DONE
    assert read_speaking(out).voices == ("b", "a")
    clips = list(read_turns(out / VOICES, with_audio=False))
    assert {turn.speaker_id for turn in clips} == {"test:a", "test:b"}
    monkeypatch.chdir(tmp_path)  # there is no data/ here
    assert "| test:a |" in (out / "README.md").read_text()
    engine = demo.voice_of(demo.parse_flags(["--checkpoint", str(out)])).load()
    assert [clip.name for clip in engine.own_clips] == ["b", "a"]
    talk = engine.conversation(0, max_seconds=0.4)
    assert [engine.introduce(talk, speaker) for speaker in (0, 1, 0, 2)] == ["b", "a", None, "b"]
    assert sorted(talk.voices) == [0, 1, 2] and torch.equal(talk.voices[1].codes, engine.own_clips[1].codes)
    requests = {"conversations": [{"id": "two", "turns": [{"speaker": 1, "text": "Hello."}]}]}
    (tmp_path / "talks.json").write_text(json.dumps(requests))
    said = []
    for name in ("with", "without"):
        if name == "without":
            speaking = json.loads((out / SPEAKING).read_text())
            (out / SPEAKING).write_text(json.dumps(speaking | {"voices": []}))
        batch = ["--mode", "batch", "--input", "talks.json", "--checkpoint", str(out), "--out", "spoken"]
        assert run(demo.main, [*batch, "--max_seconds", "0.4"]) == EXIT_DONE  # made anew: what it hangs on has changed
        said.append((tmp_path / "spoken" / "two" / "conversation.wav").read_bytes())
    assert said[0] != said[1]


def test_only_clips_that_may_be_passed_on_go_with_it(trained, tmp_path, capsys, monkeypatch):
    flags = [*trained, "--out", str(tmp_path / "voice"), "--voices", "a"]
    assert run(export_voice.main, flags) == EXIT_INPUT
    assert "no clip of test:a is marked as redistributable (licence: CC0-1.0" in capsys.readouterr().err
    assert not (tmp_path / "voice").exists()
    assert run(export_voice.main, [*flags[:-1], "nobody"]) == EXIT_INPUT
    everything = list(read_turns(Path(trained[-1]), with_audio=True))
    free = next(turn.utt_id for turn in everything if turn.speaker_id == "test:a")
    marked = [dataclasses.replace(turn, redistributable=turn.utt_id == free) for turn in everything]
    monkeypatch.setattr(export_voice, "read_turns", lambda data, with_audio: marked)
    assert run(export_voice.main, flags) == EXIT_DONE
    monkeypatch.undo()
    assert [turn.utt_id for turn in read_turns(tmp_path / "voice" / VOICES, with_audio=False)] == [free]


def test_clips_of_an_earlier_export_go_and_what_else_lies_there_stays(trained, tmp_path, capsys, monkeypatch):
    with_facts(monkeypatch, redistributable=True)
    out = tmp_path / "voice"
    assert run(export_voice.main, [*trained, "--out", str(out), "--voices", "a"]) == EXIT_DONE
    (tmp_path / "wrong").mkdir()
    assert run(export_voice.main, [*trained, "--out", str(out), "--voices", "b", "--tokenizer", "wrong"]) == EXIT_INPUT
    demo.voice_of(demo.parse_flags(["--checkpoint", str(out)])).load()  # whole, as before
    assert run(export_voice.main, [*trained, "--out", str(out)]) == EXIT_DONE
    assert not (out / VOICES).exists()
    (out / VOICES).mkdir()
    (out / VOICES / "mine.wav").write_bytes(b"precious")
    capsys.readouterr()
    assert run(export_voice.main, [*trained, "--out", str(out), "--voices", "a"]) == EXIT_INPUT
    assert "holds what no export wrote" in capsys.readouterr().err and (out / VOICES / "mine.wav").is_file()


@pytest.mark.parametrize("damage", ["gone", "another", "no name"])
def test_clips_that_are_not_as_the_weights_say_are_told(trained, tmp_path, capsys, monkeypatch, damage):
    with_facts(monkeypatch, redistributable=True)
    out = tmp_path / "voice"
    assert run(export_voice.main, [*trained, "--out", str(out), "--voices", "a"]) == EXIT_DONE
    speaking = json.loads((out / SPEAKING).read_text())
    if damage == "gone":
        shutil.rmtree(out / VOICES)
    else:
        (out / SPEAKING).write_text(json.dumps(speaking | {"voices": ["nobody"] if damage == "another" else 5}))
    assert run(demo.main, ["--mode", "test", "--checkpoint", str(out), "--out", str(tmp_path / "said")]) == EXIT_INPUT
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert ("does not say how to speak" if damage == "no name" else "lacks clips that speaking.json beside it") in error
