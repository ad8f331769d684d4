"""Muon: steps along the orthogonalised momentum of weight matrices (https://kellerjordan.github.io/posts/muon).

`torch.optim.Muon` does the same but always in bfloat16, which is many times slower than float32 on CPUs that have no
such instructions; here the precision is chosen by the caller. Knows nothing of models.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor


def orthogonalise(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """(M, N) -> about U V^T of its singular value decomposition, by five Newton-Schulz steps."""
    x = matrix.to(dtype)
    if wide := x.size(0) > x.size(1):
        x = x.T
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x  # singular values towards 0.7 to 1.2
    return x.T if wide else x


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised; an update is as large as one of AdamW (arXiv 2502.16982, 2.2).

    So a learning rate means about the same as for AdamW. Parameters must be matrices.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float,
        *,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.dtype = dtype  # of the orthogonalisation; weights and momentum keep theirs
        shapes = [tuple(p.shape) for group in self.param_groups for p in group["params"]]
        if any(len(shape) != 2 for shape in shapes):
            raise ValueError(f"Muon takes matrices, got shapes {[shape for shape in shapes if len(shape) != 2]}")

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                state["momentum"].lerp_(p.grad, 1 - group["momentum"])
                direction = orthogonalise(p.grad.lerp(state["momentum"], group["momentum"]), self.dtype)
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(direction.to(p.dtype), alpha=-0.2 * math.sqrt(max(p.shape)) * group["lr"])
