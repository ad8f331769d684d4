"""Muon: steps along the orthogonalised momentum of weight matrices (https://kellerjordan.github.io/posts/muon).

`torch.optim.Muon` does the same but always in bfloat16, which is many times slower than float32 on CPUs that have no
such instructions; here the precision is chosen by the caller. Knows nothing of models.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

STEPS = 5
A, B, C = 3.4445, -4.7750, 2.0315  # a x + b x^3 + c x^5 brings singular values towards 0.7 to 1.2


def orthogonalise(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """(M, N) -> about U V^T of its singular value decomposition, by five Newton-Schulz steps."""
    x = matrix.to(dtype)
    if tall := x.size(0) > x.size(1):
        x = x.T
    x = x / (x.norm() + 1e-7)
    if x.size(1) >= 2 * x.size(0) and torch.finfo(dtype).eps < 1e-6:
        x = _factor(x @ x.T) @ x
    else:
        for _ in range(STEPS):
            gram = x @ x.T
            x = A * x + (B * gram + C * gram @ gram) @ x
    return x.T if tall else x


def _factor(gram: Tensor) -> Tensor:
    """(M, M) products of the rows of a matrix with each other -> what five steps multiply it with, (M, M).

    Every step multiplies by a polynomial of the products, which all commute: the products alone can be followed, with
    fewer operations where rows are long. Rounding errors are not corrected by the next step, so not in bfloat16.
    """
    factor = None
    for step in range(STEPS):
        poly = B * gram + C * gram @ gram
        poly.diagonal().add_(A)
        factor = poly if factor is None else poly @ factor
        if step < STEPS - 1:
            gram = poly @ (gram @ poly)
    return factor


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised; an update is as large as one of AdamW (arXiv 2502.16982, 2.2).

    So a learning rate means about the same as for AdamW. Parameters must be matrices. With `every` above 1 each one
    moves in one of so many steps only, so many times as far, and they take turns: all gradients count in the momentum,
    the orthogonalisation costs a share.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float,
        *,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        every: int = 1,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.every = every
        self.dtype = dtype  # of the orthogonalisation; weights and momentum keep theirs
        shapes = [tuple(p.shape) for group in self.param_groups for p in group["params"]]
        if any(len(shape) != 2 for shape in shapes):
            raise ValueError(f"Muon takes matrices, got shapes {[shape for shape in shapes if len(shape) != 2]}")

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            lr = self.every * group["lr"]
            for place, p in enumerate(group["params"]):
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                state["momentum"].lerp_(p.grad, 1 - group["momentum"])
                state["turn"] = state.get("turn", place) + 1  # states of before took no turns
                if state["turn"] % self.every:
                    continue
                direction = orthogonalise(p.grad.lerp(state["momentum"], group["momentum"]), self.dtype)
                p.mul_(1 - lr * group["weight_decay"])
                p.add_(direction.to(p.dtype), alpha=-0.2 * math.sqrt(max(p.shape)) * lr)
