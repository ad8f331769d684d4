"""Readers of public corpora on local files of the published layout and schema, with their traps."""

import io
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import Mock

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import soundfile
from conftest import voice
from huggingface_hub.errors import HTTPError

import public_speech
from collect_data import main
from command_line import EXIT_DONE, EXIT_INPUT, EXIT_MISSING, EXIT_PARTIAL, MissingRequirement, run
from public_speech import Hub, Utterance, common_voice_source, hub_rows, monologues
from turn_shards import read_turns

RATE = 16_000


def samples(seconds: float, pitch: float = 120) -> np.ndarray:
    return voice(seconds, pitch, RATE)


def flac(seconds: float, pitch: float = 120) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples(seconds, pitch), RATE, format="FLAC")
    return buffer.getvalue()


def collect(tmp_path: Path, *flags: str) -> int:
    return run(main, ["--out", str(tmp_path / "data"), "--workers", "1", *flags])


def turns_of(tmp_path: Path) -> list:
    turns = read_turns(tmp_path / "data", with_audio=False)
    return sorted(turns, key=lambda turn: (turn.conv_key, turn.turn_index))


@pytest.fixture
def librispeech(tmp_path) -> Path:
    """Two chapters of two readers; in one an utterance is missing."""
    root = tmp_path / "LibriSpeech"
    for speaker, chapter, numbers in ((19, 198, (0, 1, 3)), (26, 495, (0, 1))):
        folder = root / "train-clean-100" / str(speaker) / str(chapter)
        folder.mkdir(parents=True)
        names = [f"{speaker}-{chapter}-{number:04d}" for number in numbers]
        for i, name in enumerate(names):
            (folder / f"{name}.flac").write_bytes(flac(1.2 + 0.1 * i, 100 + speaker))
        lines = "".join(f"{name} NORTHANGER ABBEY NUMBER {i}\n" for i, name in enumerate(names))
        (folder / f"{speaker}-{chapter}.trans.txt").write_text(lines)
    return root


def test_chapters_become_monologues_cut_where_a_number_is_missing(librispeech, tmp_path, capsys):
    assert collect(tmp_path, "--sources", "librispeech", "--local", f"librispeech={librispeech}") == EXIT_DONE
    turns = turns_of(tmp_path)
    key = "librispeech:train-clean-100-"
    assert [turn.conv_key for turn in turns] == [f"{key}{c}" for c in ("19-198-000",) * 2 + ("19-198-001",)] + [
        f"{key}26-495-000"
    ] * 2
    assert [turn.speaker_id for turn in turns] == ["libri:19"] * 3 + ["libri:26"] * 2
    assert turns[0].text == "Northanger abbey number 0" and turns[0].text_form == "upper_nopunct"
    assert {turn.license for turn in turns} == {"CC-BY-4.0"} and turns[0].split_group == "libri:19"
    assert turns[0].split_native == "train-clean-100" and turns[0].origin_url == "19-198-0000"
    assert "CC-BY-4.0" in capsys.readouterr().out


def test_a_chapter_is_the_same_from_inside_its_folder(librispeech, tmp_path, monkeypatch):
    monkeypatch.chdir(librispeech / "train-clean-100" / "19" / "198")
    assert collect(tmp_path, "--sources", "librispeech", "--local", "librispeech=.") == EXIT_DONE
    assert {turn.split_native for turn in turns_of(tmp_path)} == {"train-clean-100"}


def test_libritts_r_shares_its_readers_with_librispeech(librispeech, tmp_path):
    folder = tmp_path / "LibriTTS_R" / "train-clean-100" / "19" / "198"
    folder.mkdir(parents=True)
    for name in ("19_198_000010_000002", "19_198_000010_000000"):
        soundfile.write(folder / f"{name}.wav", samples(1.5, 140 + 30 * int(name[-1])), RATE)
        (folder / f"{name}.normalized.txt").write_text(f"Chapter {name[-1]}, she said.")
    flags = ["--local", f"librispeech={librispeech}", f"libritts_r={tmp_path / 'LibriTTS_R'}"]
    assert collect(tmp_path, "--sources", "librispeech", "libritts_r", *flags) == EXIT_DONE
    turns = [turn for turn in turns_of(tmp_path) if turn.source == "libritts_r"]
    assert [turn.text for turn in turns] == ["Chapter 0, she said.", "Chapter 2, she said."]
    assert {turn.speaker_id for turn in turns} == {"libri:19"} == {turn.split_group for turn in turns}


def test_monologues_are_no_longer_than_the_window(monkeypatch):
    monkeypatch.setattr(public_speech, "duration_of", lambda audio: 20.0)
    chapter = [Utterance(f"7-9-{i:04d}", b"", "text", "dev-clean") for i in reversed(range(12))]
    recordings = monologues("librispeech", chapter)
    sizes = [sum(r.conversation.endswith(f"-{w:03d}") for r in recordings) for w in range(3)]
    assert sizes == [5, 5, 2] and [r.turn_index for r in recordings] == list(range(12))


def write_parquet(path: Path, columns: dict) -> None:
    audio = pyarrow.array(
        columns.pop("audio"), pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    )
    table = pyarrow.table({"audio": audio, **columns})
    features = {"audio": {"sampling_rate": RATE, "_type": "Audio"}}
    features |= {name: {"dtype": str(table.schema.field(name).type), "_type": "Value"} for name in columns}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    pyarrow.parquet.write_table(table.replace_schema_metadata(metadata), path)


def test_rows_of_the_hub_are_read_without_decoding(tmp_path, monkeypatch):
    """The published schema: an Audio feature, integer speakers and chapters."""
    names = ["84-121123-0000", "84-121123-0001", "174-50561-0000"]
    audio = [{"bytes": flac(1.2 + 0.1 * i), "path": f"{name}.flac"} for i, name in enumerate(names)]
    columns = {"file": names, "audio": audio, "text": ["GO ON AND ON", "DO YOU HEAR", "FORGOTTEN TOO"]}
    columns |= {"speaker_id": [84, 84, 174], "chapter_id": [121123, 121123, 50561], "id": names}
    write_parquet(tmp_path / "0000.parquet", columns)
    monkeypatch.setitem(public_speech.HUBS, "librispeech", Hub(str(tmp_path / "*.parquet"), "text"))
    assert collect(tmp_path, "--sources", "librispeech", "--target_hours", "1") == EXIT_PARTIAL
    turns = turns_of(tmp_path)
    assert [turn.speaker_id for turn in turns] == ["libri:174", "libri:84", "libri:84"]
    assert [turn.text for turn in turns[1:]] == ["Go on and on", "Do you hear"]


def test_hub_that_lacks_a_column_or_cannot_be_reached_is_told_in_one_line(tmp_path, monkeypatch, capsys):
    write_parquet(tmp_path / "0000.parquet", {"audio": [{"bytes": flac(1.0), "path": "a"}], "sentence": ["hello"]})
    monkeypatch.setitem(public_speech.HUBS, "librispeech", Hub(str(tmp_path / "*.parquet"), "text"))
    with pytest.raises(ValueError, match="librispeech on the hub lacks chapter_id, id, speaker_id, text; found audio"):
        next(hub_rows("librispeech"))
    monkeypatch.setitem(public_speech.HUBS, "librispeech", Hub(str(tmp_path / "nothing" / "*.parquet"), "text"))
    with pytest.raises(MissingRequirement, match="--local librispeech=DIR"):
        next(hub_rows("librispeech"))
    assert collect(tmp_path, "--sources", "librispeech", "--target_hours", "1") == EXIT_MISSING
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: librispeech cannot be read from the Hugging Face hub")


def test_a_hub_that_cannot_be_reached_is_exit_5_with_the_remedy(tmp_path):
    command = [sys.executable, "collect_data.py", "--sources", "librispeech", "--workers", "1", "--out", str(tmp_path)]
    environment = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}
    root = Path(public_speech.__file__).parent
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == EXIT_MISSING
    error = done.stderr.splitlines()[-1]
    assert error.startswith("error: librispeech cannot be read from the Hugging Face hub (") and "--local" in error


def test_a_hub_that_fails_in_mid_stream_keeps_what_it_gave(tmp_path, monkeypatch, capsys):
    def rows():
        for chapter in (121123, 50561, 50561):
            audio = {"bytes": flac(1.2, 100 + chapter % 100)}
            name = f"84-{chapter}-0000"
            yield {"audio": audio, "text": "GO ON AND ON", "speaker_id": 84, "chapter_id": chapter, "id": name}
        raise HTTPError("connection reset")

    hub = Mock(column_names=None)
    hub.cast_column.side_effect = lambda *given: rows()
    monkeypatch.setattr(datasets, "load_dataset", lambda *given, **named: hub)
    tts = tmp_path / "tts" / "train-clean-100" / "19" / "198"
    tts.mkdir(parents=True)
    soundfile.write(tts / "19_198_000010_000000.wav", samples(1.5, 150), RATE)
    (tts / "19_198_000010_000000.normalized.txt").write_text("Chapter one, she said.")
    flags = ["--sources", "librispeech", "libritts_r", "--local", f"libritts_r={tmp_path / 'tts'}"]
    assert collect(tmp_path, *flags, "--target_hours", "1") == EXIT_PARTIAL
    assert {turn.source for turn in turns_of(tmp_path)} == {"librispeech", "libritts_r"}
    assert "(connection reset); unpack its archive" in capsys.readouterr().out


COLUMNS = ("path", "client_id", "sentence_id", "sentence", "up_votes", "down_votes", "gender", "accents", "locale")


@pytest.fixture
def common_voice(tmp_path) -> Path:
    """A release: columns in another order than some readers expect, bare quotes, a clip that is not there."""
    folder = tmp_path / "cv-corpus-25.0-2026-03-09" / "en"
    (folder / "clips").mkdir(parents=True)
    rows = []
    for i in range(9):
        client = ("a" if i < 7 else "b") * 64
        text = '"Well," she said, "number' if i == 0 else f"Sentence number {i}."
        rows.append((f"common_voice_en_{i}.mp3", client, "s", text, "2", "0", "male_masculine", "", "en"))
        if i != 3:
            soundfile.write(folder / "clips" / rows[-1][0], samples(1.5 + 0.1 * i, 100 + 5 * i), RATE, format="MP3")
    lines = "\n".join("\t".join(row) for row in (COLUMNS, *rows)) + "\n"
    (folder / "validated.tsv").write_text(lines, encoding="utf-8")
    return tmp_path / "cv-corpus-25.0-2026-03-09"


def test_clips_of_one_speaker_become_sets_of_one_voice(common_voice, tmp_path, capsys):
    assert collect(tmp_path, "--sources", "common_voice", "--local", f"common_voice={common_voice}") == EXIT_PARTIAL
    assert "1 missing_file" in capsys.readouterr().out
    turns = turns_of(tmp_path)
    keys = [f"common_voice:en-{'a' * 24}-000"] * 5 + [f"common_voice:en-{'a' * 24}-001"]
    assert [turn.conv_key for turn in turns] == [*keys, *[f"common_voice:en-{'b' * 24}-000"] * 2]
    assert turns[0].text == '"Well," she said, "number' and turns[0].speaker_sex == "male"
    assert {turn.license for turn in turns} == {"CC0-1.0"} and not any(turn.redistributable for turn in turns)
    assert len({turn.split_group for turn in turns}) == 2
    written = "".join(path.read_text() for path in (tmp_path / "data" / "conversations").iterdir())
    kinds = {json.loads(line)["structure"] for line in written.splitlines()}
    assert kinds == {"voice_set"}


@pytest.mark.parametrize("column", ["clip", "filename"])
def test_a_clip_of_another_length_than_its_release_says_is_refused(common_voice, tmp_path, capsys, column):
    lengths = [(f"common_voice_en_{i}.mp3", 9000 if i == 5 else 1500 + 100 * i) for i in range(9)]
    lines = [f"{column}\tduration[ms]", *(f"{name}\t{ms}" for name, ms in lengths)]
    (common_voice / "en" / "clip_durations.tsv").write_text("\n".join(lines))
    assert collect(tmp_path, "--sources", "common_voice", "--local", f"common_voice={common_voice}") == EXIT_PARTIAL
    assert "1 missing_file, 1 wrong_length" in capsys.readouterr().out
    assert len(turns_of(tmp_path)) == 7


def test_common_voice_without_a_release_explains_where_it_is(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("MDC_API_KEY", raising=False)
    assert collect(tmp_path, "--sources", "common_voice") == EXIT_MISSING
    error = capsys.readouterr().err
    assert "Mozilla Data Collective" in error and "MDC_API_KEY" in error and "--local common_voice=DIR" in error
    with pytest.raises(ValueError, match=r"holds no validated\.tsv"):
        common_voice_source(tmp_path, None, 0, set())


def test_two_parts_do_not_download_a_release_at_once(tmp_path, monkeypatch):
    at_once, most = [], []

    def download_dataset(release, extract):
        at_once.append(release)
        most.append(len(at_once))
        time.sleep(0.2)
        at_once.pop()
        return tmp_path / release

    monkeypatch.setitem(sys.modules, "datacollective", Mock(download_dataset=download_dataset))
    monkeypatch.setenv("MDC_API_KEY", "key")
    monkeypatch.setenv("MDC_DOWNLOAD_PATH", str(tmp_path / "downloads"))
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(public_speech.fetch_release, ["cv"] * 2)) == [tmp_path / "cv"] * 2
    assert most == [1, 1]


def test_missing_column_and_wrong_folder_are_named(common_voice, tmp_path, capsys):
    table = common_voice / "en" / "validated.tsv"
    table.write_text(table.read_text().replace("sentence\t", "words\t", 1).replace("sentence_id", "sid"))
    flags = ["--sources", "common_voice", "--local", f"common_voice={common_voice}"]
    assert collect(tmp_path, *flags) == EXIT_INPUT
    assert "column sentence missing; found path, client_id" in capsys.readouterr().err
    assert collect(tmp_path, "--sources", "librispeech", "--local", f"librispeech={common_voice}") == EXIT_INPUT
    assert "holds no *.trans.txt" in capsys.readouterr().err


def test_a_source_that_fails_does_not_stop_the_others(librispeech, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("MDC_API_KEY", raising=False)
    flags = ["--sources", "common_voice", "librispeech", "--local", f"librispeech={librispeech}"]
    assert collect(tmp_path, *flags) == EXIT_PARTIAL
    printed = capsys.readouterr()
    assert "common_voice left out: Common Voice is only given out" in printed.err and len(turns_of(tmp_path)) == 5


@pytest.mark.parametrize("text", ["librispeech", "nowhere=x", "local=x"])
def test_places_that_are_no_places_are_refused(tmp_path, text, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--local", text, "--out", str(tmp_path)])
    assert stop.value.code == EXIT_INPUT and "is not SOURCE=DIR" in capsys.readouterr().err
