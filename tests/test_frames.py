"""The (T, K + 1) layout: what rows hold, what they must predict, what ends a turn."""

import pytest
import torch

from frames import IGNORE, FrameLayout, Turn, concatenate, next_frame_targets, turn_length

K, V = 4, 16
OWN = FrameLayout(n_codebooks=K, codebook_size=V)
CSM_1B = FrameLayout(n_codebooks=K, codebook_size=V, zero_end_of_turn=True)


def some_turn(n_text: int = 3, n_frames: int = 5, seed: int = 0) -> Turn:
    codes = torch.randint(0, V, (n_frames, K), generator=torch.Generator().manual_seed(seed))
    return Turn(list(range(1, n_text + 1)), codes)


@pytest.mark.parametrize("layout", [OWN, CSM_1B])
def test_a_turn_can_be_read_back_from_its_rows(layout):
    turn = some_turn()
    rows = layout.turn_rows(turn)
    assert len(rows.tokens) == turn_length(3, 5) == 9
    assert rows.tokens[rows.mask[:, K]][:, K].tolist() == turn.text_ids
    frames = rows.mask[:, : K - 1].any(dim=1)
    audio = rows.tokens[frames][:, :K]
    assert torch.equal(audio[:-1], turn.codes)
    assert layout.is_end_of_turn(audio).tolist() == [False] * 5 + [True]


def test_every_frame_and_the_end_are_predicted_once_from_the_row_before():
    first, second = some_turn(seed=1), some_turn(seed=2)
    rows = concatenate([OWN.turn_rows(first), OWN.turn_rows(second)])
    targets = next_frame_targets(rows)
    predicted = (targets[:, 0] != IGNORE).nonzero().squeeze(1).tolist()
    assert predicted == [2, 3, 4, 5, 6, 7, 11, 12, 13, 14, 15, 16]  # the last text row to the last frame of each turn
    assert torch.equal(targets[2:7], first.codes)
    assert targets[7].tolist() == [V, IGNORE, IGNORE, IGNORE]  # the end is told by codebook 0 alone
    assert (targets[8:11] == IGNORE).all()  # text follows


def test_the_zero_end_of_turn_is_predicted_in_every_codebook():
    targets = next_frame_targets(CSM_1B.turn_rows(some_turn()))
    assert targets[7].tolist() == [0] * K


def test_a_turn_to_be_spoken_is_its_text_only():
    rows = OWN.turn_rows(Turn([5, 6], None))
    assert rows.mask.sum().item() == 2
    assert rows.mask[:, K].all()


def test_an_empty_turn_is_text_and_end():
    rows = OWN.turn_rows(Turn([5, 6], torch.empty(0, K, dtype=torch.int64)))
    assert len(rows.tokens) == 3
    assert OWN.is_end_of_turn(rows.tokens[-1, :K])


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (torch.zeros(3, K + 1, dtype=torch.int64), r"codes must be \(T, 4\), got \(3, 5\)"),
        (torch.full((3, K), V), r"codes must lie in \[0, 16\), got 16..16"),
        (torch.full((3, K), -1), r"codes must lie in \[0, 16\), got -1..-1"),
    ],
)
def test_codes_of_another_layout_are_refused(codes, message):
    with pytest.raises(ValueError, match=message):
        OWN.audio_rows(codes)
