"""The (T, K + 1) layout: what rows hold, in which order, what they must predict, what ends a turn, the clock."""

import pytest
import torch

from frames import IGNORE, N_PROSODY, ORDERS, RATE_PRIOR_IDS, Clock, FrameLayout, Rows, Turn, concatenate

K, V, S = 4, 16, 2
OWN = FrameLayout(n_codebooks=K, codebook_size=V)
CSM_1B = FrameLayout(n_codebooks=K, codebook_size=V, zero_end_of_turn=True)
CHUNKED = FrameLayout(n_codebooks=K, codebook_size=V, text_per_chunk=2, frames_per_chunk=3)


def some_turn(n_text: int = 3, n_frames: int = 5, seed: int = 0, **changes) -> Turn:
    codes = torch.randint(0, V, (n_frames, K), generator=torch.Generator().manual_seed(seed))
    return Turn(list(range(1, n_text + 1)), codes, **changes)


def delayed(acoustic_delay: int) -> FrameLayout:
    sizes = {"n_codebooks": K, "codebook_size": V, "n_semantic": S, "text_per_chunk": 2, "frames_per_chunk": 4}
    return FrameLayout(**sizes, acoustic_delay=acoustic_delay)


def kinds(rows: Rows) -> str:
    """One letter a row: t for text, a for audio."""
    return "".join("t" if text else "a" for text in rows.mask[:, K].tolist())


@pytest.mark.parametrize("layout", [OWN, CSM_1B])
def test_a_turn_can_be_read_back_from_its_rows(layout):
    turn = some_turn()
    rows = layout.turn_rows(turn)
    assert len(rows.tokens) == layout.turn_length(3, 5) == 9
    assert rows.tokens[rows.mask[:, K]][:, K].tolist() == turn.text_ids
    frames = rows.mask[:, : K - 1].any(dim=1)
    audio = rows.tokens[frames][:, :K]
    assert torch.equal(audio[:-1], turn.codes)
    assert layout.is_end_of_turn(audio).tolist() == [False] * 5 + [True]


@pytest.mark.parametrize("delay", [0, 1, 3])
@pytest.mark.parametrize("k", [1, 2, 3])
def test_codes_of_the_first_codebooks_are_rows_without_the_others(k, delay):
    turn, layout = some_turn(), delayed(delay)
    whole, few = layout.turn_rows(turn), layout.turn_rows(turn._replace(codes=turn.codes[:, :k]))
    there = torch.arange(K + 1) < k
    there[K] = True
    assert torch.equal(few.mask, whole.mask & there)
    assert torch.equal(few.tokens, torch.where(few.mask, whole.tokens, 0))
    assert torch.equal(few.targets, torch.where(there, whole.targets, IGNORE))


@pytest.mark.parametrize("n_frames", [0, 1, 2, 5])
@pytest.mark.parametrize("delay", [0, 1, 3])
def test_a_turn_with_an_acoustic_delay_can_be_read_back_from_its_rows(delay, n_frames):
    layout, turn = delayed(delay), some_turn(n_frames=n_frames)
    rows = layout.turn_rows(turn)
    assert len(rows.tokens) == layout.turn_length(3, n_frames) == 3 + n_frames + max(1, delay)
    tokens, mask = rows.tokens[3:, :K], rows.mask[3:, :K]
    expected = torch.zeros_like(mask)
    expected[:n_frames, :S] = True
    expected[delay : delay + n_frames, S:] = True
    expected[n_frames, 0] = True
    assert torch.equal(mask, expected)
    assert torch.equal(tokens[:n_frames, :S], turn.codes[:, :S])
    assert torch.equal(tokens[delay : delay + n_frames, S:], turn.codes[:, S:])
    assert layout.is_end_of_turn(tokens).nonzero().flatten().tolist() == [n_frames]
    assert not tokens[~mask].any()


@pytest.mark.parametrize("delay", [0, 1, 3])
def test_targets_are_the_whole_frames_without_their_delay(delay):
    turn = some_turn()
    targets = delayed(delay).turn_rows(turn).targets
    assert torch.equal(targets[2:7, :K], turn.codes)
    assert targets[7].tolist() == [V, *[IGNORE] * K]
    assert (targets[8:] == IGNORE).all()


def test_every_frame_and_the_end_are_predicted_once_from_the_row_before():
    first, second = some_turn(seed=1), some_turn(seed=2)
    clock = Clock()
    targets = concatenate([OWN.turn_rows(first, clock), OWN.turn_rows(second, clock)]).targets
    predicted = (targets[:, 0] != IGNORE).nonzero().squeeze(1).tolist()
    assert predicted == [2, 3, 4, 5, 6, 7, 11, 12, 13, 14, 15, 16]  # the last text row to the last frame of each turn
    assert torch.equal(targets[2:7, :K], first.codes)
    assert targets[7, :K].tolist() == [V, IGNORE, IGNORE, IGNORE]  # the end is told by codebook 0 alone
    assert (targets[8:11, :K] == IGNORE).all()  # text follows


def test_the_zero_end_of_turn_is_predicted_in_every_codebook():
    targets = CSM_1B.turn_rows(some_turn()).targets
    assert targets[7, :K].tolist() == [0] * K


def test_text_is_predicted_from_the_row_before_but_its_prompt_never():
    for layout in (OWN, delayed(3)):
        for order in ORDERS:
            rows = layout.turn_rows(some_turn(n_text=6, n_prompt=2, order=order))
            told = (rows.targets[:, K] != IGNORE).nonzero().flatten()
            assert rows.targets[told, K].tolist() == [3, 4, 5, 6]
            assert torch.equal(rows.targets[told, K], rows.tokens[told + 1, K])
            assert rows.mask[told + 1, K].all()
            assert not ((rows.targets[:, K] != IGNORE) & (rows.targets[:, 0] != IGNORE)).any()


def test_a_spoken_turn_is_text_then_audio_and_a_heard_one_audio_after_the_prompt():
    assert kinds(OWN.turn_rows(some_turn(n_text=4, n_prompt=1, order="speak"))) == "tttt" + "aaaaaa"
    heard = OWN.turn_rows(some_turn(n_text=4, n_prompt=1, order="listen"))
    assert kinds(heard) == "t" + "aaaaaa" + "ttt"
    assert heard.targets[6].tolist() == [IGNORE] * K + [2]  # the end of turn is followed by text
    assert heard.targets[5].tolist() == [V, *[IGNORE] * K]


@pytest.mark.parametrize(
    ("n_text", "n_frames", "expected"),
    [
        (7, 9, "t" + "tt" + "aaa" + "tt" + "aaa" + "tt" + "aaa" + "a"),  # the text ends inside the speech
        (4, 5, "t" + "tt" + "aaa" + "t" + "aa" + "a"),  # a last short chunk of text
        (3, 5, "t" + "tt" + "aaaaa" + "a"),  # text of one chunk
        (1, 5, "t" + "aaaaa" + "a"),  # the prompt alone
        (5, 3, "t" + "tt" + "aaa" + "tt" + "a"),  # only the end of the turn is left
    ],
)
def test_a_joint_turn_takes_turns_of_chunks_until_its_text_is_written(n_text, n_frames, expected):
    rows = CHUNKED.turn_rows(some_turn(n_text, n_frames, n_prompt=1, order="joint"))
    assert kinds(rows) == expected
    assert rows.tokens[rows.mask[:, K], K].tolist() == list(range(1, n_text + 1))


@pytest.mark.parametrize("n_frames", range(9))
def test_a_joint_turn_whose_speech_would_end_before_its_text_puts_the_text_first(n_frames):
    """7 ids are 4 chunks of text; 3 chunks of 3 frames come before the last of them."""
    joint, speak = (CHUNKED.turn_rows(some_turn(8, n_frames, n_prompt=1, order=order)) for order in ("joint", "speak"))
    for name in ("tokens", "mask", "targets", "times"):
        assert torch.equal(getattr(joint, name), getattr(speak, name))
    assert kinds(CHUNKED.turn_rows(some_turn(8, 9, n_prompt=1, order="joint"))) == "tttaaa" + "ttaaa" * 2 + "ta"


@pytest.mark.parametrize("order", ORDERS)
def test_a_turn_not_to_be_learnt_has_the_same_rows_and_no_target(order):
    turn = some_turn(n_text=6, order=order)
    learnt, given = (delayed(3).turn_rows(turn._replace(learn=learn)) for learn in (True, False))
    assert (learnt.targets != IGNORE).any()
    assert (given.targets == IGNORE).all()
    for name in ("tokens", "mask", "positions", "turns", "times"):
        assert torch.equal(getattr(learnt, name), getattr(given, name))


def test_a_turn_to_be_spoken_is_its_text_only():
    rows = OWN.turn_rows(Turn([5, 6], None))
    assert rows.mask.sum().item() == 2
    assert rows.mask[:, K].all()


@pytest.mark.parametrize("order", ORDERS)
def test_an_empty_turn_is_text_and_end(order):
    rows = OWN.turn_rows(Turn([5, 6], torch.empty(0, K, dtype=torch.int64), order=order))
    assert len(rows.tokens) == 3
    assert OWN.is_end_of_turn(rows.tokens[:, :K]).sum() == 1
    last = (rows.targets[:, 0] == V).nonzero().flatten()
    assert OWN.is_end_of_turn(rows.tokens[last + 1, :K]).tolist() == [True]


def test_rows_are_counted_through_a_conversation():
    clock = Clock()
    rows = concatenate([OWN.turn_rows(some_turn(), clock) for _ in range(3)])
    assert rows.positions.tolist() == list(range(27))
    assert rows.turns.tolist() == [0] * 9 + [1] * 9 + [2] * 9
    assert not rows.documents.any() and not rows.conversations.any()


def test_a_rows_prosody_is_its_turns():
    features = torch.randn(N_PROSODY)
    assert torch.equal(OWN.turn_rows(some_turn(prosody=features)).prosody, features.expand(9, -1))
    assert OWN.turn_rows(some_turn()).prosody.isnan().all()


def test_audio_stands_at_its_time_and_text_where_it_is_expected():
    rows = OWN.turn_rows(some_turn(n_text=4, n_prompt=1, gap=10.0))
    rate = 12.5 / 15
    assert rows.times[:4].tolist() == pytest.approx([10, 10, 10 + rate, 10 + 2 * rate])
    assert rows.times[4:].tolist() == [10, 11, 12, 13, 14, 15]


@pytest.mark.parametrize("order", ORDERS)
def test_the_order_of_rows_does_not_change_their_times(order):
    rows = delayed(3).turn_rows(some_turn(n_text=6, n_frames=9, n_prompt=2, order=order))
    rate = 12.5 / 15
    expected = [0, 0, *(rate * i for i in range(4))]
    assert rows.times[rows.mask[:, K]].tolist() == pytest.approx(expected)
    assert rows.times[~rows.mask[:, K]].tolist() == [*range(9), 9, 9, 9]  # the closing rows stand at the end


def test_the_clock_goes_on_from_turn_to_turn_and_silence_counts():
    clock = Clock()
    starts = []
    for gap in (0.0, 7.5, -3.0):  # turns that overlap follow each other at once
        starts.append(float(OWN.turn_rows(some_turn(gap=gap), clock).times[0]))
    assert starts == [0.0, 12.5, 17.5]
    assert clock.now == 22.5


def test_the_speaking_rate_follows_what_was_heard():
    clock = Clock()
    assert OWN.speaking_rate(clock) == pytest.approx(12.5 / 15)
    turn = Turn(list(range(51)), torch.zeros(200, K, dtype=torch.int64))  # 50 ids without the prompt, 4 frames each
    times = OWN.turn_rows(turn, clock).times
    assert times[2] == pytest.approx(12.5 / 15)  # not known before the turn is over
    expected = (RATE_PRIOR_IDS * 12.5 / 15 + 200) / (RATE_PRIOR_IDS + 50)
    assert OWN.speaking_rate(clock) == pytest.approx(expected)
    later = OWN.turn_rows(some_turn(), clock).times
    assert float(later[2] - later[1]) == pytest.approx(expected, rel=1e-4)
    for _ in range(100):
        OWN.turn_rows(turn, clock)
    assert OWN.speaking_rate(clock) == pytest.approx(4, abs=0.1)


def test_a_turn_of_text_only_takes_the_time_it_would_take_to_say_and_teaches_no_rate():
    clock = Clock()
    OWN.turn_rows(Turn(list(range(16)), None), clock)
    assert clock.now == pytest.approx(12.5)
    assert (clock.frames, clock.text_ids) == (0, 0)
    assert float(OWN.turn_rows(some_turn(gap=1.0), clock).times[0]) == pytest.approx(13.5)


def same_inputs(one: Rows, other: Rows) -> bool:
    names = ("tokens", "mask", "positions", "turns", "times")
    return all(torch.equal(getattr(one, name), getattr(other, name)) for name in names)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("delay", "n_frames"), [(0, 7), (1, 7), (3, 7), (3, 1), (3, 0)])
def test_rows_placed_one_by_one_equal_those_of_the_whole_turn(order, delay, n_frames):
    """As generation places them: text in pieces, audio frame by frame with only the frames known by then."""
    layout = delayed(delay)
    turns = [some_turn(n_text=5, seed=1), some_turn(6, n_frames, n_prompt=2, order=order, gap=4.0)]
    whole_clock = Clock()
    whole = [layout.turn_rows(turn, whole_clock) for turn in turns][1]

    turn, clock = turns[1], Clock()
    layout.turn_rows(turns[0], clock)
    clock.begin_turn(turn.gap)
    parts = []
    n_text = len(turn.text_ids)
    for index in layout.row_order(turn).tolist():
        if index < n_text:
            parts.append(layout.text_rows(turn.text_ids[index : index + 1], turn.n_prompt, clock, index))
        elif index < n_text + n_frames:
            known = turn.codes[: index - n_text + 1].clone()
            if delay:
                known[max(0, len(known) - delay) :, S:] = 0  # drawn later
            parts.append(layout.audio_row(known, clock))
        elif index == n_text + n_frames:
            parts.append(layout.end_rows(turn.codes, clock))
    layout.end_turn(turn, clock)
    assert same_inputs(concatenate(parts), whole)
    assert clock == whole_clock


def test_a_turn_whose_text_is_to_be_written_leaves_its_end_to_the_caller():
    whole, open_end = Clock(), Clock()
    turn = some_turn(n_text=6, n_prompt=2, order="listen")
    OWN.turn_rows(turn, whole)
    OWN.turn_rows(turn._replace(text_ids=turn.text_ids[:2]), open_end, ends=False)
    assert open_end.now == 0
    OWN.text_rows(turn.text_ids[2:], 2, open_end, 2)
    OWN.end_turn(turn, open_end)
    assert open_end == whole


def test_a_row_may_attend_the_past_of_its_document_only():
    clock = Clock()
    rows = concatenate([OWN.turn_rows(some_turn(), clock), OWN.turn_rows(some_turn(), clock)])
    rows.documents[9:] = 1
    allowed = rows.batch().allowed()[0, 0]
    assert allowed.shape == (18, 18)
    for i in range(18):
        assert allowed[i].nonzero().flatten().tolist() == list(range(0 if i < 9 else 9, i + 1))


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (torch.zeros(3, K + 1, dtype=torch.int64), r"codes must be \(T, 1..4\), got \(3, 5\)"),
        (torch.full((3, K), V), r"codes must lie in \[0, 16\), got 16..16"),
        (torch.full((3, K), -1), r"codes must lie in \[0, 16\), got -1..-1"),
    ],
)
def test_codes_of_another_layout_are_refused(codes, message):
    with pytest.raises(ValueError, match=message):
        OWN.turn_rows(Turn([1], codes))


def test_an_unknown_order_is_refused():
    with pytest.raises(ValueError, match="order 'shout' of a turn must be one of speak, joint, listen"):
        OWN.turn_rows(some_turn(order="shout"))
