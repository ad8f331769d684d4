"""A stack arranged for inference: at batch sizes where moving weights and starting operations cost more than their
arithmetic.

The blocks are those of a `Transformer`, folded: scales of norms into the matrices behind them, query, key and value
into one matrix, gate and up into another; rotary channels lie in pairs, so that one complex product turns them. On a
CPU the matrices may be of 8 bits, which moves a quarter of the bytes. Letters: B batch, T positions, D width, H heads,
G key/value heads, S positions in the cache, d = D / H.
"""

from __future__ import annotations

import functools
import math
import os
import shutil
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from command_line import MissingRequirement
from matrix_order import for_few_rows
from transformer import Block, KVCache, KVCaches, Transformer, attend, behind

Product = Callable[[Tensor], Tensor]  # (N, in) -> (N, out)
COMPILERS = ("g++", "clang++", "cl")
FEW_ROWS = 16  # from more on, a product of 8 bits is computed in the precision of its input


def eight_bits(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(out, in) -> whole numbers, to the nearest, and the scale of each output, (out,), in fp32."""
    scale = weight.abs().amax(dim=1, keepdim=True).clamp(min=1e-12).float() / 127
    return (weight / scale).round().to(torch.int8).contiguous(), scale.squeeze(1)


class Int8Matrix:
    """A matrix of 8-bit whole numbers with a scale for each output, rounded to the nearest; inputs stay as they are.

    With few rows the product is computed in bf16, as is its result. ValueError elsewhere than on a CPU.
    """

    def __init__(self, weight: Tensor):
        if weight.device.type != "cpu":
            raise ValueError(f"8-bit weights are for a CPU, the model is on {weight.device}")
        self.codes, self.scale = eight_bits(weight)  # (out, in), (out,)
        self.scale_bf16 = self.scale.to(torch.bfloat16)

    def __call__(self, x: Tensor) -> Tensor:
        if len(x) > FEW_ROWS:
            return (x @ self.codes.T.to(x.dtype)) * self.scale.to(x.dtype)
        return torch._weight_int8pack_mm(x.to(torch.bfloat16), self.codes, self.scale_bf16).to(x.dtype)


class PackedMatrix:
    """A bf16 matrix on a CPU in the order in which oneDNN reads it: for few rows up to 1.8 times as fast."""

    def __init__(self, weight: Tensor):
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), 1)

    @staticmethod
    def takes(weight: Tensor) -> bool:
        on_cpu = weight.device.type == "cpu" and weight.dtype == torch.bfloat16
        return on_cpu and torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()

    def __call__(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, None, "none", [], "")


def product(weight: Tensor, int8: bool, plain: bool = False) -> Product:
    """Of (N, in) with an (out, in) matrix; `plain`: by what torch.compile knows."""
    if int8:
        return Int8Matrix(weight)
    if PackedMatrix.takes(weight) and not plain:
        return PackedMatrix(weight)
    return functools.partial(torch.mm, mat2=for_few_rows(weight).T)


def weights_of(of: Product) -> list[Tensor]:
    """What a product holds."""
    if isinstance(of, Int8Matrix):
        return [of.codes, of.scale, of.scale_bf16]
    return [of.packed] if isinstance(of, PackedMatrix) else [of.keywords["mat2"]]


class FoldedBlock(NamedTuple):
    qkv: Product  # D -> (H + 2 G) d
    out: Product  # H d -> D
    gate_up: Product  # D -> 2 d_ff
    down: Product  # d_ff -> D


def folded(block: Block, int8: bool, plain: bool) -> FoldedBlock:
    """The same function of the residual stream, without dropout, in fewer and larger matrices."""
    a, f = block.attention, block.feed_forward
    turned = torch.cat((a.q_proj.weight * a.d_head**-0.5, a.k_proj.weight))  # channel i is turned with i + d / 2 ...
    pairs = turned.unflatten(0, (-1, 2, a.d_head // 2)).transpose(1, 2).flatten(0, 2)  # ... now 2 i with 2 i + 1
    length = math.sqrt(block.attention_norm.weight.numel())  # of a vector whose mean square is 1
    qkv = torch.cat((pairs, a.v_proj.weight)) * (length * block.attention_norm.weight)
    gate_up = torch.cat((f.gate_proj.weight, f.up_proj.weight)) * (length * block.feed_forward_norm.weight)
    return FoldedBlock(*(product(x, int8, plain) for x in (qkv, a.o_proj.weight, gate_up, f.down_proj.weight)))


class FoldedStack:
    """The blocks that `stack` has now: make another one when they change. Its caches are not those of the stack."""

    @torch.no_grad()
    def __init__(self, stack: Transformer, int8: bool = False, plain: bool = False):
        self.stack, self.config = stack, stack.config
        self.blocks = [folded(block, int8, plain) for block in stack.blocks]
        precise = torch.promote_types(stack.norm.weight.dtype, torch.float32)
        least = math.sqrt(stack.config.norm_eps * stack.config.d_model)
        self.least = stack.norm.weight.new_tensor(least, dtype=precise)

    def turns(self, positions: Tensor) -> Tensor:
        """(B or 1, T) positions -> (B or 1, 1, T, d / 2) complex factors that turn the pairs of channels."""
        angles = positions[:, None, :, None].float() * self.stack.frequencies
        return torch.polar(torch.ones_like(angles), angles)

    def __call__(
        self,
        x: Tensor,
        turns: Tensor,
        cache: KVCache | KVCaches,
        allowed: Tensor | None = None,
        between: Callable[[int, Tensor], Tensor] | None = None,
    ) -> Tensor:
        """(B, T, D) that continue what the cache holds -> (B, T, D), as `Transformer.forward` without the last norm."""
        c, (B, T, D) = self.config, x.shape
        H, turned = c.n_heads, c.n_heads + c.n_kv_heads
        if T > 1 and cache.length and allowed is None:
            allowed = behind(cache.length, T, x.device)
        x = x.reshape(B * T, D)
        for layer, block in enumerate(self.blocks):
            qkv = block.qkv(self.direction(x)).view(B, T, -1, c.d_head).transpose(1, 2)  # (B, H + 2 G, T, d)
            turn(qkv[:, :turned], turns)
            if isinstance(cache, KVCaches):
                rows = zip(cache.caches, qkv.split(1), strict=True)
                parts = [self.attention(row[:, :H], own.append_both(layer, row[:, H:]), None) for own, row in rows]
                heard = torch.cat(parts)
            else:
                heard = self.attention(qkv[:, :H], cache.append_both(layer, qkv[:, H:]), allowed)
            x = block.out(heard).add_(x)
            gate, up = block.gate_up(self.direction(x)).chunk(2, dim=-1)
            x = block.down(F.silu(gate).mul_(up)).add_(x)
            if between is not None:
                x = between(layer, x.view(B, T, D)).reshape(B * T, D)
        cache.advance(T)
        return x.view(B, T, D)

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        allowed: Tensor | None,
        cache: KVCache | KVCaches,
        between: Callable[[int, Tensor], Tensor] | None = None,
    ) -> Tensor:
        """As `Transformer.forward`, the last norm included."""
        return self.stack.norm(self(x, self.turns(positions), cache, allowed, between))

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for block in self.blocks for of in block for tensor in weights_of(of))

    def direction(self, x: Tensor) -> Tensor:
        """RMSNorm without its scale and divided by sqrt(D), which both lie in the matrices."""
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=self.least.dtype)
        return (x / torch.hypot(length, self.least)).to(x.dtype)

    def attention(self, q: Tensor, both: Tensor, allowed: Tensor | None) -> Tensor:
        """(B, H, T, d) queries divided by sqrt(d), (B, 2 G, S, d) keys and values -> (B T, H d)."""
        (B, H, T, d), G = q.shape, self.config.n_kv_heads
        if B == T == 1:  # faster than a fused kernel
            k, v = both[0].split(G)  # (G, S, d)
            return torch.bmm(torch.bmm(q.view(G, H // G, d), k.mT).softmax(dim=-1), v).view(1, H * d)
        k, v = both.split(G, dim=1)
        out = attend(q, k, v, allowed, causal=allowed is None and T > 1, scale=1.0)
        return out.transpose(1, 2).reshape(B * T, H * d)


def turn(x: Tensor, turns: Tensor) -> None:
    """Apply RoPE in place to (B, H, T, d) with channels in pairs; in fp32 at least."""
    precise = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(-1, (-1, 2))
    turned = torch.view_as_complex(precise).mul_(turns)
    if precise.data_ptr() != x.data_ptr():
        x.copy_(torch.view_as_real(turned).flatten(-2))


class CompiledStep:
    """One more position of one sequence through a stack, as one function that torch.compile has made: about half a
    minute of work at the first call, seconds from torch's cache of compiled functions on disk afterwards.

    Attention is over all `n_positions` with those to come hidden, so that all positions are of one shape.
    MissingRequirement: no C++ compiler for a CPU.
    """

    def __init__(self, stack: FoldedStack, n_positions: int):
        if stack.least.device.type == "cpu" and not any(map(shutil.which, (os.environ.get("CXX", "g++"), *COMPILERS))):
            raise MissingRequirement(f"compiling needs a C++ compiler, one of {', '.join(COMPILERS)}; or go without")
        device = stack.least.device
        self.hidden = torch.full((n_positions, n_positions), -torch.inf, device=device).triu(1)
        self.places = torch.arange(n_positions, device=device).unsqueeze(1)  # (S, 1)
        self.function = torch.compile(functools.partial(_one_position, stack), dynamic=False, fullgraph=True)

    def __call__(self, x: Tensor, turns: Tensor, cache: KVCache) -> Tensor:
        """(1, 1, D), (1, 1, 1, d / 2) -> (1, 1, D), as the stack does it. The cache must be `n_positions` long."""
        at = cache.length
        cache.length += 1
        angles = torch.view_as_real(turns[0, 0])  # (1, d / 2, 2)
        return self.function(x[0], angles, cache.both, self.places[at], self.hidden[at])[None]


def _one_position(stack: FoldedStack, x: Tensor, angles: Tensor, both: Tensor, place: Tensor, hidden: Tensor) -> Tensor:
    """(1, D), cosines and sines (1, d / 2, 2), the cache (L, 1, 2 G, S, d), (1,) where to write, (S,) what is not to be
    seen -> (1, D)"""
    c = stack.config
    H, G, turned = c.n_heads, c.n_kv_heads, c.n_heads + c.n_kv_heads
    cos, sin = angles.unbind(-1)
    for layer, block in enumerate(stack.blocks):
        qkv = block.qkv(stack.direction(x)).view(-1, c.d_head)  # (H + 2 G, d)
        even, odd = qkv[:turned].to(cos.dtype).unflatten(-1, (-1, 2)).unbind(-1)
        pairs = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).to(x.dtype)
        both[layer, 0].index_copy_(1, place, torch.cat((pairs[H:], qkv[turned:]))[:, None])
        keys, values = both[layer, 0].split(G)  # (G, S, d)
        scores = pairs[:H].view(G, H // G, -1) @ keys.mT + hidden.to(x.dtype)
        x = block.out((scores.softmax(dim=-1) @ values).view(1, -1)) + x
        gate, up = block.gate_up(stack.direction(x)).chunk(2, dim=-1)
        x = block.down(F.silu(gate) * up) + x
    return x
