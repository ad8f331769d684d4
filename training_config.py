"""How a speech model is trained: every setting with its default, the recipes by size, what is a function of the step.

Rates and weights are pure functions of (step, config), so a resumed run needs no state of theirs.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch

from architecture import Terms
from dataset_pipeline import Mixture
from generation import Sampling
from history_corruption import Corruption
from model_sizes import CSMConfig
from parallel import WAYS

MOST_SEEDS = 2**20  # so that seed, step and process together make a seed of torch
FREE = ("save_every", "eval_every", "keep_last", "speak_every", "parallel", "recompute")  # may change when resuming


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How to train; all of it but `FREE` is part of the run's identity. ValueError for what cannot work."""

    max_steps: int = 100
    batch_rows: int = 2
    row_positions: int = 1024
    grad_accum: int = 1
    lr: float = 1e-3
    min_lr: float = 1e-4
    warmup: int = 10
    weight_decay: float = 0.1
    max_grad_norm: float = 1.0
    added_steps: int = 0
    depth_share: float = 1 / 16
    semantic_share: float = 0.0
    no_context: float = 0.15
    joint: float = 0.3
    listen: float = 0.1
    text_only: float = 0.1
    evict: float = 0.3
    one_speaker: float = 0.0
    semantic_weight: float = 1.0
    acoustic_weight: float = 1.0
    text_weight: float = 1.0
    guidance_weight: float = 0.0
    guidance_steps: int = 1000
    memory_weight: float = 0.1
    dropout: float = 0.0
    drop_frames: float = 0.0
    replace_codes: float = 0.0
    shallow: float = 0.0
    bf16: bool = False
    recompute: bool = False
    parallel: str = "ddp"
    seed: int = 0
    save_every: int = 25
    keep_last: int = 2
    eval_every: int = 25
    eval_rows: int = 2
    speak_every: int = 0
    speak_texts: int = 8
    speak_codebooks: int = 0
    speak_temperature: float = Sampling.temperature

    def __post_init__(self) -> None:
        positive = ("max_steps", "batch_rows", "grad_accum", "save_every", "keep_last", "eval_every", "eval_rows")
        for name in (*positive, "row_positions", "guidance_steps", "speak_texts"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("lr", "max_grad_norm"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)} must be above 0 and finite")
        if not 0 < self.depth_share <= 1:
            raise ValueError(f"depth_share={self.depth_share} must be above 0 and at most 1")
        if not 0 <= self.semantic_share <= 1:
            raise ValueError(f"semantic_share={self.semantic_share} must be at least 0 and at most 1")
        weights = [name for name in HELP if name.endswith(("_weight", "_decay"))]
        speaking = ("speak_every", "speak_codebooks", "speak_temperature")
        for name in (*weights, "min_lr", "warmup", "added_steps", *speaking):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)} must be 0 or more, and finite")
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr={self.min_lr} must be at most lr={self.lr}")
        if not 0 <= self.seed < MOST_SEEDS:
            raise ValueError(f"seed={self.seed} must be at least 0 and less than {MOST_SEEDS}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout} must be at least 0 and less than 1")
        if self.parallel not in WAYS:
            raise ValueError(f"parallel={self.parallel} is not one of {', '.join(WAYS)}")
        self.part(Mixture)
        self.part(Corruption)

    def part(self, kind: type) -> object:
        """The settings that another dataclass holds too."""
        return kind(**{f.name: getattr(self, f.name) for f in dataclasses.fields(kind)})

    def identity(self) -> dict:
        """What a resumed run must share."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in FREE}


HELP = {
    "max_steps": "optimizer steps",
    "batch_rows": "packed rows of a micro-batch, of all processes together",
    "row_positions": "positions of a row, 12.5 a second where all are audio frames; at most the model's max_positions",
    "grad_accum": "micro-batches per step",
    "lr": "highest learning rate",
    "min_lr": "learning rate at max_steps, reached by a cosine",
    "warmup": "steps until the highest learning rate",
    "weight_decay": "of matrices; embeddings, norms, gates and half-lives have none",
    "max_grad_norm": "longer gradients are scaled down to it",
    "added_steps": "first steps in which only what was added to --init_from learns, so that its gates open first",
    "depth_share": "of the frames the depth decoder learns in a step (compute amortization); 1 = all",
    "semantic_share": "of the frames, of which it learns the semantic codebooks beside those",
    "no_context": "share of conversations learnt as single turns",
    "joint": "share of turns with text and audio in chunks; this and the next two need a text head",
    "listen": "share of turns with audio, then text",
    "text_only": "share of turns without their audio",
    "evict": "share of documents whose first turns leave the context; needs a memory",
    "one_speaker": "share of documents with targets in one speaker's turns only",
    "semantic_weight": "of the mean loss of the semantic codebooks after codebook 0, which weighs 1",
    "acoustic_weight": "of the mean loss of the acoustic codebooks",
    "text_weight": "of the text loss",
    "guidance_weight": "of the attention guidance at first; needs cross-attention; 0 = none, as good",
    "guidance_steps": "the guidance weight falls linearly to 0 within so many steps",
    "memory_weight": "of the prosody that the memory should expect",
    "dropout": "of what every block adds",
    "drop_frames": "share of past frames that are not seen",
    "replace_codes": "share of past codes that are seen as others",
    "shallow": "share of turns of whose frames only the first codebooks are seen",
    "recompute": "activation checkpointing: less memory, about a third more time",
    "parallel": "ddp (every process holds all) or fsdp (processes share weights and optimizer)",
    "seed": "of weights, batches and all draws",
    "save_every": "steps between training states",
    "keep_last": "training states that are kept",
    "eval_every": "steps between held-out losses and pictures",
    "eval_rows": "packed rows of held-out conversations per evaluation",
    "speak_every": "steps between free-running validations, which need the extra eval; 0 = never",
    "speak_texts": "held-out texts spoken in each",
    "speak_codebooks": "codebooks that are drawn and heard there; 0 = all",
    "speak_temperature": "of the codes drawn there; 0 = always the likeliest",
}

# Learning rates follow GPT-3 (arXiv 2005.14165, table 2.1: 6e-4 for 125M, 2e-4 for 1.3B, 1.6e-4 for 2.7B, 1.2e-4 for
# 6.7B) with Llama's betas, decay and clip (arXiv 2302.13971, 2.3); a step holds 16 to 64 minutes of speech above nano.
# History corruption and dropout are for the small sizes, which see little data many times.
SMALL_DATA = {"dropout": 0.1, "drop_frames": 0.5, "replace_codes": 0.1, "shallow": 0.3, "semantic_share": 0.25}
OFTEN = {"max_steps": 5000, "warmup": 100, "save_every": 100, "eval_every": 100, "eval_rows": 4}
LARGE = {"max_steps": 50_000, "warmup": 1000, "row_positions": 2048, "save_every": 500}
LARGE |= {"eval_every": 500, "eval_rows": 32}
RECIPES: dict[str, dict] = {
    "nano": {**SMALL_DATA, **OFTEN, "lr": 1e-3, "min_lr": 1e-4},
    "micro": {**SMALL_DATA, **OFTEN, "max_steps": 20_000, "lr": 6e-4, "min_lr": 6e-5, "batch_rows": 8},
    "tiny": {**LARGE, "lr": 2e-4, "min_lr": 2e-5, "batch_rows": 8, "grad_accum": 2},
    "small": {**LARGE, "lr": 1.6e-4, "min_lr": 1.6e-5, "batch_rows": 8, "grad_accum": 4, "recompute": True},
    "medium": {**LARGE, "lr": 1.2e-4, "min_lr": 1.2e-5, "batch_rows": 8, "grad_accum": 4, "recompute": True},
    "csm-1b": {**LARGE, "lr": 2e-4, "min_lr": 2e-5, "batch_rows": 8, "grad_accum": 2},
}
# From pretrained weights: a tenth of the rate, a short run, small batches
FINE_TUNING = {"max_steps": 2000, "warmup": 50, "lr": 2e-5, "min_lr": 2e-6, "batch_rows": 2, "row_positions": 2048}
FINE_TUNING |= {"save_every": 100, "eval_every": 100, "eval_rows": 4}


def recipe(size: str, fine_tuning: bool = False) -> dict:
    """Settings for a named size from scratch, or for any model from weights that exist."""
    return dict(FINE_TUNING if fine_tuning else RECIPES[size])


def lr_at(step: int, c: TrainConfig) -> float:
    """Linear warmup, then cosine to min_lr."""
    if step < c.warmup:
        return c.lr * (step + 1) / c.warmup
    progress = min(1.0, (step - c.warmup) / max(1, c.max_steps - c.warmup))
    return c.min_lr + 0.5 * (c.lr - c.min_lr) * (1 + math.cos(math.pi * progress))


def mixture(c: TrainConfig, model: CSMConfig) -> Mixture:
    """How the data is shown to a model, without what it has no use for."""
    unused = () if model.text_head else ("joint", "listen", "text_only")
    unused += () if model.has_memory else ("evict",)
    return dataclasses.replace(c.part(Mixture), **dict.fromkeys(unused, 0.0))


def term_weights(step: int, c: TrainConfig, model: CSMConfig) -> Terms:
    """Weights of the terms of the loss in a step; (K - 1,) for the depth codebooks."""
    guidance = c.guidance_weight * max(0.0, 1 - step / c.guidance_steps) if model.cross_layers else 0.0
    K, S = model.n_codebooks, model.n_semantic
    each = [c.semantic_weight / max(1, S - 1)] * (S - 1) + [c.acoustic_weight / max(1, K - S)] * (K - S)
    return Terms(
        1.0, torch.tensor(each), c.text_weight * model.text_head, guidance, c.memory_weight * (model.prosodic_heads > 0)
    )
