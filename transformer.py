"""The Llama block both stages are built of: RMSNorm, RoPE with llama3 scaling, grouped-query attention, SwiGLU.

Knows nothing of text, codes or losses. Letters: B batch, T positions, D width, H heads, G key/value heads, d = D / H.
RoPE pairs channel i with i + d/2 (the rotate-half order of transformers).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """Dimensions of one stack. ValueError for those that cannot work."""

    n_layers: int
    d_model: int
    n_heads: int
    n_kv_heads: int  # each is shared by n_heads // n_kv_heads query heads
    d_ff: int
    rope_base: float = 500_000.0
    rope_scale: float = 1.0  # llama3 scaling factor; 32 for csm-1b, 1 = plain RoPE
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        for name in ("n_layers", "d_model", "n_heads", "n_kv_heads", "d_ff"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.d_model % self.n_heads:
            raise ValueError(f"d_model={self.d_model} must be a multiple of n_heads={self.n_heads}")
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_heads={self.n_heads} must be a multiple of n_kv_heads={self.n_kv_heads}")
        if self.d_head % 2:
            raise ValueError(f"d_model / n_heads = {self.d_head} must be even for rotary positions")
        if self.rope_scale < 1:
            raise ValueError(f"rope_scale={self.rope_scale} must be at least 1")

    @property
    def d_head(self) -> int:
        return self.d_model // self.n_heads


# Who attends whom: a (B, 1, T, S) bool mask; or causal within spans of these lengths, which fill each of the B rows;
# or None, causal over all positions
Allowed = Tensor | list[list[int]] | None


class KVCache:
    """Static keys and values of one stack, filled from the left. Memory is allocated once for `max_positions`."""

    def __init__(self, config: TransformerConfig, batch_size: int, max_positions: int, like: Tensor):
        G = config.n_kv_heads
        shape = (config.n_layers, batch_size, 2 * G, max_positions, config.d_head)
        self.both = torch.zeros(shape, dtype=like.dtype, device=like.device)  # keys, then values
        self.keys, self.values = self.both[:, :, :G], self.both[:, :, G:]  # (L, B, G, S, d)
        self.length = 0  # positions filled so far, the same for all layers once a forward pass is over

    @property
    def max_positions(self) -> int:
        return self.keys.size(3)

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write (B, G, T, d) behind what is there; return all (B, G, length + T, d) of this layer."""
        end = self.check_room(keys.size(2))
        self.keys[layer, :, :, self.length : end] = keys
        self.values[layer, :, :, self.length : end] = values
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]

    def append_both(self, layer: int, both: Tensor) -> Tensor:
        """The same with keys and values in one: (B, 2 G, T, d) -> (B, 2 G, length + T, d)."""
        end = self.check_room(both.size(2))
        self.both[layer, :, :, self.length : end] = both
        return self.both[layer, :, :, :end]

    def advance(self, more: int) -> None:
        """Every layer has written so many positions."""
        self.length += more

    def check_room(self, more: int) -> int:
        """How many positions are filled when so many more are. ValueError: too many."""
        end = self.length + more
        if end > self.max_positions:
            raise ValueError(f"the cache holds {self.max_positions} positions, {end} are needed")
        return end


class KVCaches(NamedTuple):
    """The caches of N sequences, each of its own length, that go on by one position at once."""

    caches: Sequence[KVCache]  # of one sequence each

    def advance(self, more: int) -> None:
        for cache in self.caches:
            cache.advance(more)


def rope_frequencies(config: TransformerConfig) -> Tensor:
    """(d / 2,) radians per position; llama3 scaling slows waves longer than 2,048 positions (Llama 3.1, csm-1b)."""
    exponents = torch.arange(0, config.d_head, 2, dtype=torch.float32) / config.d_head
    frequencies = 1.0 / config.rope_base**exponents
    if config.rope_scale == 1:
        return frequencies
    old_context, low, high = 8192, 1.0, 4.0
    wavelengths = 2 * math.pi / frequencies
    keep = ((old_context / wavelengths - low) / (high - low)).clamp(0, 1)  # 1: short wave, unscaled
    return frequencies * (keep + (1 - keep) / config.rope_scale)


def keep_frequencies(module: nn.Module) -> None:
    """Its frequencies in fp32 again, whatever the weights were converted to: bf16 is a radian off at position 1,000."""
    if module.frequencies.dtype.itemsize < 4:
        module.frequencies = rope_frequencies(module.config).to(module.frequencies.device)


def rope_angles(frequencies: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """(B or 1, T) positions, whole or not -> cos and sin, each (B or 1, 1, T, d), in fp32."""
    angles = positions[:, None, :, None].float() * frequencies  # (B, 1, T, d / 2)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply RoPE to (B, H, T, d); cos and sin are (B or 1, 1, T, d)."""
    half = x.size(-1) // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return x * cos + turned * sin


def behind(past: int, new: int, device: torch.device) -> Tensor:
    """(1, 1, new, past + new) bool: new rows attend what came before them and themselves."""
    return torch.ones(new, past + new, dtype=torch.bool, device=device).tril(past)[None, None]


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False, scale: float | None = None
) -> Tensor:
    """(B, H, T, d), (B, G, S, d) twice -> (B, H, T, d), each of G shared by H / G query heads.

    `scale` is of the products of queries and keys, by default 1 / sqrt(d).
    """
    share = q.size(1) // k.size(1)
    if share > 1 and mask is not None and q.is_cuda:  # there only a kernel that keeps T x S takes a mask and groups
        k, v, share = k.repeat_interleave(share, dim=1), v.repeat_interleave(share, dim=1), 1
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=share > 1)


def attend_within(q: Tensor, k: Tensor, v: Tensor, spans: list[list[int]]) -> Tensor:
    """Causal attention within each span of each row: (B, H, T, d), (B, G, T, d) twice -> (B, H, T, d).

    On a CPU the attention over all T positions of a packed row, masked, is most of a small model's training step.
    """
    rows = []
    for row, lengths in zip(zip(*(x.split(1) for x in (q, k, v)), strict=True), spans, strict=True):
        parts = zip(*(x.split(lengths, dim=2) for x in row), strict=True)
        rows.append(torch.cat([attend(*part, causal=True) for part in parts], dim=2))
    return torch.cat(rows)


class Attention(nn.Module):
    """Grouped-query self-attention with rotary positions (arXiv 2305.13245, 2104.09864)."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.n_heads, self.n_kv_heads, self.d_head = config.n_heads, config.n_kv_heads, config.d_head
        self.q_proj = nn.Linear(config.d_model, config.n_heads * config.d_head, bias=False)
        self.k_proj = nn.Linear(config.d_model, config.n_kv_heads * config.d_head, bias=False)
        self.v_proj = nn.Linear(config.d_model, config.n_kv_heads * config.d_head, bias=False)
        self.o_proj = nn.Linear(config.n_heads * config.d_head, config.d_model, bias=False)

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor], allowed: Allowed, cache: KVCache | KVCaches | None, layer: int
    ) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, self.n_heads, self.d_head).transpose(1, 2)  # (B, H, T, d)
        k = self.k_proj(x).view(B, T, self.n_kv_heads, self.d_head).transpose(1, 2)  # (B, G, T, d)
        v = self.v_proj(x).view(B, T, self.n_kv_heads, self.d_head).transpose(1, 2)
        q, k = rotate(q, *rope).to(v.dtype), rotate(k, *rope).to(v.dtype)
        if isinstance(cache, KVCaches):
            rows = zip(cache.caches, q.split(1), k.split(1), v.split(1), strict=True)
            out = torch.cat([attend(query, *own.append(layer, key, value)) for own, query, key, value in rows])
            return self.o_proj(out.transpose(1, 2).flatten(2))
        if cache is not None:
            k, v = cache.append(layer, k, v)
        causal = allowed is None and T == k.size(2) > 1  # one new row may see all rows before it
        spans = isinstance(allowed, list)
        out = attend_within(q, k, v, allowed) if spans else attend(q, k, v, allowed, causal)
        return self.o_proj(out.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """SwiGLU (arXiv 2002.05202)."""

    def __init__(self, d_model: int, d_ff: int):
        super().__init__()
        self.gate_proj = nn.Linear(d_model, d_ff, bias=False)
        self.up_proj = nn.Linear(d_model, d_ff, bias=False)
        self.down_proj = nn.Linear(d_ff, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """Pre-norm attention and feed-forward, each added to the residual stream."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        self.attention = Attention(config)
        self.feed_forward_norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        self.feed_forward = FeedForward(config.d_model, config.d_ff)
        self.dropout = 0.0  # of what attention and feed-forward add, in training

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor], allowed: Allowed, cache: KVCache | KVCaches | None, layer: int
    ) -> Tensor:
        x = x + self.dropped(self.attention(self.attention_norm(x), rope, allowed, cache, layer))
        return x + self.dropped(self.feed_forward(self.feed_forward_norm(x)))

    def dropped(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training) if self.dropout else x


def init_matrices(module: nn.Module, residual_scale: float) -> None:
    """Every matrix normal with std 0.02, those that write into the residual stream times `residual_scale` (GPT-2)."""
    for name, parameter in module.named_parameters():
        if parameter.ndim == 2:
            into_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
            nn.init.normal_(parameter, std=0.02 * (residual_scale if into_residual else 1.0))


class Transformer(nn.Module):
    """Blocks and a final norm; takes embeddings, gives hidden states.

    Initialisation: every matrix normal with std 0.02, those that write into the residual stream divided by
    sqrt(2 n_layers); norms 1.
    """

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.config = config
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        self.recompute = False  # blocks keep only their input for the backward pass and compute the rest again
        self.register_buffer("frequencies", rope_frequencies(config), persistent=False)
        init_matrices(self, 1 / math.sqrt(2 * config.n_layers))

    def _apply(self, *args, **kwargs) -> Transformer:
        super()._apply(*args, **kwargs)
        keep_frequencies(self)
        return self

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        allowed: Allowed = None,
        cache: KVCache | KVCaches | None = None,
        between: Callable[[int, Tensor], Tensor] | None = None,
    ) -> Tensor:
        """(B, T, D) embeddings at (B or 1, T) positions -> (B, T, D) normed hidden states.

        With a cache, x continues what the cache holds; several new rows on a non-empty cache get their causal mask
        here. Of N caches x is the next position of each, (N, 1, D). `between` takes number and output of each block
        and may change it.
        """
        T = x.size(1)
        if T > 1 and cache is not None and cache.length and allowed is None:
            allowed = behind(cache.length, T, x.device)
        rope = rope_angles(self.frequencies, positions)
        x = x.to(self.norm.weight.dtype)  # under autocast the residual stream keeps the precision of the weights
        for layer, block in enumerate(self.blocks):
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(block, x, rope, allowed, cache, layer, use_reentrant=False)
            else:
                x = block(x, rope, allowed, cache, layer)
            if between is not None:
                x = between(layer, x)
        if cache is not None:
            cache.advance(T)
        return self.norm(x)
