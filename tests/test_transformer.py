"""The transformer block: causality, cache, positions, configs that cannot work."""

import pytest
import torch

from cross_attention import VoiceTextCrossAttention
from transformer import KVCache, Transformer, TransformerConfig, rope_frequencies

CONFIG = TransformerConfig(n_layers=2, d_model=32, n_heads=4, n_kv_heads=2, d_ff=48)


@pytest.fixture
def stack() -> Transformer:
    torch.manual_seed(0)
    stack = Transformer(CONFIG).eval()
    with torch.no_grad():
        for parameter in stack.parameters():
            if parameter.ndim > 1:
                parameter.mul_(10)  # as initialised, attention is too flat to show a leak
    return stack


def positions(T: int) -> torch.Tensor:
    return torch.arange(T)[None]


def test_a_position_sees_itself_and_the_past_only(stack):
    x = torch.randn(1, 6, 32, requires_grad=True)
    out = stack(x, positions(6))
    for t in range(6):
        (gradient,) = torch.autograd.grad(out[0, t].sum(), x, retain_graph=True)
        moved = gradient[0].abs().sum(dim=1) > 0  # (T,)
        assert moved.tolist() == [s <= t for s in range(6)]


@pytest.mark.parametrize("pieces", [[1] * 9, [4, 5], [3, 1, 1, 4]])
def test_cached_equals_uncached(stack, pieces):
    x = torch.randn(2, 9, 32)
    whole = stack(x, positions(9))
    cache = KVCache(CONFIG, 2, 9, x)
    parts, start = [], 0
    for n in pieces:
        parts.append(stack(x[:, start : start + n], positions(9)[:, start : start + n], cache=cache))
        start += n
    assert cache.length == 9
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=1e-5, rtol=1e-5)


def test_an_empty_batch_stays_empty(stack):
    """A micro-batch may hold no frame for the depth decoder."""
    assert stack(torch.zeros(0, 4, 32), positions(4)).shape == (0, 4, 32)


def test_what_is_done_between_blocks_sees_each_output_once_and_replaces_it(stack):
    x, seen = torch.randn(1, 5, 32), []

    def double_after_the_first(layer, states):
        seen.append(layer)
        return 2 * states if layer == 0 else states

    changed = stack(x, positions(5), between=double_after_the_first)
    assert seen == [0, 1]
    own = stack(x, positions(5), between=lambda layer, states: states)
    assert torch.equal(own, stack(x, positions(5)))
    assert (changed - own).abs().max() > 1e-3


def test_positions_need_not_be_whole_but_their_distances_count(stack):
    x = torch.randn(1, 5, 32)
    shifted = stack(x, positions(5) + 0.5)
    torch.testing.assert_close(shifted, stack(x, positions(5)), atol=1e-4, rtol=1e-4)
    stretched = stack(x, positions(5) * 0.5)
    assert (stretched - stack(x, positions(5))).abs().max() > 1e-3


def test_a_full_cache_refuses_more(stack):
    cache = KVCache(CONFIG, 1, 4, torch.zeros(1))
    with pytest.raises(ValueError, match="the cache holds 4 positions, 5 are needed"):
        stack(torch.randn(1, 5, 32), positions(5), cache=cache)


def test_only_distances_matter(stack):
    x = torch.randn(1, 5, 32)
    torch.testing.assert_close(stack(x, positions(5)), stack(x, positions(5) + 700), atol=1e-4, rtol=1e-4)


def test_order_matters(stack):
    x = torch.randn(1, 5, 32)
    swapped = x[:, [1, 0, 2, 3, 4]]
    assert (stack(x, positions(5)) - stack(swapped, positions(5)))[0, -1].abs().max() > 1e-3


def test_llama3_scaling_slows_long_waves_only():
    plain = rope_frequencies(TransformerConfig(n_layers=1, d_model=128, n_heads=2, n_kv_heads=2, d_ff=8))
    scaled = rope_frequencies(
        TransformerConfig(n_layers=1, d_model=128, n_heads=2, n_kv_heads=2, d_ff=8, rope_scale=32)
    )
    wavelengths = 2 * torch.pi / plain
    assert torch.equal(scaled[wavelengths < 2048], plain[wavelengths < 2048])
    torch.testing.assert_close(scaled[wavelengths > 8192], plain[wavelengths > 8192] / 32)
    assert (scaled <= plain).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_heads": 5}, "d_model=32 must be a multiple of n_heads=5"),
        ({"n_kv_heads": 3}, "n_heads=4 must be a multiple of n_kv_heads=3"),
        ({"n_heads": 32, "n_kv_heads": 1}, "must be even"),
        ({"n_layers": 0}, "n_layers=0 must be at least 1"),
        ({"rope_scale": 0.5}, "rope_scale=0.5 must be at least 1"),
    ],
)
def test_impossible_dimensions_are_refused(changes, message):
    values = {"n_layers": 2, "d_model": 32, "n_heads": 4, "n_kv_heads": 2, "d_ff": 48}
    with pytest.raises(ValueError, match=message):
        TransformerConfig(**{**values, **changes})


@pytest.mark.parametrize("n_kv_heads", [1, 2, 4])
def test_attention_within_spans_is_attention_under_their_mask(n_kv_heads):
    stack = Transformer(TransformerConfig(n_layers=2, d_model=32, n_heads=4, n_kv_heads=n_kv_heads, d_ff=48))
    x, positions = torch.randn(2, 12, 32), torch.arange(12)[None]
    documents = torch.tensor([[0] * 5 + [1] * 1 + [2] * 6, [0] * 9 + [-1] * 3])
    spans = [[5, 1, 6], [9, 3]]
    same = documents[:, :, None] == documents[:, None]
    allowed = (same & torch.ones(12, 12, dtype=torch.bool).tril())[:, None]
    results = []
    for rule in (spans, allowed):
        given = x.clone().requires_grad_()
        out = stack(given, positions, rule)
        out.square().sum().backward()
        results.append((out.detach(), given.grad))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("move", [lambda m: m.bfloat16(), lambda m: m.half(), lambda m: m.to("cpu", torch.bfloat16)])
def test_turning_is_exact_whatever_the_precision_of_the_weights(stack, move):
    """Rounded to bf16, positions 1,000 apart would be a radian off."""
    exact = rope_frequencies(CONFIG)
    across = VoiceTextCrossAttention(CONFIG, d_ff=48)
    for part in (stack, across):
        assert torch.equal(move(part).frequencies, exact)
        assert next(part.parameters()).dtype != torch.float32
    assert Transformer(CONFIG).to("meta").bfloat16().frequencies.is_meta


def test_in_bf16_only_the_distance_of_positions_counts_however_far_they_are(stack):
    x = torch.randn(1, 40, 32).bfloat16()
    near, far = (stack.bfloat16()(x, positions(40) + first).float() for first in (0, 3000))
    assert (near - far).norm() < 0.02 * near.norm()
