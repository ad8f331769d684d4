"""The training loop of the speech model, used by every script that trains one; its losses on held-out conversations.

One visible function: rate, micro-batches, clip, finite check, update, log, then evaluate and save when due. Batches,
amortization draws and the schedule are pure functions of (seed, step), so training state is weights, optimizer, step.
"""

from __future__ import annotations

import dataclasses
import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from architecture import CSM, Terms, count_targets, pick_depth_rows, save_model
from checkpointing import load_into, load_newest_state, random_state, restore_random_state, save_state
from command_line import EXIT_DONE, StopSignals
from dataset_pipeline import ConversationDataset, Mixture
from frames import Rows
from model_sizes import CSMConfig
from run_folder import RunLog, plot_metrics, read_settings, refuse_other_settings


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How to train; all of it is part of the run's identity except `save_every` and `eval_every`."""

    max_steps: int = 100
    batch_rows: int = 2  # packed rows per micro-batch
    row_positions: int = 1024  # positions per row, 82 s when all are audio frames
    grad_accum: int = 1  # micro-batches per step
    lr: float = 1e-3
    min_lr: float = 1e-4  # reached at max_steps
    warmup: int = 10  # steps
    weight_decay: float = 0.1
    max_grad_norm: float = 1.0
    depth_share: float = 1 / 16  # of the frames the depth decoder learns in a step; 1 = all
    no_context: float = 0.15  # share of conversations learnt as single turns
    joint: float = 0.3  # share of turns with text and audio in chunks; these three need a text head
    listen: float = 0.1  # share of turns with audio, then text
    text_only: float = 0.1  # share of turns without their audio
    evict: float = 0.3  # share of documents whose first turns leave the context; needs a memory
    one_speaker: float = 0.0  # share of documents with targets in one speaker's turns only
    text_weight: float = 0.5  # of the text loss beside codebook 0 and the mean of the depth codebooks
    guidance_weight: float = 1.0  # of the attention guidance at first; needs cross-attention; 0 = none
    guidance_steps: int = 1000  # the guidance weight falls linearly to 0 within so many
    memory_weight: float = 0.1  # of the prosody that the memory should expect
    bf16: bool = False  # autocast; weights and optimizer stay fp32
    seed: int = 0
    save_every: int = 25  # steps between checkpoints
    eval_every: int = 25  # steps between evaluations on the val split
    eval_rows: int = 2  # packed rows per evaluation

    def __post_init__(self) -> None:
        for name in (
            "max_steps",
            "batch_rows",
            "grad_accum",
            "save_every",
            "eval_every",
            "eval_rows",
            "guidance_steps",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if not 0 < self.depth_share <= 1:
            raise ValueError(f"depth_share={self.depth_share} must be above 0 and at most 1")
        for name in ("text_weight", "guidance_weight", "memory_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must be 0 or more")
        Mixture(**{f.name: getattr(self, f.name) for f in dataclasses.fields(Mixture)})
        if self.lr <= 0:
            raise ValueError(f"lr={self.lr} must be above 0")


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
    return Mixture(**{f.name: 0.0 if f.name in unused else getattr(c, f.name) for f in dataclasses.fields(Mixture)})


def term_weights(step: int, c: TrainConfig, model: CSMConfig) -> Terms:
    """Weights of the terms of the loss in a step: 1 for codebook 0 and for the mean of the depth codebooks."""
    guidance = c.guidance_weight * max(0.0, 1 - step / c.guidance_steps) if model.cross_layers else 0.0
    return Terms(1.0, 1.0, c.text_weight * model.text_head, guidance, c.memory_weight * (model.prosodic_heads > 0))


def make_optimizer(model: nn.Module, c: TrainConfig) -> torch.optim.AdamW:
    """AdamW (.9, .95); weight decay on matrices, not on embeddings and norms; half-lives learn ten times faster."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    groups: dict[str, list] = {"matrices": [], "others": [], "half-lives": []}
    for name, parameter in model.named_parameters():
        plain = parameter.ndim < 2 or id(parameter) in embeddings
        kind = "half-lives" if name.endswith("log_half_life") else "others" if plain else "matrices"
        groups[kind].append(parameter)
    options = {"matrices": (c.weight_decay, 1.0), "others": (0.0, 1.0), "half-lives": (0.0, 10.0)}
    listed = [
        {"params": groups[kind], "weight_decay": decay, "lr_scale": scale}
        for kind, (decay, scale) in options.items()
        if groups[kind]
    ]
    return torch.optim.AdamW(listed, lr=c.lr, betas=(0.9, 0.95), fused=True)


def choose_bf16(precision: str, device: torch.device, folder: Path) -> bool:
    """'fp32', 'bf16', or 'auto': what the run in `folder` began with, else the faster one, measured by a product."""
    if precision not in ("auto", "fp32", "bf16"):
        raise ValueError(f"precision={precision} is not one of auto, fp32, bf16")
    previous = read_settings(folder)
    if precision != "auto":
        return precision == "bf16"
    if previous is not None:
        return previous["train"]["bf16"]
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        matrix = torch.ones(768, 768, dtype=dtype)
        rounds = []
        for _ in range(6):
            began = time.perf_counter()
            matrix @ matrix
            rounds.append(time.perf_counter() - began)
        seconds[dtype] = min(rounds)
    return seconds[torch.bfloat16] < 0.7 * seconds[torch.float32]


def micro_batch(dataset: ConversationDataset, index: int, c: TrainConfig) -> tuple[Rows, Tensor]:
    """Micro-batch number `index` of the run and the (N,) rows the depth decoder learns of it, redrawn for each."""
    batch = dataset.batch(index, c.batch_rows, c.seed)
    generator = torch.Generator().manual_seed(c.seed * 2**32 + index)
    return batch, pick_depth_rows(batch.targets, c.depth_share, generator)


def batch_losses(
    model: CSM, batch: Rows, depth_rows: Tensor, device: torch.device, bf16: bool = False, guidance: bool = False
) -> Terms:
    """Summed losses of one batch on `device`."""
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        return model.loss(batch.to(device), depth_rows.to(device), guidance)


def weighted_mean(sums: Terms, counts: Terms, weights: Terms) -> Tensor:
    """The loss: every term's mean over its targets, times its weight; the depth codebooks count as their mean."""
    means = [total / count.clamp(min=1) for total, count in zip(sums, counts, strict=True)]
    return sum(weight * mean.mean() for weight, mean in zip(weights, means, strict=True) if weight)


def gradient_step(
    model: CSM, optimizer: torch.optim.Optimizer, micro: list, c: TrainConfig, device: torch.device, step: int = 0
) -> tuple[Terms, Terms, Tensor]:
    """Backward over the micro-batches and one update; returns summed losses, their counts and the gradient norm.

    Every target weighs the same, however the step is split. FloatingPointError before an update that is not finite.
    """
    weights = term_weights(step, c, model.config)
    counts = add([count_targets(*each, weights.guidance > 0) for each in micro])
    on_device = Terms(*(count.to(device) for count in counts))
    parts = []
    for batch, depth_rows in micro:
        sums = batch_losses(model, batch, depth_rows, device, c.bf16, weights.guidance > 0)
        weighted_mean(sums, on_device, weights).backward()
        parts.append(Terms(*(part.detach() for part in sums)))
    grad_norm = nn.utils.clip_grad_norm_(model.parameters(), c.max_grad_norm)
    if not torch.isfinite(grad_norm):
        raise FloatingPointError(f"the gradient norm is {float(grad_norm)}; stopped before the update, lower --lr")
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return add(parts), counts, grad_norm


def named_losses(sums: Terms, counts: Terms, prefix: str) -> dict[str, float]:
    """Means per target: codebook 0 plus mean of the depth codebooks, each of both, each codebook, the other terms."""
    codebook0, depth, *others = (
        (total.double().cpu() / count.clamp(min=1).cpu()).tolist() for total, count in zip(sums, counts, strict=True)
    )
    mean = sum(depth) / len(depth)
    values = {f"{prefix}/loss": codebook0 + mean, f"{prefix}/codebook0": codebook0, f"{prefix}/depth": mean}
    named = zip(Terms._fields[2:], others, sums[2:], strict=True)
    values |= {f"{prefix}/{name}": value for name, value, total in named if total}
    return values | {f"codebooks_{prefix}/{k:02d}": nats for k, nats in enumerate([codebook0, *depth])}


def add(losses: list[Terms]) -> Terms:
    """Sums or counts over micro-batches."""
    return Terms(*(torch.stack(parts).sum(dim=0) for parts in zip(*losses, strict=True)))


@torch.no_grad()
def evaluate_losses(
    model: CSM, dataset: ConversationDataset, device: torch.device | str = "cpu", max_rows: int | None = None
) -> dict:
    """Teacher-forced nats per target on held-out conversations, depth decoder on every frame.

    Returns {"loss", "c0", "depth": [K - 1 values], "text", "frames"}: c0 + mean(depth), codebook 0, codebooks 1..K-1,
    text ids (None without a text head), the number of frames. Low values do not prove intelligible speech: free-running
    generation can still fail.
    """
    device = torch.device(device)
    was_training = model.training
    model.eval()
    sums, counts = [], []
    for row in dataset.plan(seed=0, epoch=0)[:max_rows]:
        batch = dataset.collate([row], seeds=None)
        depth_rows = pick_depth_rows(batch.targets, 1.0, torch.Generator())
        sums.append(batch_losses(model, batch, depth_rows, device))
        counts.append(count_targets(batch, depth_rows))
    model.train(was_training)
    values, frames = named_losses(add(sums), add(counts), "val"), int(add(counts).depth.max())
    depth = [values[f"codebooks_val/{k:02d}"] for k in range(1, model.config.n_codebooks)]
    found = {"loss": values["val/loss"], "c0": values["val/codebook0"], "depth": depth, "frames": frames}
    return found | {"text": values.get("val/text")}


def train(
    model: CSM,
    train_data: ConversationDataset,
    val_data: ConversationDataset | None,
    c: TrainConfig,
    folder: Path,
    settings: dict,
    device: torch.device,
) -> int:
    """Train to `c.max_steps`, resuming what `folder` holds; returns 0, or 128 + signal after saving for one.

    Nothing is done, nor written, when the run is complete already.

    FloatingPointError: a gradient is not finite (stopped before the update). ValueError: `folder` is another run's.
    """
    if c.row_positions > model.config.max_positions:
        raise ValueError(
            f"row_positions={c.row_positions} must be at most the model's max_positions={model.config.max_positions}"
        )
    settings = {"train": identity(c), "model": model.config.to_dict(), **settings}
    refuse_other_settings(folder, settings)
    optimizer = make_optimizer(model, c)
    state = load_newest_state(folder)
    start = 0
    if state is not None:
        start = state["step"]
        if start == c.max_steps and (folder / "model.safetensors").is_file():
            return EXIT_DONE
        load_into(model, state["model"], str(folder))
        optimizer.load_state_dict(state["optimizer"])
        restore_random_state(state["random"])
    log = RunLog(folder, settings, start)
    model.to(device).train()
    bar = tqdm(range(start, c.max_steps), initial=start, total=c.max_steps, desc="training", unit="step")
    with StopSignals() as stop:
        for step in bar:
            for group in optimizer.param_groups:
                group["lr"] = lr_at(step, c) * group["lr_scale"]

            began = time.perf_counter()
            micro = [micro_batch(train_data, step * c.grad_accum + i, c) for i in range(c.grad_accum)]
            sums, counts, grad_norm = gradient_step(model, optimizer, micro, c, device, step)

            values = named_losses(sums, counts, "train") | {
                "train/grad_norm": float(grad_norm),
                "train/lr": lr_at(step, c),
                "train/frames_per_s": int(counts.codebook0) / (time.perf_counter() - began),
            }
            done = step + 1
            if val_data is not None and (done % c.eval_every == 0 or done == c.max_steps):
                values |= held_out_values(evaluate_losses(model, val_data, device, c.eval_rows))
            log.scalars(step, values)
            bar.set_postfix(loss=f"{values['train/loss']:.3f}", codebook0=f"{values['train/codebook0']:.3f}")
            if done % c.save_every == 0 or done == c.max_steps or stop.received is not None:
                save(folder, done, model, optimizer)
            if stop.received is not None:
                break
    log.close()
    if stop.received is None:
        save_model(model, folder)
        plot_losses(folder, model.config.n_codebooks)
    return stop.exit_code


def identity(c: TrainConfig) -> dict:
    """The settings that a resumed run must share; how often to save and evaluate may change."""
    return {name: value for name, value in dataclasses.asdict(c).items() if name not in ("save_every", "eval_every")}


def held_out_values(result: dict) -> dict[str, float]:
    """What `evaluate_losses` returns, under the names of the log."""
    each = {f"codebooks_val/{k:02d}": nats for k, nats in enumerate([result["c0"], *result["depth"]])}
    depth = sum(result["depth"]) / len(result["depth"])
    each |= {} if result["text"] is None else {"val/text": result["text"]}
    return {"val/loss": result["loss"], "val/codebook0": result["c0"], "val/depth": depth, **each}


def save(folder: Path, step: int, model: CSM, optimizer: torch.optim.Optimizer) -> None:
    """Training state after `step` updates."""
    content = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "random": random_state()}
    save_state(folder, step, content)


def plot_losses(folder: Path, n_codebooks: int) -> None:
    """`losses.png`: total, codebook 0 and depth; each codebook in training."""
    some = sorted({0, 1, *range(4, n_codebooks, 4), n_codebooks - 1})
    groups = {
        "nats per target": [f"{split}/{name}" for split in ("train", "val") for name in ("codebook0", "depth", "text")],
        "training loss by codebook": [f"codebooks_train/{k:02d}" for k in some],
    }
    plot_metrics(folder, groups, folder / "losses.png")
