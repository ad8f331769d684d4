"""The Conversational Speech Model: a backbone over interleaved text and audio, a depth decoder over codebooks.

Sesame, "Crossing the Uncanny Valley of Conversational Voice" (2025), section "Conversational Speech Model". Tensors in,
tensors out; knows nothing of files of audio, tokenizers or training loops.

Letters: B batch, T rows, K codebooks, A codes per codebook with the special ones, D backbone width, E depth width,
N frames the depth decoder sees.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from checkpointing import load_into, load_weights, save_weights
from command_line import EXIT_CODES_HELP, EXIT_DONE, run
from frames import IGNORE, FrameLayout
from transformer import KVCache, Transformer, TransformerConfig, rope_frequencies

WEIGHTS_KIND = "csm"


@dataclass(frozen=True, kw_only=True)
class CSMConfig:
    """Everything that fixes the shapes of a model. ValueError names field and value of what cannot work."""

    backbone: TransformerConfig
    depth: TransformerConfig
    text_tokenizer: str = "bytes"
    text_vocab_size: int = 258
    n_codebooks: int = 32
    codebook_size: int = 512  # of the tokenizer; special codes come after it
    n_special_codes: int = 1  # ours: end of turn; csm-1b: 3, unused
    zero_end_of_turn: bool = False  # csm-1b ends a turn with an all-zero frame
    max_positions: int = 2048  # longest sequence, about two minutes
    audio_tokenizer: str = ""  # fingerprint of the tokenizer whose codes the weights know; empty = any that fits
    layout: FrameLayout = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name, least in (("n_codebooks", 2), ("codebook_size", 2), ("text_vocab_size", 2), ("max_positions", 2)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}")
        if not self.zero_end_of_turn and self.n_special_codes < 1:
            raise ValueError(f"n_special_codes={self.n_special_codes} must be at least 1 to hold the end of turn")
        layout = FrameLayout(
            n_codebooks=self.n_codebooks, codebook_size=self.codebook_size, zero_end_of_turn=self.zero_end_of_turn
        )
        object.__setattr__(self, "layout", layout)

    @property
    def audio_vocab_size(self) -> int:
        return self.codebook_size + self.n_special_codes

    def to_dict(self) -> dict:
        """Plain values that `from_dict` takes back."""
        values = dataclasses.asdict(self)
        del values["layout"]
        return values

    @classmethod
    def from_dict(cls, values: dict) -> CSMConfig:
        """Inverse of `to_dict`; ValueError for unknown or missing fields."""
        try:
            stacks = {name: TransformerConfig(**values[name]) for name in ("backbone", "depth")}
            return cls(**{**values, **stacks})
        except (TypeError, KeyError) as error:
            raise ValueError(f"model config does not fit this version: {error}") from error


PRESETS: dict[str, CSMConfig] = {
    "nano": CSMConfig(
        backbone=TransformerConfig(n_layers=8, d_model=256, n_heads=4, n_kv_heads=2, d_ff=1024),
        depth=TransformerConfig(n_layers=4, d_model=256, n_heads=4, n_kv_heads=2, d_ff=512),
    ),
    "csm-1b": CSMConfig(
        backbone=TransformerConfig(n_layers=16, d_model=2048, n_heads=32, n_kv_heads=8, d_ff=8192, rope_scale=32),
        depth=TransformerConfig(n_layers=4, d_model=1024, n_heads=8, n_kv_heads=2, d_ff=8192, rope_scale=32),
        text_tokenizer="sesame/csm-1b",
        text_vocab_size=128_256,
        codebook_size=2048,
        n_special_codes=3,
        zero_end_of_turn=True,
    ),
}


def preset(name: str, **changes: object) -> CSMConfig:
    """A preset with some fields changed. ValueError for an unknown name."""
    if name not in PRESETS:
        raise ValueError(f"unknown model size {name!r}; choose one of {', '.join(PRESETS)}")
    return dataclasses.replace(PRESETS[name], **changes)


class Losses(NamedTuple):
    """Sums of nats and counts of targets, so that accumulation and packing weigh every target the same."""

    c0_sum: Tensor  # () over all frames and end-of-turn frames
    c0_count: Tensor  # ()
    depth_sum: Tensor  # (K - 1,) codebooks 1..K-1 over the amortized share of the frames
    depth_count: Tensor  # (K - 1,)

    def total(self) -> Tensor:
        """mean(c0) + mean over codebooks of the depth means; equal weight as in the public trainers of csm-1b."""
        return self.c0_sum / self.c0_count.clamp(min=1) + (self.depth_sum / self.depth_count.clamp(min=1)).mean()


class CSM(nn.Module):
    """Backbone and depth decoder, split at the zeroth codebook.

    The backbone reads the masked sum of a row's K code embeddings and its text embedding and predicts codebook 0 of the
    next frame. The depth decoder reads [projected hidden state, codes 0..K-2 of that frame] and predicts codes 1..K-1,
    each with its own head. One embedding table of K * A rows serves both.

    Initialisation: embeddings and heads normal with std 0.02 (tables of a row sum 1 / sqrt(K + 1) of that), the rest as
    in `Transformer`.
    """

    def __init__(self, config: CSMConfig):
        super().__init__()
        self.config = config
        K, A, D, E = config.n_codebooks, config.audio_vocab_size, config.backbone.d_model, config.depth.d_model
        self.text_embedding = nn.Embedding(config.text_vocab_size, D)
        self.audio_embedding = nn.Embedding(K * A, D)  # codebook k owns rows k * A .. k * A + A - 1
        self.backbone = Transformer(config.backbone)
        self.projection = nn.Linear(D, E, bias=False)
        self.depth = Transformer(config.depth)
        self.codebook0_head = nn.Linear(D, A, bias=False)
        self.depth_heads = nn.Parameter(torch.empty(K - 1, E, A))
        nn.init.normal_(self.text_embedding.weight, std=0.02)
        nn.init.normal_(self.audio_embedding.weight, std=0.02 / math.sqrt(K + 1))
        for matrix in (self.projection.weight, self.codebook0_head.weight, self.depth_heads):
            nn.init.normal_(matrix, std=0.02)
        self.register_buffer("code_offsets", A * torch.arange(K), persistent=False)  # (K,)

    def reset_buffers(self) -> None:
        """Compute the fixed tables anew, after `to_empty` on a model built on the meta device."""
        K, A = self.config.n_codebooks, self.config.audio_vocab_size
        self.code_offsets.copy_(A * torch.arange(K))
        for stack in (self.backbone, self.depth):
            stack.frequencies.copy_(rope_frequencies(stack.config))

    def embed(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """(B, T, K + 1) ids and mask -> (B, T, D): masked sum of the row's embeddings."""
        B, T, _ = tokens.shape
        table = self.audio_embedding.weight
        index = (tokens[..., :-1] + self.code_offsets).flatten(0, 1)  # (B T, K)
        weights = mask[..., :-1].flatten(0, 1).to(table.dtype)
        audio = F.embedding_bag(index, table, mode="sum", per_sample_weights=weights)  # (B T, D)
        text = self.text_embedding(tokens[..., -1]) * mask[..., -1:].to(table.dtype)
        return audio.view(B, T, -1) + text

    def hidden(
        self,
        tokens: Tensor,
        mask: Tensor,
        positions: Tensor | None = None,
        allowed: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """(B, T, K + 1) -> (B, T, D) backbone states. Positions default to where the cache ends, else 0..T-1."""
        if positions is None:
            start = cache.length if cache is not None else 0
            positions = torch.arange(start, start + tokens.size(1), device=tokens.device)[None]
        return self.backbone(self.embed(tokens, mask), positions, allowed, cache)

    def embed_code(self, codebook: int, codes: Tensor) -> Tensor:
        """(N,) codes of one codebook -> (N, E) depth decoder inputs."""
        return self.projection(self.audio_embedding(codes + codebook * self.config.audio_vocab_size))

    def depth_logits(self, hidden: Tensor, codes: Tensor) -> Tensor:
        """(N, D) backbone states, (N, K) true codes -> (N, K - 1, A) logits of codes 1..K-1, teacher-forced."""
        K = self.config.n_codebooks
        inputs = self.audio_embedding(codes[:, :-1] + self.code_offsets[:-1])  # (N, K - 1, D)
        inputs = self.projection(torch.cat((hidden[:, None], inputs), dim=1))  # (N, K, E)
        positions = torch.arange(K, device=codes.device)[None]
        states = self.depth(inputs, positions)[:, 1:]  # (N, K - 1, E); position k predicts codebook k
        return torch.einsum("nke,kea->nka", states, self.depth_heads.to(states.dtype))

    def loss(
        self,
        tokens: Tensor,
        mask: Tensor,
        targets: Tensor,
        positions: Tensor,
        allowed: Tensor | None,
        depth_rows: Tensor,
    ) -> Losses:
        """Losses of a batch; `depth_rows` (N,) indexes the B * T rows whose next frame the depth decoder learns.

        Compute amortization (Sesame, section "Compute amortization"): codebook 0 on every frame, the depth decoder on
        a random share of them.
        """
        states = self.hidden(tokens, mask, positions, allowed)  # (B, T, D)
        c0_targets = targets[..., 0].flatten()
        live = (c0_targets != IGNORE).nonzero().squeeze(1)  # text rows cost no head
        c0_logits = self.codebook0_head(states.flatten(0, 1)[live])
        c0_sum = F.cross_entropy(c0_logits.float(), c0_targets[live], reduction="sum")

        depth_targets = targets.flatten(0, 1)[depth_rows]  # (N, K)
        logits = self.depth_logits(states.flatten(0, 1)[depth_rows], depth_targets.clamp(min=0))
        nats = F.cross_entropy(
            logits.float().transpose(1, 2), depth_targets[:, 1:], ignore_index=IGNORE, reduction="none"
        )  # (N, K - 1)
        counts = (depth_targets[:, 1:] != IGNORE).sum(dim=0)
        return Losses(c0_sum, torch.tensor(live.numel(), device=c0_sum.device), nats.sum(dim=0), counts)


def pick_depth_rows(targets: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """(B, T, K) targets -> (N,) indices into B * T: a random `share` of the rows whose next frame is whole.

    At least one is picked when there is any, so that small batches train the depth decoder too.
    """
    rows = (targets[..., -1] != IGNORE).flatten().nonzero().squeeze(1)
    n = min(len(rows), max(1, round(share * len(rows))))
    picked = torch.randperm(len(rows), generator=generator)[:n].sort().values
    return rows[picked.to(rows.device)]


def save_model(model: CSM, folder: Path) -> None:
    """Write `config.json` and `model.safetensors`."""
    save_weights(folder, WEIGHTS_KIND, model.config.to_dict(), model.state_dict())


def load_model(folder: Path, device: torch.device | str = "cpu") -> CSM:
    """A model written by `save_model`, in eval mode. ValueError names the first tensor that does not fit."""
    config, tensors = load_weights(Path(folder), WEIGHTS_KIND, "python train_minimal.py")
    model = CSM(CSMConfig.from_dict(config))
    load_into(model, tensors, str(folder))
    return model.to(device).eval()


def parameter_table(config: CSMConfig) -> dict[str, int]:
    """Parameters by part, counted without allocating them."""
    with torch.device("meta"):
        model = CSM(config)
    parts = {name: sum(p.numel() for p in child.parameters()) for name, child in model.named_children()}
    return {**parts, "depth_heads": model.depth_heads.numel(), "total": sum(p.numel() for p in model.parameters())}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Print the parameters of a model size.", epilog=EXIT_CODES_HELP)
    parser.add_argument("--model_size", default="nano", help=f"one of {', '.join(PRESETS)} (default: nano)")
    args = parser.parse_args(argv)
    for name, count in parameter_table(preset(args.model_size)).items():
        print(f"{name:20} {count:>15,}")
    return EXIT_DONE


if __name__ == "__main__":
    raise SystemExit(run(main))
