"""Does each mechanism of the model do what it is for? python benchmarks/mechanisms.py

Small synthetic tasks with known optima, the real model classes at width 64, every mechanism against its own switch off
at equal parameters, three seeds. Prints one table per question; the last line of --json is one JSON object. Results of
finished runs are kept in --out, so that an interrupted benchmark goes on where it was.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from architecture import CSM, CSMCache, Traces, count_targets, parameter_table
from checkpointing import write_atomically
from command_line import EXIT_CODES_HELP, EXIT_DONE, Several, run
from conversational_memory import MemoryStore
from cross_attention import guidance_loss
from frames import IGNORE, Clock, Rows, Turn, concatenate
from generation import Sampling, Speaker
from inference_model import InferenceModel
from model_sizes import CSMConfig, preset
from run_folder import describe_environment
from transformer import TransformerConfig

BOS, EOS, TAG = 256, 257, 48
WIDTH, BATCH, LR = 64, 32, 3e-3
EVALUATIONS = 8  # batches
WATCH_EVERY = 20  # steps


def small_config(**changes: object) -> CSMConfig:
    """Two backbone layers of width 64; two codebooks of 32 codes."""
    backbone = TransformerConfig(n_layers=2, d_model=WIDTH, n_heads=4, n_kv_heads=4, d_ff=128)
    depth = TransformerConfig(n_layers=1, d_model=32, n_heads=2, n_kv_heads=2, d_ff=64)
    values = {"n_codebooks": 2, "codebook_size": 32, "max_positions": 512, "backbone": backbone, "depth": depth}
    return CSMConfig(**{**values, **changes})


def n_parameters(config: CSMConfig) -> int:
    return parameter_table(config)["total"]


def widened(config: CSMConfig, target: int, n_layers: int | None = None) -> CSMConfig:
    """The config with the feed-forward width (and number of layers) that comes closest to `target` parameters."""
    layers = n_layers or config.backbone.n_layers

    def at(d_ff: int) -> CSMConfig:
        backbone = dataclasses.replace(config.backbone, n_layers=layers, d_ff=d_ff)
        return dataclasses.replace(config, backbone=backbone)

    return min((at(d_ff) for d_ff in range(8, 1025, 4)), key=lambda c: abs(n_parameters(c) - target))


def expand(rows: Rows, batch: int) -> Rows:
    """One sequence -> a batch of copies that may be written to."""
    return Rows(*(x[None].repeat(batch, *[1] * x.ndim) for x in rows))


def train(
    model: CSM, batch: Callable[[torch.Generator], tuple], loss: Callable, steps: int, seed: int, watch: Callable
) -> list[tuple[int, float]]:
    """AdamW with a short warm-up and a cosine; `watch` now and then -> [(step, value)]."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=steps, pct_start=0.1)
    generator = torch.Generator().manual_seed(seed)
    seen = []
    for step in range(steps):
        optimizer.zero_grad(set_to_none=True)
        loss(*batch(generator), step).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % WATCH_EVERY == 0:
            with torch.inference_mode():
                seen.append((step + 1, watch()))
    return seen


# ---- memory ----------------------------------------------------------------------------------------------------------
# A slow fact (1 of 16) is told once, as text, in turn 0. Every turn sounds in one of 8 ways, its fast cue. From turn 1
# on each turn must answer with the fact and with the cue of the turn before, or with NEUTRAL after a minute of silence.
# Answers are targets only, never inputs, so nothing tells the fact again. Older turns are out of the window.

N_FACTS, N_CUES = 16, 8
NEUTRAL = N_FACTS + N_CUES
SILENCE = 60 * 12.5  # frames
TRAINED_TURNS, TESTED_TURNS = 6, 16
TURN_ROWS = 4 + 3 + 1  # text, the two answers and the cue, the end


def conversation_batch(n_turns: int, generator: torch.Generator, silences: float = 0.2, batch: int = BATCH) -> Rows:
    """(B, T) rows of conversations; codebook 0 of the two answers of each turn has a target, nothing else."""
    layout, parts, clock = small_config().layout, [], Clock()
    for n in range(n_turns):
        clock.position = 0
        rows = layout.turn_rows(Turn([BOS, TAG, 99, EOS], torch.zeros(3, 2, dtype=torch.int64), 4, gap=12.5), clock)
        parts.append(rows._replace(documents=torch.full_like(rows.documents, n)))
    rows = expand(concatenate(parts), batch)
    fact = torch.randint(0, N_FACTS, (batch,), generator=generator)
    cues = N_FACTS + torch.randint(0, N_CUES, (batch, n_turns), generator=generator)
    silent = torch.rand(batch, n_turns, generator=generator) < silences
    silent[:, 0] = False

    def at(tensor: Tensor, row: int) -> Tensor:
        return tensor.unflatten(1, (n_turns, TURN_ROWS))[:, :, row]  # a view: (B, turns, ...)

    rows.targets[:] = IGNORE
    at(rows.targets, 3)[:, 1:, 0] = fact[:, None]
    at(rows.targets, 4)[:, 1:, 0] = torch.where(silent, NEUTRAL, cues.roll(1, dims=1))[:, 1:]
    for answer in (4, 5):
        at(rows.mask, answer)[:] = False
    at(rows.tokens, 6)[..., 0] = cues
    rows.tokens[:, 2, -1] = 100 + fact
    rows.times[:] += (silent.cumsum(dim=1) * SILENCE).repeat_interleave(TURN_ROWS, dim=1)
    return rows


def window(rows: Rows, n_turns: int) -> Tensor:
    """(B, 1, T, T) bool: causal, the row's own turn and the `n_turns` - 1 before it."""
    T = rows.turns.size(1)
    near = rows.turns[:, :, None] - rows.turns[:, None] < n_turns
    return (near & torch.ones(T, T, dtype=torch.bool).tril())[:, None]


class LastTurn(MemoryStore):
    """A style vector of the last turn: what older turns wrote is gone."""

    def read_all(self, states: Tensor, writes, turns, row_turns: Tensor) -> Tensor:
        before = turns.conversations.clone()
        reads = []
        for n in range(turns.end.size(1)):
            only = turns._replace(conversations=torch.where(torch.arange(before.size(1)) == n - 1, before, -2))
            only.conversations[:, n] = before[:, n]
            read = super().read_all(states, writes, only, row_turns)
            reads.append(torch.where((row_turns == n)[..., None], read, 0.0))
        return sum(reads)


MEMORY_HEADS = {"semantic_heads": 4, "prosodic_heads": 4, "memory_key": 16, "memory_value": 16}


@functools.cache
def memory_variants() -> dict[str, tuple[CSMConfig, int]]:
    """Name -> config and window in turns; all have about the parameters of the dual memory."""
    dual = small_config(**MEMORY_HEADS)
    plain = widened(small_config(), n_parameters(dual))
    return {
        "dual memory": (dual, 1),
        "dual memory, no decay": (dual, 1),
        "one memory, same bytes, 30 s": (dual, 1),
        "one memory, same bytes, 2 to 1,800 s": (dual, 1),
        "last-turn vector": (dual, 1),
        "none": (plain, 1),
        "window of 2 turns": (plain, 2),
        "full context": (plain, TESTED_TURNS),
    }


def build_memory_model(name: str, config: CSMConfig) -> CSM:
    """The model of a variant; the baselines differ in half-lives and in the rows that stores are written from."""
    model = CSM(config)
    if name == "dual memory, no decay":
        for store in model.memory.stores.values():
            store.decay = lambda seconds, store=store: torch.ones_like(seconds)[:, None].repeat_interleave(4, dim=1)
    if name.startswith("one memory") or name == "last-turn vector":
        heads = config.semantic_heads + config.prosodic_heads
        kind = MemoryStore if name.startswith("one") else LastTurn
        shapes = (WIDTH, heads, config.memory_key, config.memory_value)
        seconds = (30.0, 30.0) if name.endswith("30 s") else (2.0, 1800.0)
        model.memory.stores = torch.nn.ModuleDict({"both": kind(*shapes, seconds, 0)})
        model.memory.members = lambda name, turns: turns.text | turns.audio
        del model.memory.prosody_head
    return model


def answers(model: CSM, rows: Rows, n_turns: int) -> tuple[Tensor, Tensor]:
    """(B, N, 2) logits' best codes and targets of the answers of turns 1..N."""
    if n_turns > 1:  # older turns are seen: their positions run on, or nothing would tell which was the last
        rows = rows._replace(positions=torch.arange(rows.positions.size(1)).expand_as(rows.positions))
    states = model.hidden(rows, window(rows, n_turns))
    live = rows.targets[..., 0] != IGNORE
    logits = model.codebook0_head(states[live])
    return logits, rows.targets[..., 0][live]


def memory_run(name: str, seed: int, steps: int) -> dict[str, float]:
    """Train one variant; accuracies by answer and gap."""
    config, n_turns = memory_variants()[name]
    torch.manual_seed(seed)
    model = build_memory_model(name, config)

    def loss(rows: Rows, step: int) -> Tensor:
        return F.cross_entropy(*answers(model, rows, n_turns))

    def batch(generator: torch.Generator) -> tuple:
        return (conversation_batch(TRAINED_TURNS, generator),)

    train(model, batch, loss, steps, seed, lambda: 0.0)
    test = torch.Generator().manual_seed(10_000 + seed)
    hits, silent = [], []
    with torch.inference_mode():
        for _ in range(EVALUATIONS):
            rows = conversation_batch(TESTED_TURNS, test)
            logits, targets = answers(model, rows, n_turns)
            hits.append((logits.argmax(dim=-1) == targets).view(BATCH, -1, 2))
            silent.append(targets.view(BATCH, -1, 2)[..., 1] == NEUTRAL)
    hit, neutral = torch.cat(hits).float(), torch.cat(silent)  # (n, turns - 1, 2), (n, turns - 1)
    trained = TRAINED_TURNS - 1
    results = {
        "fact, trained gaps": float(hit[:, :trained, 0].mean()),
        "fact, twice the gap": float(hit[:, 2 * trained - 1, 0].mean()),
        "fact, 3 times": float(hit[:, 3 * trained - 1, 0].mean()),
        "cue": float(hit[..., 1][~neutral].mean()),
        "forgets in silence": float(hit[..., 1][neutral].mean()),
    }
    if name == "dual memory":
        results["swap: fact of donor"], results["swap: cue of donor"] = swap(model, test)
        results["gate semantic"], results["gate prosodic"] = (
            abs(float(store.gate.detach().tanh())) for store in model.memory.stores.values()
        )
    return results


@torch.inference_mode()
def swap(model: CSM, generator: torch.Generator) -> tuple[float, float]:
    """Exchange the memories of two conversations before the last turn: share of answers that follow the donor."""
    rows = conversation_batch(TRAINED_TURNS, generator, silences=0.0, batch=256)
    cache, length = CSMCache(model, batch_size=256), rows.tokens.size(1) // TRAINED_TURNS
    donor = torch.arange(256).roll(1)
    for n in range(TRAINED_TURNS):
        cache.forget_context()
        if n == TRAINED_TURNS - 1:
            state = cache.memory.state
            cache.memory.state = state._replace(matrices=tuple(m[donor] for m in state.matrices))
        turn = Rows(*(x[:, n * length : (n + 1) * length] for x in rows))
        states = model.hidden(turn, cache=cache)
        model.end_turn(cache, turn.prosody[:, 0])
    said = model.codebook0_head(states[:, 3:5]).argmax(dim=-1)  # (B, 2)
    wanted = turn.targets[:, 3:5, 0]
    different = wanted != wanted[donor]  # the same fact by chance shows nothing
    follows = (said == wanted[donor]) & different
    return tuple((follows.sum(dim=0) / different.sum(dim=0)).tolist())


# ---- cross-attention -------------------------------------------------------------------------------------------------


def copy_batch(generator: torch.Generator, scale: int = 1) -> Rows:
    """Delayed copy: letters spoken for 2 to 4 frames each, as the first text id says, after 2 frames of silence.

    Targets are the frames at which a new letter begins: only the text tells which it is.
    """
    n_letters, quiet = 8 * scale, 31
    n_frames = 2 + 4 * n_letters
    letters = torch.randint(0, 26, (BATCH, n_letters), generator=generator)
    rate = 2 + torch.randint(0, 3, (BATCH, 1), generator=generator)
    spoken = torch.arange(n_frames) - 2  # frames since the first letter began
    which = (spoken // rate).clamp(0, n_letters - 1)  # (B, n)
    talking = (spoken >= 0) & (spoken < rate * n_letters)
    sound = torch.where(talking, letters.gather(1, which), quiet)
    turn = Turn([BOS, TAG, 0, *[0] * n_letters, EOS], torch.zeros(n_frames, 2, dtype=torch.int64), 4 + n_letters)
    rows = expand(small_config().layout.turn_rows(turn), BATCH)
    first = 4 + n_letters  # the row of frame 0
    rows.tokens[:, 2, -1] = 40 + rate[:, 0]
    rows.tokens[:, 3 : 3 + n_letters, -1] = 100 + letters
    rows.tokens[:, first : first + n_frames, 0] = sound
    rows.targets[:] = IGNORE
    begins = talking & (spoken % rate == 0)
    rows.targets[:, first - 1 : first + n_frames - 1, 0] = torch.where(begins, sound, IGNORE)
    return rows


def voice_cue_batch(generator: torch.Generator, scale: int = 1) -> Rows:
    """A cue that is only in the voice: one of 8 codes somewhere among 16 frames of noise; the text must name it."""
    n = 16 * scale
    cue = torch.randint(0, 8, (BATCH, 1), generator=generator)
    sound = torch.randint(0, 24, (BATCH, n), generator=generator)
    sound.scatter_(1, torch.randint(0, n, (BATCH, 1), generator=generator), 24 + cue)
    turn = Turn([BOS, TAG, 0, EOS], torch.zeros(n, 2, dtype=torch.int64), 2, "listen")
    rows = expand(small_config().layout.turn_rows(turn), BATCH)
    rows.tokens[:, 2 : 2 + n, 0] = sound
    rows.tokens[:, -2, -1] = 100 + cue[:, 0]
    rows.targets[:] = IGNORE
    rows.targets[:, -3, -1] = 100 + cue[:, 0]
    return rows


def future_text_batch(generator: torch.Generator, scale: int = 1) -> Rows:
    """A homograph: how the first of 6 words sounds (its only frame) depends on the last one."""
    n = 6 * scale
    words = torch.randint(0, 12, (BATCH, n), generator=generator)
    last = torch.randint(0, 2, (BATCH,), generator=generator)
    turn = Turn([BOS, TAG, *[0] * n, 0, EOS], torch.zeros(1, 2, dtype=torch.int64), 4 + n)
    rows = expand(small_config().layout.turn_rows(turn), BATCH)
    rows.tokens[:, 2 : 2 + n, -1] = 100 + words
    rows.tokens[:, 2 + n, -1] = 120 + last
    rows.targets[:] = IGNORE
    rows.targets[:, 3 + n, 0] = words[:, 0] + 12 * last
    return rows


CROSS_TASKS: dict[str, Callable[[torch.Generator, int], Rows]] = {
    "delayed copy": copy_batch,
    "cue only in the voice": voice_cue_batch,
    "future text": future_text_batch,
}


@functools.cache
def cross_variants() -> dict[str, CSMConfig]:
    cross = small_config(cross_attention_every=2, text_head=True)
    plain = small_config(text_head=True)
    return {
        "cross-attention": cross,
        "cross-attention, guided": cross,
        "extra self-attention block": widened(plain, n_parameters(cross), n_layers=3),
        "wider feed-forward": widened(plain, n_parameters(cross)),
    }


def cross_run(task: str, name: str, seed: int, steps: int) -> dict[str, float]:
    """Train one variant on one task: accuracy at the end, and the step at which it was 0.9 for the first time."""
    torch.manual_seed(seed)
    model = CSM(cross_variants()[name])
    guided = name.endswith("guided")

    def predictions(rows: Rows, traces: Traces | None = None) -> tuple[Tensor, Tensor]:
        states = model.hidden(rows, traces=traces, maps=traces is not None)
        column = 0 if task != "cue only in the voice" else -1
        live = rows.targets[..., column] != IGNORE
        head = model.codebook0_head if column == 0 else model.text_logits
        return head(states[live]), rows.targets[..., column][live]

    def loss(rows: Rows, step: int) -> Tensor:
        traces = Traces() if guided else None
        total = F.cross_entropy(*predictions(rows, traces))
        if guided:
            count = count_targets(rows, torch.zeros(0, dtype=torch.int64), guidance=True).guidance.clamp(min=1)
            weight = max(0.0, 1 - 2 * step / steps)
            total = total + weight * sum(guidance_loss(m, traces.streams, rows) for m in traces.maps) / count
        return total

    test = torch.Generator().manual_seed(10_000 + seed)
    held_out = {scale: [CROSS_TASKS[task](test, scale) for _ in range(EVALUATIONS)] for scale in (1, 2)}

    def accuracy(scale: int = 1) -> float:
        found = [predictions(rows) for rows in held_out[scale]]
        hits = [(logits.argmax(dim=-1) == targets).float() for logits, targets in found]
        return float(torch.cat(hits).mean())

    seen = train(model, lambda generator: (CROSS_TASKS[task](generator),), loss, steps, seed, accuracy)
    reached = next((float(step) for step, value in seen if value >= 0.9), float("nan"))
    with torch.inference_mode():
        return {"accuracy": seen[-1][1], "twice as long": accuracy(2), "first step at 0.9": reached}


# ---- acoustic codes behind the semantic ones -------------------------------------------------------------------------


def acoustic_batch(config: CSMConfig, generator: torch.Generator) -> Rows:
    """Semantic codes follow the text, acoustic ones are functions of them, of the frame before and of the speaker."""
    K, S, V, n = config.n_codebooks, config.n_semantic, config.codebook_size, 12
    letters = torch.randint(0, V, (BATCH, n, 1), generator=generator)
    speaker = torch.randint(0, 4, (BATCH, 1, 1), generator=generator)
    before = F.pad(letters[:, :-1], (0, 0, 1, 0))
    acoustic = letters * torch.arange(1, K - S + 1) + 3 * before + 5 * speaker
    codes = torch.cat((letters, letters + before, acoustic), dim=-1) % V  # (B, n, K)
    sequences = []
    for one, ids, tag in zip(codes, letters[..., 0].tolist(), speaker.flatten().tolist(), strict=True):
        turn = Turn([BOS, TAG + tag, *(100 + letter for letter in ids), EOS], one, 3 + n)
        sequences.append(config.layout.turn_rows(turn))
    return Rows(*(torch.stack(columns) for columns in zip(*sequences, strict=True)))


def acoustic_run(delay: int, seed: int, steps: int) -> dict[str, float]:
    """Accuracy of semantic and acoustic codes, the true codes before them given."""
    torch.manual_seed(seed)
    depth = TransformerConfig(n_layers=2, d_model=64, n_heads=4, n_kv_heads=4, d_ff=128)
    config = small_config(depth=depth, n_codebooks=8, n_semantic=2, codebook_size=16, acoustic_delay=delay)
    model = CSM(config)

    def loss(rows: Rows, step: int) -> Tensor:
        live = (rows.targets[..., -2] != IGNORE).flatten().nonzero().squeeze(1)
        terms = model.loss(rows, live)
        return terms.codebook0 / len(live) + terms.depth.mean() / len(live)

    test = torch.Generator().manual_seed(10_000 + seed)
    held_out = [acoustic_batch(config, test) for _ in range(EVALUATIONS)]
    train(model, lambda g: (acoustic_batch(config, g),), loss, steps, seed, lambda: 0.0)
    first, semantic, acoustic = [], [], []
    with torch.inference_mode():
        for rows in held_out:
            live = rows.targets[..., -2] != IGNORE
            states, targets = model.hidden(rows)[live], rows.targets[live][:, :-1]
            first.append((model.codebook0_head(states).argmax(dim=-1) == targets[:, 0]).float())
            hits = (model.depth_logits(states, targets).argmax(dim=-1) == targets[:, 1:]).float()
            semantic.append(hits[:, : config.n_semantic - 1])
            acoustic.append(hits[:, config.n_semantic - 1 :])
    parts = {"codebook 0": first, "semantic": semantic, "acoustic": acoustic}
    return {name: float(torch.cat(hits).mean()) for name, hits in parts.items()}


@torch.inference_mode()
def frame_seconds(seed: int, rounds: int = 5, n_frames: int = 24) -> dict[str, list[float]]:
    """Seconds per frame of `nano` without a codec, the ways to generate by turns, one value per round."""
    torch.manual_seed(seed)
    ways = {"C=0": (0, 1), "C=4, one by one": (4, 1), "C=4, 4 at once": (4, 4), "C=8, 8 at once": (8, 8)}
    models = {
        name: InferenceModel(CSM(preset("nano", acoustic_delay=delay)).eval()) for name, (delay, _) in ways.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, (_, at_once) in ways.items():
            began = time.perf_counter()
            generate_frames(models[name], at_once, n_frames)
            if number:  # the first round warms up
                seconds[name].append((time.perf_counter() - began) / n_frames)
    return seconds


def generate_frames(model: InferenceModel, at_once: int, n_frames: int) -> Tensor:
    """(n, K) frames after a short text, stage 2 for `at_once` frames in a pass."""
    layout, cache, clock = model.config.layout, CSMCache(model.model), Clock()
    speaker = Speaker(model, Sampling(), torch.Generator().manual_seed(0))
    clock.begin_turn()
    hidden = model.hidden(layout.text_rows([BOS, TAG, *range(40, 70), EOS], 2, clock).batch(), cache)[:, -1]
    whole, first, states = [], [], []
    for _ in range(n_frames):
        first.append(speaker.first_codes(hidden, may_end=False)[0])
        states.append(hidden)
        if len(states) == at_once:
            codes = speaker.continue_frames(torch.cat(states), torch.stack(first[-at_once:]), layout.n_codebooks)
            whole += list(codes)
            states = []
        waiting = [F.pad(codes, (0, layout.n_codebooks - len(codes))) for codes in first[len(whole) :]]
        hidden = model.hidden(layout.audio_row(torch.stack([*whole, *waiting]), clock).batch(), cache)[:, -1]
    return torch.stack(whole)


# ---- runs and tables -------------------------------------------------------------------------------------------------


def all_runs(seeds: list[int], steps: dict[str, int]) -> dict[str, Callable[[], dict]]:
    """Key -> what computes its result."""
    runs: dict[str, Callable[[], dict]] = {}
    for seed in seeds:
        for name in memory_variants():
            key = f"memory/{name}/{seed}/{steps['memory']}"
            runs[key] = lambda name=name, seed=seed: memory_run(name, seed, steps["memory"])
        for task in CROSS_TASKS:
            for name in cross_variants():
                if task == "cue only in the voice" and name.endswith("guided"):
                    continue  # guidance is for voice <- text
                key = f"cross/{task}/{name}/{seed}/{steps['cross']}"
                runs[key] = lambda task=task, name=name, seed=seed: cross_run(task, name, seed, steps["cross"])
        for delay in (0, 4, 8):
            key = f"acoustic/C={delay}/{seed}/{steps['acoustic']}"
            runs[key] = lambda delay=delay, seed=seed: acoustic_run(delay, seed, steps["acoustic"])
    return runs


def table(results: dict[str, dict[str, float]], group: str) -> dict[str, dict[str, list[float]]]:
    """Row name -> column -> [mean, spread (highest - lowest), number of seeds] of a group of runs."""
    rows: dict[str, dict[str, list[float]]] = {}
    for key, values in results.items():
        head, *middle, _, _ = key.split("/")
        if head == group:
            for column, value in values.items():
                rows.setdefault(": ".join(middle), {}).setdefault(column, []).append(value)
    summary: dict[str, dict[str, list[float]]] = {}
    for name, columns in rows.items():
        for column, values in columns.items():
            known = [value for value in values if value == value]
            figures = [statistics.fmean(known), max(known) - min(known), len(known)] if known else [float("nan")] * 3
            summary.setdefault(name, {})[column] = figures
    return summary


def print_table(title: str, rows: dict[str, dict[str, list[float]]], digits: int = 2) -> None:
    columns = list(dict.fromkeys(column for values in rows.values() for column in values))
    print(f"\n{title}")
    print(f"{'':52}" + "".join(f"{column:>22}" for column in columns))
    for name, values in rows.items():
        cells = []
        for column in columns:
            mean, spread, n = values.get(column, [float("nan")] * 3)
            cells.append(f"{mean:.{digits}f} ({spread:.{digits}f})" if n == n and n else "-")
        print(f"{name:52}" + "".join(f"{cell:>22}" for cell in cells))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], epilog=EXIT_CODES_HELP)
    defaults = " (default: %(default)s)"
    parser.add_argument("--seeds", type=int, action=Several, default=[0, 1, 2], help="of weights and data" + defaults)
    parser.add_argument("--only", default="", help="run only what begins so, e.g. memory or cross/delayed copy")
    parser.add_argument("--memory_steps", type=int, default=500, help="training steps of the memory task" + defaults)
    parser.add_argument("--cross_steps", type=int, default=300, help="of the cross-attention tasks" + defaults)
    parser.add_argument("--acoustic_steps", type=int, default=1000, help="of the acoustic task" + defaults)
    parser.add_argument("--out", type=Path, default=Path("runs/mechanisms"), help="folder of the results" + defaults)
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)  # the matrices are tiny
    steps = {"memory": args.memory_steps, "cross": args.cross_steps, "acoustic": args.acoustic_steps}
    if min(steps.values()) < WATCH_EVERY:
        raise ValueError(f"steps={min(steps.values())} must be at least {WATCH_EVERY}, one evaluation")
    runs = {key: compute for key, compute in all_runs(args.seeds, steps).items() if key.startswith(args.only)}
    if not runs and args.only != "speed":
        raise ValueError(f"--only {args.only!r}: no run begins so; use memory, cross, acoustic or speed")
    args.out.mkdir(parents=True, exist_ok=True)
    results: dict[str, dict[str, float]] = {}
    commits = set()
    for key, compute in tqdm(runs.items(), desc="training", unit="run", disable=not runs):
        path = args.out / (key.replace("/", "--").replace(" ", "_") + ".json")
        if not path.is_file():
            write_atomically(
                path, json.dumps({"commit": describe_environment()["commit"], "values": compute()}).encode()
            )
        made_at, results[key] = read_result(path)
        commits.add(made_at)
    summary = {group: table(results, group) for group in ("memory", "cross", "acoustic")}
    for group, rows in summary.items():
        if rows:
            print_table(f"{group}: mean over seeds (highest - lowest)", rows)
    if "speed".startswith(args.only[:5]):
        summary["speed"] = speed_table(args.seeds[0])
        print_table("speed of nano: median over rounds (highest - lowest)", summary["speed"])
    if args.json:
        info = {"commits": sorted(commits), "seeds": args.seeds, "steps": steps, "threads": 1}
        print(json.dumps(info | summary))
    return EXIT_DONE


def read_result(path: Path) -> tuple[str, dict[str, float]]:
    """Commit and values of a finished run. ValueError for a file that this script did not write whole."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return content["commit"], content["values"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged; delete it, its run will be made again") from error


def speed_table(seed: int) -> dict[str, dict[str, list[float]]]:
    """Time of a frame, and how many times faster than without a delay, in the same round."""
    seconds = frame_seconds(seed)

    def figures(values: list[float]) -> list[float]:
        return [statistics.median(values), max(values) - min(values), len(values)]

    return {
        name: {
            "ms per frame": figures([1000 * value for value in values]),
            "times C=0": figures([base / value for base, value in zip(seconds["C=0"], values, strict=True)]),
        }
        for name, values in seconds.items()
    }


if __name__ == "__main__":
    raise SystemExit(run(main))
