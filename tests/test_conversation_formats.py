"""Conversations written in each format and read back, and the traps of files that others wrote."""

import dataclasses
import errno
import io
import itertools
import json

import jsonschema
import numpy as np
import pytest
import soundfile
import torch
from conftest import tiny_tokenizer, turn_record, voice, write_tiny_data

import collect_data
import export_conversations
import spoken_conversations
from audio import read_audio
from command_line import EXIT_DONE, EXIT_INPUT, EXIT_PARTIAL, EXIT_STORAGE, run
from conversation_formats import Word, recordings_of_csm, recordings_of_moshi, turns_of
from conversations import build_conversations, loudness_gains, split_of
from export_conversations import INDEX, REQUESTS, file_names, spread_words
from rvq_tokenizer import save_tokenizer
from speech_sources import COLUMNS, manifest_turns
from spoken_conversations import read_requests
from synthetic_voices import trim_silence
from turn_shards import Collection, make_turn, read_turns

RATE = 22_050


def write_data(folder, level=0.1):
    """12 dialogues, half of them with times and overlaps, and 6 monologues; trimmed turns with soft ends."""
    turns = []
    for c, i in itertools.product(range(18), range(4)):
        samples = voice(1.2 + 0.1 * i, 100 + 5 * c + 40 * (i % 2), RATE, level)
        samples = trim_silence(samples * np.hanning(len(samples)).astype(np.float32) ** 3, RATE)
        speaker = "a" if c >= 12 else "ba"[i % 2]
        start = 1.1 * i + 0.25 if c % 2 else None
        turns.append(
            make_turn(
                samples,
                RATE,
                f"Turn {i} of talk number {c}.",
                utt_id=f"test:{c:02d}-{i}",
                source="test",
                split_group=f"test:talk/{c:02d}",
                conv_key=f"test:talk/{c:02d}",
                turn_index=i,
                speaker_id=f"test:{speaker}",
                start_s=start,
                end_s=None if start is None else start + len(samples) / RATE,
                style="calm" if c % 3 else None,
                lang="cs",
                license="CC0-1.0",
            )
        )
    folder.mkdir(parents=True)
    Collection(folder).commit("test", "1", [f"{c}" for c in range(18)], turns, [])
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("formats") / "data")


COLLECTABLE = ["csm", "moshi", "wav"]  # formats that collect_data.py reads


def export(data, out, kind, *flags):
    return run(export_conversations.main, ["--data", str(data), "--to", kind, "--out", str(out), *flags])


def collect(out, source):
    flags = ["--sources", "local", "--input", str(source), "--out", str(out), "--workers", "1"]
    return run(collect_data.main, flags)


def conversations(folder, split=None):
    """Conversations with audio, ordered by their first text; those of one split if one is given."""
    found = build_conversations(read_turns(folder, with_audio=True))
    return sorted((c for c in found if split in (None, c.split)), key=lambda c: c.turns[0].text)


def rejects(out):
    lines = [line for path in out.glob("rejects/*/*.jsonl") for line in path.read_text(encoding="utf-8").splitlines()]
    return sorted(json.loads(line)["reason"] for line in lines)


def write_lines(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def assert_one_line(capsys, said):
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


# --- there and back --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", COLLECTABLE)
def test_what_is_exported_is_read_back_as_the_same_conversations(data, tmp_path, kind):
    assert export(data, tmp_path / "out", kind) == EXIT_DONE
    assert collect(tmp_path / "back", tmp_path / "out" / INDEX[kind]) == EXIT_DONE
    before = [c for c in conversations(data, "train") if kind != "moshi" or c.structure == "dialogue"]
    after = conversations(tmp_path / "back")
    assert {c.structure for c in before} >= {"dialogue"}
    assert {turn.start_s is None for c in before for turn in c.turns} == {True, False}
    assert [[turn.text for turn in c.turns] for c in after] == [[turn.text for turn in c.turns] for c in before]
    assert [c.speakers for c in after] == [c.speakers for c in before]
    pairs = [pair for c, d in zip(before, after, strict=True) for pair in zip(c.turns, d.turns, strict=True)]
    end = 0.0
    for one, other in pairs:
        if kind == "wav":
            names = ("pcm_sha256", "sample_rate", "start_s", "end_s", "style", "lang", "license")
            assert [getattr(other, name) for name in names] == [getattr(one, name) for name in names]
            continue
        assert other.sample_rate == 24_000
        wanted, found = read_audio(one.audio)[0], read_audio(other.audio)[0]
        lost = len(wanted) - len(found)  # silence at soft ends is cut anew
        assert 0 <= lost < 480 if kind == "csm" else lost == 0
        assert min(np.abs(wanted[s : s + len(found)] - found).max() for s in range(lost + 1)) < 2 / 32768
        if kind == "moshi":
            placed = 0.0 if one.turn_index == 0 else end + 0.3
            assert other.start_s == pytest.approx(placed if one.start_s is None else one.start_s, abs=1e-4)
            end = other.end_s


def test_a_wav_export_is_what_the_shards_hold_to_the_bit_also_where_it_is_loud(tmp_path):
    data = write_data(tmp_path / "data", level=0.4)
    export(data, tmp_path / "out", "wav")
    rows = [json.loads(line) for line in (tmp_path / "out" / "manifest.jsonl").read_text().splitlines()]
    turns = {turn.text: turn for c in conversations(data, "train") for turn in c.turns}
    assert len(rows) == len(turns)
    assert max(turn.peak_dbfs for turn in turns.values()) > -6
    for row in rows:
        assert tuple(row) == COLUMNS
        path = tmp_path / "out" / row["audio"]
        assert path.with_suffix(".txt").read_text(encoding="utf-8").strip() == row["text"]
        stored, _ = soundfile.read(io.BytesIO(turns[row["text"]].audio), dtype="int16")
        assert np.array_equal(soundfile.read(path, dtype="int16")[0], stored)


def test_the_data_has_turns_that_would_be_trimmed_again(data):
    samples = [read_audio(turn.audio, None)[0] for turn in read_turns(data, with_audio=True)]
    assert any(len(trim_silence(x, RATE)) < len(x) for x in samples)


# --- csm -------------------------------------------------------------------------------------------------------------


def csm_turn(role, text, **audio):
    """A turn with a file, or without one if none is given."""
    items = [{"type": "text", "text": text}]
    return {"role": role, "content": [*items, {"type": "audio", **audio}] if audio else items}


@pytest.fixture
def clips(tmp_path):
    (tmp_path / "audio").mkdir()
    for number in range(4):
        soundfile.write(tmp_path / "audio" / f"{number}.wav", voice(1.2, 120 + 30 * number), 16_000)
    return tmp_path


def test_csm_lines_of_others_are_read_in_their_spellings(clips):
    null = {"role": "1", "content": [{"type": "text", "text": "Fine, and you?", "path": None}]}
    null["content"].append({"type": "audio", "text": None, "audio": None, "path": "audio/1.wav"})
    rows = [
        {"messages": [csm_turn(0, "How are you?", url="audio/0.wav"), null], "training_mask": [False, True]},
        {"conversation": [csm_turn("0", "Somebody else.", audio="audio/2.wav")]},
    ]
    assert collect(clips / "out", write_lines(clips / "data.jsonl", *rows)) == EXIT_DONE
    first, second = conversations(clips / "out")
    assert [turn.text for turn in first.turns] == ["How are you?", "Fine, and you?"]
    assert first.speakers == (0, 1)
    assert second.turns[0].text == "Somebody else."
    assert second.turns[0].speaker_id not in {turn.speaker_id for turn in first.turns}


def test_a_csm_turn_without_audio_is_a_reject_and_not_silently_skipped(clips):
    row = {"conversation": [csm_turn("0", "How are you?", path="audio/0.wav"), csm_turn("1", "Fine, and you?")]}
    assert collect(clips / "out", write_lines(clips / "data.jsonl", row)) == EXIT_PARTIAL
    assert [turn.text for turn in read_turns(clips / "out", with_audio=False)] == ["How are you?"]
    assert rejects(clips / "out") == ["missing_file"]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"conversation": []}, "no turn has audio"),
        ({"messages": [csm_turn("0", "Text alone.")]}, "no turn has audio"),
        ({"messages": ["Hello."]}, "turn 0 is not an object"),
        ({"messages": [{"role": "0", "content": "Hello."}]}, "turn 0 is not an object"),
        ({"messages": [{"content": [{"type": "text", "text": "Hello."}]}]}, "turn 0 is not an object"),
        ({"messages": [csm_turn("0", "Numbers.", audio=[0.1, 0.2])]}, "turn 0 needs one text and one audio file"),
        ({"messages": [csm_turn("0", 3, path="a.wav")]}, "turn 0 needs one text and one audio file"),
        ({"messages": [csm_turn("0", "Two.", path="a.wav", url="b.wav")]}, "turn 0 needs one text and one audio"),
        ({"messages": [csm_turn("0", "Far.", url="https://example.org/a.wav")]}, "download it"),
    ],
)
def test_a_csm_line_of_another_form_is_one_line_and_exit_2(tmp_path, capsys, row, said):
    assert collect(tmp_path / "out", write_lines(tmp_path / "data.jsonl", row)) == EXIT_INPUT
    assert_one_line(capsys, said)


def test_the_processor_of_transformers_reads_the_exported_lines(data, tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    special = ["<pad>", "<|AUDIO|>", "<|audio_eos|>"]
    ids = {token: number for number, token in enumerate([*special, *map(chr, range(32, 127))])}
    letters = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token="<pad>"))
    letters.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex("."), "isolated")
    letters.add_special_tokens(special)
    template = "{% for m in messages %}[{{ m['role'] }}]{% for item in m['content'] %}{% if item['type'] == 'text' %}"
    template += "{{ item['text'] }}{% else %}<|AUDIO|><|audio_eos|>{% endif %}{% endfor %}{% endfor %}"
    processor = transformers.CsmProcessor(
        transformers.EncodecFeatureExtractor(feature_size=1, sampling_rate=24_000),
        transformers.PreTrainedTokenizerFast(tokenizer_object=letters, pad_token="<pad>"),
        chat_template=template,
    )
    export(data, tmp_path, "csm")
    monkeypatch.chdir(tmp_path)  # it takes paths as they are
    line = json.loads((tmp_path / "data.jsonl").read_text(encoding="utf-8").splitlines()[0])
    found = processor.apply_chat_template(line["conversation"], tokenize=True, return_dict=True)
    first_text = line["conversation"][0]["content"][0]["text"]
    turns = next(c for c in conversations(data, "train") if c.turns[0].text == first_text)
    said = "".join(f"[{s}]{turn.text}" for s, turn in zip(turns.speakers, turns.turns, strict=True))
    names = {number: token for token, number in ids.items()}
    assert "".join(names[i] for i in found["input_ids"][0].tolist() if i >= len(special)) == said
    samples = [read_audio(turn.audio)[0] for turn in turns.turns]
    assert found["input_values_cutoffs"][0].tolist() == np.cumsum([len(x) for x in samples]).tolist()
    assert np.abs(found["input_values"].flatten().numpy() - np.concatenate(samples)).max() < 2 / 32768


# --- moshi -----------------------------------------------------------------------------------------------------------


def write_moshi(folder, alignments, seconds=8.0, channels=2):
    """A file whose channels hum in different pitches, and the line that names it."""
    folder.mkdir(parents=True, exist_ok=True)
    hums = np.stack([voice(seconds, 110), voice(seconds, 190, level=0.05)], axis=1)  # (N, 2)
    soundfile.write(folder / "x.wav", hums[:, :channels], 16_000)
    if alignments is not None:
        (folder / "x.json").write_text(json.dumps({"alignments": alignments}), encoding="utf-8")
    return write_lines(folder / "data.jsonl", {"path": "x.wav", "duration": seconds})


TALK = [  # not in order, as nobody promises; a word without length, a label of another program, two pauses near 0.8 s
    ["Good", [0.5, 0.8], "SPEAKER_MAIN"],
    ["Yes,", [3.0, 3.2], "user"],
    ["morning,", [0.8, 1.3], "SPEAKER_MAIN"],
    ["Anna.", [2.09, 2.4], "SPEAKER_MAIN"],
    ["good", [3.2, 3.4], "user"],
    ["morning.", [3.65, 3.9], "user"],
    ["Tea?", [3.6, 4.3], "SPEAKER_MAIN"],
    [" Tea?", [4.3, 4.3], "SPEAKER_MAIN"],
    ["Please.", [4.7, 5.2], "user"],
]


def test_moshi_words_become_turns_of_their_channel(tmp_path):
    assert collect(tmp_path / "out", write_moshi(tmp_path / "in", TALK)) == EXIT_DONE
    (talk,) = conversations(tmp_path / "out")
    assert [turn.text for turn in talk.turns] == ["Good morning, Anna.", "Yes, good morning.", "Tea? Tea?", "Please."]
    assert talk.speakers == (0, 1, 0, 1)
    assert [turn.overlap for turn in talk.turns] == [False, True, True, False]
    assert [turn.start_s for turn in talk.turns] == pytest.approx([0.4, 2.9, 3.5, 4.6])
    assert [turn.end_s for turn in talk.turns] == pytest.approx([2.5, 4.0, 4.4, 5.3])
    both, rate = soundfile.read(tmp_path / "in" / "x.wav", dtype="float32")
    for turn, speaker in zip(talk.turns, talk.speakers, strict=True):
        first = round(turn.start_s * rate)
        wanted = both[first : first + turn.num_samples, speaker]
        assert np.abs(read_audio(turn.audio, None)[0] - wanted).max() < 2 / 32768
        for word, begin, end in json.loads(turn.words):
            assert [word, pytest.approx([turn.start_s + begin, turn.start_s + end], abs=1e-3)] in [
                [text.strip(), times] for text, times, _ in TALK
            ]
    assert len({turn.origin_url for turn in talk.turns}) == 4


def test_silence_inside_a_span_stays_so_that_word_times_hold(tmp_path):
    index = write_moshi(tmp_path / "in", [["Anything.", [1.0, 3.0], "SPEAKER_MAIN"]])
    samples, rate = soundfile.read(tmp_path / "in" / "x.wav")
    samples[: 2 * rate] = 0
    soundfile.write(tmp_path / "in" / "x.wav", samples, rate)
    assert collect(tmp_path / "out", index) == EXIT_DONE
    (turn,) = read_turns(tmp_path / "out", with_audio=False)
    assert turn.duration_s == pytest.approx(2.2)
    assert json.loads(turn.words) == [["Anything.", 0.1, 2.1]]


def collected_split(folder, alignments):
    """Collect one file into `folder / "data"`; the split it fell into."""
    assert collect(folder / "data", write_moshi(folder / "in", alignments)) == EXIT_DONE
    (conversation,) = conversations(folder / "data")
    return conversation.split


def test_known_words_are_exported_at_their_times(tmp_path):
    words = [(word, start, end, label != "user") for word, (start, end), label in TALK]
    split = collected_split(tmp_path, TALK)
    assert export(tmp_path / "data", tmp_path / "out", "moshi", "--split", split) == EXIT_DONE
    (line,) = map(json.loads, (tmp_path / "out" / "data.jsonl").read_text().splitlines())
    found = json.loads((tmp_path / "out" / line["path"]).with_suffix(".json").read_text())["alignments"]
    assert [times[0] for _, times, _ in found] == sorted(times[0] for _, times, _ in found)
    assert {label for *_, label in found} == {"SPEAKER_MAIN", "SPEAKER_OTHER"}
    found = [(word, *times, label == "SPEAKER_MAIN") for word, times, label in found]
    for (word, start, end, main), other in zip(sorted(words, key=lambda w: w[1:]), found, strict=True):
        assert other == (word.strip(), pytest.approx(start, abs=1e-3), pytest.approx(end, abs=1e-3), main)
    info = soundfile.info(tmp_path / "out" / line["path"])
    assert (info.channels, info.samplerate, info.subtype) == (2, 24_000, "PCM_16")
    assert info.duration == pytest.approx(line["duration"])


def test_long_turns_are_cut_at_their_widest_pause_and_even_ones_in_the_middle():
    def talk(pauses):
        ends = np.cumsum([0.5 + pause for pause in pauses])
        return [Word(f"w{i}", end - 0.5, float(end)) for i, end in enumerate(ends)]

    widest = talk([0.1] * 20 + [0.5] + [0.1] * 40)
    assert [len(turn) for turn in turns_of(widest)] == [20, 41]
    even = talk([0.0] * 200)
    assert [len(turn) for turn in turns_of(even)] == [50] * 4
    for words in (widest, even, talk([0.001 * i for i in range(400)])):
        turns = turns_of(words)
        assert [word for turn in turns for word in turn] == words
        assert max(turn[-1].end - turn[0].start for turn in turns) <= 29.8 + 1e-4
    assert [len(turn) for turn in turns_of([Word("eternal", 0.0, 40.0)])] == [1]  # to be rejected as too long
    assert turns_of([]) == []


def test_cut_turns_share_no_audio(tmp_path):
    words = [[f"w{i}", [0.5 * i, 0.5 * i + 0.45], "SPEAKER_MAIN"] for i in range(100)]
    (tmp_path / "x.json").write_text(json.dumps({"alignments": words}), encoding="utf-8")
    spans = [r.span for r in recordings_of_moshi({"path": "x.wav", "duration": 50}, tmp_path / "data.jsonl")]
    assert len(spans) == 2
    assert spans[0][1] == spans[1][0] == pytest.approx(24.975)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"alignments": None}, "missing_text"),
        ({"alignments": []}, "missing_text"),
        ({"alignments": TALK, "seconds": 5.0}, "unreadable_audio"),  # ends before the last turn does
        ({"alignments": [["Hi", [1, 2], "user"]], "channels": 1}, "unreadable_audio"),
    ],
)
def test_a_moshi_file_that_lacks_something_is_a_reject(tmp_path, changes, reason):
    assert collect(tmp_path / "out", write_moshi(tmp_path / "in", **changes)) == EXIT_PARTIAL
    assert rejects(tmp_path / "out") == [reason]


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        '{"words": []}',
        '{"alignments": [["Hello.", 0.5, "SPEAKER_MAIN"]]}',
        '{"alignments": [["Hello.", [0.9, 0.5], "SPEAKER_MAIN"]]}',
        '{"alignments": [["Hello.", [NaN, 0.5], "SPEAKER_MAIN"]]}',
        '{"alignments": [["Hello.", [null, 0.5], "SPEAKER_MAIN"]]}',
        '{"alignments": [[7, [0.1, 0.5], "SPEAKER_MAIN"]]}',
    ],
)
def test_damaged_alignments_are_one_line_and_exit_2(tmp_path, capsys, content):
    index = write_moshi(tmp_path / "in", [])
    (tmp_path / "in" / "x.json").write_text(content, encoding="utf-8")
    assert collect(tmp_path / "out", index) == EXIT_INPUT
    assert_one_line(capsys, "x.json is not of the form")


def test_words_are_spread_by_their_letters_inside_the_margins():
    assert [word for word, _, _ in spread_words("We are here.", 2.2)] == ["We", "are", "here."]
    times = [time for _, *pair in spread_words("We are here.", 2.2) for time in pair]
    assert times == pytest.approx([0.1, 0.5, 0.5, 1.1, 1.1, 2.1])


# --- which format ----------------------------------------------------------------------------------------------------


def test_rows_of_a_manifest_are_not_taken_for_other_formats(tmp_path):
    row = {"audio": "a.wav", "text": "Hello.", "conversation": "c", "path": "b.wav", "duration": 3, "trimmed": "TRUE"}
    (turn,) = manifest_turns(tmp_path / "m.jsonl", row, 1)
    assert (turn.audio, turn.conversation, turn.span, turn.trimmed) == (tmp_path / "a.wav", "c", None, True)
    with pytest.raises(ValueError, match="trimmed is 'perhaps'"):
        manifest_turns(tmp_path / "m.jsonl", {**row, "trimmed": "perhaps"}, 1)


def test_identical_roles_in_two_files_or_lines_are_different_people(tmp_path):
    row = {"conversation": [csm_turn("0", "Hello.", path="a.wav")]}
    other = {"conversation": [csm_turn("0", "Hello.", path="b.wav")]}
    found = [recordings_of_csm(r, tmp_path / f"{name}.jsonl")[0].speaker for r in (row, other) for name in "ab"]
    assert len(set(found)) == 4


# --- exporting -------------------------------------------------------------------------------------------------------


def test_conversations_without_two_speakers_are_left_out_and_counted(data, tmp_path, capsys):
    assert export(data, tmp_path / "out", "moshi") == EXIT_DONE
    own = conversations(data, "train")
    alone = sum(c.structure == "monologue" for c in own)
    said = capsys.readouterr().out
    assert 0 < alone < len(own)
    assert f"{alone} of {len(own)} conversations left out" in said
    assert f"{len(own) - alone} conversations in" in said
    assert len((tmp_path / "out" / "data.jsonl").read_text().splitlines()) == len(own) - alone


@pytest.mark.parametrize("kind", COLLECTABLE)
def test_an_interrupted_export_leaves_no_folder_and_is_made_by_the_same_command(
    data, tmp_path, monkeypatch, capsys, kind
):
    wanted = len(conversations(data, "train"))
    calls = itertools.count()

    def filling(content, *arguments, **named):
        if next(calls) > 6:
            raise OSError(errno.ENOSPC, "No space")
        return real(content, *arguments, **named)

    real = export_conversations.read_audio
    monkeypatch.setattr(export_conversations, "read_audio", filling)
    if kind == "wav":
        real = soundfile.read
        monkeypatch.setattr(export_conversations.soundfile, "read", filling)
    assert export(data, tmp_path / "out", kind) == EXIT_STORAGE
    assert list(tmp_path.glob("out.partial/*/*")) != []
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    capsys.readouterr()
    assert export(data, tmp_path / "out", "csm") == EXIT_DONE
    assert len((tmp_path / "out" / "data.jsonl").read_text().splitlines()) == wanted
    assert not (tmp_path / "out.partial").exists()
    capsys.readouterr()
    assert export(data, tmp_path / "out", kind) == EXIT_INPUT
    assert_one_line(capsys, "is not empty")


def test_clips_of_a_batch_are_what_the_tokenizer_gives_back(data, tmp_path, capsys):
    save_tokenizer(tiny_tokenizer(), tmp_path / "tokenizer")
    assert export(data, tmp_path / "plain", "batch") == EXIT_DONE
    assert export(data, tmp_path / "coded", "batch", "--tokenizer", str(tmp_path / "tokenizer")) == EXIT_DONE
    clips = sorted(path.name for path in (tmp_path / "plain").glob("*.wav"))
    assert clips == sorted(path.name for path in (tmp_path / "coded").glob("*.wav")) != []
    assert all((tmp_path / "plain" / c).read_bytes() != (tmp_path / "coded" / c).read_bytes() for c in clips)
    capsys.readouterr()
    flags = ["--tokenizer", str(tmp_path / "tokenizer"), "--codebooks", "99"]
    assert export(data, tmp_path / "many", "wav", *flags) == EXIT_INPUT
    assert_one_line(capsys, "codebooks=99 must be at most the tokenizer's 4")


def test_names_that_begin_alike_stay_short_and_apart(data):
    one = conversations(data, "train")[0]
    many = [dataclasses.replace(one, conv_id="x" * 70 + str(number)) for number in range(30)]
    names = export_conversations.file_names(many)
    assert len(set(names)) == 30 and max(map(len, names)) <= 60


def test_a_batch_holds_the_texts_and_a_clip_of_every_speaker_from_elsewhere(data, tmp_path):
    assert export(data, tmp_path / "out", "batch") == EXIT_DONE
    requests, failures = read_requests(tmp_path / "out" / "conversations.json")
    own = conversations(data, "train")
    assert not failures and len(requests) == len(own)
    texts = {request.id: [turn["text"] for turn in request.content["turns"]] for request in requests}
    assert sorted(texts.values()) == sorted([turn.text for turn in c.turns] for c in own)
    shown = [(request, clip) for request in requests for clip in request.content["voices"].values()]
    assert shown
    for request, clip in shown:
        assert clip["text"] not in texts[request.id]
        assert len(read_audio(tmp_path / "out" / clip["audio"])[0]) > 0


def test_the_longest_silences_of_a_meeting_are_shortened_to_what_can_be_asked_for(data, tmp_path):
    one = next(c for c in conversations(data, "train") if len(c.turns) > 1)
    early = dataclasses.replace(one.turns[0], start_s=0.0, end_s=1.0)
    late = dataclasses.replace(one.turns[1], start_s=5_000.0, end_s=5_001.0)
    pair = dataclasses.replace(one, turns=(early, late), speakers=one.speakers[:2])
    (request,) = export_conversations.write_requests(tmp_path, "meeting", pair, {}, {}, answered=False)
    assert request["turns"][1]["gap_seconds"] == spoken_conversations.LONGEST_GAP
    jsonschema.validate({"conversations": [request]}, spoken_conversations.SCHEMA)


def test_replies_are_left_to_who_speaks_second_and_the_others_are_heard(data, tmp_path, capsys):
    assert export(data, tmp_path / "out", "replies") == EXIT_DONE
    requests, failures = read_requests(tmp_path / "out" / REQUESTS)
    own = {c.turns[0].text: c for c in conversations(data, "train") if len(set(c.speakers)) > 1}
    left_out = len(conversations(data, "train")) - len(own)
    assert f"{left_out} of {left_out + len(own)} conversations left out" in capsys.readouterr().out
    assert not failures and len(requests) == len(own) > 0
    for request in requests:
        asked = request.content["turns"]
        real = own[asked[0]["text"]]
        second = next(speaker for speaker in real.speakers if speaker != real.speakers[0])
        for turn, original, speaker in zip(asked, real.turns, real.speakers, strict=True):
            assert turn["speaker"] == speaker
            if speaker == second:
                assert "text" not in turn and "audio" not in turn
            else:
                samples = read_audio(tmp_path / "out" / turn["audio"])[0]
                assert turn["text"] == original.text
                np.testing.assert_allclose(samples, read_audio(original.audio)[0], atol=1e-4)
        assert set(request.content["voices"]) <= {str(second)}
    assert any(request.content["voices"] for request in requests)


def test_an_export_through_a_tokenizer_holds_its_copies(data, tmp_path, tokenizer, tokenizer_folder):
    assert export(data, tmp_path / "real", "wav") == EXIT_DONE
    assert export(data, tmp_path / "copy", "wav", "--tokenizer", str(tokenizer_folder)) == EXIT_DONE
    few = ("--tokenizer", str(tokenizer_folder), "--codebooks", "1")
    assert export(data, tmp_path / "few", "wav", *few) == EXIT_DONE
    path = next((tmp_path / "real").rglob("*.wav")).relative_to(tmp_path / "real")
    real, copy, one = (read_audio(tmp_path / name / path)[0] for name in ("real", "copy", "few"))
    turns = [turn for c in conversations(data) for turn in c.turns]
    (own,) = {t.utt_id for t in turns if np.array_equal(read_audio(t.audio)[0], real)}
    heard = real * np.float32(loudness_gains(turns)[own])  # tokenizers know one level
    assert np.abs(heard - real).max() > 0.01
    codes = tokenizer.encode(torch.from_numpy(heard)[None])
    wanted = tokenizer.decode(codes)[0, : len(real)].detach().numpy()
    np.testing.assert_allclose(copy, wanted.clip(-1, 1), atol=2e-4)
    assert np.abs(copy - one).max() > 1e-3
    assert export(data, tmp_path / "no", "wav", "--codebooks", "1") == EXIT_INPUT


def test_what_cannot_be_exported_is_one_line_and_exit_2(tmp_path, capsys):
    assert export(tmp_path / "none", tmp_path / "out", "csm") == EXIT_INPUT
    assert_one_line(capsys, "no collected data")
    soundfile.write(tmp_path / "a.wav", voice(1.2, 120), 16_000)
    index = write_lines(tmp_path / "m.jsonl", {"audio": "a.wav", "text": "All of it is here."})
    assert collect(tmp_path / "data", index) == EXIT_DONE
    (split,) = {c.split for c in conversations(tmp_path / "data")}
    capsys.readouterr()
    assert export(tmp_path / "data", tmp_path / "out", "moshi", "--split", split) == EXIT_INPUT
    assert_one_line(capsys, "none of the 1 conversations has two speakers")
    other = next(name for name in ("train", "val", "test") if name != split)
    assert export(tmp_path / "data", tmp_path / "out", "csm", "--split", other) == EXIT_INPUT
    assert_one_line(capsys, f"no turns in split {other!r}")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="unknown kind 'mp3'"):
        export_conversations.export(tmp_path / "data", tmp_path / "out", "mp3", split)


def test_file_names_differ_on_every_file_system(tmp_path):
    write_tiny_data(tmp_path / "data", 4)
    talks = build_conversations(read_turns(tmp_path / "data", with_audio=False))
    ids = ["a:b/c", "a_b_c", "A.B", "a.b", "../..", "\u010de\u0161tina", "x" * 300, "x" * 301]
    names = file_names([dataclasses.replace(talks[0], conv_id=conv_id) for conv_id in ids])
    assert len({name.lower() for name in names}) == len(ids)
    assert all(name.isascii() and len(name) < 110 and not {*name} & {*"/\\:"} for name in names)


def test_voice_sets_are_exported_whole_and_not_as_pseudo_dialogues(tmp_path):
    turns = [
        turn_record(f"set{s}", i, f"s{s}", f"sentence {i}", voice(0.5, 100 + s), source="common_voice")
        for s in range(60)
        for i in range(2)
    ]
    Collection(tmp_path).commit("common_voice", "1", ["all"], turns, [])
    assert any(c.structure == "pseudo" for c in build_conversations(turns))
    wanted = sum(split_of(f"set{s}") == "train" for s in range(60))
    assert export_conversations.export(tmp_path, tmp_path / "out", "wav", "train") == wanted
    assert len((tmp_path / "out" / "manifest.jsonl").read_text().splitlines()) == 2 * wanted


def test_a_dialogue_that_begins_late_is_not_exported_with_its_hours_of_silence(tmp_path):
    times = [{"start_s": 1.7e9 + 2 * i, "end_s": 1.7e9 + 2 * i + 1} for i in range(2)]
    turns = [turn_record("late", i, "ab"[i], "some words", voice(1.0, 100), **times[i]) for i in range(2)]
    Collection(tmp_path).commit("test", "1", ["late"], turns, [])
    assert export_conversations.export(tmp_path, tmp_path / "out", "moshi", split_of("late")) == 1
    assert json.loads((tmp_path / "out" / "data.jsonl").read_text())["duration"] == pytest.approx(3.0, abs=0.01)
