"""The depth decoder arranged for generation: one code after another, at batch sizes where the operations cost more than
their arithmetic.

The blocks are those of the model, folded: scales of norms into the matrices behind them, query, key and value into one
matrix, gate and up into another. Letters: N frames, K codebooks, V codes, E width, H heads, G key/value heads,
d = E / H.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from architecture import CSM
from transformer import Block, KVCache, attend, rope_angles, rotate


class FoldedBlock(NamedTuple):
    qkv: Tensor  # (E, (H + 2 G) d)
    out: Tensor  # (H d, E)
    gate_up: Tensor  # (E, 2 d_ff)
    down: Tensor  # (d_ff, E)


def folded(block: Block) -> FoldedBlock:
    """The same function of the residual stream, without dropout, in fewer and larger matrices."""
    a, f = block.attention, block.feed_forward
    qkv = torch.cat((a.q_proj.weight, a.k_proj.weight, a.v_proj.weight)) * block.attention_norm.weight
    gate_up = torch.cat((f.gate_proj.weight, f.up_proj.weight)) * block.feed_forward_norm.weight
    return FoldedBlock(*(x.T.contiguous() for x in (qkv, a.o_proj.weight, gate_up, f.down_proj.weight)))


class DepthLoop:
    """Codes of frames from backbone states, by the blocks that `model` has now: make another one when they change."""

    @torch.no_grad()
    def __init__(self, model: CSM):
        self.model, self.config = model, model.config.depth
        self.blocks = [folded(block) for block in model.depth.blocks]
        positions = torch.arange(model.config.n_codebooks, device=model.depth.frequencies.device)[None]
        self.rope = rope_angles(model.depth.frequencies, positions)  # cos and sin, each (1, 1, K, d)

    def continue_frames(self, hidden: Tensor, codes: Tensor, stop: int, choose: Callable[[Tensor], Tensor]) -> Tensor:
        """(N, D) backbone states, (N, k) first codes -> (N, stop); `choose` makes (N,) codes of (N, V) logits."""
        model, V = self.model, self.model.config.codebook_size  # no special codes
        N, k = codes.shape
        inputs = model.depth_inputs(hidden, codes)  # (N, k + 1, E)
        cache = KVCache(self.config, N, stop, inputs)
        drawn = [codes]
        for codebook in range(k, stop):
            states = self.states(inputs, cache)
            code = choose((states @ model.depth_heads[codebook - 1])[:, :V])
            drawn.append(code[:, None])
            if codebook < stop - 1:
                inputs = model.embed_code(codebook, code)[:, None]
        return torch.cat(drawn, dim=1)

    def states(self, x: Tensor, cache: KVCache) -> Tensor:
        """(N, T, E) inputs that continue what the cache holds -> (N, E) hidden states of the last.

        Several inputs for an empty cache, later one at a time.
        """
        c, (N, T, E) = self.config, x.shape
        rope = [part[:, :, cache.length : cache.length + T] for part in self.rope]
        for layer, block in enumerate(self.blocks):
            qkv = (F.rms_norm(x, (E,), eps=c.norm_eps) @ block.qkv).view(N, T, -1, c.d_head).transpose(1, 2)
            turned = rotate(qkv[:, : c.n_heads + c.n_kv_heads], *rope).to(x.dtype)  # (N, H + G, T, d)
            k, v = cache.append(layer, turned[:, c.n_heads :], qkv[:, c.n_heads + c.n_kv_heads :])
            out = attend(turned[:, : c.n_heads], k, v, causal=T > 1)
            x = x + out.transpose(1, 2).flatten(2) @ block.out
            gate, up = (F.rms_norm(x, (E,), eps=c.norm_eps) @ block.gate_up).chunk(2, dim=-1)
            x = x + (F.silu(gate) * up) @ block.down
        cache.length += T
        return self.model.depth.norm(x[:, -1])
