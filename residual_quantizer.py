"""Residual vector quantiser: a stack of nearest-neighbour codebooks that learn as moving averages.

Knows nothing of audio. Dims: B batch, T frames, K levels, V codes per codebook, D width, M vectors.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vector_quantize_pytorch import VectorQuantize

from ranks import over_ranks

FEWEST = 4  # vectors per code that codebooks are fitted to
ASIDE = 0.2  # of the way from a code to a vector it serves badly, where a code that nothing falls to is put


class Quantized(NamedTuple):
    latents: Tensor  # (B, T, D) straight-through: value of the chosen codes up to the depth, gradient of the input
    codes: Tensor  # (B, T, K) int64, of all levels whatever the depth
    commitment: Tensor  # () mean over the levels of the squared distance to the chosen code


class Books(NamedTuple):
    """The codebooks of all levels in one precision."""

    codes: Tensor  # (K, V, D)
    tables: Tensor  # (K, D + 1, V): -2 c and below it |c|^2

    @classmethod
    def of(cls, codes: Tensor) -> Books:
        """(K, V, D)"""
        return cls(codes, torch.cat([-2 * codes.mT, codes.square().sum(dim=2)[:, None]], dim=1))

    def encode(self, x: Tensor) -> Tensor:
        """(B, T, D) of the same precision -> (B, T, K) int64"""
        vectors = F.pad(x.flatten(0, 1), (0, 1), value=1.0)  # (M, D + 1)
        residual, chosen = vectors[:, :-1], []
        for book, table in zip(*self, strict=True):
            distances = vectors @ table  # |x - c|^2 without |x|^2, which is the same for every code
            index = distances.float().argmin(dim=1)  # (M,) the first of those that float32 cannot tell apart
            residual -= book.index_select(0, index)
            chosen.append(index)
        return torch.stack(chosen, dim=-1).unflatten(0, x.shape[:2])


class ResidualQuantizer(nn.Module):
    """K nearest-neighbour codebooks, each coding what the ones before left over (SoundStream, arXiv 2107.03312).

    Deviation from `ResidualVQ` of vector_quantize_pytorch, whose levels are used here one by one: one straight-through
    step on the sum (its own, one per level, multiplies the encoder's gradient by K), no rotation trick, the dead-code
    threshold relative to the uniform share, and depth dropout per sample with every level learning at every step.
    """

    DEAD = 0.1  # a code used less than this share of the uniform one is replaced

    def __init__(self, n_levels: int, *, dim: int, n_codes: int, decay: float):
        super().__init__()
        self.levels = nn.ModuleList(
            VectorQuantize(
                dim,
                n_codes,
                decay=decay,
                commitment_weight=0.0,
                rotation_trick=False,
                route_gradients_to_input=False,
                threshold_ema_dead_code=self.DEAD,
            )
            for _ in range(n_levels)
        )
        self.n_codes = n_codes
        self.n_moves = 0  # of the codebooks by `forward`: the library's own changes raise no version of a tensor
        self._books: tuple[list, Books] | None = None  # with the versions of the codebooks they were made from

    def forward(self, x: Tensor, depth: Tensor, live: Tensor | None = None) -> Quantized:
        """(B, T, D) and how many levels each sample keeps (B,). In training mode this moves the codebooks.

        `live` (B, T): which frames are speech and no padding, from which nothing is learnt; all by default.
        """
        self.n_moves += self.training
        with torch.autocast(x.device.type, enabled=False):
            x = x.float()
            counted = ... if live is None else live
            tokens = x[counted].numel() // x.size(2)
            tokens = over_ranks(tokens, x.device) if self.training else tokens
            uniform = tokens / self.n_codes  # tokens per code in this batch, were all used alike
            residual, total = x, torch.zeros_like(x)
            codes, commitment = [], []
            for k, level in enumerate(self.levels):
                level._codebook.threshold_ema_dead_code = self.DEAD * uniform
                level._codebook.reset_cluster_size = uniform  # the library would use the threshold itself
                chosen, index, _ = level(residual.detach(), mask=live)  # (B, T, D) 0 where not live, (B, T)
                commitment.append(F.mse_loss(residual[counted], chosen[counted]))
                residual = residual - chosen
                total = total + chosen * (depth > k).view(-1, 1, 1)
                codes.append(index)
            kept = (depth > 0).view(-1, 1, 1)
            latents = (x + (total - x).detach()) * kept
        return Quantized(latents, torch.stack(codes, dim=-1), torch.stack(commitment).mean())

    @torch.no_grad()
    def nearest(self, x: Tensor, depth: Tensor) -> Tensor:
        """(B, T, D) and how many levels each sample keeps (B,) -> (B, T, D), the sum of the chosen codes; learns
        nothing."""
        with torch.autocast(x.device.type, enabled=False):
            codes = self.encode(x)
            kept = torch.arange(len(self.levels), device=x.device) < depth.view(-1, 1, 1)  # (B, 1, K)
            chosen = [level.codebook[codes[..., k]] for k, level in enumerate(self.levels)]
            return sum(code * kept[..., k, None] for k, code in enumerate(chosen))

    def books(self, dtype: torch.dtype) -> Books:
        """The codebooks as they are now, in one piece; kept until one moves or another precision is asked for."""
        books = [level._codebook.embed for level in self.levels]  # (1, V, D) each
        version = [dtype, self.n_moves, *((book.data_ptr(), book._version) for book in books)]
        if self._books is None or self._books[0] != version:
            self._books = version, Books.of(torch.cat(books).to(dtype))
        return self._books[1]

    def encode(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, K) int64"""
        return self.books(torch.float32).encode(x.float())

    def decode(self, codes: Tensor) -> Tensor:
        """(B, T, K') codes of the first K' levels -> (B, T, D)"""
        first = torch.arange(codes.size(-1), device=codes.device) * self.n_codes
        return self.books(torch.float32).codes.flatten(0, 1)[codes + first].sum(dim=-2)

    @torch.no_grad()
    def fit(self, vectors: Tensor, batch_tokens: int, generator: torch.Generator, *, anew: bool = True) -> None:
        """k-means, level by level, on (M, D) vectors; `batch_tokens` sets the weight of later batches against it.

        From vectors drawn at random, or (not `anew`) from the codes as they are. ValueError with fewer than `FEWEST`
        vectors per code: codebooks fitted on fewer collapse.
        """
        least = FEWEST * self.n_codes
        if len(vectors) < least:
            raise ValueError(f"{len(vectors)} vectors are too few for {self.n_codes} codes; {least} are needed")
        residual = vectors
        for level in self.levels:
            order = torch.randperm(len(vectors), generator=generator).to(vectors.device)
            start = residual[order[: self.n_codes]] if anew else level.codebook
            centres, counts = k_means(residual, start, generator, self.DEAD)
            weight = counts * (batch_tokens / len(vectors))  # counts as an average batch would give them
            book = level._codebook
            book.embed.copy_(centres[None])
            book.cluster_size.copy_(weight[None])
            book.embed_avg.copy_((centres * weight[:, None])[None])
            residual = residual - centres[torch.cdist(residual, centres).argmin(dim=1)]


def k_means(
    vectors: Tensor, centres: Tensor, generator: torch.Generator, dead: float, n_rounds: int = 12
) -> tuple[Tensor, Tensor]:
    """(M, D) and where to begin (V, D) -> centres (V, D) and how many vectors each has (V,).

    A centre with less than `dead` of the uniform share is put beside another one, on the way from that to a vector it
    serves badly (drawn by the squared distance, as in k-means++): a vector itself, in so many dimensions, is no centre
    and would win no other. Drawn evenly, they would all go to silence, which many vectors share.
    """
    least = dead * len(vectors) / len(centres)
    for _ in range(n_rounds):
        distance, nearest = torch.cdist(vectors, centres).min(dim=1)  # (M,), (M,)
        counts = torch.bincount(nearest, minlength=len(centres))
        sums = torch.zeros_like(centres).index_add_(0, nearest, vectors)
        badly = torch.multinomial(distance.square().cpu() + 1e-12, len(centres), True, generator=generator)
        badly = badly.to(vectors.device)
        beside = torch.lerp(centres[nearest[badly]], vectors[badly], ASIDE)
        centres = torch.where(counts[:, None] > least, sums / counts.clamp(min=1)[:, None], beside)
    counts = torch.bincount(torch.cdist(vectors, centres).argmin(dim=1), minlength=len(centres))
    return centres, counts.to(vectors.dtype)


def codebook_use(codes: Tensor, codebook_size: int) -> tuple[Tensor, Tensor]:
    """(..., K) codes -> share of codes in use (K,) and perplexity (K,), exp of the entropy in nats."""
    flat = codes.reshape(-1, codes.size(-1))  # (M, K)
    counts = torch.stack([torch.bincount(column, minlength=codebook_size) for column in flat.unbind(dim=1)]).double()
    share = counts / counts.sum(dim=1, keepdim=True)  # (K, V)
    entropy = -(share * share.clamp(min=1e-12).log()).sum(dim=1)
    return (counts > 0).double().mean(dim=1), entropy.exp()


class _ScaledGradient(torch.autograd.Function):
    """The identity, whose gradient is multiplied by `scale`."""

    @staticmethod
    def forward(ctx, x: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.scale * gradient, None


def scale_gradient(x: Tensor, scale: float) -> Tensor:
    """x, its gradient times `scale`; negative values reverse it."""
    return _ScaledGradient.apply(x, scale)
