import collections
import contextlib
import errno
import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
from conftest import turn_record

import collect_data
import speech_sources
import synthetic_voices
from audio import write_wav
from collect_data import Rules, Source, Unit, UnitResult, apply_rules, fill_all, main
from command_line import (
    EXIT_BUSY,
    EXIT_DONE,
    EXIT_INPUT,
    EXIT_MISSING,
    EXIT_PARTIAL,
    EXIT_STORAGE,
    StopSignals,
    default_part,
    only_run_in,
    run,
)
from conversation_formats import Recording
from conversations import choose_clip, split_of
from speech_sources import grouped_by_voice
from turn_shards import Collection, ShardWriter, make_turn, read_ledger, read_turns

ROOT = Path(__file__).resolve().parent.parent
RATE = 16_000
TEXT = "We are going home now."


def voice_like(seed, seconds=1.2):
    """Noise-modulated tone, loud enough to pass the checks; every seed gives other samples."""
    generator = np.random.default_rng(seed)
    moments = np.arange(int(seconds * RATE)) / RATE
    tone = np.sin(2 * np.pi * 180 * moments) + 0.3 * generator.standard_normal(len(moments))
    return (0.2 * tone / np.abs(tone).max()).astype(np.float32)


def recording(folder, name, seed, text=TEXT):
    folder.mkdir(parents=True, exist_ok=True)
    write_wav(folder / f"{name}.wav", voice_like(seed), RATE)
    if text is not None:
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")


def recordings(folder, count):
    for number in range(count):
        recording(folder, f"clip{number:03d}", number)
    return folder


def collect(out, source, *flags):
    return run(main, ["--sources", "local", "--input", str(source), "--out", str(out), "--workers", "1", *flags])


def ids(out):
    return [turn.utt_id for turn in read_turns(out, with_audio=False)]


def reject_reasons(out):
    lines = [line for path in out.glob("rejects/*/*.jsonl") for line in path.read_text(encoding="utf-8").splitlines()]
    return sorted(json.loads(line)["reason"] for line in lines)


def assert_whole(out, count):
    """Every clip is there once, and every shard is what the ledger says."""
    found = list(read_turns(out, with_audio=True))
    assert len({turn.utt_id for turn in found}) == len({turn.pcm_sha256 for turn in found}) == len(found) == count
    collection = Collection(out)
    assert collection.adopted == []
    assert collection.verify() == []
    assert not list(out.glob("turns/*/.*"))


# --- limits ----------------------------------------------------------------------------------------------------------


def test_excluded_turns_and_speakers_do_not_come_in(tmp_path, capsys):
    for speaker in ("anna", "ben"):
        recording(tmp_path / "in" / speaker, "one", len(speaker))
        recording(tmp_path / "in" / speaker, "two", 10 + len(speaker))
    banned = tmp_path / "banned.txt"
    banned.write_text("# asked to be left out\nlocal:anna\n\nlocal:ben/two.wav\n", encoding="utf-8")
    assert collect(tmp_path / "out", tmp_path / "in", "--exclude_ids", str(banned)) == EXIT_DONE
    assert [turn.origin_url for turn in read_turns(tmp_path / "out", with_audio=False)] == ["ben/one"]
    assert reject_reasons(tmp_path / "out") == ["excluded"] * 3
    said = capsys.readouterr().out
    assert "3 excluded" in said and "--exclude_ids:" not in said
    banned.write_text("local:anna\nlocal:ben/two.wav\nlocal:carl # twice\nlocal:dora\n")
    assert collect(tmp_path / "out", tmp_path / "in", "--exclude_ids", str(banned)) == EXIT_DONE
    unmatched = "--exclude_ids: 3 id(s) have kept nothing out so far, the first: local:carl; a comment is better on"
    assert unmatched in capsys.readouterr().out
    assert collect(tmp_path / "other", tmp_path / "in", "--exclude_ids", str(tmp_path / "none.txt")) == EXIT_INPUT
    banned.write_text("local:anna  # asked for it\nlocal:ben # too\n")
    collect(tmp_path / "other", tmp_path / "in", "--exclude_ids", str(banned))
    assert reject_reasons(tmp_path / "other") == ["excluded"] * 4


def test_collecting_stops_at_the_disk_limit_and_goes_on_with_a_higher_one(tmp_path, capsys):
    source = recordings(tmp_path / "in", 6)
    flags = ("--shard_minutes", "0.03")
    assert collect(tmp_path / "out", source, *flags, "--max_disk_gb", "0.00001") == EXIT_PARTIAL
    assert "the limit of --max_disk_gb" in capsys.readouterr().out
    assert 0 < len(ids(tmp_path / "out")) < 6
    assert collect(tmp_path / "out", source, *flags, "--max_disk_gb", "1") == EXIT_DONE
    assert_whole(tmp_path / "out", 6)


def test_dry_run_shows_what_would_come_and_collects_nothing(tmp_path, capsys):
    source = recordings(tmp_path / "in", 4)
    assert collect(tmp_path / "out", source, "--dry_run") == EXIT_DONE
    assert "local: 4 conversations to collect, first clip" in capsys.readouterr().out
    assert not (tmp_path / "out" / "turns").exists()


# --- local recordings ------------------------------------------------------------------------------------------------


def test_a_folder_becomes_turns_with_speakers_and_licence(tmp_path, capsys):
    recording(tmp_path / "in" / "anna", "one", 1, "Good morning to you.")
    recording(tmp_path / "in" / "ben", "two", 2)
    soundfile.write(tmp_path / "in" / "ben" / "three.flac", voice_like(3), RATE)
    (tmp_path / "in" / "ben" / "three.txt").write_text("WHERE ARE YOU GOING", encoding="utf-8")
    soundfile.write(tmp_path / "in" / "ben" / "four.ogg", voice_like(4), RATE)
    (tmp_path / "in" / "ben" / "four.txt").write_text(TEXT, encoding="utf-8")
    soundfile.write(tmp_path / "in" / "ben" / "five.mp3", voice_like(5), RATE)
    (tmp_path / "in" / "ben" / "five.txt").write_text(TEXT, encoding="utf-8")
    assert collect(tmp_path / "out", tmp_path / "in") == EXIT_DONE
    turns = {turn.origin_url: turn for turn in read_turns(tmp_path / "out", with_audio=True)}
    assert sorted(turns) == ["anna/one", "ben/five", "ben/four", "ben/three", "ben/two"]
    assert turns["anna/one"].speaker_id == "local:anna"
    assert turns["ben/three"].text == "Where are you going"
    assert {turn.license for turn in turns.values()} == {"NOASSERTION"}
    assert not any(turn.synthetic or turn.redistributable for turn in turns.values())
    assert "local" in capsys.readouterr().out
    assert_whole(tmp_path / "out", 5)


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_a_manifest_keeps_conversations_together_and_in_order(tmp_path, kind):
    recordings(tmp_path, 4)
    rows = [
        {"audio": f"clip{n:03d}.wav", "text": f'She said, "number {"abcd"[n]} is here".', "speaker": "ab"[n % 2]}
        | {"conversation": "dinner", "turn_index": 3 - n, "start": 1.5 * (3 - n), "style": "calm", "licence": "CC0-1.0"}
        for n in range(4)
    ]
    path = tmp_path / f"list.{kind}"
    if kind == "jsonl":
        path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    else:
        quoted = [",".join(f'"{str(value).replace(chr(34), chr(34) * 2)}"' for value in row.values()) for row in rows]
        path.write_text("\n".join([",".join(rows[0]), *quoted]) + "\n", encoding="utf-8")
    assert collect(tmp_path / "out", path) == EXIT_DONE
    turns = list(read_turns(tmp_path / "out", with_audio=False))
    assert [turn.turn_index for turn in turns] == [0, 1, 2, 3]
    assert [turn.start_s for turn in turns] == [0.0, 1.5, 3.0, 4.5]
    assert len({turn.conv_key for turn in turns}) == len({turn.split_group for turn in turns}) == 1
    assert turns[0].text == 'She said, "number d is here".'
    assert (turns[0].speaker_id, turns[0].style, turns[0].license) == ("local:b", "calm", "CC0-1.0")


def test_a_second_run_adds_nothing_and_a_new_file_is_added(tmp_path):
    recordings(tmp_path / "in", 3)
    assert collect(tmp_path / "out", tmp_path / "in") == EXIT_DONE
    before = (tmp_path / "out" / "shards.jsonl").read_bytes()
    assert collect(tmp_path / "out", tmp_path / "in") == EXIT_DONE
    assert (tmp_path / "out" / "shards.jsonl").read_bytes() == before
    recording(tmp_path / "in", "later", 77)
    assert collect(tmp_path / "out", tmp_path / "in") == EXIT_DONE
    assert_whole(tmp_path / "out", 4)


def test_a_target_is_met_by_whole_units_and_then_there_is_nothing_to_do(tmp_path, capsys):
    recordings(tmp_path / "in", 10)
    assert collect(tmp_path / "out", tmp_path / "in", "--target_hours", str(5 / 3600)) == EXIT_DONE
    assert len(ids(tmp_path / "out")) == 5  # 1.2 s each
    capsys.readouterr()
    assert collect(tmp_path / "out", tmp_path / "in", "--target_hours", str(5 / 3600)) == EXIT_DONE
    assert "nothing to do" in capsys.readouterr().out
    assert collect(tmp_path / "out", tmp_path / "in", "--target_hours", "1") == EXIT_PARTIAL
    assert "target not reached" in capsys.readouterr().out
    assert_whole(tmp_path / "out", 10)


# --- bad input -------------------------------------------------------------------------------------------------------


def test_bad_files_are_refused_with_reasons_and_a_mended_one_is_taken_on_the_next_run(tmp_path):
    source = recordings(tmp_path / "in", 6)
    (source / "clip000.wav").write_bytes(b"<html>not found</html>")
    whole = (source / "clip001.wav").read_bytes()
    (source / "clip001.wav").write_bytes(whole[: len(whole) // 2])  # header promises more
    (source / "clip002.txt").write_text(" ...", encoding="utf-8")
    (source / "clip003.txt").unlink()
    soundfile.write(source / "nan.wav", np.full(RATE, np.nan, dtype=np.float32), RATE, subtype="FLOAT")
    (source / "nan.txt").write_text(TEXT, encoding="utf-8")
    write_wav(source / "twin.wav", voice_like(5), RATE)
    (source / "twin.txt").write_text(TEXT, encoding="utf-8")
    (source / "latin.txt").write_bytes("caf\u00e9 au lait".encode("latin-1"))
    write_wav(source / "latin.wav", voice_like(8), RATE)
    assert collect(tmp_path / "out", source) == EXIT_PARTIAL
    reasons = ["duplicate", "empty_text", *["missing_text"] * 2, *["unreadable_audio"] * 3]
    assert reject_reasons(tmp_path / "out") == reasons
    assert len(ids(tmp_path / "out")) == 2

    recordings(source, 4)
    assert collect(tmp_path / "out", source) == EXIT_DONE
    assert len(ids(tmp_path / "out")) == 6


def test_a_corrected_text_is_told_to_need_a_new_collection(tmp_path):
    source, out = recordings(tmp_path / "in", 2), tmp_path / "out"
    assert collect(out, source) == EXIT_DONE
    (source / "clip000.txt").write_text("We are going there now.")
    assert collect(out, source) == EXIT_PARTIAL
    assert "with another text or speaker; collect into a new --out" in next(out.glob("rejects/*/*")).read_text()
    assert reject_reasons(out) == ["changed"] and {turn.text for turn in read_turns(out, False)} == {TEXT}


def test_a_recording_mended_at_the_same_size_and_one_no_longer_excluded_come_in(tmp_path):
    source, out, banned = recordings(tmp_path / "in", 3), tmp_path / "out", tmp_path / "banned.txt"
    whole = (source / "clip000.wav").read_bytes()
    (source / "clip000.wav").write_bytes(b"x" * len(whole))
    banned.write_text("local:clip001.wav\n")
    assert collect(out, source, "--exclude_ids", str(banned)) == EXIT_PARTIAL
    assert collect(out, source, "--exclude_ids", str(banned)) == EXIT_DONE
    assert len(ids(out)) == 1 and reject_reasons(out) == ["excluded", "unreadable_audio"]  # not tried again
    (source / "clip000.wav").write_bytes(whole)
    assert collect(out, source, "--exclude_ids", str(banned)) == EXIT_DONE
    assert len(ids(out)) == 2
    assert collect(out, source) == EXIT_DONE
    assert_whole(out, 3)
    before = (out / "shards.jsonl").read_bytes()
    os.utime(source / "clip000.wav")
    assert collect(out, source) == EXIT_DONE
    assert (out / "shards.jsonl").read_bytes() == before  # what came in is not read again


def test_a_transcript_without_audio_that_can_be_read_is_a_reject(tmp_path):
    source = recordings(tmp_path / "in", 2)
    (source / "clip000.wav").rename(source / "clip000.m4a")
    assert collect(tmp_path / "out", source) == EXIT_PARTIAL
    assert reject_reasons(tmp_path / "out") == ["missing_file"] and len(ids(tmp_path / "out")) == 1
    detail = json.loads(next((tmp_path / "out").glob("rejects/*/*")).read_text())["detail"]
    assert detail == f"no audio file at {source / 'clip000.wav'}, .flac, .ogg or .mp3"


def test_a_recording_of_hours_is_refused_without_being_read(tmp_path, monkeypatch):
    source, load = recordings(tmp_path / "in", 1), speech_sources.load
    write_wav(source / "long.wav", np.tile(voice_like(1), 300), RATE)
    (source / "long.txt").write_text(TEXT)
    monkeypatch.setattr(speech_sources, "load", lambda turn: load(turn) if turn.name != "long" else 1 / 0)
    assert collect(tmp_path / "out", source) == EXIT_PARTIAL
    assert reject_reasons(tmp_path / "out") == ["too_long"] and len(ids(tmp_path / "out")) == 1


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"path": "a.wav", "text": "Hello."}\n', "column audio missing; found path, text"),
        ('{"audio": "a.wav"}\n', "column text missing"),
        ('{"audio": "a.wav", "text": "Hello.", "start": "soon"}\n', "line 1"),
        ('{"audio": "a.wav", "text": "Hello."\n', "line 1"),
        ('["a.wav", "Hello."]\n', "not an object"),
        ("\n", "holds no turns"),
        ('{"audio": "a.wav", "text": "Hello."}\n', "none of the 1 audio files"),
    ],
)
def test_an_unusable_manifest_is_one_line_and_exit_2(tmp_path, capsys, content, said):
    (tmp_path / "m.jsonl").write_text(content, encoding="utf-8")
    assert collect(tmp_path / "out", tmp_path / "m.jsonl") == EXIT_INPUT
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_a_manifest_of_another_kind_or_encoding_is_one_line_and_exit_2(tmp_path, capsys):
    recording(tmp_path, "a", 1)
    (tmp_path / "m.csv").write_bytes("audio,text\na.wav,caf\u00e9\n".encode("latin-1"))
    for name, said in (("a.wav", "expected a folder"), ("m.csv", "not UTF-8")):
        assert collect(tmp_path / "out", tmp_path / name) == EXIT_INPUT
        error = capsys.readouterr().err
        assert said in error
        assert error.count("\n") == 1


def test_turns_with_the_same_index_in_one_conversation_keep_ids_of_their_own(tmp_path):
    recordings(tmp_path, 3)
    rows = [{"audio": f"clip{n:03d}.wav", "text": TEXT, "conversation": "c", "turn_index": 1} for n in range(3)]
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    assert collect(tmp_path / "out", tmp_path / "m.jsonl") == EXIT_DONE
    assert_whole(tmp_path / "out", 3)


def test_a_comma_in_a_text_without_quotes_is_refused_and_not_cut_off(tmp_path, capsys):
    recording(tmp_path, "a", 1)
    (tmp_path / "m.csv").write_text("audio,text\na.wav,I am fine, and how about you\n", encoding="utf-8")
    assert collect(tmp_path / "out", tmp_path / "m.csv") == EXIT_INPUT
    error = capsys.readouterr().err
    assert "line 2: more fields than columns; a comma in a text needs quotes" in error and error.count("\n") == 1


def test_times_are_those_of_what_is_left_when_silence_was_cut(tmp_path):
    pause = np.zeros(RATE, dtype=np.float32)
    spoken = voice_like(1)
    (tmp_path / "in").mkdir()
    write_wav(tmp_path / "in" / "a.wav", np.concatenate([pause, spoken, pause]), RATE)
    row = {"audio": "a.wav", "text": TEXT, "start": 10.0}
    (tmp_path / "in" / "manifest.jsonl").write_text(json.dumps(row), encoding="utf-8")
    assert collect(tmp_path / "out", tmp_path / "in") == EXIT_DONE
    (turn,) = read_turns(tmp_path / "out", with_audio=False)
    assert turn.start_s == pytest.approx(10.9, abs=0.05)  # 0.1 s of the pause is left
    assert turn.end_s - turn.start_s == pytest.approx(turn.duration_s, abs=1e-3)


def test_names_and_texts_that_are_no_utf8_stop_nothing(tmp_path):
    recordings(tmp_path, 2)
    strange = tmp_path / os.fsdecode(b"caf\xe9.wav")
    strange.write_bytes((tmp_path / "clip000.wav").read_bytes())
    write_wav(tmp_path / "other.wav", voice_like(7), RATE)
    (tmp_path / os.fsdecode(b"caf\xe9.txt")).write_text(TEXT, encoding="utf-8")
    (tmp_path / "clip000.wav").unlink()
    assert collect(tmp_path / "out", tmp_path) == EXIT_PARTIAL  # two clips have no transcript
    assert len(ids(tmp_path / "out")) == 2
    (tmp_path / "m.jsonl").write_text('{"audio": "other.wav", "text": "Nice \\ud83d words."}', encoding="utf-8")
    assert collect(tmp_path / "more", tmp_path / "m.jsonl") == EXIT_DONE
    assert [turn.text for turn in read_turns(tmp_path / "more", with_audio=False)] == ["Nice words."]


def test_a_source_that_cannot_be_read_on_keeps_what_it_gave_and_the_others_go_on(tmp_path, monkeypatch, capsys):
    """As pyarrow, whose errors of damaged files are those of the system."""
    recordings(tmp_path / "in", 3)

    def tearing(*given):
        source = local_source(*given)
        return replace(source, units=itertools.chain(itertools.islice(source.units, 2), failing()))

    def failing():
        raise OSError("TProtocolException: Invalid data\nDeserialization failed")
        yield

    local_source = collect_data.local_source
    monkeypatch.setattr(collect_data, "local_source", tearing)
    assert collect(tmp_path / "out", tmp_path / "in") == EXIT_PARTIAL
    assert len(ids(tmp_path / "out")) == 2
    assert "Invalid data" in capsys.readouterr().out


def test_wrong_csv_columns_are_named(tmp_path, capsys):
    (tmp_path / "m.csv").write_text("file,sentence\na.wav,Hello.\n", encoding="utf-8")
    assert collect(tmp_path / "out", tmp_path / "m.csv") == EXIT_INPUT
    assert "column audio and text missing; found file, sentence" in capsys.readouterr().err


def test_a_folder_that_is_missing_empty_or_without_transcripts_is_one_line_and_exit_2(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    recording(tmp_path / "silent", "a", 1, text=None)
    for folder, said in (("none", "does not exist"), ("empty", "no audio"), ("silent", "no transcripts")):
        assert collect(tmp_path / "out", tmp_path / folder) == EXIT_INPUT
        error = capsys.readouterr().err
        assert said in error
        assert error.count("\n") == 1


def test_wrong_flags_end_with_exit_2(tmp_path):
    wrong = (["--sources", "local"], ["--target_hours", "-1"], ["--target_hours", "nan"], ["--sources", "moon"])
    for flags in (*wrong, ["--min_dnsmos", "nan"], ["--min_dnsmos", "7"], ["--shard", "2/2"], ["--shard", "x"]):
        with pytest.raises(SystemExit) as caught:
            main([*flags, "--out", str(tmp_path)])
        assert caught.value.code == EXIT_INPUT


def test_a_source_that_looks_wrong_is_stopped(tmp_path, capsys):
    recordings(tmp_path / "in", 60)
    for number in range(50):
        (tmp_path / "in" / f"clip{number:03d}.wav").write_bytes(b"nothing")
    assert collect(tmp_path / "out", tmp_path / "in") == EXIT_PARTIAL
    assert "looks wrong" in capsys.readouterr().out
    assert len(reject_reasons(tmp_path / "out")) == 41  # one more than 20 % of 200


def test_a_missing_voice_is_exit_5(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(synthetic_voices.importlib.util, "find_spec", lambda name: None)
    assert run(main, ["--out", str(tmp_path)]) == EXIT_MISSING
    assert "pip install" in capsys.readouterr().err


# --- faults ----------------------------------------------------------------------------------------------------------


def test_a_full_disk_is_exit_4_and_a_second_run_completes(tmp_path, monkeypatch, capsys):
    recordings(tmp_path / "in", 8)
    real, calls = os.fsync, 0

    def filling(handle):
        nonlocal calls
        calls += 1
        if calls > 7:
            raise OSError(28, os.strerror(28))
        real(handle)

    monkeypatch.setattr(os, "fsync", filling)
    assert collect(tmp_path / "out", tmp_path / "in", "--shard_minutes", "0.03") == EXIT_STORAGE
    assert "No space left" in capsys.readouterr().err
    monkeypatch.undo()
    assert 0 < len(ids(tmp_path / "out")) < 8
    assert collect(tmp_path / "out", tmp_path / "in") == EXIT_DONE
    assert_whole(tmp_path / "out", 8)


def test_too_little_space_is_seen_before_the_work(tmp_path, monkeypatch):
    recordings(tmp_path / "in", 1)
    usage = type("Usage", (), {"free": 1_000})
    monkeypatch.setattr(collect_data.shutil, "disk_usage", lambda path: usage)
    assert collect(tmp_path / "out", tmp_path / "in", "--target_hours", "1") == EXIT_STORAGE


def test_a_folder_one_may_not_write_to_is_exit_4(tmp_path, capsys):
    recordings(tmp_path / "in", 1)
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o555)
    if os.access(locked, os.W_OK):  # root may write anywhere but into the kernel's own file systems
        locked = Path("/sys")
        if not locked.is_dir():
            pytest.skip("no folder here refuses this user")
    assert collect(locked / "data", tmp_path / "in") == EXIT_STORAGE
    error = capsys.readouterr().err
    assert str(locked / "data") in error
    assert error.count("\n") == 1


def test_a_second_run_in_the_same_folder_is_exit_6(tmp_path, capsys):
    recordings(tmp_path / "in", 1)
    with only_run_in(tmp_path / "out"):
        assert collect(tmp_path / "out", tmp_path / "in") == EXIT_BUSY
    assert "another run" in capsys.readouterr().err


def start(out, source, forking=False):
    """A process that has imported everything and collects at a line on its input; or a child of it at every line."""
    flags = ["--sources", "local", "--input", str(source), "--out", str(out), "--workers", "1"]
    work = f"os._exit(run(collect_data.main, {[*flags, '--shard_minutes', '0.04']!r}))"
    code = (
        "import os, sys, collect_data\nfrom command_line import run\nprint('ready', flush=True)\n"
        + (
            "for line in sys.stdin:\n    child = os.fork()\n    if child == 0:\n        os.close(1)\n"
            if forking
            else ""
        )
        + (f"        {work}\n    print(child, flush=True)\n    os.waitpid(child, 0)\n" if forking else "")
        + ("" if forking else f"sys.stdin.readline()\n{work}\n")
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, text=True, **pipes)


def set_going(process):
    process.stdin.write("\n")
    process.stdin.flush()


def wait_for_shards(out, count):
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with contextlib.suppress(FileNotFoundError):
            if (out / "shards.jsonl").read_bytes().count(b"\n") >= count:
                return
        time.sleep(0.002)
    raise AssertionError(f"no {count} shards after a minute")


@pytest.mark.skipif(os.name == "nt", reason="Windows has no fork")
def test_kill_9_at_50_random_moments_loses_and_repeats_nothing(tmp_path):
    n = 600  # more than a fast machine collects between 50 kills
    source, out = recordings(tmp_path / "in", n), tmp_path / "out"
    moments, committed = random.Random(4), []
    process = start(out, source, forking=True)
    try:
        process.stdout.readline()
        for number in range(50):
            set_going(process)
            child = int(process.stdout.readline())
            if number % 2:  # after a while, or around a commit
                wait_for_shards(out, len(read_ledger(out)) + 1)
                time.sleep(moments.uniform(0, 0.05))
            else:
                time.sleep(moments.uniform(0, 0.4))
            os.kill(child, signal.SIGKILL)
            kept = ids(out) if (out / "shards.jsonl").is_file() else []
            assert kept[: len(committed)] == committed, f"kill {number} lost committed turns"
            committed = kept
        assert 25 <= len(committed) < n
    finally:
        process.kill()
        process.wait()
    assert collect(out, source) == EXIT_DONE
    assert ids(out)[: len(committed)] == committed
    assert_whole(out, n)


def test_parts_collect_everything_once_and_are_read_as_one_collection(tmp_path, capsys):
    source = recordings(tmp_path / "in", 24)
    for index in range(3):
        assert collect(tmp_path / "parts", source, "--shard", f"{index}/3") == EXIT_DONE
    assert collect(tmp_path / "whole", source) == EXIT_DONE
    assert sorted(ids(tmp_path / "parts")) == sorted(ids(tmp_path / "whole"))
    folders = sorted(path.name for path in (tmp_path / "parts").iterdir())
    assert folders == [f"part-{index:03d}-of-003" for index in range(3)]
    capsys.readouterr()
    assert run(main, ["--out", str(tmp_path / "parts"), "--verify"]) == EXIT_DONE
    assert run(main, ["--out", str(tmp_path / "parts"), "--status"]) == EXIT_DONE
    assert " 24 " in capsys.readouterr().out


@pytest.mark.parametrize("flags", [["--shard", "0/2"], []], ids=["another number", "none"])
def test_another_number_of_parts_is_refused(tmp_path, capsys, flags):
    source = recordings(tmp_path / "in", 12)
    assert collect(tmp_path / "out", source, "--shard", "1/3") == EXIT_DONE
    assert collect(tmp_path / "out", source, *flags) == EXIT_INPUT
    assert "was collected as part-001-of-003" in capsys.readouterr().err


def test_parts_under_torchrun_are_its_ranks(monkeypatch):
    assert default_part() == (0, 1)
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert default_part() == (2, 4)


def test_a_sentence_a_voice_has_said_and_an_id_that_is_taken_are_refused():
    samples = voice_like(0)
    rules = Rules()

    def turn(number, **facts):
        return replace(turn_record("set", number, "v", TEXT, samples), **{"pcm_sha256": str(number), **facts})

    def reasons(*turns):
        return [reject.reason for reject in apply_rules(UnitResult(list(turns), []), rules).rejects]

    assert reasons(turn(0, source="common_voice"), turn(1, source="common_voice")) == ["duplicate_text"]
    assert reasons(turn(2), turn(3)) == []  # in a dialogue people repeat themselves
    assert reasons(turn(3), turn(3, utt_id="another:set-3", text="other")) == ["duplicate"] * 2
    assert reasons(turn(3, text="other"), turn(3, speaker_id="test:w")) == ["changed"] * 2
    assert reasons(turn(4, utt_id="test:set-3")) == ["id_conflict"]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals between processes")
def test_a_stop_signal_commits_what_is_done_and_a_second_run_completes(tmp_path):
    source = recordings(tmp_path / "in", 60)
    for number in (signal.SIGTERM, signal.SIGINT):
        out = tmp_path / number.name
        process = start(out, source)
        process.stdout.readline()
        set_going(process)
        wait_for_shards(out, 1)
        process.send_signal(number)
        output, _ = process.communicate(timeout=60)
        assert process.returncode == 128 + number
        assert "local" in output
        assert 0 < len(ids(out)) < 60
        assert (out / "collection.json").is_file()
        assert collect(out, source) == EXIT_DONE
        assert_whole(out, 60)


def test_a_damaged_shard_is_reported_and_collected_again(tmp_path, capsys):
    recordings(tmp_path / "in", 4)
    out = tmp_path / "out"
    assert collect(out, tmp_path / "in", "--shard_minutes", "0.03") == EXIT_DONE
    assert run(main, ["--verify", "--out", str(out)]) == EXIT_DONE
    shard = out / read_ledger(out)[0].path
    shard.write_bytes(shard.read_bytes()[:-100])
    assert run(main, ["--verify", "--out", str(out)]) == EXIT_PARTIAL
    assert "collected again" in capsys.readouterr().out
    assert collect(out, tmp_path / "in") == EXIT_DONE
    assert_whole(out, 4)


def test_status_of_nothing_is_exit_2_and_of_a_collection_shows_it(tmp_path, capsys):
    assert run(main, ["--status", "--out", str(tmp_path / "none")]) == EXIT_INPUT
    recordings(tmp_path / "in", 2)
    collect(tmp_path / "out", tmp_path / "in")
    capsys.readouterr()
    assert run(main, ["--status", "--out", str(tmp_path / "out")]) == EXIT_DONE
    assert "NOASSERTION" in capsys.readouterr().out


# --- shares ----------------------------------------------------------------------------------------------------------


def small_source(collection, name, seconds):
    """One second of audio per unit."""
    turns = [
        make_turn(
            voice_like([len(name), number], 1.0),
            RATE,
            TEXT,
            utt_id=f"{name}:{number}",
            source=name,
            split_group=f"{name}:{number}",
            conv_key=f"{name}:{number}",
            speaker_id=name,
        )
        for number in range(seconds)
    ]
    writer = ShardWriter(collection, name, "1", shard_seconds=100)
    results = ((Unit(turn.utt_id, None), UnitResult([turn], [])) for turn in turns)
    return Source(name, "1", iter(()), endless=False, writer=writer, results=results)


@pytest.mark.parametrize(("available", "expected"), [((20, 20), (6, 6)), ((2, 20), (2, 10)), ((20, 3), (9, 3))])
def test_what_one_source_lacks_the_other_gives(tmp_path, available, expected):
    collection = Collection(tmp_path)
    sources = [
        small_source(collection, name, count) for name, count in zip(("first", "second"), available, strict=True)
    ]
    with StopSignals() as stop, collect_data.progress_bar(12 / 3600, 0) as bar:
        fill_all(sources, 12.0, Rules({}), stop, bar)
    assert tuple(round(collection.seconds(name)) for name in ("first", "second")) == expected


# --- synthetic speech ------------------------------------------------------------------------------------------------

TINY = "dialogue: {} (test)\nA: Good morning, {{name}}.\nB [sad]: I am so sorry.\n"


def test_synthetic_dialogues_are_collected_with_their_ground_truth(tmp_path, monkeypatch):
    corpus = tmp_path / "dialogues.txt"
    corpus.write_text(TINY.format("one") + TINY.format("two"), encoding="utf-8")
    monkeypatch.setattr(speech_sources, "DIALOGUES", corpus)
    flags = ["--sources", "synthetic", "--workers", "1", "--out", str(tmp_path / "out")]
    assert run(main, [*flags, "--target_hours", "0.001"]) == EXIT_DONE
    turns = list(read_turns(tmp_path / "out", with_audio=False))
    assert 3.6 <= sum(turn.duration_s for turn in turns) < 8
    assert {turn.split_group for turn in turns} <= {"synthetic:one", "synthetic:two"}
    for first, second in zip(turns[::2], turns[1::2], strict=True):
        assert first.conv_key == second.conv_key
        assert first.speaker_id != second.speaker_id
        assert (first.style, second.style) == ("neutral", "sad")
        assert first.synthetic and first.redistributable and first.license == "CC0-1.0"
        assert first.sample_rate == 22_050
        parameters = json.loads(second.voice_parameters)
        assert parameters["style"]["rate"] < 1
        assert 50 < parameters["f0_median_hz"] < 300
    assert run(main, [*flags, "--target_hours", "0.003"]) == EXIT_DONE
    found = ids(tmp_path / "out")
    assert found[: len(turns)] == [turn.utt_id for turn in turns]
    assert_whole(tmp_path / "out", len(found))


def test_sentences_are_read_once_each_by_the_voices_named(tmp_path, capsys):
    texts = ["the cat sat down", "a long and glorious career", "who goes there?"]
    lines = ["the cat sat down", "room 12 is free", "too short", "un café, s'il vous plaît"]
    (tmp_path / "lines.txt").write_text("\n".join(texts + lines), encoding="utf-8")
    wordnet = tmp_path / "root" / "usr" / "share" / "wordnet"
    wordnet.mkdir(parents=True)
    content = f'  1 licence; "of no word"\n00001 03 n 01 cat 0 000 | a pet; "{texts[0]}"; "{texts[1]}"  \n'
    (wordnet / "data.noun").write_text(content + f'00002 03 v 01 go 0 000 | move; "{texts[2]}"; "cat"  \n')
    flags = ["--sources", "sentences", "--voices", "adam", "--workers", "1", "--out"]
    for given, licence in ((tmp_path / "lines.txt", "NOASSERTION"), (tmp_path / "root", "LicenseRef-WordNet-3.0")):
        out = tmp_path / licence
        assert run(main, [*flags, str(out), "--local", f"sentences={given}", "--target_hours", "1"]) == EXIT_PARTIAL
        turns = list(read_turns(out, with_audio=False))
        assert sorted(turn.text.lower() for turn in turns) == sorted(texts)
        facts = {(turn.speaker_id, turn.license, turn.redistributable) for turn in turns}
        assert facts == {("synthetic:adam", licence, given.is_dir())}
        said = capsys.readouterr().out
        assert "target not reached" in said
        assert ("3 of 6 lines left out" in said and "'room 12 is free'" in said) == given.is_file()
    everything = [*flags, str(tmp_path / "all"), "--local", f"sentences={tmp_path / 'lines.txt'}"]
    assert run(main, everything) == EXIT_DONE  # a file has an end
    assert run(main, [*flags, str(tmp_path / "no"), "--local", f"sentences={tmp_path}"]) == EXIT_MISSING
    assert "apt-get download wordnet-base" in capsys.readouterr().err
    assert run(main, ["--voices", "adam", "--out", str(tmp_path / "no")]) == EXIT_INPUT
    assert "the dialogues of synthetic need two" in capsys.readouterr().err


def test_sentences_that_are_read_together_are_the_same_for_every_seed(tmp_path):
    (tmp_path / "lines.txt").write_text("\n".join(f"this is line {'long' * i}" for i in range(1, 81)))
    names = []
    for seed in (0, 1):
        source = speech_sources.sentences_source(tmp_path / "lines.txt", ["adam"], ["neutral"], seed, set())
        names.append([unit.id.partition("-")[0] for unit in source.units])
    assert sorted(names[0]) == sorted(names[1]) and names[0] != names[1]


def test_sentences_of_numbers_are_many_and_of_a_closed_vocabulary():
    """Readable as they stand, each once, and every pattern is filled in different ways."""
    sentences = speech_sources.number_sentences()
    assert len(set(sentences)) == len(sentences) == speech_sources.N_NUMBERS
    assert all(speech_sources.PLAIN.fullmatch(text) for text in sentences)
    words = collections.Counter(re.findall(r"[a-z']+", " ".join(sentences).lower()))
    assert len(words) < 200
    assert min(words.values()) >= 20  # no word is so rare that it cannot be learnt


def test_numbers_are_read_by_the_voice_named(tmp_path):
    out = tmp_path / "out"
    flags = ["--sources", "numbers", "--voices", "adam", "--workers", "1", "--target_hours", "0.005"]
    assert run(main, [*flags, "--out", str(out)]) == EXIT_DONE
    turns = list(read_turns(out, with_audio=False))
    assert {turn.text for turn in turns} <= set(speech_sources.number_sentences())
    assert {(turn.speaker_id, turn.license) for turn in turns} == {("synthetic:adam", "CC0-1.0")}


def test_every_group_of_sentences_is_read_in_one_style(tmp_path):
    out, styles = tmp_path / "out", collections.defaultdict(set)
    flags = ["--sources", "numbers", "--voices", "adam", "--workers", "1", "--target_hours", "0.02"]
    assert run(main, [*flags, "--styles", "calm", "excited", "--out", str(out)]) == EXIT_DONE
    for turn in read_turns(out, with_audio=False):
        styles[turn.conv_key].add(turn.style)
    assert all(len(of_group) == 1 for of_group in styles.values())
    assert set.union(*styles.values()) == {"calm", "excited"}


def test_questions_are_asked_by_others_and_answered_by_the_first_voice(tmp_path):
    out = tmp_path / "out"
    flags = ["--sources", "questions", "--voices", "bruno", "adam", "--workers", "1", "--target_hours", "0.005"]
    assert run(main, [*flags, "--out", str(out)]) == EXIT_DONE
    turns = sorted(read_turns(out, with_audio=False), key=lambda turn: (turn.conv_key, turn.turn_index))
    pairs = list(zip(turns[::2], turns[1::2], strict=True))
    assert {(a.speaker_id, b.speaker_id) for a, b in pairs} == {("synthetic:adam", "synthetic:bruno")}
    known = speech_sources.question_answers()
    assert all([question.text, answer.text] in known for question, answer in pairs)
    assert all(question.text.endswith("?") and not answer.text.endswith("?") for question, answer in pairs)


def test_a_value_that_is_asked_for_comes_back_in_the_answer():
    """All words are known to who reads `numbers`, but for few; and a question is not always answered alike."""
    pairs = speech_sources.question_answers()
    rooms = [(question, answer) for question, answer in pairs if question.startswith("Is room")]
    assert len(rooms) > 100
    assert all(question[8:-6] in answer for question, answer in rooms)
    answers = collections.defaultdict(set)
    for question, answer in pairs:
        answers[question].add(answer)
    assert len(answers["What time is it?"]) > 50


def test_questions_need_somebody_who_asks(tmp_path, capsys):
    flags = ["--sources", "questions", "--voices", "adam", "--target_hours", "0.005", "--out", str(tmp_path / "out")]
    assert run(main, flags) == EXIT_INPUT
    assert "needs two --voices" in capsys.readouterr().err


def test_two_workers_give_the_same_turns_as_one(tmp_path):
    collected = []
    for workers in ("1", "2"):
        out = tmp_path / workers
        recordings(tmp_path / "in", 6)
        flags = ["--sources", "local", "--input", str(tmp_path / "in"), "--out", str(out), "--workers", workers]
        assert run(main, flags) == EXIT_DONE
        collected.append([(turn.utt_id, turn.pcm_sha256) for turn in read_turns(out, with_audio=False)])
    assert collected[0] == collected[1]


def test_parts_do_not_collect_a_mended_conversation_twice(tmp_path):
    source, out = recordings(tmp_path / "in", 8), tmp_path / "out"
    for _ in range(2):
        for index in range(2):
            collect(out, source, "--shard", f"{index}/2")
        for path in source.glob("*.txt"):
            path.write_text("Other words than before.")
    turns = list(read_turns(out, with_audio=False))
    assert len(turns) == len({turn.pcm_sha256 for turn in turns}) == 8


def test_a_conversation_that_grows_stays_in_its_split():
    rules = Rules(groups={"set": "the group of its first turns"})
    new = replace(turn_record("set", 3, "v", TEXT, voice_like(0)), split_group="what the folder says today")
    other = replace(turn_record("other", 0, "v", TEXT, voice_like(1)), split_group="another")
    found = apply_rules(UnitResult([new, other], []), rules).turns
    assert [turn.split_group for turn in found] == ["the group of its first turns", "another"]


def test_a_folder_that_grows_beyond_few_voices_can_still_be_read(tmp_path):
    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    rows = [(f"c{n:02d}", place) for n in range(25) for place in range(2)]
    for number, (conversation, place) in enumerate(rows):
        write_wav(source / f"{conversation}-{place}.wav", voice_like(number, 1.4), RATE)

    def manifest(n_conversations, missing):
        lines = ["audio,text,speaker,conversation,turn_index"]
        for conversation, place in rows[: 2 * n_conversations]:
            name = f"{conversation}-{place}.wav" if (conversation, place) not in missing else "nowhere.wav"
            lines.append(f"{name},{TEXT},v{conversation},{conversation},{place}")
        (source / "manifest.csv").write_text("\n".join(lines) + "\n")

    manifest(10, {(f"c{n:02d}", 1) for n in range(10)})
    collect(out, source)
    manifest(25, set())
    assert collect(out, source) in (EXIT_DONE, EXIT_PARTIAL)
    assert len(ids(out)) == 50


def test_a_file_that_may_not_be_read_is_a_reject_and_the_others_go_on(tmp_path, monkeypatch):
    source, out, load = recordings(tmp_path / "in", 3), tmp_path / "out", speech_sources.load

    def refuse(turn):
        if "clip001" in turn.name:
            raise PermissionError(errno.EACCES, "Permission denied", turn.name)
        return load(turn)

    monkeypatch.setattr(speech_sources, "load", refuse)
    assert collect(out, source) == EXIT_PARTIAL
    assert reject_reasons(out) == ["unreadable_audio"] and len(ids(out)) == 2


def test_a_clip_that_a_larger_release_counts_anew_is_no_conflict():
    rules = Rules(places={("set", 0)})
    same_place = turn_record("set", 0, "v", TEXT, voice_like(0))
    assert [reject.reason for reject in apply_rules(UnitResult([same_place], []), rules).rejects] == ["id_conflict"]
    assert not apply_rules(UnitResult([replace(same_place, source="common_voice")], []), rules).rejects


def test_a_turn_that_is_in_a_conversation_is_not_taken_a_second_time_with_other_samples(tmp_path):
    source, out = recordings(tmp_path / "in", 2), tmp_path / "out"
    assert collect(out, source) == EXIT_DONE
    write_wav(source / "clip000.wav", voice_like(77, 1.4), RATE)
    assert collect(out, source) == EXIT_PARTIAL
    assert reject_reasons(out) == ["id_conflict"] and len(ids(out)) == 2
    assert "give every turn of a manifest its turn_index" in next(out.glob("rejects/*/*")).read_text()


def test_a_header_that_promises_terabytes_and_a_rate_that_is_no_speech_are_rejects(tmp_path):
    folder = recordings(tmp_path / "in", 8)
    soundfile.write(folder / "slow.wav", voice_like(50), 50)
    soundfile.write(folder / "huge.flac", voice_like(51), RATE)
    content = bytearray((folder / "huge.flac").read_bytes())
    content[21] |= 0x0F  # the sample count of STREAMINFO: 36 bits
    content[22:26] = b"\xff" * 4
    (folder / "huge.flac").write_bytes(content)
    for name in ("slow", "huge"):
        (folder / f"{name}.txt").write_text(TEXT)
    assert collect(tmp_path / "out", folder) == EXIT_PARTIAL
    assert reject_reasons(tmp_path / "out") == ["unreadable_audio"] * 2 and len(ids(tmp_path / "out")) == 8


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_a_line_separator_within_a_text_is_no_end_of_a_line(tmp_path, kind):
    recordings(tmp_path / "in", 1)
    text = "We are going\u2028home now."
    row = {"audio": "clip000.wav", "text": text}
    lines = {"jsonl": json.dumps(row, ensure_ascii=False), "csv": f"audio,text\nclip000.wav,{text}"}
    path = tmp_path / "in" / f"manifest.{kind}"
    path.write_text(lines[kind] + "\n", encoding="utf-8")
    assert collect(tmp_path / "out", path) == EXIT_DONE
    assert [turn.text for turn in read_turns(tmp_path / "out", False)] == [TEXT]


@pytest.mark.parametrize("change", ['"turn_index": 1e999', '"turn_index": 1e20', '"start": Infinity', '"start": -1'])
def test_numbers_of_a_manifest_that_cannot_be_are_one_line(tmp_path, capsys, change):
    recordings(tmp_path / "in", 1)
    path = tmp_path / "in" / "manifest.jsonl"
    path.write_text(f'{{"audio": "clip000.wav", "text": "{TEXT}", {change}}}\n')
    assert collect(tmp_path / "out", path) == EXIT_INPUT
    error = capsys.readouterr().err
    assert "manifest.jsonl: line 1" in error and error.count("\n") == 1


def test_an_open_quote_in_a_csv_is_one_line(tmp_path, capsys):
    recordings(tmp_path / "in", 1)
    path = tmp_path / "in" / "manifest.csv"
    path.write_text('audio,text\nclip000.wav,"' + "x" * 140_000)
    assert collect(tmp_path / "out", path) == EXIT_INPUT
    assert "manifest.csv line" in capsys.readouterr().err


def test_a_list_of_excluded_ids_may_begin_with_a_byte_order_mark_and_ids_may_hold_a_hash(tmp_path):
    path = tmp_path / "ids.txt"
    path.write_text("\ufefflocal:a\nlocal:b#2\nlocal:Episode #12/001.wav\n# nothing\n #\n\n", encoding="utf-8")
    ids = {"local:a", "local:b#2", "local:Episode #12/001.wav"}
    assert collect_data.read_excluded(path) == ids | {"local:Episode"}  # as if a comment had followed it
    path.write_text("local:amy\t# asked\nlocal:a #1 # no\n", encoding="utf-8")
    assert {"local:amy", "local:a", "local:a #1"} < collect_data.read_excluded(path)


def test_names_with_accents_are_the_same_however_they_are_written(tmp_path):
    """As macOS writes them, and as keyboards do."""
    decomposed, composed = "Ame\u0301lie", "Am\u00e9lie"
    recording(tmp_path / "in" / decomposed, "one", 1)
    recording(tmp_path / "in" / "ben", "two", 2)
    assert collect(tmp_path / "out", tmp_path / "in") == EXIT_DONE
    turns = list(read_turns(tmp_path / "out", with_audio=False))
    found = {(turn.speaker_id, turn.conv_key, turn.origin_url) for turn in turns}
    assert (f"local:{composed}", f"local:{composed}/one.wav", f"{composed}/one") in found
    assert choose_clip(turns, decomposed).speaker_id == f"local:{composed}"
    (tmp_path / "ids.txt").write_text(f"local:{decomposed}\n", encoding="utf-8")
    collect(tmp_path / "other", tmp_path / "in", "--exclude_ids", str(tmp_path / "ids.txt"))
    assert [turn.speaker_id for turn in read_turns(tmp_path / "other", with_audio=False)] == ["local:ben"]


def test_a_full_collection_takes_nothing_more_at_the_next_run(tmp_path, capsys):
    source, out = recordings(tmp_path / "in", 20), tmp_path / "out"
    flags = ["--max_disk_gb", "0.0001", "--shard_minutes", "0.01"]
    assert collect(out, source, *flags) == EXIT_PARTIAL
    before = ids(out)
    assert 0 < len(before) < 20
    assert collect(out, source, *flags) == EXIT_PARTIAL
    assert ids(out) == before


def test_a_rank_without_a_world_is_no_part(monkeypatch):
    monkeypatch.setenv("RANK", "3")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert default_part() == (0, 1)


def split_speakers(out) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for turn in read_turns(out, with_audio=False):
        found.setdefault(split_of(turn.split_group), set()).add(turn.speaker_id)
    return found


def test_no_voice_of_your_recordings_is_in_two_splits_where_there_are_many(tmp_path):
    """60 voices; every conversation is between two of a pair, or of one alone."""
    lines = []
    for number in range(90):
        pair = number % 30
        for turn, voice in enumerate((f"v{2 * pair}", f"v{2 * pair + 1}")[: 1 + number % 2]):
            write_wav(tmp_path / f"{number}-{turn}.wav", voice_like(1000 + 2 * number + turn), RATE)
            row = {"audio": f"{number}-{turn}.wav", "text": TEXT, "speaker": voice, "conversation": f"c{number}"}
            lines.append(json.dumps(row | {"turn_index": turn}))
    (tmp_path / "manifest.jsonl").write_text("\n".join(lines))
    assert collect(tmp_path / "out", tmp_path / "manifest.jsonl") == EXIT_DONE
    found = split_speakers(tmp_path / "out")
    assert found.keys() == {"train", "val", "test"}
    assert sum(map(len, found.values())) == len(set().union(*found.values())) == 45
    hashes = {}
    for turn in read_turns(tmp_path / "out", with_audio=False):
        hashes.setdefault(turn.pcm_sha256, set()).add(split_of(turn.split_group))
    assert {len(splits) for splits in hashes.values()} == {1}


def test_conversations_are_parted_where_voices_are_few(tmp_path):
    rows = [Recording(audio=b"", text="", speaker=f"v{i % 3}", conversation=f"c{i}") for i in range(60)]
    assert grouped_by_voice(rows) == rows
    unknown = [Recording(audio=b"", text="", conversation=f"c{i}") for i in range(60)]
    assert len({row.group for row in grouped_by_voice(unknown)}) == 60
