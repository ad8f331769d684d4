"""Short trainings that differ in one setting, side by side: loss on held-out conversations, speed, memory.

    python benchmarks/sweep.py --vary depth_share=1,0.25,0.0625,0.015625 --max_steps 300
    python benchmarks/sweep.py --vary lr=3e-4,1e-3,3e-3 --vary text_weight=0.1,0.5,1 --model_size nano

Every setting is varied alone, the others keep their value; flags that are not known here go to train.py. Runs are kept
in --out and skipped when they are done, so a sweep goes on where it was stopped. What is compared is the same for all:
codebook 0 and all depth codebooks on every frame of the same held-out rows.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from command_line import EXIT_CODES_HELP, EXIT_DONE, EXIT_SIGINT, EXIT_SIGTERM, run, run_child
from run_folder import describe_environment, read_metrics, read_settings
from training_config import HELP

ROOT = Path(__file__).resolve().parent.parent
HELD_OUT = ("val/loss", "val/codebook0", "val/text_gain", "val/depth", "val/text")
COLUMNS = (*HELD_OUT, "spoken/wer", "spoken/cer", "train/loss", "frames_per_s", "memory_gib", "minutes")


def settings_of(varied: list[str]) -> list[tuple[str, str]]:
    """NAME=V1,V2 of the command line -> (name, value) of every run. ValueError for a name train.py does not have."""
    runs = []
    for text in varied:
        name, sign, values = text.partition("=")
        if (
            name not in HELP
            or not sign
            or not all(values.split(","))
            or {"true", "false"} & {*values.lower().split(",")}
        ):
            raise ValueError(
                f"--vary {text}: expected NAME=V1,V2,... with a setting of train.py, for example lr=1e-3,3e-3"
            )
        runs += [(name, value) for value in values.split(",")]
    return runs


def train_with(name: str, value: str, out: Path, others: list[str]) -> dict[str, float]:
    """What one run came to; SystemExit with its exit code, and its last line, if it failed."""
    folder = out / f"{name}-{value}"
    command = [sys.executable, str(ROOT / "train.py"), "--out", str(folder), f"--{name}", value, *others]
    timed, began = folder / "minutes.json", time.perf_counter()
    complete = (folder / "losses.png").is_file()
    try:
        done = run_child(command, stderr=subprocess.PIPE, text=True)
    finally:  # of all starts together
        before = json.loads(timed.read_text()) if timed.is_file() else 0.0
        if folder.is_dir() and not (complete and before):
            timed.write_text(json.dumps(before + (time.perf_counter() - began) / 60))
    if done.returncode != EXIT_DONE:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        why = f"error: {name}={value} ended with exit code {done.returncode}: {last}"
        if done.returncode in (EXIT_SIGINT, EXIT_SIGTERM):
            why = f"stopped in {name}={value}, saved; the same command goes on"
        print(why, file=sys.stderr)
        raise SystemExit(done.returncode)
    records = read_metrics(folder)
    last, half = records[-1], records[len(records) // 2 :]
    values = {column: last[column] for column in COLUMNS if column in last}
    values["train/loss"] = statistics.fmean(record["train/loss"] for record in half)
    values["frames_per_s"] = statistics.median(record["train/frames_per_s"] for record in records)
    values["memory_gib"] = max(record.get("train/memory_gib", 0.0) for record in records)
    return {**values, "minutes": json.loads(timed.read_text())}


def print_table(results: dict[str, dict[str, float]]) -> None:
    print(f"{'':28}" + "".join(f"{column:>15}" for column in COLUMNS))
    for name, values in results.items():
        cells = (f"{values[column]:15.3f}" if column in values else " " * 15 for column in COLUMNS)
        print(f"{name:28}" + "".join(cells))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], epilog=EXIT_CODES_HELP)
    parser.add_argument("--vary", action="append", required=True, metavar="NAME=V1,V2", help="a setting and its values")
    parser.add_argument("--out", type=Path, default=Path("runs/sweep"), help="folder of the runs (default: runs/sweep)")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    args, others = parser.parse_known_args(argv)
    results = {}
    for name, value in settings_of(args.vary):
        results[f"{name}={value}"] = train_with(name, value, args.out, others)
        print_table(results)
    if args.json:
        used = read_settings(args.out / f"{name}-{value}")["environment"]["device"]  # by the trainings
        print(json.dumps({**describe_environment(), "device": used, "results": results}))
    return EXIT_DONE


if __name__ == "__main__":
    raise SystemExit(run(main))
