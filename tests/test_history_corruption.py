"""What corruption hides of the history, and what it leaves alone."""

import pytest
import torch
from conftest import full_config, full_model, tiny_config

from architecture import pick_depth_rows
from frames import Clock, Rows, Turn, concatenate
from history_corruption import Corruption, corrupt

V = 16


def two_turns(config=None) -> Rows:
    """A batch of two equal rows of two turns of 40 frames."""
    layout = (config or tiny_config()).layout
    clock, codes = Clock(), torch.randint(0, V, (40, 4), generator=torch.Generator().manual_seed(0))
    row = concatenate([layout.turn_rows(Turn([1, 65, 66, 2], codes), clock) for _ in range(2)])
    return Rows(*(torch.stack((column, column)) for column in row))


def test_nothing_is_changed_where_nothing_is_asked_for():
    rows = two_turns()
    changed, shown = corrupt(rows, Corruption(), V, [1, 2])
    assert torch.equal(changed.tokens, rows.tokens) and torch.equal(shown, rows.mask) and not Corruption()


def test_text_ends_of_turns_targets_and_times_are_left_alone():
    rows = two_turns()
    changed, shown = corrupt(rows, Corruption(drop_frames=0.9, replace_codes=0.9, shallow=0.9), V, [1, 2])
    special = rows.tokens[..., 0] == V
    assert special.sum() == 4 and torch.equal(changed.tokens[special], rows.tokens[special])
    assert shown[special][:, 0].all()
    assert torch.equal(changed.tokens[..., -1], rows.tokens[..., -1]) and torch.equal(
        shown[..., -1], rows.mask[..., -1]
    )
    for name in ("mask", "targets", "positions", "times", "turns"):
        assert getattr(changed, name) is getattr(rows, name)
    assert changed.tokens[..., :-1].max() == V and not (shown & ~rows.mask).any()


def test_frames_are_dropped_whole_and_codes_replaced_in_the_shares_asked_for():
    rows = two_turns()
    frames = rows.mask[..., 1]  # (B, T)
    many = [corrupt(rows, Corruption(drop_frames=0.3), V, [2 * i, 2 * i + 1])[1][frames] for i in range(40)]
    kept = torch.stack(many)[..., :-1]
    assert (kept.any(-1) == kept.all(-1)).all()
    assert 1 - kept.float().mean().item() == pytest.approx(0.3, abs=0.03)
    changed = [corrupt(rows, Corruption(replace_codes=0.3), V, [2 * i, 2 * i + 1])[0].tokens for i in range(40)]
    other = torch.stack([(tokens != rows.tokens)[frames][:, :-1] for tokens in changed]).float().mean().item()
    assert other == pytest.approx(0.3 * (V - 1) / V, abs=0.03)


def test_a_shallow_turn_shows_the_same_first_codebooks_of_all_its_frames():
    rows = two_turns()
    depths = set()
    for seed in range(4):
        shown = corrupt(rows, Corruption(shallow=0.99), V, [2 * seed, 2 * seed + 1])[1]
        for row, turn in ((0, 0), (0, 1), (1, 0), (1, 1)):
            frames = rows.mask[row, :, 1] & (rows.turns[row] == turn)
            patterns = shown[row][frames][:, :-1].unique(dim=0)
            assert len(patterns) == 1 and patterns[0, 0]
            assert (patterns[0].int().diff() <= 0).all()
            depths.add(int(patterns.sum()))
    assert depths >= {1, 2, 3}


def test_a_row_depends_on_its_own_seed_only():
    rows, how = two_turns(), Corruption(drop_frames=0.3, replace_codes=0.3, shallow=0.5)
    both, shown = corrupt(rows, how, V, [7, 8])
    fill = Rows(0, False, -100, 0, -1, -1, -1, 0.0, float("nan"))
    one = [torch.cat((c[1:], c.new_full((1, 5, *c.shape[2:]), f)), 1) for c, f in zip(rows, fill, strict=True)]
    alone, alone_shown = corrupt(Rows(*one), how, V, [8])  # with more padding than it had
    assert torch.equal(both.tokens[1], alone.tokens[0, :-5]) and torch.equal(shown[1], alone_shown[0, :-5])
    assert not torch.equal(both.tokens[0], both.tokens[1])


def test_a_hidden_frame_cannot_be_told_from_another_hidden_frame():
    """With additions and memory: only what is shown reaches the states, but the frame still has its place and time."""
    config = full_config(n_semantic=4, acoustic_delay=0)
    model, rows = full_model(n_semantic=4, acoustic_delay=0), two_turns(config)
    frame = rows.mask[0, :, 1].nonzero()[20]
    shown = rows.mask.clone()
    shown[:, frame, :4] = False
    other = rows.tokens.clone()
    other[:, frame, :4] = (other[:, frame, :4] + 3) % V
    depth_rows = pick_depth_rows(rows.targets, 1.0, torch.Generator())
    with torch.no_grad():
        hidden = [model.hidden(r, r.allowed(), shown=shown) for r in (rows, rows._replace(tokens=other))]
        seen = model.hidden(rows, rows.allowed())
        losses = [model.loss(rows, depth_rows, shown=s).codebook0 for s in (shown, None, rows.mask)]
    assert torch.equal(*hidden) and not torch.allclose(hidden[0], seen)
    assert losses[1] == losses[2] != losses[0]


@pytest.mark.parametrize("name", ["drop_frames", "replace_codes", "shallow"])
@pytest.mark.parametrize("value", [-0.1, 1.0])
def test_impossible_shares_are_refused(name, value):
    with pytest.raises(ValueError, match=f"{name}={value} must be at least 0 and less than 1"):
        Corruption(**{name: value})
