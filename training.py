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

from architecture import CSM, Losses, pick_depth_rows, save_model
from checkpointing import load_into, load_newest_state, random_state, restore_random_state, save_state
from command_line import EXIT_DONE, StopSignals
from dataset_pipeline import Batch, ConversationDataset
from frames import IGNORE
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
    bf16: bool = False  # autocast; weights and optimizer stay fp32
    seed: int = 0
    save_every: int = 25  # steps between checkpoints
    eval_every: int = 25  # steps between evaluations on the val split
    eval_rows: int = 2  # packed rows per evaluation

    def __post_init__(self) -> None:
        for name in ("max_steps", "batch_rows", "grad_accum", "save_every", "eval_every", "eval_rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if not 0 < self.depth_share <= 1:
            raise ValueError(f"depth_share={self.depth_share} must be above 0 and at most 1")
        if not 0 <= self.no_context <= 1:
            raise ValueError(f"no_context={self.no_context} must be between 0 and 1")
        if self.lr <= 0:
            raise ValueError(f"lr={self.lr} must be above 0")


def lr_at(step: int, c: TrainConfig) -> float:
    """Linear warmup, then cosine to min_lr."""
    if step < c.warmup:
        return c.lr * (step + 1) / c.warmup
    progress = min(1.0, (step - c.warmup) / max(1, c.max_steps - c.warmup))
    return c.min_lr + 0.5 * (c.lr - c.min_lr) * (1 + math.cos(math.pi * progress))


def make_optimizer(model: nn.Module, c: TrainConfig) -> torch.optim.AdamW:
    """AdamW (.9, .95); weight decay on matrices only, not on embeddings and norms."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    decayed = [p for p in model.parameters() if p.ndim >= 2 and id(p) not in embeddings]
    others = [p for p in model.parameters() if p.ndim < 2 or id(p) in embeddings]
    groups = [{"params": decayed, "weight_decay": c.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=c.lr, betas=(0.9, 0.95), fused=True)


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


def micro_batch(dataset: ConversationDataset, index: int, c: TrainConfig) -> tuple[Batch, Tensor]:
    """Micro-batch number `index` of the run and the (N,) rows the depth decoder learns of it, redrawn for each."""
    batch = dataset.batch(index, c.batch_rows, c.seed)
    generator = torch.Generator().manual_seed(c.seed * 2**32 + index)
    return batch, pick_depth_rows(batch.targets, c.depth_share, generator)


def batch_losses(model: CSM, batch: Batch, depth_rows: Tensor, device: torch.device, bf16: bool = False) -> Losses:
    """Losses of one batch on `device`."""
    batch = batch.to(device)
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        return model.loss(
            batch.tokens, batch.mask, batch.targets, batch.positions, batch.allowed(), depth_rows.to(device)
        )


def gradient_step(model: CSM, optimizer: torch.optim.Optimizer, micro: list, c: TrainConfig, device: torch.device):
    """Backward over the micro-batches and one update; returns their summed losses and the gradient norm.

    Every target weighs the same, however the step is split. FloatingPointError before an update that is not finite.
    """
    c0_count = sum(int((batch.targets[..., 0] != IGNORE).sum()) for batch, _ in micro)
    depth_count = sum(len(rows) for _, rows in micro)
    parts = []
    for batch, depth_rows in micro:
        losses = batch_losses(model, batch, depth_rows, device, c.bf16)
        (losses.c0_sum / c0_count + losses.depth_sum.mean() / max(1, depth_count)).backward()
        parts.append(Losses(*(part.detach() for part in losses)))
    grad_norm = nn.utils.clip_grad_norm_(model.parameters(), c.max_grad_norm)
    if not torch.isfinite(grad_norm):
        raise FloatingPointError(f"the gradient norm is {float(grad_norm)}; stopped before the update, lower --lr")
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return add(parts), grad_norm


def named_losses(losses: Losses, prefix: str) -> dict[str, float]:
    """Nats per target: total, codebook 0, mean of the depth codebooks, and each codebook."""
    c0 = float(losses.c0_sum) / max(1, int(losses.c0_count))
    depth = (losses.depth_sum.double() / losses.depth_count.clamp(min=1)).tolist()
    mean = sum(depth) / len(depth)
    each = {f"codebooks_{prefix}/{k:02d}": nats for k, nats in enumerate([c0, *depth])}
    return {f"{prefix}/loss": c0 + mean, f"{prefix}/codebook0": c0, f"{prefix}/depth": mean, **each}


def add(losses: list[Losses]) -> Losses:
    """Sums and counts over micro-batches."""
    return Losses(*(torch.stack(parts).sum(dim=0) for parts in zip(*losses, strict=True)))


@torch.no_grad()
def evaluate_losses(
    model: CSM, dataset: ConversationDataset, device: torch.device | str = "cpu", max_rows: int | None = None
) -> dict:
    """Teacher-forced nats per target on held-out conversations, depth decoder on every frame.

    Returns {"loss", "c0", "depth": [K - 1 values], "frames"}: c0 + mean(depth), codebook 0, codebooks 1..K-1, the
    number of frames. Low values do not prove intelligible speech: free-running generation can still fail.
    """
    device = torch.device(device)
    was_training = model.training
    model.eval()
    rows = dataset.plan(seed=0, epoch=0)[:max_rows]
    parts = []
    for row in rows:
        batch = dataset.collate([row], seed=None)
        depth_rows = pick_depth_rows(batch.targets, 1.0, torch.Generator())
        parts.append(batch_losses(model, batch, depth_rows, device))
    model.train(was_training)
    losses = add(parts)
    c0 = float(losses.c0_sum / losses.c0_count)
    depth = (losses.depth_sum / losses.depth_count.clamp(min=1)).tolist()
    return {"loss": c0 + sum(depth) / len(depth), "c0": c0, "depth": depth, "frames": int(losses.depth_count.max())}


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
                group["lr"] = lr_at(step, c)

            began = time.perf_counter()
            micro = [micro_batch(train_data, step * c.grad_accum + i, c) for i in range(c.grad_accum)]
            losses, grad_norm = gradient_step(model, optimizer, micro, c, device)

            values = named_losses(losses, "train") | {
                "train/grad_norm": float(grad_norm),
                "train/lr": lr_at(step, c),
                "train/frames_per_s": int(losses.c0_count) / (time.perf_counter() - began),
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
    return {"val/loss": result["loss"], "val/codebook0": result["c0"], "val/depth": depth, **each}


def save(folder: Path, step: int, model: CSM, optimizer: torch.optim.Optimizer) -> None:
    """Training state after `step` updates."""
    content = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "random": random_state()}
    save_state(folder, step, content)


def plot_losses(folder: Path, n_codebooks: int) -> None:
    """`losses.png`: total, codebook 0 and depth; each codebook in training."""
    some = sorted({0, 1, *range(4, n_codebooks, 4), n_codebooks - 1})
    groups = {
        "nats per code": [f"{split}/{name}" for split in ("train", "val") for name in ("codebook0", "depth")],
        "training loss by codebook": [f"codebooks_train/{k:02d}" for k in some],
    }
    plot_metrics(folder, groups, folder / "losses.png")
