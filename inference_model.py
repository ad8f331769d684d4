"""A CSM arranged for generation: the depth decoder one code after another, and, with 8-bit weights, the backbone too.

Made once and shared by any number of conversations. Letters: N frames, K codebooks, V codes, A codes with special ones,
D backbone width, E depth width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from architecture import CSM, CSMCache
from folded_stack import CompiledStep, FoldedStack, product, weights_of
from frames import Rows
from transformer import KVCache


class InferenceModel:
    """The weights that `model` has now: make another one when they change. ValueError for 8 bits off a CPU.

    Compiled, frames of one conversation at a time are faster; what several need at once is not compiled.
    """

    def __init__(self, model: CSM, int8: bool = False, compiled: bool = False):
        self.model, self.config = model, model.config
        self.tokenizer: object = None  # the one whose codes were found to be the model's
        self.depth = DepthLoop(model, int8, compiled)
        self.backbone = FoldedStack(model.backbone, int8).forward if int8 else model.backbone

    def hidden(self, rows: Rows, cache: CSMCache) -> Tensor:
        """(B, T) rows behind what the cache holds -> (B, T, D); a cache is of one `InferenceModel` only."""
        return self.model.hidden(rows, cache=cache, backbone=self.backbone)

    def hidden_of_several(self, rows: Sequence[Rows], caches: Sequence[CSMCache]) -> Tensor:
        """A row of each of N conversations, (1, 1) behind what its cache holds -> (N, 1, D), as each alone."""
        if len(rows) == 1:
            return self.hidden(rows[0], caches[0])
        return self.model.hidden_of_several(rows, caches, self.backbone)


class DepthLoop:
    """Codes of frames from backbone states."""

    @torch.no_grad()
    def __init__(self, model: CSM, int8: bool = False, compiled: bool = False):
        self.model = model
        V = model.config.codebook_size  # no special codes
        self.stack = FoldedStack(model.depth, int8, plain=compiled)
        scale = math.sqrt(model.config.depth.d_model) * model.depth.norm.weight
        self.heads = [product((scale[:, None] * head[:, :V]).T, int8) for head in model.depth_heads]
        self.inputs = model.projection(model.audio_embedding.weight)  # (K A, E) what the decoder reads of each code
        positions = torch.arange(model.config.n_codebooks, device=model.depth.frequencies.device)[None]
        self.turns = self.stack.turns(positions)  # (1, 1, K, d / 2)
        self.step = CompiledStep(self.stack, model.config.n_codebooks) if compiled else None

    def continue_frames(self, hidden: Tensor, codes: Tensor, stop: int, choose: Callable[[Tensor], Tensor]) -> Tensor:
        """(N, D) backbone states, (N, k) first codes -> (N, stop); `choose` makes (N,) codes of (N, V) logits."""
        N, k = codes.shape
        inputs = torch.cat((self.model.projection(hidden)[:, None], self.read(codes, 0)), dim=1)  # (N, k + 1, E)
        compiled = self.step is not None and N == 1
        cache = KVCache(self.stack.config, N, self.model.config.n_codebooks if compiled else stop, inputs)
        drawn = [codes]
        for codebook in range(k, stop):
            turns = self.turns[:, :, cache.length : cache.length + inputs.size(1)]
            step = self.step if compiled and inputs.size(1) == 1 else self.stack
            states = step(inputs, turns, cache)[:, -1]
            code = choose(self.heads[codebook - 1](self.stack.direction(states)))
            drawn.append(code[:, None])
            if codebook < stop - 1:
                inputs = self.read(code[:, None], codebook)
        return torch.cat(drawn, dim=1)

    @property
    def nbytes(self) -> int:
        """Of what it holds beside the model's own weights."""
        heads = (tensor for head in self.heads for tensor in weights_of(head))
        return self.stack.nbytes + self.inputs.nbytes + sum(tensor.nbytes for tensor in heads)

    def read(self, codes: Tensor, first: int) -> Tensor:
        """(N, k) codes of the codebooks from `first` on -> (N, k, E)."""
        return F.embedding(codes + self.model.code_offsets[first : first + codes.size(1)], self.inputs)
