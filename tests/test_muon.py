"""Muon: orthogonal steps, the same as torch's, faster than AdamW where it should be."""

import pytest
import torch

import muon
from muon import Muon, _factor, orthogonalise


@pytest.mark.parametrize("shape", [(16, 16), (12, 40), (40, 12)])
def test_directions_are_about_orthogonal_with_the_singular_vectors_of_the_matrix(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    inner = u.T @ orthogonalise(matrix, torch.float32) @ v.T  # diagonal with entries near 1
    assert (inner - inner.diagonal().diag()).abs().max() < 1e-3
    assert (inner.diagonal()[s > 0.1 * s.max()] - 1).abs().max() < 0.35


@pytest.mark.parametrize("shape", [(48, 96), (400, 48), (64, 512)])
def test_long_rows_take_the_same_steps_by_their_products(shape, monkeypatch):
    """Also where singular values span four decades."""
    u, _, v = torch.linalg.svd(torch.randn(shape, generator=torch.Generator().manual_seed(0)), full_matrices=False)
    matrix = u * torch.logspace(0, -4, min(shape)) @ v
    found = orthogonalise(matrix, torch.float32)
    called = []
    monkeypatch.setattr(muon, "_factor", lambda gram: called.append(gram) or _factor(gram))
    torch.testing.assert_close(orthogonalise(matrix, torch.float32), found)
    assert called  # else nothing was compared
    torch.testing.assert_close(
        found, orthogonalise(matrix.double(), torch.float64), atol=5e-3, rtol=0, check_dtype=False
    )
    rows = matrix if shape[0] < shape[1] else matrix.T
    x = rows.double() / (rows.norm() + 1e-7)
    for _ in range(5):
        x = 3.4445 * x - 4.7750 * x @ x.T @ x + 2.0315 * x @ x.T @ x @ x.T @ x
    expected = x if shape[0] < shape[1] else x.T
    torch.testing.assert_close(found.double(), expected, atol=5e-3, rtol=0)


def test_in_bfloat16_a_run_equals_that_of_torchs_own():
    ours, theirs = (torch.nn.Parameter(torch.randn(24, 8, generator=torch.Generator().manual_seed(1))) for _ in "ab")
    mine = Muon([ours], 1e-2, weight_decay=0.1, dtype=torch.bfloat16)
    torchs = torch.optim.Muon([theirs], 1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for step in range(5):
        gradient = torch.randn(24, 8, generator=torch.Generator().manual_seed(step + 2))
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        mine.step()
        torchs.step()
    torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=0)
    start = torch.randn(24, 8, generator=torch.Generator().manual_seed(1))
    assert (ours - start).abs().mean() > 0.005


def test_matrices_take_turns_and_move_as_far():
    first, second, whole = (torch.nn.Parameter(torch.ones(6, 4)) for _ in range(3))
    turns, each = Muon([first, second], 1e-2, every=2), Muon([whole], 1e-2)
    gradient = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    moved = []
    for _ in range(4):
        before = [p.detach().clone() for p in (first, second)]
        for p in (first, second, whole):
            p.grad = gradient.clone()
        turns.step()
        each.step()
        moved.append([not torch.equal(p, b) for p, b in zip((first, second), before, strict=True)])
    assert moved == [[False, True], [True, False]] * 2
    for p in (first, second):
        torch.testing.assert_close(p, whole, atol=1e-4, rtol=0)


def test_a_resumed_run_equals_the_uninterrupted_one():
    def run(optimizer, parameter, steps):
        for step in steps:
            parameter.grad = torch.randn(6, 4, generator=torch.Generator().manual_seed(step))
            optimizer.step()

    whole = torch.nn.Parameter(torch.ones(6, 4))
    run(Muon([whole], 1e-2), whole, range(6))
    first = torch.nn.Parameter(torch.ones(6, 4))
    optimizer = Muon([first], 1e-2)
    run(optimizer, first, range(3))
    second = torch.nn.Parameter(first.detach().clone())
    resumed = Muon([second], 1e-2)
    resumed.load_state_dict(optimizer.state_dict())
    run(resumed, second, range(3, 6))
    assert torch.equal(whole, second)


def test_only_matrices_are_taken():
    with pytest.raises(ValueError, match=r"Muon takes matrices, got shapes \[\(3,\)\]"):
        Muon([torch.nn.Parameter(torch.ones(2, 2)), torch.nn.Parameter(torch.ones(3))], 1e-2)
