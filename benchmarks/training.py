"""Training throughput and peak memory against transformers' CSM: python benchmarks/training.py --data data

The same frames of the same conversations, the same amortization, the published architecture in the same sizes from the
same weights, side by side in one process. Nothing is timed unless the losses of both on a batch agree. A step is
forward, backward, clipping and an update of fused AdamW; weights are fp32, bf16 is autocast; batches are made before.

    ours                  packed rows, `training.gradient_step`
    transformers          each document of these rows is an item of the batch, padded to the longest, with an attention
                          mask; frames that the depth decoder skips are labelled as its -101 does
    transformers, packed  the same model on our rows; it sees from the positions where documents begin
    ours, with additions  the preset as it is, on rows of its own layout and mixture; in no ratio

A useful frame is one whose codebook 0 is learnt. Memory is that of one side alone, weights and optimizer included. MFU
counts multiplications that a step needs, not those on padding. Losses are of the first batch, before and after all
steps; precisions, and both ways to feed transformers, go on with the same weights. Prints tables; the last line of
--json is one JSON object.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import multiprocessing
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from architecture import CSM, count_targets
from command_line import EXIT_CODES_HELP, EXIT_DONE, MissingRequirement, run
from dataset_pipeline import ConversationDataset
from frames import IGNORE, Rows
from model_sizes import PRESETS, PUBLISHED, WITHOUT_ADDITIONS, CSMConfig, preset
from ranks import pick_device, use_threads
from run_folder import describe_environment
from rvq_tokenizer import load_tokenizer
from text_tokenizer import load_text_tokenizer
from token_cache import TokenCache
from training import gradient_step, make_optimizer, micro_batch, named_losses
from training_config import TrainConfig, mixture
from training_start import sized
from weight_layouts import transformers_model, transformers_version

PRECISIONS = ("fp32", "bf16")
PEAK_TFLOPS = {"H100 PCIe": 756, "H100": 989, "H200": 989, "A100": 312}  # dense bf16, by what the device's name holds
TOLERANCE = 1e-3  # relative, of the losses of both sides
STEEPER = 32  # times the heads during that check, else every loss is about that of guessing; exact to undo
BYTES_PER_PARAMETER = 4 + 8  # fp32 weight, moments of AdamW


class Work(NamedTuple):
    """What one of our models learns: its batches, and the rows of each that the depth decoder learns."""

    config: CSMConfig
    batches: list[tuple[Rows, Tensor]]


class Items(NamedTuple):
    """A batch as transformers' CSM takes it."""

    tokens: Tensor  # (B, T, K + 1)
    audio: Tensor  # (B, T) bool, rows that are a frame
    labels: Tensor  # (B, T, K) codes of the row itself, else IGNORE
    attention: Tensor | None  # (B, T) bool, False on padding
    positions: Tensor | None  # (B, T)


class Side(NamedTuple):
    """One that takes part; every precision trains the same weights."""

    step: Callable[[int, str], float]  # number of the batch and precision -> loss before the update
    used: float  # share of the positions computed that are not padding
    frames: list[int]  # useful ones of each batch
    n_parameters: int


def read_work(args: argparse.Namespace) -> dict[str, Work]:
    """Batches of the train split for the published architecture and, if the preset adds to it, for the preset."""
    tokenizer = load_tokenizer(args.tokenizer)
    cache = TokenCache(args.data, tokenizer)
    configs = {"ours": sized(args.model_size, tokenizer, PUBLISHED)}
    if preset(args.model_size) != preset(args.model_size, **WITHOUT_ADDITIONS):
        configs["ours, with additions"] = sized(args.model_size, tokenizer, {})
    c, work = train_config(args), {}
    for name, config in configs.items():
        text = load_text_tokenizer(config.text_tokenizer)
        shares = mixture(c, config)
        dataset = ConversationDataset(args.data, "train", cache, text, config.layout, args.row_positions, shares)
        work[name] = Work(config, [micro_batch(dataset, i, c)[:2] for i in range(args.rounds * args.steps)])
    return work


def train_config(args: argparse.Namespace) -> TrainConfig:
    names = ("batch_rows", "row_positions", "depth_share", "seed")
    return TrainConfig(lr=3e-4, **{name: getattr(args, name) for name in names})


def our_side(model: CSM, work: Work, c: TrainConfig, device: torch.device) -> Side:
    """A model of ours and our training step."""
    optimizer = make_optimizer(model, c)

    def step(index: int, precision: str) -> float:
        config = dataclasses.replace(c, bf16=precision == "bf16")
        sums, counts, _ = gradient_step(model, optimizer, [work.batches[index]], config, device)
        return named_losses(sums, counts, "train")["train/loss"]

    real, computed = positions_of(work)
    return Side(step, real / computed, [useful_frames(rows) for rows, _ in work.batches], n_parameters(model))


def their_side(twin: nn.Module, optimizer, batches: list[Items], work: Work, c: TrainConfig, device) -> Side:
    """transformers' model and a training step on the batches of `work`, as it takes them."""

    def step(index: int, precision: str) -> float:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            loss = their_losses(twin, batches[index], device).loss
        loss.backward()
        nn.utils.clip_grad_norm_(twin.parameters(), c.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    computed = sum(items.audio.numel() for items in batches)
    frames = [useful_frames(rows) for rows, _ in work.batches]
    return Side(step, positions_of(work)[0] / computed, frames, n_parameters(twin))


def positions_of(work: Work) -> tuple[int, int]:
    """Positions of all batches that are not padding, and all of them."""
    documents = torch.cat([rows.documents.flatten() for rows, _ in work.batches])
    return int((documents >= 0).sum()), len(documents)


def useful_frames(rows: Rows) -> int:
    return int((rows.targets[..., 0] != IGNORE).sum())


def n_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def flops_per_frame(work: Work) -> float:
    """What a step of the published architecture must compute: two for a multiplication, backward twice the forward."""
    c = work.config
    K, A, D, E = c.n_codebooks, c.audio_vocab_size, c.backbone.d_model, c.depth.d_model
    with torch.device("meta"):
        model = CSM(c)
    blocks, depth_blocks = (
        sum(p.numel() for p in m.parameters() if p.ndim == 2) for m in (model.backbone, model.depth)
    )
    frame = K * (depth_blocks + D * E) + c.depth.n_layers * E * K**2 + (K - 1) * E * A  # causal: half of the square
    total, frames = 0, 0
    for rows, depth_rows in work.batches:
        lengths = torch.cat([torch.bincount(ids[ids >= 0]) for ids in rows.documents])  # (documents,)
        total += blocks * int(lengths.sum()) + c.backbone.n_layers * D * int((lengths**2).sum())
        total += useful_frames(rows) * D * A + len(depth_rows) * frame
        frames += useful_frames(rows)
    return 6 * total / frames


# ---- transformers ----------------------------------------------------------------------------------------------------


def labels_of(rows: Rows, depth_rows: Tensor) -> Tensor:
    """(B, T, K): the targets of the row before, codebooks 1..K-1 only of frames that the depth decoder learns.

    The depth decoder skips frames without labels there; its 2-D labels say so with -101, which its forward makes this.
    """
    targets = rows.targets[..., :-1].flatten(0, 1)  # (B T, K)
    skipped = torch.ones(len(targets), dtype=torch.bool)
    skipped[depth_rows] = False
    labels = torch.cat((targets[:, :1], targets[:, 1:].masked_fill(skipped[:, None], IGNORE)), dim=1)
    return F.pad(labels.view(*rows.documents.shape, -1)[:, :-1], (0, 0, 1, 0), value=IGNORE)


def padded_items(rows: Rows, depth_rows: Tensor) -> Items:
    """Every document as an item, padded on the right to the longest."""
    labels = labels_of(rows, depth_rows)
    members = [(row, ids == n) for row, ids in enumerate(rows.documents) for n in range(int(ids.max()) + 1)]

    def unpacked(x: Tensor, padding: int) -> Tensor:
        return pad_sequence([x[row, inside] for row, inside in members], batch_first=True, padding_value=padding)

    attention = unpacked(torch.ones_like(rows.documents, dtype=torch.bool), 0)
    return Items(unpacked(rows.tokens, 0), unpacked(rows.mask[..., 0], 0), unpacked(labels, IGNORE), attention, None)


def packed_items(rows: Rows, depth_rows: Tensor) -> Items:
    """Our rows as they are."""
    return Items(rows.tokens, rows.mask[..., 0], labels_of(rows, depth_rows), None, rows.positions)


REFERENCES = {"transformers": padded_items, "transformers, packed": packed_items}


def their_losses(twin: nn.Module, items: Items, device: torch.device):
    """transformers' output on a batch, embedded as it merges text and audio itself, without encoding any audio."""
    tokens, audio, labels, attention, positions = (x if x is None else x.to(device) for x in items)
    embedded = twin.embed_text_tokens(tokens[..., -1])  # (B, T, D)
    embedded[audio] = twin.backbone_model.embed_tokens(tokens[audio][None, :, :-1])[0]
    inputs = {"inputs_embeds": embedded, "attention_mask": attention, "position_ids": positions, "labels": labels}
    return twin(**inputs, use_cache=False)


@torch.no_grad()
def check_parity(model: CSM, twin: nn.Module, rows: Rows, depth_rows: Tensor, device: torch.device) -> float:
    """The largest relative difference between the losses of equal weights on a batch. ValueError: they differ."""
    sums, counts = model.loss(rows.to(device), depth_rows.to(device)), count_targets(rows, depth_rows)
    ours = float(sums.codebook0) / int(counts.codebook0), float(sums.depth.sum()) / int(counts.depth.sum())
    worst = 0.0
    for name, make_items in REFERENCES.items():
        output = their_losses(twin, make_items(rows, depth_rows), device)
        theirs = float(output.backbone_loss), float(output.depth_decoder_loss)
        for part, one, other in zip(("codebook 0", "the depth codebooks"), ours, theirs, strict=True):
            if not math.isclose(one, other, rel_tol=TOLERANCE):
                raise ValueError(
                    f"loss of {part}: ours {one:.5f}, {name} {other:.5f} nats with equal weights on one batch; "
                    "the sides do not learn the same, so their speeds cannot be compared"
                )
            worst = max(worst, abs(one - other) / one)
    return worst


def equal_models(work: Work, device: torch.device) -> tuple[CSM, nn.Module, float]:
    """Our model, transformers' with the same weights, and how far their losses are apart."""
    model = CSM(work.config).to(device)
    with torch.no_grad():
        for head in (model.codebook0_head.weight, model.depth_heads):
            head.mul_(STEEPER)
        twin = transformers_model(model).train().to(device)
        apart = check_parity(model, twin, *work.batches[0], device)
        their_heads = twin.lm_head.weight, twin.depth_decoder.codebooks_head.weight
        for head in (model.codebook0_head.weight, model.depth_heads, *their_heads):
            head.div_(STEEPER)
    return model, twin, apart


def make_sides(work: dict[str, Work], args: argparse.Namespace) -> tuple[dict[str, Side], float]:
    """All sides, and how far the losses are apart."""
    device, c, ours = torch.device(args.device), train_config(args), work["ours"]
    torch.manual_seed(args.seed)
    model, twin, apart = equal_models(ours, device)
    sides, optimizer = {"ours": our_side(model, ours, c, device)}, make_optimizer(twin, c)
    for name, make_items in REFERENCES.items():
        sides[name] = their_side(twin, optimizer, [make_items(*batch) for batch in ours.batches], ours, c, device)
    for name, own in list(work.items())[1:]:
        sides[name] = our_side(CSM(own.config).to(device), own, c, device)
    return sides, apart


# ---- measuring -------------------------------------------------------------------------------------------------------


def measure(sides: dict[str, Side], args: argparse.Namespace, precisions: list[str]) -> dict[str, dict[str, dict]]:
    """Side -> precision -> frames per second of every round, losses on the first batch, peak bytes on a GPU.

    A warm-up step each; then in every round each side takes its steps, every other round in the opposite order.
    """
    lanes = [(name, precision) for name in sides for precision in precisions]
    found: dict[str, dict[str, dict]] = {name: {} for name in sides}
    for name, precision in lanes:
        first = sides[name].step(0, precision)
        found[name][precision] = {"rates": [], "loss_first": first, "peak_bytes": None}
    for n in tqdm(range(args.rounds), desc="training", unit="round"):
        indices = range(n * args.steps, (n + 1) * args.steps)
        for name, precision in lanes[:: -1 if n % 2 else 1]:
            figures = found[name][precision]
            seconds, peak = timed_steps(sides[name], indices, precision, torch.device(args.device))
            figures["rates"].append(sum(sides[name].frames[index] for index in indices) / seconds)
            figures["peak_bytes"] = peak and max(peak, figures["peak_bytes"] or 0)
    for name, precision in lanes:
        found[name][precision]["loss_last"] = sides[name].step(0, precision)
    return found


def timed_steps(side: Side, indices: range, precision: str, device: torch.device) -> tuple[float, int | None]:
    """Seconds, and on a GPU the peak bytes but for what the other sides hold meanwhile."""
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        others = torch.cuda.memory_allocated() - BYTES_PER_PARAMETER * side.n_parameters
    began = time.perf_counter()
    for index in indices:
        side.step(index, precision)
    if cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    return seconds, torch.cuda.max_memory_allocated() - others if cuda else None


def peak_alone(args: argparse.Namespace, name: str, precision: str) -> int:
    """Bytes by which the resident memory of this process grows at most when one side alone trains in it."""
    import resource

    def peak() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

    use_threads(args.threads)
    transformers_version()
    work = read_work(args)
    before = peak()
    side = make_sides(work, args)[0][name]
    for index in range(min(2, len(side.frames))):
        side.step(index, precision)
    return peak() - before


def peaks_alone(args: argparse.Namespace, names: list[str], precisions: list[str]) -> dict[tuple[str, str], int]:
    """Peak bytes of every side and precision, each measured in a new process. MissingRequirement on Windows."""
    if sys.platform == "win32":
        raise MissingRequirement("--memory on a CPU needs Linux or macOS, which tell a process its peak memory")
    lanes = [(name, precision) for name in names for precision in precisions]
    new = multiprocessing.get_context("forkserver")  # a process started otherwise inherits the peak of this one
    with new.Pool(1, maxtasksperchild=1) as pool:
        return {lane: pool.apply(peak_alone, (args, *lane)) for lane in tqdm(lanes, desc="memory", unit="run")}


def quartiles(values: list[float]) -> dict[str, float]:
    points = torch.tensor(values, dtype=torch.float64).quantile(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64))
    return dict(zip(("q1", "median", "q3"), points.tolist(), strict=True))


def ratios(found: dict[str, dict[str, dict]]) -> dict[str, dict[str, dict[str, float]]]:
    """How many times faster ours is, round by round: in each precision, and its best against theirs in fp32."""
    rates = {name: {precision: figures["rates"] for precision, figures in by.items()} for name, by in found.items()}
    best = max(rates["ours"], key=lambda precision: quartiles(rates["ours"][precision])["median"])
    result: dict[str, dict[str, dict[str, float]]] = {}
    for name in REFERENCES:
        pairs = {precision: (precision, precision) for precision in rates["ours"]}
        pairs |= {"best / fp32": (best, "fp32")} if "fp32" in pairs else {}
        result[name] = {
            title: quartiles([a / b for a, b in zip(rates["ours"][own], rates[name][other], strict=True)])
            for title, (own, other) in pairs.items()
        }
    return result


def print_tables(found: dict[str, dict[str, dict]], compared: dict) -> None:
    columns = ("frames/s", "quartiles", "loss first", "last", "peak GiB", "used", "MFU")
    print(f"{'':31}" + "".join(f"{column:>18}" if column == "quartiles" else f"{column:>11}" for column in columns))
    for name, by in found.items():
        for precision, f in by.items():
            rate, peak, mfu = f["frames_per_s"], f["peak_bytes"], f["mfu"]
            cells = f"{rate['median']:11.1f}{rate['q1']:9.1f}-{rate['q3']:<8.1f}{f['loss_first']:11.3f}"
            cells += f"{f['loss_last']:11.3f}" + (f"{peak / 2**30:11.2f}" if peak else f"{'-':>11}")
            print(
                f"{name:23}{precision:>8}{cells}{f['positions_used']:11.2f}" + (f"{mfu:11.3f}" if mfu else f"{'-':>11}")
            )
    for name, by in compared.items():
        print(f"\nours / {name}")
        for title, ratio in by.items():
            print(f"  {title:29}{ratio['median']:11.2f}{ratio['q1']:9.2f}-{ratio['q3']:<8.2f}")


def peak_tflops(args: argparse.Namespace) -> float | None:
    """Of the device in bf16, as given or known."""
    if args.peak_tflops or torch.device(args.device).type != "cuda":
        return args.peak_tflops
    name = torch.cuda.get_device_name(args.device)
    return next((value for part, value in PEAK_TFLOPS.items() if part in name), None)


def parse_flags(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], epilog=EXIT_CODES_HELP)
    add, defaults = parser.add_argument, " (default: %(default)s)"
    add("--data", type=Path, default=Path("data"), help="folder of collect_data.py" + defaults)
    add("--tokenizer", default="runs/tokenizer", help="folder of train_tokenizer.py, or kyutai/mimi" + defaults)
    add("--model_size", default="nano", help=f"one of {', '.join(PRESETS)}" + defaults)
    add("--row_positions", type=int, default=2048, help="of a packed row" + defaults)
    add("--batch_rows", type=int, default=2, help="packed rows of a step" + defaults)
    add("--depth_share", type=float, default=1 / 16, help="of the frames, for the depth decoder" + defaults)
    add("--rounds", type=int, default=5, help="in each of which every side trains" + defaults)
    add("--steps", type=int, default=2, help="of a side in a round" + defaults)
    add("--precision", default=",".join(PRECISIONS), help="one or several of them" + defaults)
    add("--threads", type=int, default=torch.get_num_threads(), help="of torch (default: its choice)")
    add("--device", default="cpu", help="cpu or cuda" + defaults)
    add("--memory", action="store_true", help="on a CPU measure peak memory too, each side in its own process; slow")
    add("--peak_tflops", type=float, help="of the device in bf16, for the MFU (default: what is known of the GPU)")
    add("--seed", type=int, default=0, help="of weights and batches" + defaults)
    add("--json", action="store_true", help="print one JSON object as the last line")
    args = parser.parse_args(argv)
    for name in ("rounds", "steps"):
        if getattr(args, name) < 1:
            raise ValueError(f"{name}={getattr(args, name)} must be at least 1")
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        raise MissingRequirement(f"device {args.device!r} asked for, but this torch sees no CUDA; use --device cpu")
    args.device = str(pick_device(args.device))
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_flags(argv)
    precisions = args.precision.split(",")
    if not set(precisions) <= set(PRECISIONS):
        raise ValueError(f"precision={args.precision} must be one or several of {','.join(PRECISIONS)}")
    use_threads(args.threads)
    info = describe_environment(args.device) | {"transformers": transformers_version()}
    work = read_work(args)
    names = ["ours", *REFERENCES, *list(work)[1:]]
    alone = peaks_alone(args, names, precisions) if args.memory and args.device == "cpu" else {}
    sides, apart = make_sides(work, args)
    print(f"with equal weights the losses agree within {apart:.1e}")
    found, flops, peak = measure(sides, args, precisions), flops_per_frame(work["ours"]), peak_tflops(args)
    for name, by in found.items():
        for precision, f in by.items():
            f["frames_per_s"] = quartiles(f["rates"])
            f["positions_used"] = sides[name].used
            f["peak_bytes"] = alone.get((name, precision), f["peak_bytes"])
            counted = peak and name in ("ours", *REFERENCES)
            f["mfu"] = f["frames_per_s"]["median"] * flops / (peak * 1e12) if counted else None
    compared = ratios(found)
    print_tables(found, compared)
    if args.json:
        settings = {name: value for name, value in vars(args).items() if name not in ("data", "tokenizer", "json")}
        figures = {"parameters": sides["ours"].n_parameters, "flops_per_frame": flops, "losses_agree_within": apart}
        print(json.dumps(info | {"settings": settings} | figures | {"sides": found, "ratios": compared}))
    return EXIT_DONE


if __name__ == "__main__":
    raise SystemExit(run(main))
