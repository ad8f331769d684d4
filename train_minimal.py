"""100 steps of the `nano` model on the collected data, a few minutes on a CPU: python train_minimal.py

Leaves a checkpoint that demo.py loads, metrics.jsonl, a TensorBoard log and losses.png. After 100 steps the voice
babbles: the point is to see every part work and the loss fall. Running it again resumes, or says that it is done.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from command_line import EXIT_CODES_HELP, EXIT_DONE, only_run_in, run
from ranks import use_threads
from run_folder import read_metrics
from rvq_tokenizer import load_tokenizer
from token_cache import TokenCache
from training import choose_bf16, train
from training_config import TrainConfig
from training_start import data_for, new_model, sized


def parse_flags(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], epilog=EXIT_CODES_HELP)
    defaults = " (default: %(default)s)"
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder of collect_data.py" + defaults)
    parser.add_argument(
        "--tokenizer",
        type=Path,
        default=Path("runs/tokenizer"),
        help="folder of train_tokenizer.py, or kyutai/mimi" + defaults,
    )
    parser.add_argument("--out", type=Path, default=Path("runs/minimal"), help="folder of this run" + defaults)
    parser.add_argument("--max_steps", type=int, default=TrainConfig.max_steps, help="optimizer steps" + defaults)
    parser.add_argument("--seed", type=int, default=TrainConfig.seed, help="of weights and batches" + defaults)
    parser.add_argument("--precision", default="auto", help="fp32, bf16, or auto: the faster one here" + defaults)
    parser.add_argument("--threads", type=int, default=0, help="CPU threads of torch, 0 = torch's choice (default: 0)")
    return parser.parse_args(argv)


def print_summary(folder: Path) -> None:
    """The falling loss as a table, every tenth step."""
    records = read_metrics(folder)
    print(f"{'step':>5} {'loss':>8} {'codebook 0':>11} {'depth':>7} {'text':>7} {'val loss':>9}   nats per code")
    for record in records:
        if record["step"] % 10 == 0 or "val/loss" in record:
            val = f"{record['val/loss']:9.3f}" if "val/loss" in record else " " * 9
            loss, codebook0, depth, text = (record[f"train/{name}"] for name in ("loss", "codebook0", "depth", "text"))
            print(f"{record['step'] + 1:5d} {loss:8.3f} {codebook0:11.3f} {depth:7.3f} {text:7.3f} {val}")
    print(f"loss {records[0]['train/loss']:.3f} -> {records[-1]['train/loss']:.3f} in {len(records)} steps")
    print(f"checkpoint {folder}, picture {folder / 'losses.png'}, TensorBoard: tensorboard --logdir {folder}")


def main(argv: list[str] | None = None) -> int:
    args = parse_flags(argv)
    device = torch.device("cpu")
    use_threads(args.threads)
    bf16 = choose_bf16(args.precision, device, args.out)
    config = TrainConfig(max_steps=args.max_steps, seed=args.seed, bf16=bf16)
    with only_run_in(args.out):
        tokenizer = load_tokenizer(args.tokenizer)
        cache = TokenCache(args.data, tokenizer)
        model = new_model(sized("nano", tokenizer, {}), args.seed, tokenizer)
        train_data, val_data = data_for(model.config, config, args.data, cache)
        settings = {"data": cache.fingerprint}
        done = len(read_metrics(args.out)) >= config.max_steps and (args.out / "model.safetensors").is_file()
        code = train(model, train_data, val_data, config, args.out, settings, device)
    if code == EXIT_DONE:
        if done:
            print("this run was done already; give another --out to start anew")
        print_summary(args.out)
    return code


if __name__ == "__main__":
    raise SystemExit(run(main))
