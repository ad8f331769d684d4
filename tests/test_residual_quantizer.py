"""The residual quantiser: gradients, depths, learning of the codebooks, refusals, and the measures of its codes."""

import pytest
import torch

from residual_quantizer import ResidualQuantizer, codebook_use, k_means

DIM = 8


def quantizer(n_levels: int = 6) -> tuple[ResidualQuantizer, torch.Tensor]:
    torch.manual_seed(1)
    stack = ResidualQuantizer(n_levels, dim=DIM, n_codes=16, decay=0.98)
    vectors = torch.randn(400, DIM)
    stack.fit(vectors, 64, torch.Generator().manual_seed(0))
    return stack, vectors.view(4, 100, -1)


def test_gradient_passes_the_quantiser_with_gain_one():
    stack, x = quantizer()
    x = x.clone().requires_grad_()
    out = stack(x, torch.full((4,), 6))
    direction = torch.randn_like(x)
    (out.latents * direction).sum().backward()
    assert torch.allclose(x.grad, direction)


def test_commitment_of_every_level_reaches_the_input():
    stack, x = quantizer()
    stack.eval()  # training would move the codebooks that the expectation is computed from
    left = [x - total for total in prefix_sums(stack, stack.encode(x))]
    x = x.clone().requires_grad_()
    stack(x, torch.full((4,), 6)).commitment.backward()
    # each level sees the input minus constants, so its gradient is 2 / numel times what it leaves over
    expected = sum(2 * rest / rest.numel() for rest in left) / len(left)
    assert left[-1].abs().max() > 0 and torch.allclose(x.grad, expected, atol=1e-9)


def prefix_sums(stack: ResidualQuantizer, codes: torch.Tensor) -> list[torch.Tensor]:
    return [stack.decode(codes[..., : k + 1]) for k in range(codes.size(-1))]


def test_each_level_reduces_the_error_after_fitting():
    stack, x = quantizer()
    codes = stack.encode(x)
    errors = [(x - total).square().mean().item() for total in prefix_sums(stack, codes)]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.5 * errors[0]


def test_depth_is_per_sample_and_zero_gives_nothing():
    stack, x = quantizer()
    stack.eval()
    out = stack(x, torch.tensor([0, 1, 3, 6]))
    assert out.latents[0].abs().max() == 0
    for row, depth in ((1, 1), (2, 3), (3, 6)):
        assert torch.allclose(out.latents[row], stack.decode(out.codes[row : row + 1, :, :depth])[0], atol=1e-5)


def test_every_level_learns_even_when_no_sample_keeps_it():
    stack, x = quantizer()
    before = [level.codebook.clone() for level in stack.levels]
    stack.train()
    stack(x + 0.5, torch.ones(4, dtype=torch.int64))
    assert all(not torch.equal(level.codebook, book) for level, book in zip(stack.levels, before, strict=True))


def test_padding_moves_no_codebook():
    learnt = []
    for padding in (0, 300):
        stack, x = quantizer()
        stack.train()
        padded = torch.nn.functional.pad(x, (0, 0, 0, padding), value=7.0)
        live = torch.arange(100 + padding).expand(4, -1) < 100
        depth = torch.full((4,), 6)
        for _ in range(3):
            torch.manual_seed(0)
            out = stack(padded, depth, live)
        learnt.append([out.latents[:, :100], *(level.codebook.clone() for level in stack.levels)])
    assert all(torch.allclose(one, other, atol=1e-6) for one, other in zip(*learnt, strict=True))


def test_evaluation_leaves_the_codebooks_alone():
    stack, x = quantizer()
    before = [level.codebook.clone() for level in stack.levels]
    stack.eval()(x, torch.full((4,), 6))
    assert all(torch.equal(level.codebook, book) for level, book in zip(stack.levels, before, strict=True))


def test_dead_codes_come_back_and_used_ones_stay():
    stack, x = quantizer(1)
    book = stack.levels[0]._codebook
    book.embed[0, 0] = book.embed_avg[0, 0] = 100.0  # no vector is near it
    stack.train()
    kept = book.embed[0, 1:].clone()
    for _ in range(250):  # its moving average falls below a tenth of the uniform share
        stack(x, torch.ones(4, dtype=torch.int64))
    assert book.embed[0, 0].abs().max() < 10
    assert (book.embed[0, 1:] - kept).abs().mean() < 0.5
    assert codebook_use(stack.encode(x), 16)[0].item() == 1.0


def test_quantiser_stays_in_float32_under_autocast():
    stack, x = quantizer()
    stack.eval()
    plain = stack(x, torch.full((4,), 6))
    with torch.autocast("cpu", torch.bfloat16):
        inside = stack(x, torch.full((4,), 6))
    assert inside.latents.dtype == torch.float32 and torch.equal(inside.codes, plain.codes)


def test_fitting_refuses_too_few_vectors():
    with pytest.raises(ValueError, match="too few for 16 codes"):
        ResidualQuantizer(1, dim=DIM, n_codes=16, decay=0.98).fit(torch.randn(63, DIM), 8, torch.Generator())


def test_k_means_finds_separate_clusters():
    centres = 10 * torch.eye(4)
    vectors = (centres[:, None] + 0.1 * torch.randn(4, 50, 4)).flatten(0, 1)
    found, counts = k_means(vectors, vectors[:16], torch.Generator().manual_seed(0), dead=0.1)
    assert torch.cdist(centres, found).min(dim=1).values.max() < 0.5 and counts.sum() == 200


def test_unused_codes_go_where_vectors_are_served_badly():
    """Not to silence, which most vectors share, and beside a code, as a lone vector would win no other."""
    torch.manual_seed(0)
    silence, speech = 1e-3 * torch.randn(1800, DIM), 5 + torch.randn(600, DIM)
    nowhere = 100 + torch.randn(14, DIM)
    start = torch.cat([silence[:1], speech[:1], nowhere])
    centres, counts = k_means(torch.cat([silence, speech]), start, torch.Generator().manual_seed(0), dead=0.1)
    assert (counts > 0).all()
    assert (torch.cdist(centres, torch.zeros(1, DIM)) < 1).sum() == 1


def test_settled_codes_fit_other_vectors_and_all_are_used():
    stack, _ = quantizer()
    moved = 1 + 0.5 * torch.randn(2000, DIM)
    everything = torch.full((1,), 6)
    stack.eval()
    before = (stack.nearest(moved[None], everything) - moved).square().mean()
    stack.fit(moved, 2000, torch.Generator().manual_seed(0), anew=False)
    after = (stack.nearest(moved[None], everything) - moved).square().mean()
    usage, _ = codebook_use(stack.encode(moved[None]), 16)
    assert after < 0.7 * before and (usage == 1).all()


def test_codebook_use_counts_codes_and_entropy():
    codes = torch.stack([torch.arange(16), torch.arange(16) % 4, torch.zeros(16, dtype=torch.int64)], dim=1)
    usage, perplexity = codebook_use(codes, 16)
    assert usage.tolist() == [1.0, 0.25, 0.0625] and perplexity.tolist() == pytest.approx([16, 4, 1])
