"""The training loop of the speech model, used by every script that trains one; its losses on held-out conversations.

One visible function: rate, micro-batches, clip, checks, update, log, then evaluate, let it speak and save when due.
Batches, all random draws and the schedule are pure functions of (seed, step), so training state is weights, optimizer,
step, and N processes take the steps of one (but for dropout, which each draws for itself).
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Set
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from tqdm import tqdm

from architecture import CSM, WEIGHTS_KIND, Places, Terms, count_targets, find_places, pick_depth_rows
from checkpointing import load_newest_state, save_state, save_weights, state_files, step_of, write_atomically
from command_line import EXIT_DONE, EXIT_SIGTERM, StopSignals
from dataset_pipeline import ConversationDataset
from fine_tuning import merged_state
from frames import IGNORE, Rows, send
from history_corruption import Corruption, corrupt
from parallel import begin_moments, distribute, gather, restore, training_state, whole
from ranks import Ranks, bf16_speed, warn_of_slow_bf16
from run_folder import RunLog, read_settings, refuse_other_settings
from spoken_validation import SpokenValidation
from training_config import TrainConfig, lr_at, term_weights
from training_pictures import attention_figures, gate_values, memory_gib, plot_training

WEIGHTS = "model.safetensors"  # written last: its presence beside a state of the last step means the run is complete


class Micro(NamedTuple):
    """One process's part of a micro-batch."""

    rows: Rows
    depth_rows: Tensor  # (N,) rows the depth decoder learns
    shown: Tensor | None = None  # (B, T, K + 1) what is embedded; None: all that is real
    semantic_rows: Tensor | None = None  # (M,) rows of which it learns the semantic codebooks only; None: no such share


@dataclass
class Training:
    """What one run holds, beside its settings."""

    model: CSM
    loss: nn.Module  # what to call for the loss: the model, or what spreads it over the processes
    optimizer: torch.optim.Optimizer
    device: torch.device
    ranks: Ranks


def make_optimizer(model: nn.Module, c: TrainConfig, new: Set[str] = frozenset()) -> torch.optim.AdamW:
    """AdamW (.9, .95); weight decay on matrices, not on embeddings and norms; half-lives learn ten times faster.

    Parameters that do not learn are left out. While `c.added_steps` last, only the parameters named in `new` learn.
    """
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    groups: dict[tuple, list] = {}
    for name, parameter in model.named_parameters():
        plain = parameter.ndim < 2 or id(parameter) in embeddings
        scale = 10.0 if name.endswith("log_half_life") else 1.0
        if parameter.requires_grad:
            groups.setdefault((0.0 if plain else c.weight_decay, scale, name in new), []).append(parameter)
    listed = [
        {"params": parameters, "weight_decay": decay, "lr_scale": scale, "new": is_new}
        for (decay, scale, is_new), parameters in groups.items()
    ]
    return torch.optim.AdamW(listed, lr=c.lr, betas=(0.9, 0.95), fused=True)


def choose_bf16(precision: str, device: torch.device, folder: Path) -> bool:
    """'fp32', 'bf16', or 'auto': what the run in `folder` began with, else the faster one, measured by a product."""
    if precision not in ("auto", "fp32", "bf16"):
        raise ValueError(f"precision={precision} is not one of auto, fp32, bf16")
    if precision != "auto":
        if precision == "bf16":
            warn_of_slow_bf16(device)
        return precision == "bf16"
    previous = read_settings(folder)
    if previous is not None and "bf16" in previous.get("train", {}):
        return previous["train"]["bf16"]
    return bf16_speed(device) > 1 / 0.7


# ---- one step --------------------------------------------------------------------------------------------------------


def micro_batch(dataset: ConversationDataset, index: int, c: TrainConfig, part: slice = slice(None)) -> Micro:
    """Micro-batch number `index` of the run, `part` of its rows; what is drawn for a row depends on no other row."""
    rows = dataset.batch(index, c.batch_rows, c.seed, part)
    first = index * c.batch_rows + (part.start or 0)
    seeds = [2 * (c.seed * 2**32 + first + place) for place in range(len(rows.tokens))]
    T = rows.tokens.size(1)

    def pick(share: float) -> Tensor:
        parts = (
            place * T + pick_depth_rows(rows.targets[place, None], share, torch.Generator().manual_seed(seed))
            for place, seed in enumerate(seeds)
        )
        return torch.cat(list(parts))

    depth_rows, semantic_rows = pick(c.depth_share), None
    if c.semantic_share:
        more = pick(min(1.0, c.depth_share + c.semantic_share))  # of the same draws, so it holds the first
        semantic_rows = more[~torch.isin(more, depth_rows)]
    how, shown = c.part(Corruption), None
    if how:
        rows, shown = corrupt(rows, how, dataset.layout.codebook_size, [seed + 1 for seed in seeds])
    return Micro(rows, depth_rows, shown, semantic_rows)


def batch_losses(
    model: nn.Module,
    batch: Rows,
    depth_rows: Tensor,
    device: torch.device,
    bf16: bool = False,
    guidance: bool = False,
    shown: Tensor | None = None,
    semantic_rows: Tensor | None = None,
    places: Places | None = None,
) -> Terms:
    """Summed losses of one batch on `device`."""
    others = [None if tensor is None else send(tensor, device) for tensor in (shown, semantic_rows)]
    others.append(places and places.to(device))
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        return model(batch.to(device), send(depth_rows, device), guidance, *others)


def weighted_mean(sums: Terms, counts: Terms, weights: Terms) -> Tensor:
    """The loss: every term's mean over its targets, times its weight; a single weight of the depth codebooks is that of
    their mean."""
    total = sums.codebook0.new_zeros(())
    for weight, part, count in zip(weights, sums, counts, strict=True):
        mean = part / count.clamp(min=1)
        if isinstance(weight, Tensor):
            total = total + (weight.to(mean) * mean).sum()
        elif weight:
            total = total + weight * mean.mean()
    return total


def gradient_step(
    model: CSM,
    optimizer: torch.optim.Optimizer,
    micro: list,
    c: TrainConfig,
    device: torch.device,
    step: int = 0,
    ranks: Ranks | None = None,
    loss: nn.Module | None = None,
) -> tuple[Terms, Terms, Tensor]:
    """Backward over the micro-batches and one update; returns summed losses, their counts and the gradient norm.

    Every target weighs the same, however the step is split over micro-batches and processes. `loss` is what spreads
    the model over the processes. FloatingPointError before an update that is not finite, or of a loss twice as high
    as that of guessing.
    """
    ranks, loss = ranks or Ranks(), loss or model
    weights = term_weights(step, c, model.config)
    guided = weights.guidance > 0
    micro = [Micro(*each) for each in micro]
    places = [find_places(each.rows, model.config) for each in micro]
    each_own = (
        count_targets(rows, depth_rows, guided, semantic_rows, model.config.n_semantic, found)
        for (rows, depth_rows, _, semantic_rows), found in zip(micro, places, strict=True)
    )
    own = Terms(*(send(count, device) for count in add(list(each_own))))
    counts = over_processes(own, ranks)
    parts = []
    for each, found in zip(micro, places, strict=True):
        last = found is places[-1]
        with contextlib.nullcontext() if last or not hasattr(loss, "no_sync") else loss.no_sync():
            sums = batch_losses(loss, *each[:2], device, c.bf16, guided, *each[2:], found)
            (ranks.n * weighted_mean(sums, counts, weights)).backward()  # gradients are averaged, counts are of all
        parts.append(Terms(*(part.detach() for part in sums)))
    sums = over_processes(add(parts), ranks)
    grad_norm = whole(nn.utils.clip_grad_norm_(model.parameters(), c.max_grad_norm))
    refuse_update(sums, counts, grad_norm, model.config.audio_vocab_size)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return sums, counts, grad_norm


def refuse_update(sums: Terms, counts: Terms, grad_norm: Tensor, n_codes: int) -> None:
    """FloatingPointError if the gradient is not finite or the loss is twice that of guessing all codes."""
    audio = weighted_mean(sums, counts, Terms(1.0, 1.0, 0.0, 0.0, 0.0))
    norm, nats = torch.stack((grad_norm, audio.to(grad_norm))).tolist()  # waits for the device
    if not math.isfinite(norm):
        raise FloatingPointError(f"the gradient norm is {norm}; stopped before the update, lower --lr")
    if nats > 4 * math.log(n_codes):
        raise FloatingPointError(
            f"the loss is {nats:.1f} nats, twice that of guessing; stopped before the update, lower --lr"
        )


def over_processes(terms: Terms, ranks: Ranks) -> Terms:
    """Sums or counts of all processes, on the device of this one's."""
    if ranks.n == 1:
        return terms
    flat = ranks.sum(torch.cat([term.reshape(-1).double() for term in terms]))
    parts = flat.split([term.numel() for term in terms])
    return Terms(*(part.view(term.shape).to(term) for part, term in zip(parts, terms, strict=True)))


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


# ---- validation ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def evaluate_losses(
    model: CSM, dataset: ConversationDataset, device: torch.device | str = "cpu", max_rows: int | None = None
) -> dict:
    """Teacher-forced nats per target on held-out conversations, depth decoder on every frame.

    Returns {"loss", "c0", "text_gain", "depth": [K - 1 values], "text", "frames"}: c0 + mean(depth), codebook 0, how
    many nats higher that is with text of elsewhere, codebooks 1..K-1, text ids (None without a text head), the number
    of frames. The gain of a model that does not use the text is 0, however low its losses. Low values do not prove
    intelligible speech: free-running generation can still fail.
    """
    device = torch.device(device)
    was_training = model.training
    model.eval()
    sums, counts, others = [], [], []
    for row in dataset.plan(seed=0, epoch=0)[:max_rows]:
        batch = dataset.collate([row], seeds=None)
        depth_rows = pick_depth_rows(batch.targets, 1.0, torch.Generator())
        places = find_places(batch, model.config)
        sums.append(batch_losses(model, batch, depth_rows, device, places=places))
        counts.append(count_targets(batch, depth_rows, places=places))
        no_text = places._replace(text=places.text[:0])
        other = with_other_text(batch, dataset.text_tokenizer.eos)
        others.append(batch_losses(model, other, depth_rows[:0], device, places=no_text).codebook0)
    model.train(was_training)
    values, frames = named_losses(add(sums), add(counts), "val"), int(add(counts).depth.max())
    depth = [values[f"codebooks_val/{k:02d}"] for k in range(1, model.config.n_codebooks)]
    found = {"loss": values["val/loss"], "c0": values["val/codebook0"], "depth": depth, "frames": frames}
    gain = float(sum(others).cpu() / add(counts).codebook0.cpu()) - found["c0"]
    return found | {"text": values.get("val/text"), "text_gain": gain}


def with_other_text(rows: Rows, end: int) -> Rows:
    """(B, T) rows of the same audio with wrong text: the ids behind a turn's first ones, which name the speaker, are
    moved on by half their number; those that `end` a text stay, so that only what is read is wrong."""
    tokens, written = rows.tokens.clone(), F.pad(rows.targets[:, :-1, -1] != IGNORE, (1, 0))
    written &= tokens[..., -1] != end
    ids = tokens[..., -1][written]
    tokens[..., -1][written] = ids.roll(len(ids) // 2)
    return rows._replace(tokens=tokens)


def held_out_values(result: dict) -> dict[str, float]:
    """What `evaluate_losses` returns, under the names of the log."""
    each = {f"codebooks_val/{k:02d}": nats for k, nats in enumerate([result["c0"], *result["depth"]])}
    depth = sum(result["depth"]) / len(result["depth"])
    each |= {} if result["text"] is None else {"val/text": result["text"]}
    named = {"val/loss": result["loss"], "val/codebook0": result["c0"], "val/text_gain": result["text_gain"]}
    return {**named, "val/depth": depth, **each}


def validate(
    run: Training,
    c: TrainConfig,
    done: int,
    val_data: ConversationDataset | None,
    spoken: SpokenValidation | None,
    log: RunLog | None,
) -> dict[str, float]:
    """What is due after `done` steps; with pictures and audio to TensorBoard."""
    values: dict[str, float] = {}
    at_end = done == c.max_steps
    if val_data is not None and len(val_data) and (at_end or done % c.eval_every == 0):
        with parametrize.cached():
            values |= held_out_values(evaluate_losses(run.model, val_data, run.device, c.eval_rows))
        values |= gate_values(run.model)
        if log is not None and not sharded(c, run.ranks):
            for name, figure in attention_figures(run.model, val_data, run.device):
                log.tensorboard.add_figure(name, figure, done - 1)  # closes the figure
    if spoken is not None and log is not None and (at_end or done % c.speak_every == 0):
        with parametrize.cached():
            heard = spoken.measure(run.model)
        values |= heard.values
        log.speech(done - 1, heard.clips, heard.lines)
    return values


# ---- the run ---------------------------------------------------------------------------------------------------------


def train(
    model: CSM,
    train_data: ConversationDataset,
    val_data: ConversationDataset | None,
    c: TrainConfig,
    folder: Path,
    settings: dict,
    device: torch.device,
    ranks: Ranks | None = None,
    spoken: SpokenValidation | None = None,
    new: Set[str] = frozenset(),
) -> int:
    """Train to `c.max_steps`, resuming what `folder` holds; returns 0, or 128 + signal after saving for one.

    Nothing is done, nor written, when the run is complete already. Only the first process writes.

    FloatingPointError: a step that must not be taken (stopped before it). ValueError: `folder` is another run's, or
    settings that do not fit the model or the processes.
    """
    ranks = ranks or Ranks()
    check(model, c, new, ranks)
    settings = {"train": c.identity(), "model": model.config.to_dict(), **settings}
    refuse_other_settings(folder, settings)
    if ranks.from_first(is_complete(folder, c)):
        return EXIT_DONE
    state = load_newest_state(folder) if ranks.first else None
    start = ranks.from_first(state["step"] if state else 0)
    run = begin(model, c, device, ranks, new)
    if start:
        restore(model, run.optimizer, state, ranks, str(folder))
    del state
    log = RunLog(folder, settings, start, device) if ranks.first else None
    with contextlib.closing(log) if log else contextlib.nullcontext(), StopSignals() as stop:
        stopped = take_steps(run, start, train_data, val_data, c, folder, spoken, log, stop)
    if stopped:
        return stop.exit_code or EXIT_SIGTERM
    if ranks.first:
        plot_training(folder, model.config.n_codebooks)
    export(model, folder, ranks)
    return EXIT_DONE


def is_complete(folder: Path, c: TrainConfig) -> bool:
    """Whether all steps were taken and the weights exported."""
    files = state_files(folder)
    return bool(files) and step_of(files[-1]) == c.max_steps and (folder / WEIGHTS).is_file()


def check(model: CSM, c: TrainConfig, new: Set[str], ranks: Ranks) -> None:
    """ValueError for settings that do not fit the model or the processes."""
    if c.row_positions > model.config.max_positions:
        raise ValueError(
            f"row_positions={c.row_positions} must be at most the model's max_positions={model.config.max_positions}"
        )
    if c.added_steps and not new:
        raise ValueError(f"added_steps={c.added_steps} needs --init_from with something added to it")
    if c.speak_every and sharded(c, ranks):
        raise ValueError(f"speak_every={c.speak_every} needs --parallel ddp: a sharded model cannot speak")
    ranks.share_of(c.batch_rows, "batch_rows")


def sharded(c: TrainConfig, ranks: Ranks) -> bool:
    """Whether no process holds the whole model, so that only its loss can be computed."""
    return c.parallel == "fsdp" and ranks.n > 1


def begin(model: CSM, c: TrainConfig, device: torch.device, ranks: Ranks, new: Set[str]) -> Training:
    """The model on its device or devices, in train mode, and its optimizer."""
    blocks = [*model.backbone.blocks, *model.depth.blocks]
    for block in blocks:
        block.dropout = c.dropout
    model.backbone.recompute = model.depth.recompute = c.recompute
    if not sharded(c, ranks):
        model.to(device)
    loss = distribute(model.train(), blocks, c.parallel, ranks, device)
    optimizer = make_optimizer(model, c, new)
    begin_moments(optimizer)
    return Training(model, loss, optimizer, device, ranks)


def take_steps(
    run: Training,
    start: int,
    train_data: ConversationDataset,
    val_data: ConversationDataset | None,
    c: TrainConfig,
    folder: Path,
    spoken: SpokenValidation | None,
    log: RunLog | None,
    stop: StopSignals,
) -> bool:
    """Steps from `start` to the last one; whether a signal came, in any process, and was answered by saving."""
    best, ranks = Best(folder, c, start), run.ranks
    steps = range(start, c.max_steps)
    bar = tqdm(steps, initial=start, total=c.max_steps, desc="training", unit="step", disable=log is None)
    for step in bar:
        values = take_step(run, step, train_data, c)
        done = step + 1
        values |= validate(run, c, done, val_data, spoken, log)
        if log is not None:
            log.scalars(step, values)
            bar.set_postfix(loss=f"{values['train/loss']:.3f}", codebook0=f"{values['train/codebook0']:.3f}")
        if best.is_judged(done, c) and ranks.from_first(best.is_beaten(values)):
            export(run.model, folder / "best", ranks)
            if log is not None:
                best.keep(done, values)
        stopped = ranks.any(stop.received is not None)
        if done % c.save_every == 0 or done == c.max_steps or stopped:
            state = training_state(run.model, run.optimizer, ranks)
            if ranks.first:
                save_state(folder, done, state, c.keep_last)
        if stopped:
            return done < c.max_steps
    return False


def take_step(run: Training, step: int, train_data: ConversationDataset, c: TrainConfig) -> dict[str, float]:
    """One step of training; what to log of it. FloatingPointError names the conversations of the batch."""
    for group in run.optimizer.param_groups:
        learns = step >= c.added_steps or group["new"]
        group["lr"] = lr_at(step, c) * group["lr_scale"] * learns
    torch.manual_seed((c.seed * 2**32 + step) * 1009 + run.ranks.rank)  # of dropout: the same after a resume
    began = time.perf_counter()
    numbers = range(step * c.grad_accum, (step + 1) * c.grad_accum)
    part = run.ranks.share_of(c.batch_rows, "batch_rows")
    micro = [micro_batch(train_data, number, c, part) for number in numbers]
    try:
        sums, counts, grad_norm = gradient_step(
            run.model, run.optimizer, micro, c, run.device, step, run.ranks, run.loss
        )
    except FloatingPointError as error:
        names = [name for number in numbers for name in train_data.names(number, c.batch_rows, c.seed)]
        raise FloatingPointError(f"step {step}: {error}; the batch held {', '.join(names)}") from error
    values = named_losses(sums, counts, "train") | {
        "train/grad_norm": float(grad_norm),
        "train/lr": lr_at(step, c),
        "train/frames_per_s": int(counts.codebook0) / (time.perf_counter() - began),
        "train/memory_gib": memory_gib(run.device),
    }
    return {name: value for name, value in values.items() if value is not None}


class Best:
    """The best weights so far, in `best/`: by free-running word errors where they are measured, then held-out loss.

    Those of a step after `start` are not: this run may take another course from there.
    """

    def __init__(self, folder: Path, c: TrainConfig, start: int = 0):
        self.path = folder / "best" / "best.json"
        self.metrics = ["spoken/wer", "val/loss"] if c.speak_every else ["val/loss"]
        self.every = c.speak_every or c.eval_every
        self.values = [math.inf] * len(self.metrics)
        if self.path.is_file() and (folder / "best" / WEIGHTS).is_file():
            record = json.loads(self.path.read_text(encoding="utf-8"))
            judged_alike = list(record["values"]) == self.metrics  # else the run was judged in another way until now
            if judged_alike and record["step"] <= start:
                self.values = list(record["values"].values())

    def is_judged(self, done: int, c: TrainConfig) -> bool:
        return done == c.max_steps or done % self.every == 0

    def of(self, values: dict[str, float]) -> list[float]:
        return [values.get(metric, math.inf) for metric in self.metrics]

    def is_beaten(self, values: dict[str, float]) -> bool:
        return self.of(values) < self.values

    def keep(self, step: int, values: dict[str, float]) -> None:
        """Say of the weights just written what they are."""
        self.values = self.of(values)
        record = {"step": step, "values": dict(zip(self.metrics, self.values, strict=True))}
        write_atomically(self.path, (json.dumps(record, indent=2) + "\n").encode())


def export(model: CSM, folder: Path, ranks: Ranks) -> None:
    """Weights for use, whole and with LoRA merged; all processes must ask."""
    tensors = gather(merged_state(model), ranks)
    if ranks.first:
        save_weights(folder, WEIGHTS_KIND, model.config.to_dict(), tensors)
