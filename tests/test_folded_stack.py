"""A stack arranged for inference against the stack itself; products of 8 bits against those of the weights."""

import pytest
import torch

from folded_stack import FEW_ROWS, FoldedStack, Int8Matrix, PackedMatrix, product
from transformer import KVCache, Transformer, TransformerConfig

CONFIG = TransformerConfig(n_layers=3, d_model=64, n_heads=4, n_kv_heads=2, d_ff=96, rope_scale=4.0)


def stack_with_norms(dtype=torch.float32) -> Transformer:
    torch.manual_seed(0)
    stack = Transformer(CONFIG).to(dtype).eval()
    with torch.no_grad():
        for name, parameter in stack.named_parameters():
            parameter.add_(0.3 * torch.randn_like(parameter)) if "norm" in name else parameter.mul_(6)
    return stack


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("pieces", [[7], [5, 1, 1], [1, 1, 5]])
def test_what_it_computes_is_what_the_stack_computes(batch, pieces):
    stack = stack_with_norms(torch.float64)
    x = torch.randn(batch, 7, 64, dtype=torch.float64)
    positions = torch.arange(3, 10)[None]
    seen = {0: [], 1: []}
    with torch.inference_mode():
        caches = [KVCache(CONFIG, batch, 7, x) for _ in range(2)]
        found = []
        for number, own in enumerate((stack, FoldedStack(stack).forward)):

            def between(layer, y, number=number):
                seen[number].append(y)
                return y + layer  # a change must be taken up

            parts = zip(x.split(pieces, dim=1), positions.split(pieces, dim=1), strict=True)
            found.append(torch.cat([own(*part, None, caches[number], between) for part in parts], dim=1))
    torch.testing.assert_close(found[1], found[0], atol=1e-6, rtol=1e-5)  # the angles are fp32 on both sides
    for one, other in zip(seen[0], seen[1], strict=True):
        torch.testing.assert_close(other, one, atol=1e-6, rtol=1e-5)
    assert caches[0].length == caches[1].length == 7


def test_a_mask_says_who_may_attend_whom():
    stack = stack_with_norms()
    x, positions = torch.randn(1, 6, 64), torch.arange(6)[None]
    allowed = torch.ones(6, 6, dtype=torch.bool).tril()[None, None] & (torch.rand(1, 1, 6, 6) < 0.5)
    allowed |= torch.eye(6, dtype=torch.bool)
    with torch.inference_mode():
        one = stack(x, positions, allowed, KVCache(CONFIG, 1, 6, x))
        other = FoldedStack(stack).forward(x, positions, allowed, KVCache(CONFIG, 1, 6, x))
        whole = stack(x, positions, None, KVCache(CONFIG, 1, 6, x))
    torch.testing.assert_close(other, one, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(whole, one, atol=1e-2)


def test_inputs_of_zero_stay_finite():
    stack = stack_with_norms()
    x = torch.zeros(1, 1, 64)
    with torch.inference_mode():
        out = FoldedStack(stack)(x, FoldedStack(stack).turns(torch.zeros(1, 1)), KVCache(CONFIG, 1, 2, x))
    assert torch.equal(out, torch.zeros(1, 1, 64))


@pytest.mark.parametrize("n", [1, FEW_ROWS, FEW_ROWS + 1, 50])
def test_a_product_of_8_bits_is_off_by_no_more_than_its_rounding(n):
    torch.manual_seed(n)
    weight, x = torch.randn(48, 64) * torch.logspace(-3, 1, 48)[:, None], torch.randn(n, 64)
    exact, found = x @ weight.T, Int8Matrix(weight)(x)
    step = weight.abs().amax(dim=1) / 127  # of a code
    allowed = x.abs().sum(dim=1, keepdim=True) * step / 2 + 2**-7 * (x.abs() @ weight.abs().T)
    assert found.dtype == x.dtype and bool(((found - exact).abs() <= allowed).all())
    assert float((found - exact).norm() / exact.norm()) < 0.02


def test_rows_of_zeros_and_extremes_have_codes_too():
    weight = torch.zeros(32, 32)
    weight[1, 3], weight[2, :2] = 5.0, torch.tensor([-1e30, 1e30])
    found = Int8Matrix(weight)(torch.ones(1, 32))
    assert torch.isfinite(found).all() and found[0, 0] == 0
    assert float(found[0, 1]) == pytest.approx(5.0, rel=0.01)


def test_8_bits_are_for_a_cpu():
    with pytest.raises(ValueError, match="for a CPU, the model is on meta"):
        Int8Matrix(torch.zeros(4, 4, device="meta"))


@pytest.mark.skipif(not PackedMatrix.takes(torch.zeros(1, 1, dtype=torch.bfloat16)), reason="no bf16 by oneDNN here")
@pytest.mark.parametrize("n_rows", [1, 2, 8, 33])
def test_a_packed_matrix_gives_the_product_of_the_plain_one(n_rows):
    weight, x = torch.randn(300, 70, dtype=torch.bfloat16), torch.randn(n_rows, 70, dtype=torch.bfloat16)
    packed = product(weight, int8=False)
    assert isinstance(packed, PackedMatrix) and not isinstance(product(weight, False, plain=True), PackedMatrix)
    exact = x.double() @ weight.double().T
    torch.testing.assert_close(packed(x).double(), exact, atol=0.05, rtol=2**-7)
    assert not PackedMatrix.takes(weight.float())
