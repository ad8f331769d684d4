"""From conversations to batches: context, packing, mixture; a batch is a function of seed and step alone."""

import json
import shutil
from collections import Counter

import pytest
import torch
from conftest import turn_record, voice, write_tiny_data

import dataset_pipeline
from command_line import EXIT_DONE, EXIT_INPUT, run
from conversations import SPLITS, split_of, write_conversations
from dataset_pipeline import ConversationDataset, Mixture, Sample, pack
from frames import IGNORE, FrameLayout, Rows
from text_tokenizer import ByteTokenizer
from token_cache import TokenCache
from turn_shards import Collection, read_turns

LAYOUT = FrameLayout(n_codebooks=4, codebook_size=16, text_per_chunk=10, frames_per_chunk=4)
ROW = 160


@pytest.fixture
def dataset(shared_data, tokenizer) -> ConversationDataset:
    return make_dataset(shared_data, tokenizer)


def make_dataset(data, tokenizer, split="train", row_positions=ROW, layout=LAYOUT, **shares):
    cache, mixture = TokenCache(data, tokenizer), Mixture(**{"no_context": 0.15, **shares})
    return ConversationDataset(data, split, cache, ByteTokenizer(), layout, row_positions, mixture)


EVERYTHING = {"joint": 0.3, "listen": 0.2, "text_only": 0.1, "evict": 0.4, "one_speaker": 0.3}


def conversations_of(batch: Rows) -> list[Rows]:
    """The rows of each conversation of a batch."""
    return [
        Rows(*(x[b, batch.conversations[b] == number] for x in batch))
        for b in range(len(batch.tokens))
        for number in range(int(batch.conversations[b].max()) + 1)
    ]


def turns_of(batch: Rows) -> list[Rows]:
    """The rows of each turn of a batch."""
    return [
        Rows(*(x[rows.turns == number] for x in rows))
        for rows in conversations_of(batch)
        for number in rows.turns.unique().tolist()
    ]


def order_of(turn: Rows) -> str:
    """What a turn's rows are, in short: 't' for some text rows, 'a' for some audio rows."""
    letters = "".join("t" if text else "a" for text in turn.mask[:, -1].tolist())
    return "".join(letter for i, letter in enumerate(letters) if letters[:i][-1:] != letter)


def test_rows_hold_the_prosody_of_their_turn(shared_data, tokenizer):
    dataset = make_dataset(shared_data, tokenizer, text_only=0.3)
    known = {row.tobytes() for row in dataset.cache.prosody.values()}
    kinds = set()
    for turn in (turn for step in range(4) for turn in turns_of(dataset.batch(step, 2, seed=0))):
        kinds.add(order_of(turn))
        if order_of(turn) == "t":
            assert turn.prosody.isnan().all()
        else:
            assert {row.tobytes() for row in turn.prosody.numpy()} <= known
    assert kinds == {"t", "ta"}


def test_every_turn_is_learnt_once_per_epoch(dataset):
    for epoch in range(3):
        heard = Counter(
            (sample.conversation, index)
            for row in dataset.plan(seed=1, epoch=epoch)
            for sample in row
            for index in range(sample.first, sample.stop)
        )
        assert set(heard.values()) == {1}
        assert len(heard) == sum(len(c.turns) for c in dataset.conversations)


def test_no_row_is_overfull_and_packing_wastes_little(dataset):
    plan = dataset.plan(seed=0, epoch=0)
    used = [sum(sample.rows for sample in row) for row in plan]
    assert max(used) <= ROW
    assert sum(used) / (ROW * len(used)) > 0.7


def test_packing_keeps_every_sample_and_fills_rows():
    samples = [Sample(i, 0, 0, 1, rows) for i, rows in enumerate([6, 5, 4, 5, 3, 7])]
    assert [[s.rows for s in row] for row in pack(samples, 10, lambda *_: None)] == [[6, 4], [5, 5], [3, 7]]


def test_packing_fills_rows_with_parts_of_what_does_not_fit():
    """Conversations of 60 positions in rows of 100, in turns of 3 and 4: whole, 57 % of the rows would be used."""

    def split(sample: Sample, room: int) -> tuple[Sample, Sample] | None:
        taken = room // 4 * 4
        if not 0 < taken < sample.rows:
            return None
        return sample._replace(rows=taken), sample._replace(rows=sample.rows - taken + 8)  # 8 of context

    rows = pack([Sample(i, 0, 0, 15, 60) for i in range(200)], 100, split)
    used = [sum(sample.rows for sample in row) for row in rows]
    assert max(used) <= 100 and sum(used) / (100 * len(rows)) > 0.95


def test_a_conversation_that_is_cut_goes_on_with_its_newest_turns_as_context(tmp_path, tokenizer):
    name = next(f"t{i}" for i in range(100) if split_of(f"t{i}") == "train")
    turns = [turn_record(name, i, "ab"[i % 2], "some words", voice(0.56, 100 + 10 * i)) for i in range(20)]
    (tmp_path / "data").mkdir()
    Collection(tmp_path / "data").commit("test", "1", [name], turns, [])
    one_turn = LAYOUT.turn_length(len(ByteTokenizer().encode("[0]some words")) + 2, 7)
    dataset = make_dataset(tmp_path / "data", tokenizer, row_positions=8 * one_turn, no_context=0)
    assert [(s.start, s.first, s.stop) for s in dataset.samples()] == [(0, 0, 8), (6, 8, 14), (12, 14, 20)]
    second = turns_of(dataset.collate([[dataset.samples()[1]]], seeds=None))
    assert [bool((turn.targets != IGNORE).any()) for turn in second] == [False] * 2 + [True] * 6
    order = second[0].conversations.unique().tolist() + second[0].documents.unique().tolist()
    assert order == [0, 0] and {int(turn.documents[0]) for turn in second} == {0}


def test_parts_of_a_batch_are_the_rows_of_the_whole(shared_data, tokenizer):
    dataset = make_dataset(shared_data, tokenizer, **EVERYTHING)
    for step in range(4):
        whole = dataset.batch(step, 4, seed=1)
        for rank in range(2):
            part = dataset.batch(step, 4, seed=1, part=slice(2 * rank, 2 * rank + 2))
            L = part.tokens.size(1)
            for ours, all_rows in zip(part, whole, strict=True):
                assert torch.equal(ours.nan_to_num(), all_rows[2 * rank : 2 * rank + 2, :L].nan_to_num())


@pytest.mark.parametrize("shares", [{}, EVERYTHING], ids=["plain", "everything"])
def test_a_batch_depends_on_seed_and_step_alone(shared_data, tokenizer, shares):
    dataset = make_dataset(shared_data, tokenizer, **shares)
    wanted = [dataset.batch(step, 2, seed=5) for step in range(12)]  # several epochs
    fresh = make_dataset(shared_data, tokenizer, **shares)
    for step in (11, 3, 7):
        for ours, theirs in zip(fresh.batch(step, 2, seed=5), wanted[step], strict=True):
            assert torch.equal(ours.nan_to_num(), theirs.nan_to_num())
    assert not torch.equal(fresh.batch(0, 2, seed=6).tokens[0, :40], wanted[0].tokens[0, :40])


@pytest.mark.parametrize("delay", [0, 3])
def test_every_share_of_the_mixture_is_roughly_met(shared_data, tokenizer, monkeypatch, delay):
    monkeypatch.setattr(dataset_pipeline, "ROOM", 1.0)  # conversations stay whole
    sizes = {"n_codebooks": 4, "codebook_size": 16, "text_per_chunk": 10, "frames_per_chunk": 4}
    layout = FrameLayout(**sizes, n_semantic=2, acoustic_delay=delay)
    dataset = make_dataset(shared_data, tokenizer, layout=layout, no_context=0.2, **EVERYTHING)
    orders, evicted, taught = Counter(), [], []
    for step in range(120):
        batch = dataset.batch(step, 4, seed=0)
        orders.update(order_of(turn) for turn in turns_of(batch))
        for rows in conversations_of(batch):
            turns = rows.turns.unique().tolist()
            if len(turns) == 3:
                evicted.append(len(rows.documents.unique()) == 2)
                taught.append([bool((rows.targets[rows.turns == turn] != IGNORE).any()) for turn in turns])
    shares = {order: count / orders.total() for order, count in orders.items()}
    expected = {"t": 0.1, "tat": 0.2, "tata": 0.3, "ta": 0.4}  # text only, listen, joint, speak
    assert shares == pytest.approx(expected, abs=0.04)
    assert sum(evicted) / len(evicted) == pytest.approx(0.4, abs=0.07)
    of_one = [some for some in taught if not all(some)]
    assert len(of_one) / len(taught) == pytest.approx(0.3, abs=0.07)
    # a speaker has turns 0 and 2, the other turn 1; a turn of text only is taught too
    found = Counter(map(tuple, of_one))
    assert set(found) == {(True, False, True), (False, True, False)}
    singles = sum(1 for epoch in range(40) for row in dataset.plan(0, epoch) for s in row if s.stop - s.start == 1)
    assert singles / (40 * sum(len(c.turns) for c in dataset.conversations)) == pytest.approx(0.2, abs=0.04)


def test_a_turn_without_a_share_is_never_drawn(shared_data, tokenizer):
    dataset = make_dataset(shared_data, tokenizer)
    batch = dataset.batch(0, 8, seed=0)
    assert {order_of(turn) for turn in turns_of(batch)} == {"ta"}
    assert torch.equal(batch.documents, batch.conversations)


def test_held_out_rows_do_not_follow_the_mixture(shared_data, tokenizer):
    dataset = make_dataset(shared_data, tokenizer, no_context=0, listen=1, evict=1, one_speaker=1)
    batch = dataset.collate([[sample] for sample in dataset.samples()[:4]], seeds=None)
    assert {order_of(turn) for turn in turns_of(batch)} == {"ta"}
    assert torch.equal(batch.documents, batch.conversations)
    assert all((turn.targets != IGNORE).any() for turn in turns_of(batch))


def test_turns_that_leave_the_context_make_a_new_document_of_the_same_conversation(shared_data, tokenizer):
    dataset = make_dataset(shared_data, tokenizer, no_context=0, evict=1)
    cuts = Counter()
    for step in range(10):
        batch = dataset.batch(step, 2, seed=0)
        for rows in conversations_of(batch):
            first, second = rows.documents.unique().tolist()
            assert second == first + 1
            for document in (first, second):
                positions = rows.positions[rows.documents == document]
                assert positions.tolist() == list(range(len(positions)))
            begins = (rows.positions == 0).nonzero().flatten()[1]
            assert rows.turns[begins] == rows.turns[begins - 1] + 1  # between turns
            cuts[int(rows.turns[begins] - rows.turns[0])] += 1
            starts = rows.times[rows.mask[:, 0]]
            assert (starts.diff() >= 0).all()  # time goes on
        documents = [len(batch.documents[b].unique()) - int((batch.documents[b] == -1).any()) for b in range(2)]
        assert documents == [2 * (int(batch.conversations[b].max()) + 1) for b in range(2)]
    assert set(cuts) == {1, 2}


def test_turns_are_numbered_through_a_row_and_each_conversation_begins_at_time_0(dataset):
    batch = dataset.batch(0, 2, seed=0)
    for b in range(2):
        turns = batch.turns[b, batch.turns[b] >= 0]
        assert (turns.diff() >= 0).all()
        assert turns.unique().tolist() == list(range(int(turns.max()) + 1))
    assert all(rows.times[0] == 0 for rows in conversations_of(batch))
    padding = batch.documents == -1
    assert padding.any()
    for values in (batch.conversations, batch.turns):
        assert torch.equal(values == -1, padding)
    assert (batch.targets[padding] == IGNORE).all() and batch.prosody[padding].isnan().all()


@pytest.mark.parametrize(
    ("starts", "expected"), [((0.0, 1.0, 1.4), (0, 7 + 5.5, 19.5)), ((0.0, 0.3, 2.0), (0, 7, 14 + 14.25))]
)
def test_silence_between_turns_counts_and_overlap_does_not(tmp_path, tokenizer, starts, expected):
    """Turns of 0.56 s are 7 frames; `starts` are seconds, `expected` frames."""
    name = next(f"t{i}" for i in range(100) if split_of(f"t{i}") == "train")
    samples, turns = voice(0.56, 120), []
    for i, start in enumerate(starts):
        times = {"start_s": start, "end_s": start + 0.56}
        turns.append(turn_record(name, i, "ab"[i % 2], "some words", samples, **times))
    (tmp_path / "data").mkdir()
    Collection(tmp_path / "data").commit("test", "1", [name], turns, [])
    rows = make_dataset(tmp_path / "data", tokenizer, no_context=0).batch(0, 1, seed=0)
    begins = [float(rows.times[0, rows.turns[0] == turn][0]) for turn in range(3)]
    assert begins == pytest.approx(expected, abs=1e-3)


def test_a_batch_holds_whole_conversations_with_their_own_positions(dataset):
    batch = dataset.batch(0, 2, seed=0)
    for b in range(2):
        for document in range(int(batch.documents[b].max()) + 1):
            own = batch.documents[b] == document
            n = int(own.sum())
            assert batch.positions[b, own].tolist() == list(range(n))
            assert batch.tokens[b, own][0, 4] == ByteTokenizer.bos
            assert batch.tokens[b, own][-1, 0] == LAYOUT.end_of_turn
            assert (batch.targets[b, own][-1] == IGNORE).all()  # nothing of the next document is predicted
    assert not batch.mask[batch.documents == -1].any()


def test_attention_stays_within_a_document_and_the_past(dataset):
    batch = dataset.batch(0, 2, seed=0)
    allowed = batch.allowed()[:, 0]
    for b, i, j in allowed.nonzero().tolist()[::97]:
        assert j <= i
        assert batch.documents[b, i] == batch.documents[b, j]
    assert allowed.diagonal(dim1=1, dim2=2).all()  # no row is left with nothing to attend


def test_local_speaker_numbers_are_permuted_within_a_conversation(shared_data, tokenizer):
    dataset = make_dataset(shared_data, tokenizer, no_context=0)
    tags = set()
    for step in range(6):
        batch = dataset.batch(step, 1, seed=0)
        texts = batch.tokens[0, batch.mask[0, :, 4], 4].tolist()
        spoken = ByteTokenizer().decode(texts)
        tags |= {spoken[i : i + 3] for i in range(len(spoken)) if spoken[i] == "["}
        first = spoken.split("[")[1:4]
        assert first[0][0] == first[2][0] != first[1][0]  # turns 0 and 2 are one speaker
    assert tags == {"[0]", "[1]"}


def test_no_batch_is_longer_than_a_row_with_many_speakers_either(tmp_path, tokenizer):
    """The tags of speakers 10 and above have a digit more than those they are exchanged with."""
    name = next(f"t{i}" for i in range(100) if split_of(f"t{i}") == "train")
    turns = [turn_record(name, i, f"s{i}", "some words", voice(0.56, 100 + 10 * i)) for i in range(20)]
    (tmp_path / "data").mkdir()
    Collection(tmp_path / "data").commit("test", "1", [name], turns, [])
    one_turn = LAYOUT.turn_length(len(ByteTokenizer().encode("[0]some words")) + 2, 7)
    dataset = make_dataset(tmp_path / "data", tokenizer, row_positions=4 * one_turn + 2, no_context=0)
    assert max(dataset.batch(step, 1, seed=0).tokens.size(1) for step in range(40)) <= 4 * one_turn + 2


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        ({"no_context": -0.1}, "no_context=-0.1 must be between 0 and 1"),
        ({"evict": 1.5}, "evict=1.5 must be between 0 and 1"),
        ({"joint": 0.5, "listen": 0.4, "text_only": 0.2}, "joint=0.5, listen=0.4, text_only=0.2: more than 1 in all"),
    ],
)
def test_impossible_mixtures_are_refused(shares, message):
    with pytest.raises(ValueError, match=message):
        Mixture(**shares)


def test_a_turn_longer_than_a_row_is_refused_by_name(shared_data, tokenizer):
    with pytest.raises(ValueError, match=r"turn test:talk\d+-\d needs \d+ positions, a row has 20"):
        make_dataset(shared_data, tokenizer, row_positions=20)


def test_conversation_files_list_every_turn(tmp_path):
    data = write_tiny_data(tmp_path / "data", n_conversations=30)
    counts = write_conversations(data)
    rows = [
        json.loads(line)
        for split in SPLITS
        for line in (data / "conversations" / f"{split}.jsonl").read_text().splitlines()
    ]
    assert len(rows) == sum(counts.values()) == 30
    listed = {turn["utt_id"] for row in rows for turn in row["turns"]}
    assert listed == {turn.utt_id for turn in read_turns(data, with_audio=False)}
    assert [turn["speaker"] for turn in rows[0]["turns"]] == [0, 1, 0]
    assert run(dataset_pipeline.main, ["--data", str(data)]) == EXIT_DONE


def test_a_missing_or_damaged_collection_is_one_line(tmp_path, capsys):
    assert run(dataset_pipeline.main, ["--data", str(tmp_path / "none")]) == EXIT_INPUT
    assert "collect some with: python collect_data.py" in capsys.readouterr().err
    data = write_tiny_data(tmp_path / "data", n_conversations=2)
    shutil.rmtree(data / "turns")
    assert run(dataset_pipeline.main, ["--data", str(data)]) == EXIT_INPUT
    assert "is listed but gone" in capsys.readouterr().err


def test_a_split_without_conversations_is_refused_and_not_searched_for_ever(tmp_path, tokenizer):
    name = next(f"t{i}" for i in range(100) if split_of(f"t{i}") == "test")
    (tmp_path / "data").mkdir()
    turns = [turn_record(name, 0, "a", "some words", voice(0.56, 100))]
    Collection(tmp_path / "data").commit("test", "1", [name], turns, [])
    with pytest.raises(ValueError, match="this split holds no conversations; collect more"):
        make_dataset(tmp_path / "data", tokenizer).batch(0, 1, seed=0)


def test_what_is_collected_after_the_tokens_were_made_is_left_for_the_next_run(tmp_path, tokenizer):
    data = write_tiny_data(tmp_path / "data")
    cache = TokenCache(data, tokenizer)
    new = [turn_record("late", 0, "a", "some words", voice(0.56, 100))]
    Collection(data).commit("test", "1", ["late"], new, [])
    dataset = ConversationDataset(data, split_of("late"), cache, ByteTokenizer(), LAYOUT, ROW)
    assert "late" not in {c.conv_id for c in dataset.conversations} and len(dataset)


def test_turns_without_a_finite_loudness_can_be_summarised(tmp_path, capsys):
    silent = [turn_record("t", i, "a", "some words", voice(0.56, 100), lufs=[None, float("-inf")][i]) for i in range(2)]
    (tmp_path / "data").mkdir()
    Collection(tmp_path / "data").commit("test", "1", ["t"], silent, [])
    assert run(dataset_pipeline.main, ["--data", str(tmp_path / "data")]) == EXIT_DONE
    assert (tmp_path / "data" / "summary.png").stat().st_size > 1000
