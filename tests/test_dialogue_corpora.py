"""Readers of conversations on tiny files of the published schema and layout, with their traps."""

import io
import json
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import soundfile
from conftest import voice

import collect_data
import dialogue_corpora
from collect_data import main
from command_line import EXIT_DONE, EXIT_INPUT, EXIT_MISSING, EXIT_PARTIAL, MissingRequirement, run
from dialogue_corpora import Segment, ami_source, dailytalk_source, meeting_group, meeting_windows
from public_speech import WINDOW_SECONDS
from speech_sources import Source
from turn_shards import Reject, TurnRecord, read_turns

RATE = 16_000


def clip(seconds: float, pitch: float) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, voice(seconds, pitch, RATE), RATE, format="WAV")
    return buffer.getvalue()


def results(source: Source) -> tuple[list[TurnRecord], list[Reject]]:
    """What the jobs of all units give; turns in the order of their conversations."""
    done = [unit.job() for unit in source.units]
    turns = sorted((turn for result in done for turn in result.turns), key=lambda t: (t.conv_key, t.turn_index))
    return turns, [reject for result in done for reject in result.rejects]


# ---- AMI -------------------------------------------------------------------------------------------------------------


def ami_row(meeting: str, speaker: str, begin: float, end: float, text: str | None = "SO WHAT DO YOU THINK") -> dict:
    name = f"AMI_{meeting}_H00_{speaker}_{round(begin * 100):07d}_{round(end * 100):07d}"
    audio = clip(end - begin, 100 + 7 * begin)
    return {
        "meeting_id": meeting,
        "audio_id": name,
        "text": text,
        "audio": {"bytes": audio, "path": f"{name}.wav"},
        "begin_time": np.float32(begin),
        "end_time": np.float32(end),
        "microphone_id": "H00",
        "speaker_id": speaker,
    }


def write_ami(path: Path, rows: list[dict]) -> None:
    """The published schema: an Audio feature, 32-bit times."""
    kinds = dict.fromkeys(("meeting_id", "audio_id", "text", "microphone_id", "speaker_id"), "string")
    kinds |= {"begin_time": "float32", "end_time": "float32"}
    features = {name: {"dtype": kind, "_type": "Value"} for name, kind in kinds.items()}
    features["audio"] = {"sampling_rate": RATE, "_type": "Audio"}
    audio = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    fields = [(name, audio if name == "audio" else pyarrow.type_for_alias(kinds[name])) for name in rows[0]]
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, pyarrow.schema(fields, metadata)), path)


@pytest.fixture
def ami(tmp_path) -> Path:
    """Two files; rows out of time order, a meeting that goes on in the second file, a segment of 0.02 s."""
    first = [
        ami_row("ES2002a", "FEE005", 76.5, 78.0, "OKAY I USE S. S. H."),
        ami_row("ES2002a", "MEE006", 12.37, 14.5, "YEAH I MEAN THE WAVE DATA"),
        ami_row("ES2002a", "MEE006", 14.5, 15.7, "ARE NOT LOST"),
        ami_row("ES2002a", "FEE005", 14.0, 15.5, "THEY ARE NOT"),
        ami_row("ES2002a", "MEE007", 20.0, 20.02, "MM"),
    ]
    second = [
        ami_row("ES2002a", "MEE007", 121.5, 123.0, "LET US GO ON THEN"),
        ami_row("ES2002d", "FEE005", 3.0, 5.0, "GOOD MORNING ALL OF YOU"),
        ami_row("TS3003a", "MTD009PM", 1.0, 2.5, "THIS IS ANOTHER ROOM"),
    ]
    write_ami(tmp_path / "ami" / "ihm" / "train-00000-of-00002.parquet", first)
    write_ami(tmp_path / "ami" / "ihm" / "train-00001-of-00002.parquet", second)
    return tmp_path / "ami"


def test_a_meeting_becomes_conversations_in_time_order(ami):
    turns, rejects = results(ami_source(ami, 0, set()))
    assert not rejects
    texts = [turn.text for turn in turns if turn.conv_key == "ami:ES2002a-000"]
    assert texts == ["Yeah i mean the wave data", "They are not", "Are not lost", "Okay i use s. s. h."]
    assert [t.speaker_id for t in turns[:4]] == ["ami:MEE006", "ami:FEE005", "ami:MEE006", "ami:FEE005"]
    assert {turn.conv_key for turn in turns[4:]} == {"ami:ES2002a-001", "ami:ES2002d-000", "ami:TS3003a-000"}
    first = turns[0]
    assert first.text_raw == "YEAH I MEAN THE WAVE DATA" and first.text_form == "upper_nopunct"
    assert first.origin_url == "AMI_ES2002a_H00_MEE006_0001237_0001450" and first.sample_rate == RATE
    assert first.license == "CC-BY-4.0" and "Carletta" in first.attribution
    sexes = {turn.speaker_id: turn.speaker_sex for turn in turns}
    assert sexes["ami:FEE005"] == "female" and sexes["ami:MTD009PM"] == "male"


def test_times_count_from_the_first_segment_of_the_window_and_overlap_is_told(ami):
    turns, _ = results(ami_source(ami, 0, set()))
    times = [(turn.start_s, turn.end_s, turn.overlap) for turn in turns[:5]]
    assert times == [(0, 2.13, True), (1.63, 3.13, True), (2.13, 3.33, True), (64.13, 65.63, False), (0, 1.5, False)]
    for turn in turns:
        assert turn.duration_s == pytest.approx(turn.end_s - turn.start_s, abs=0.02)


def segment(begin: float, end: float, speaker: str = "MEE006") -> Segment:
    return Segment(begin, end, f"{speaker}_{begin}_{end}", speaker, "TEXT", b"")


def test_windows_hold_whole_segments_and_are_no_longer_than_the_limit():
    rng = np.random.default_rng(0)
    begins = np.round(rng.uniform(0, 1500, 400), 2)
    segments = [segment(b, round(b + rng.uniform(0.02, 25), 2), f"MEE00{i % 4}") for i, b in enumerate(begins)]
    recordings = meeting_windows("ES2002a", segments)
    kept = sorted(s.id for s in segments if round(s.end - s.begin, 2) >= 0.4)
    assert sorted(r.name for r in recordings) == kept and len(kept) < len(segments)
    windows: dict[str, list] = {}
    for recording in recordings:
        windows.setdefault(recording.conversation, []).append((recording.start, dict(recording.facts)["end_s"]))
    assert list(windows) == [f"ES2002a-{i:03d}" for i in range(len(windows))] and len(windows) > 10
    for times in windows.values():
        assert times[0][0] == 0 and times == sorted(times, key=lambda t: t[0])
        assert max(end for _, end in times) <= WINDOW_SECONDS
    assert max(max(end for _, end in times) for times in windows.values()) > WINDOW_SECONDS - 26


@pytest.mark.parametrize(
    ("second", "overlap"),
    [
        (segment(4.9, 7.0, "FEE005"), False),  # exactly 0.1 s
        (segment(4.89, 7.0, "FEE005"), True),
        (segment(2.0, 2.3, "FEE005"), True),  # too short to become a turn, yet heard
        (segment(4.0, 7.0, "MEE006"), False),  # the same person
    ],
)
def test_overlap_is_more_than_a_tenth_of_a_second_of_somebody_else(second, overlap):
    recordings = meeting_windows("ES2002a", [second, segment(0.0, 5.0), segment(8.0, 9.0, "FEE007")])
    assert [dict(r.facts)["overlap"] for r in recordings if r.name == "MEE006_0.0_5.0"] == [overlap]
    assert not dict(recordings[-1].facts)["overlap"]


def test_no_speaker_is_in_two_splits(ami):
    turns, _ = results(ami_source(ami, 0, set()))
    groups: dict[str, set[str]] = {}
    for turn in turns:
        groups.setdefault(turn.speaker_id, set()).add(turn.split_group)
    assert {t.conv_key[:11] for t in turns if t.speaker_id == "ami:FEE005"} == {"ami:ES2002a", "ami:ES2002d"}
    assert groups["ami:FEE005"] == {"ami:ES2002"} and all(len(own) == 1 for own in groups.values())


@pytest.mark.parametrize(
    "meetings",  # of one person each: FEE083, FIE038, MIO016, MIO020, MIO022, MIO023, MIO078, FIE037, FEE005
    [
        ("EN2005a", "EN2009b", "EN2009d"),
        ("IB4001", "IB4011", "IS1008a", "IS1008d"),
        ("IN1001", "IN1014", "IS1000a"),
        ("IN1014", "IS1001b"),
        ("IN1002", "IS1004c"),
        ("IN1005", "IS1003d"),
        ("IN1013", "IS1006b"),
        ("IB4003", "IB4004"),
        ("ES2002a", "ES2002b", "ES2002c", "ES2002d"),
    ],
)
def test_meetings_of_one_person_are_one_group(meetings):
    assert len({meeting_group(meeting) for meeting in meetings}) == 1


def test_meetings_of_other_people_are_groups_of_their_own():
    series = ("ES2002a", "ES2003a", "TS3003a", "IS1007a", "IS1009a", "EN2001a", "EN2002a", "IB4001", "IN1001")
    assert len({meeting_group(meeting) for meeting in series}) == len(series)


def test_hub_and_folder_give_the_same_units(ami, monkeypatch):
    monkeypatch.setattr(dialogue_corpora, "AMI_HUB", str(ami / "ihm" / "train-*.parquet"))
    hub, folder = ami_source(None, 0, set()), ami_source(ami, 0, set())
    assert hub.endless and not folder.endless
    streamed, read = list(hub.units), list(folder.units)
    assert [unit.id for unit in streamed] == [unit.id for unit in read] and len(read) == 4
    assert not list(ami_source(ami, 0, {unit.id for unit in read}).units)
    monkeypatch.setattr(dialogue_corpora, "AMI_HUB", str(ami / "nothing" / "*.parquet"))
    with pytest.raises(MissingRequirement, match="--local ami=DIR"):
        next(ami_source(None, 0, set()).units)


def test_rows_without_audio_or_text_are_rejected_alone(tmp_path):
    rows = [ami_row("ES2002a", "MEE006", 1.0, 2.5), ami_row("ES2002a", "MEE006", 3.0, 4.5, None)]
    rows.append({**ami_row("ES2002a", "FEE005", 5.0, 6.5), "audio": {"bytes": None, "path": "a.wav"}})
    write_ami(tmp_path / "a.parquet", rows)
    turns, rejects = results(ami_source(tmp_path, 0, set()))
    assert len(turns) == 1 and sorted(r.reason for r in rejects) == ["missing_text", "unreadable_audio"]


@pytest.mark.parametrize("column", ["begin_time", "end_time", "speaker_id", "audio_id"])
def test_a_row_that_lacks_a_fact_ends_its_source_in_one_line_and_keeps_what_was_collected(tmp_path, capsys, column):
    rows = [ami_row("ES2002a", "MEE006", 1.0, 2.5), {**ami_row("ES2003a", "MEE009", 3.0, 4.5), column: None}]
    write_ami(tmp_path / "in" / "a.parquet", rows)
    flags = ["--sources", "ami", "--local", f"ami={tmp_path / 'in'}", "--out", str(tmp_path / "out"), "--workers", "1"]
    assert run(main, flags) == EXIT_PARTIAL
    assert f"has no {column}" in capsys.readouterr().out
    assert len(list(read_turns(tmp_path / "out", with_audio=False))) == 1


def test_columns_of_another_type_end_their_source_in_one_line(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    rows = [{**ami_row("ES2002a", "MEE006", 1.0, 2.5), "begin_time": "1.0"}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "in" / "a.parquet")
    flags = ["--sources", "ami", "--local", f"ami={tmp_path / 'in'}", "--out", str(tmp_path / "out"), "--workers", "1"]
    assert run(main, flags) == EXIT_INPUT
    error = capsys.readouterr().err
    assert "are no numbers" in error.splitlines()[-1] and "Traceback" not in error


def test_folders_that_are_not_ami_are_told_in_one_line(ami, tmp_path):
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        ami_source(tmp_path / "nowhere", 0, set())
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"holds no \*\.parquet; expected"):
        ami_source(tmp_path / "empty", 0, set())
    write_ami(ami / "sdm" / "train.parquet", [ami_row("ES2002d", "MEE006", 1.0, 2.5)])  # another microphone's copy
    with pytest.raises(ValueError, match="the rows of ES2002d are not together"):
        ami_source(ami, 0, set())
    pyarrow.parquet.write_table(pyarrow.table({"audio": ["a"], "sentence": ["b"]}), ami / "sdm" / "train.parquet")
    with pytest.raises(ValueError, match=r"column meeting_id, audio_id.* missing; found audio, sentence"):
        ami_source(ami, 0, set())
    (ami / "sdm" / "train.parquet").write_bytes(b"version https://git-lfs.github.com/spec/v1")
    with pytest.raises(ValueError, match=r"train\.parquet cannot be read as Parquet"):
        ami_source(ami, 0, set())


# ---- DailyTalk -------------------------------------------------------------------------------------------------------


@pytest.fixture
def dailytalk(tmp_path) -> Path:
    """Two dialogues, one with more than ten turns; a transcript is missing, foreign files lie about."""
    root = tmp_path / "dailytalk"
    emotions: dict[str, dict] = {}
    for dialogue, n_turns in ((7, 3), (12, 11)):
        folder = root / "data" / str(dialogue)
        folder.mkdir(parents=True)
        for turn in range(n_turns):
            name = f"{turn}_{turn % 2}_d{dialogue}"
            soundfile.write(folder / f"{name}.wav", voice(1.0, 100 + 9 * turn + dialogue, 22_050), 22_050)
            (folder / f"{name}.txt").write_text(f"This is turn {turn}.\n")
            mark = "happiness" if turn == 1 else "no emotion"
            emotions.setdefault(str(dialogue), {})[str(turn)] = {"emotion": mark, "act": "inform", "text": "..."}
    (root / "data" / "7" / "2_0_d7.txt").unlink()
    for name in ("7/._0_0_d7.wav", "7/0_0_d12.wav", "7/notes.wav"):
        (root / "data" / name).write_bytes(b"not a turn")
    (root / "metadata.json").write_text(json.dumps(emotions))
    return root


def test_dialogues_are_in_order_with_two_actors_and_their_emotions(dailytalk):
    turns, rejects = results(dailytalk_source(dailytalk, 0, set()))
    assert [(r.reason, r.detail) for r in rejects] == [("missing_text", "no UTF-8 transcript beside data/7/2_0_d7.wav")]
    assert [turn.text for turn in turns if turn.conv_key == "dailytalk:12"] == [f"This is turn {i}." for i in range(11)]
    assert [turn.speaker_id for turn in turns[:3]] == ["dailytalk:0", "dailytalk:1", "dailytalk:0"]
    assert {turn.text: turn.style for turn in turns if turn.style} == {"This is turn 1.": "happiness"}
    assert {turn.split_group for turn in turns} == {"dailytalk:7", "dailytalk:12"}
    assert {turn.license for turn in turns} == {"CC-BY-SA-4.0"} and not any(turn.noncommercial for turn in turns)
    assert "for academic use" in turns[0].attribution and turns[0].start_s is None


def test_emotions_are_optional_but_must_be_readable(dailytalk):
    (dailytalk / "metadata.json").write_text("[1, 2]")
    with pytest.raises(ValueError, match=r"metadata\.json is not JSON of the form dialog, turn, emotion"):
        dailytalk_source(dailytalk, 0, set())
    (dailytalk / "metadata.json").unlink()
    turns, _ = results(dailytalk_source(dailytalk, 0, set()))
    assert len(turns) == 13 and not any(turn.style for turn in turns)


def test_dailytalk_that_is_not_there_is_explained(tmp_path):
    with pytest.raises(MissingRequirement, match=r"github\.com/keonlee9420/DailyTalk.*--local dailytalk=DIR"):
        dailytalk_source(None, 0, set())
    with pytest.raises(ValueError, match=r"expected data/<dialog>/<turn>_<speaker>_d<dialog>\.wav"):
        dailytalk_source(tmp_path, 0, set())


# ---- both ------------------------------------------------------------------------------------------------------------


def test_both_are_collected_by_the_command(ami, dailytalk, tmp_path, monkeypatch):
    for name, source in (("ami", ami_source), ("dailytalk", dailytalk_source)):
        monkeypatch.setitem(
            collect_data.SOURCES, name, lambda args, done, n=name, s=source: s(args.local.get(n), args.seed, done)
        )
    out = tmp_path / "data"
    command = ["--sources", "ami", "dailytalk", "--out", str(out), "--workers", "1"]
    places = ["--local", f"ami={ami}", f"dailytalk={dailytalk}"]
    assert run(main, [*command, *places]) == EXIT_PARTIAL  # one transcript is missing
    turns = list(read_turns(out, with_audio=False))
    assert {turn.source: sum(t.source == turn.source for t in turns) for turn in turns} == {"ami": 7, "dailytalk": 13}
    written = "".join(path.read_text() for path in (out / "conversations").iterdir())
    rows = {row["conv_id"]: row for row in map(json.loads, written.splitlines())}
    assert rows["ami:ES2002a-000"]["structure"] == rows["dailytalk:12"]["structure"] == "dialogue"
    gaps = [turn["gap_s"] for turn in rows["ami:ES2002a-000"]["turns"]]
    assert gaps == [None, -0.5, -1.0, 60.8]
    assert run(main, [*command, *places]) == EXIT_DONE and len(list(read_turns(out, with_audio=False))) == len(turns)
    assert run(main, ["--sources", "dailytalk", "--out", str(tmp_path / "other")]) == EXIT_MISSING
