"""A CSM arranged for generation: the depth decoder one code after another, and, compiled or with 8-bit weights, the
backbone too.

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
from command_line import MissingRequirement
from folded_stack import CompiledStep, FoldedStack, product, weights_of
from frames import Rows
from native_stack import NativeMatrix, NativeStack, library, takes
from transformer import KVCache


class InferenceModel:
    """The weights that `model` has now: make another one when they change. ValueError for 8 bits off a CPU.

    Compiled it is faster, on a CPU several times: None is for fp32 and bf16 on a CPU with a C++ compiler. It holds the
    blocks of both stages once more then; pieces of a context longer than a few rows go through the model as it is. On
    other devices what several conversations need at once is not compiled. MissingRequirement: nothing to compile with.
    """

    def __init__(self, model: CSM, int8: bool = False, compiled: bool | None = None):
        self.model, self.config = model, model.config
        self.tokenizer: object = None  # the one whose codes were found to be the model's
        self.compiled = can_compile(model) if compiled is None else compiled
        if self.compiled and takes(model.depth):
            self.depth = NativeDepthLoop(model, int8)
            self.backbone = NativeStack(model.backbone, int8).forward
        else:
            self.depth = DepthLoop(model, int8, self.compiled)
            self.backbone = FoldedStack(model.backbone, int8).forward if int8 else model.backbone

    def hidden(self, rows: Rows, cache: CSMCache) -> Tensor:
        """(B, T) rows behind what the cache holds -> (B, T, D); a cache is of one `InferenceModel` only."""
        return self.model.hidden(rows, cache=cache, backbone=self.backbone)

    def hidden_of_several(self, rows: Sequence[Rows], caches: Sequence[CSMCache]) -> Tensor:
        """A row of each of N conversations, (1, 1) behind what its cache holds -> (N, 1, D), as each alone."""
        if len(rows) == 1:
            return self.hidden(rows[0], caches[0])
        return self.model.hidden_of_several(rows, caches, self.backbone)


def can_compile(model: CSM) -> bool:
    """Whether there are native steps for the model: its weights fit, and there is a C++ compiler that works."""
    try:
        return takes(model.depth) and bool(library())
    except MissingRequirement:
        return False


def read(loop: NativeDepthLoop | DepthLoop, codes: Tensor, first: int) -> Tensor:
    """(N, k) codes of the codebooks from `first` on -> (N, k, E), what the decoder reads of them."""
    return F.embedding(codes + loop.model.code_offsets[first : first + codes.size(1)], loop.inputs)


class NativeDepthLoop:
    """`DepthLoop` on a CPU, compiled: a call for each codebook."""

    @torch.no_grad()
    def __init__(self, model: CSM, int8: bool = False):
        self.model, c = model, model.config
        self.stack = NativeStack(model.depth, int8)
        scale = math.sqrt(c.depth.d_model) * model.depth.norm.weight
        heads = ((scale[:, None] * head[:, : c.codebook_size].float()).T for head in model.depth_heads)
        self.heads = [NativeMatrix(head, self.stack.dtype) for head in heads]
        self.inputs = model.projection(model.audio_embedding.weight).float()  # (K A, E)
        self.turns = self.stack.turns(torch.arange(c.n_codebooks)[None])  # (1, K, d)

    def continue_frames(self, hidden: Tensor, codes: Tensor, stop: int, choose: Callable[[Tensor], Tensor]) -> Tensor:
        """(N, D) backbone states, (N, k) first codes -> (N, stop); `choose` makes (N,) codes of (N, V) logits."""
        (N, k), c = codes.shape, self.model.config
        x = torch.cat((self.model.projection(hidden).float()[:, None], read(self, codes, 0)), dim=1)  # (N, k + 1, E)
        cache = KVCache(c.depth, N, stop, x)
        sequences = self.stack.sequences([cache], k + 1)
        turns, drawn = self.turns[:, : k + 1], [codes]
        for codebook in range(k, stop):
            logits = self.stack.run(
                x.view(-1, c.depth.d_model), sequences, turns, 0, c.depth.n_layers, head=self.heads[codebook - 1]
            )
            code = choose(logits)[:, None]
            drawn.append(code)
            if codebook < stop - 1:
                x, turns = read(self, code, codebook), self.turns[:, codebook + 1 : codebook + 2]
                for sequence in sequences:
                    sequence.rows = 1
        return torch.cat(drawn, dim=1)

    @property
    def nbytes(self) -> int:
        """Of what it holds beside the model's own weights."""
        return self.stack.nbytes + self.inputs.nbytes + sum(head.nbytes for head in self.heads)


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
        inputs = torch.cat((self.model.projection(hidden)[:, None], read(self, codes, 0)), dim=1)  # (N, k + 1, E)
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
                inputs = read(self, code[:, None], codebook)
        return torch.cat(drawn, dim=1)

    @property
    def nbytes(self) -> int:
        """Of what it holds beside the model's own weights."""
        heads = (tensor for head in self.heads for tensor in weights_of(head))
        return self.stack.nbytes + self.inputs.nbytes + sum(tensor.nbytes for tensor in heads)
