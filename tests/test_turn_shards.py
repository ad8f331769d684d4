import dataclasses
import errno
import json
import os

import numpy as np
import pyarrow.parquet
import pytest

import turn_shards
from audio import read_audio, to_pcm16
from turn_shards import Collection, Reject, ShardWriter, TurnRecord, make_turn, read_ledger, read_turns

RATE = 16_000


def voice_like(seed=0, seconds=1.0, level=0.2):
    """Noise-modulated tone, loud enough to pass the checks; every seed gives other samples."""
    generator = np.random.default_rng(seed)
    time = np.arange(int(seconds * RATE)) / RATE
    tone = np.sin(2 * np.pi * 180 * time) + 0.3 * generator.standard_normal(len(time))
    return (level * tone / np.abs(tone).max()).astype(np.float32)


def turn_of(seed=0, samples=None, text="Good morning to you.", **facts):
    defaults = {
        "utt_id": f"test:{seed}",
        "source": "test",
        "split_group": f"test:{seed}",
        "conv_key": f"test:{seed}",
        "speaker_id": "test:anna",
    }
    return make_turn(voice_like(seed) if samples is None else samples, RATE, text, **(defaults | facts))


def commit(folder, *seeds):
    collection = Collection(folder)
    collection.commit("test", "1", [f"unit-{seed}" for seed in seeds], [turn_of(seed) for seed in seeds], [])
    return collection


def ids(folder):
    return [turn.utt_id for turn in read_turns(folder, with_audio=False)]


def test_a_turn_reads_back_as_it_was_written(tmp_path):
    turn = turn_of(3, style="calm", voice_parameters='{"f0": 1}', start_s=1.5)
    Collection(tmp_path).commit("test", "1", ["unit"], [turn], [])
    assert list(read_turns(tmp_path, with_audio=True)) == [turn]
    assert list(read_turns(tmp_path, with_audio=False)) == [dataclasses.replace(turn, audio=None)]


def test_stored_audio_is_the_samples_to_16_bits_and_its_hash_is_theirs(tmp_path):
    samples = voice_like(1)
    turn = turn_of(1, samples)
    decoded, rate = read_audio(turn.audio, sample_rate=None)
    assert rate == turn.sample_rate == RATE
    assert turn.num_samples == len(decoded) == len(samples)
    assert np.array_equal(np.rint(decoded * 32768).astype(np.int16), to_pcm16(samples))


@pytest.mark.parametrize(
    ("reason", "samples", "text"),
    [
        ("empty_text", voice_like(), " ... "),
        ("empty_text", voice_like(), "nan"),
        ("empty_text", voice_like(), "[noise]"),
        ("too_short", voice_like(seconds=0.2), "Yes."),
        ("too_long", voice_like(seconds=31), "A word. " * 60),
        ("too_quiet", voice_like(level=1e-3), "Good morning."),
        ("too_quiet", np.zeros(RATE, dtype=np.float32), "Good morning."),
        ("clipped", np.sign(voice_like()), "Good morning."),
        ("chars_per_second", voice_like(), "A"),
        ("chars_per_second", voice_like(), "far too much text for a second " * 5),
    ],
)
def test_an_unusable_turn_is_refused_with_its_reason(reason, samples, text):
    result = turn_of(samples=samples, text=text)
    assert isinstance(result, Reject)
    assert result.reason == reason


def test_text_is_cleaned_and_its_form_recorded():
    assert turn_of(text="HELLO THERE MY FRIEND").text == "Hello there my friend"
    assert turn_of(text="HELLO THERE MY FRIEND").text_form == "upper_nopunct"
    assert turn_of(text=" So,\t[laughs]  cafe\u0301s\x00 then. ").text == "So, caf\u00e9s then."
    assert turn_of(text="no capitals here").text_form == "lower"


def test_a_torn_last_ledger_line_is_cut_and_its_shard_adopted_once(tmp_path):
    commit(tmp_path, 0)
    commit(tmp_path, 1)
    ledger = tmp_path / "shards.jsonl"
    whole = ledger.read_bytes()
    first = whole.index(b"\n") + 1
    for length in (first, first + 1, first + 40, len(whole) - 1):
        ledger.write_bytes(whole[:length])
        assert ids(tmp_path) == ["test:0"]
        assert len(Collection(tmp_path).adopted) == 1
        assert Collection(tmp_path).adopted == []
        assert ids(tmp_path) == ["test:0", "test:1"]
        assert Collection(tmp_path).verify() == []


def test_leftovers_of_a_killed_commit_are_removed(tmp_path):
    collection = commit(tmp_path, 0)
    shard = tmp_path / collection.entries[0].path
    half = shard.read_bytes()[: shard.stat().st_size // 2]
    (shard.parent / ".tmp-turns-00001.parquet").write_bytes(half)
    (shard.parent / "turns-00002.parquet").write_bytes(half)
    assert Collection(tmp_path).adopted == []
    assert [path.name for path in shard.parent.iterdir()] == [shard.name]
    assert ids(tmp_path) == ["test:0"]


def test_a_copy_of_a_listed_shard_is_not_adopted(tmp_path):
    collection = commit(tmp_path, 0)
    shard = tmp_path / collection.entries[0].path
    shard.with_name("turns-00007.parquet").write_bytes(shard.read_bytes())
    assert Collection(tmp_path).adopted == []
    assert ids(tmp_path) == ["test:0"]


def test_a_ledger_damaged_before_its_end_is_refused_with_the_line(tmp_path):
    commit(tmp_path, 0)
    commit(tmp_path, 1)
    ledger = tmp_path / "shards.jsonl"
    ledger.write_bytes(b"{torn\n" + ledger.read_bytes())
    with pytest.raises(ValueError, match="line 1 is damaged"):
        Collection(tmp_path)


def test_a_ledger_of_a_newer_version_is_refused(tmp_path):
    commit(tmp_path, 0)
    ledger = tmp_path / "shards.jsonl"
    line = json.loads(ledger.read_text(encoding="utf-8"))
    ledger.write_text(json.dumps({**line, "schema_version": 99, "new": 1}) + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match="schema version 99"):
        read_ledger(tmp_path)


def test_shards_of_the_first_version_are_read_without_what_they_lack(tmp_path):
    commit(tmp_path, 1, 2)
    entry = read_ledger(tmp_path)[0]
    path = tmp_path / entry.path
    table = pyarrow.parquet.read_table(path).drop_columns(["words", "dnsmos_ovrl"])
    pyarrow.parquet.write_table(table, path)
    line = dataclasses.asdict(entry) | {"schema_version": 1}
    (tmp_path / "shards.jsonl").write_text(json.dumps(line) + "\n")
    for with_audio in (True, False):
        turns = list(read_turns(tmp_path, with_audio))
        assert [turn.words for turn in turns] == [None, None] and turns[0].text == turn_of(1).text
    commit(tmp_path, 3)
    assert len(ids(tmp_path)) == 3


def test_a_damaged_shard_is_put_aside_and_its_units_are_open_again(tmp_path):
    commit(tmp_path, 0)
    collection = commit(tmp_path, 1)
    damaged = tmp_path / collection.entries[0].path
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    assert len(collection.verify()) == 1
    again = Collection(tmp_path)
    assert again.units("test") == {"unit-1"}
    assert len(list((tmp_path / "quarantine").iterdir())) == 1
    commit(tmp_path, 0)
    assert sorted(ids(tmp_path)) == ["test:0", "test:1"]


def test_a_shard_that_is_gone_is_named_with_the_remedy(tmp_path):
    collection = commit(tmp_path, 0)
    (tmp_path / collection.entries[0].path).unlink()
    with pytest.raises(FileNotFoundError, match="--verify"):
        ids(tmp_path)


def test_no_collection_is_named_with_the_command(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"python collect_data\.py"):
        ids(tmp_path)


@pytest.mark.parametrize("call", range(4))
def test_a_full_disk_at_any_sync_leaves_what_was_committed(tmp_path, monkeypatch, call):
    collection = commit(tmp_path, 0)
    real, count = os.fsync, 0

    def full(handle):
        nonlocal count
        count += 1
        if count > call:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        collection.commit("test", "1", ["unit-1"], [turn_of(1)], [Reject(utt_id="x", reason="too_short")])
    monkeypatch.undo()
    assert ids(tmp_path)[:1] == ["test:0"]
    again = Collection(tmp_path)
    if "unit-1" not in again.units("test"):
        commit(tmp_path, 1)
    assert ids(tmp_path) == ["test:0", "test:1"]
    assert Collection(tmp_path).verify() == []


def test_the_writer_commits_whole_units_when_a_shard_is_full(tmp_path):
    writer = ShardWriter(Collection(tmp_path), "test", "1", shard_seconds=2.5)
    for seed in range(5):
        writer.add(f"unit-{seed}", [turn_of(seed)], [])
    assert [entry.rows for entry in read_ledger(tmp_path)] == [3]
    assert writer.seconds == pytest.approx(5.0)
    writer.flush()
    writer.flush()
    assert [entry.rows for entry in read_ledger(tmp_path)] == [3, 2]


def test_a_unit_whose_turns_were_all_refused_is_done(tmp_path):
    rejects = [Reject(utt_id="test:9", reason="empty_text", detail="''")]
    Collection(tmp_path).commit("test", "1", ["unit-9"], [], rejects)
    assert Collection(tmp_path).units("test") == {"unit-9"}
    assert list(read_turns(tmp_path, with_audio=False)) == []
    listed = json.loads((tmp_path / "rejects/test/rejects-00000.jsonl").read_text(encoding="utf-8"))
    assert listed == {"utt_id": "test:9", "reason": "empty_text", "detail": "''"}


def test_the_summary_counts_hours_speakers_licences_and_rejects(tmp_path):
    collection = Collection(tmp_path)
    turns = [turn_of(0, license="CC0-1.0"), turn_of(1, speaker_id="test:ben", synthetic=True)]
    collection.commit("test", "1", ["a", "b"], turns, [Reject(utt_id="x", reason="clipped")] * 2)
    collection.write_summary({"seed": 0})
    facts = json.loads((tmp_path / "collection.json").read_text(encoding="utf-8"))["sources"]["test"]
    assert facts["hours"] == round(2 / 3600, 4)
    assert (facts["turns"], facts["units"], facts["speakers"]) == (2, 2, 2)
    assert facts["licenses"] == ["CC0-1.0", "NOASSERTION"]
    assert facts["synthetic"]
    assert facts["rejected"] == {"clipped": 2}


def test_every_field_of_a_turn_is_a_column():
    assert turn_shards.SCHEMA.names == [field.name for field in dataclasses.fields(TurnRecord)]
