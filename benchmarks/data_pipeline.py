"""How fast are collection, tokenisation and loading? python benchmarks/data_pipeline.py --data data

A split of a collection is exported as wav files and collected anew, with one worker process and with several; its
tokens are made anew; its batches are timed against steps of `nano` with the same batches, in turns. Prints tables and
where collection spends its time; the last line of --json is one JSON object. Rates are audio time over wall time.
"""

from __future__ import annotations

import argparse
import contextlib
import cProfile
import io
import json
import os
import pstats
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import collect_data  # noqa: E402
from architecture import CSM  # noqa: E402
from command_line import EXIT_CODES_HELP, EXIT_DONE, Several, run  # noqa: E402
from conversations import SPLITS, build_conversations  # noqa: E402
from dataset_pipeline import ConversationDataset  # noqa: E402
from export_conversations import export  # noqa: E402
from model_sizes import preset  # noqa: E402
from ranks import use_threads  # noqa: E402
from run_folder import describe_environment  # noqa: E402
from rvq_tokenizer import load_tokenizer  # noqa: E402
from text_tokenizer import load_text_tokenizer  # noqa: E402
from token_cache import TokenCache  # noqa: E402
from training import gradient_step, make_optimizer, micro_batch  # noqa: E402
from training_config import TrainConfig, mixture  # noqa: E402
from turn_shards import read_turns  # noqa: E402

ROUNDS = 5


def collecting(wav: Path, out: Path, hours: float, workers: list[int]) -> dict[str, float]:
    """Hours of audio per minute with each number of worker processes, start of the script included."""
    rates = {}
    for n in workers:
        command = [sys.executable, str(ROOT / "collect_data.py"), "--sources", "local", "--input", str(wav)]
        began = time.perf_counter()
        subprocess.run([*command, "--out", str(out / f"w{n}"), "--workers", str(n)], check=True, capture_output=True)
        rates[f"{n} worker(s)"] = hours / (time.perf_counter() - began) * 60
    return rates


def profile_of_collecting(wav: Path, out: Path) -> dict[str, float]:
    """Share of the time in each function itself, in one process; the eight largest."""
    profile = cProfile.Profile()
    flags = ["--sources", "local", "--input", str(wav), "--out", str(out), "--workers", "1"]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        profile.runcall(collect_data.main, flags)
    stats = pstats.Stats(profile)
    total = stats.total_tt
    own = {f"{Path(file).name}:{name}": values[2] for (file, _, name), values in stats.stats.items()}
    return {name: seconds / total for name, seconds in sorted(own.items(), key=lambda item: -item[1])[:8]}


def tokenising(data: Path, tokenizer_folder: str, hours: float) -> tuple[TokenCache, float]:
    """The cache of a collection without tokens, and hours of audio per minute."""
    tokenizer = load_tokenizer(tokenizer_folder)
    began = time.perf_counter()
    cache = TokenCache(data, tokenizer)
    return cache, hours / (time.perf_counter() - began) * 60


def loading(data: Path, cache: TokenCache, tokenizer_folder: str, row_positions: int) -> dict[str, float]:
    """Seconds of a batch of two rows and of a step of `nano` with it, medians; how full the rows of an epoch are."""
    c = load_tokenizer(tokenizer_folder).config
    shape = {"n_codebooks": c.n_codebooks, "n_semantic": c.n_semantic, "codebook_size": c.codebook_size}
    torch.manual_seed(0)
    model = CSM(preset("nano", **shape))
    config = TrainConfig(row_positions=row_positions)
    text = load_text_tokenizer(model.config.text_tokenizer)
    shares = mixture(config, model.config)
    began = time.perf_counter()
    dataset = ConversationDataset(data, "train", cache, text, model.config.layout, row_positions, shares)
    plan = dataset.plan(0, 0)
    ready = time.perf_counter() - began
    optimizer = make_optimizer(model, config)
    load, step = [], []
    for index in range(ROUNDS + 1):
        began = time.perf_counter()
        micro = [micro_batch(dataset, index, config)]
        loaded = time.perf_counter()
        gradient_step(model, optimizer, micro, config, torch.device("cpu"), index)
        load.append(loaded - began)
        step.append(time.perf_counter() - loaded)
    samples = [sample for row in plan for sample in row]
    learnt = sum(sum(dataset.lengths[s.conversation][s.first : s.stop]) for s in samples)
    used = sum(sample.rows for sample in samples)
    return {
        "seconds until the first batch": ready,
        "ms of a batch": 1000 * statistics.median(load[1:]),
        "ms of a step": 1000 * statistics.median(step[1:]),
        "step / batch": statistics.median(s / b for s, b in zip(step[1:], load[1:], strict=True)),
        "positions used": used / (row_positions * len(plan)),
        "of these learnt": learnt / used,
    }


def print_table(title: str, rows: dict[str, float]) -> None:
    print(f"\n{title}")
    for name, value in rows.items():
        print(f"  {name:<44}{value:>10.3f}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], epilog=EXIT_CODES_HELP)
    add = parser.add_argument
    add("--data", type=Path, default=Path("data"), help="a collection, only read (default: data)")
    add("--split", choices=SPLITS, default="train", help="of it, what is measured with (default: train)")
    add("--tokenizer", default="runs/tokenizer", help="folder of train_tokenizer.py (default: runs/tokenizer)")
    workers_help = "(default: 1 and the number of cores)"
    add("--workers", type=int, action=Several, default=[1, os.cpu_count() or 1], help=workers_help)
    add("--threads", type=int, default=torch.get_num_threads(), help="of torch (default: its choice)")
    add("--json", action="store_true", help="print one JSON object as the last line")
    args = parser.parse_args(argv)
    use_threads(args.threads)
    turns = [t for c in build_conversations(read_turns(args.data, False)) if c.split == args.split for t in c.turns]
    hours = sum(turn.duration_s for turn in turns) / 3600
    with tempfile.TemporaryDirectory() as folder:
        wav, out = Path(folder) / "wav", Path(folder)
        export(args.data, wav, "wav", args.split)
        found: dict = {"collected, hours per minute": collecting(wav, out, hours, sorted(set(args.workers)))}
        found["collecting, share of the time"] = profile_of_collecting(wav, out / "profile")
        data = out / f"w{max(args.workers)}"
        cache, rate = tokenising(data, args.tokenizer, hours)
        found["tokenised, hours per minute"] = {f"{args.threads} thread(s)": rate}
        for row_positions in (1024, 2048):
            title = f"loading, 2 rows of {row_positions}"
            found[title] = loading(data, cache, args.tokenizer, row_positions)
        for title, rows in found.items():
            print_table(title, rows)
    if args.json:
        info = {
            "commit": describe_environment()["commit"],
            "hours": hours,
            "turns": len(turns),
            "threads": args.threads,
        }
        print(json.dumps(info | found))
    return EXIT_DONE


if __name__ == "__main__":
    raise SystemExit(run(main))
