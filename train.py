"""Train the speech model: from scratch, from csm-1b or from a checkpoint; on one CPU or on many GPUs.

    python train.py --model_size nano --max_steps 5000
    torchrun --nproc_per_node 4 train.py --model_size tiny
    torchrun --nproc_per_node 8 train.py --model_size small --parallel fsdp
    python train.py --init_from sesame/csm-1b --tokenizer kyutai/mimi --lora_rank 16

Stopping at any moment (Ctrl-C, kill -9) loses at most the steps since the last training state; the same command goes
on and ends with the same weights as a run that was never stopped. Settings not given come from the recipe of the size.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import math
import uuid
from pathlib import Path

import torch

from architecture import CSM
from audio_tokenizer import AudioTokenizer
from command_line import EXIT_CODES_HELP, EXIT_DONE, MissingRequirement, first_line, only_run_in, run
from fine_tuning import add_lora, start_from
from generation import SPEAKING, Sampling, Speaking, read_speaking, write_speaking
from model_sizes import PRESETS, CSMConfig
from ranks import Ranks, join_ranks, pick_device, use_threads
from run_folder import read_metrics
from rvq_tokenizer import load_tokenizer
from spoken_validation import SpokenValidation
from text_tokenizer import load_text_tokenizer
from token_cache import TokenCache
from training import WEIGHTS, choose_bf16, is_complete, sharded, train
from training_config import HELP, TrainConfig, recipe
from training_start import check_disk, check_memory, codes_of, data_for, new_model, sized, weight_bytes

TOKENIZER = Path("runs/tokenizer")  # where all scripts look if none is given
ADDITIONS = {  # fields of a CSMConfig that have a flag
    "acoustic_delay": "frames after which acoustic codes re-enter the backbone",
    "cross_attention_every": "backbone layers for one VoiceTextCrossAttention; 0 = none",
    "semantic_heads": "of the ConversationalMemory; 0 = no such store",
    "prosodic_heads": "of the ConversationalMemory; 0 = no such store",
    "text_head": "predict text too",
    "text_per_chunk": "ids of text before each chunk of audio in the joint order",
}


def parse_flags(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0],
        epilog=EXIT_CODES_HELP,
        argument_default=argparse.SUPPRESS,
    )
    parser.set_defaults(model_size="nano", init_from="", data=Path("data"), tokenizer="")
    parser.set_defaults(out=None, lora_rank=0, lora_alpha=None, text_tokenizer="", device="auto", precision="auto")
    parser.set_defaults(threads=0, asr="bundled", wandb="")
    parser.add_argument("--model_size", choices=list(PRESETS), help="(default: nano)")
    parser.add_argument(
        "--init_from", help="weights to begin with: a folder of this project, a file or folder of csm-1b, or a hub name"
    )
    parser.add_argument("--lora_rank", type=int, help="learn a change of this rank only (LoRA); 0 = all weights")
    parser.add_argument("--lora_alpha", type=float, help="of LoRA (default: its rank)")
    parser.add_argument("--data", type=Path, help="folder of collect_data.py (default: data)")
    codec = f"of train_tokenizer.py, or kyutai/mimi (default: tokenizer/ in --init_from, else {TOKENIZER})"
    parser.add_argument("--tokenizer", help=codec)
    other = "take weights of --init_from that know another tokenizer's codes: one that --tokenizer was trained from"
    parser.add_argument("--other_codes", action="store_true", help=other, default=False)
    parser.add_argument("--text_tokenizer", help="bytes, or a Hugging Face tokenizer (default: as size or weights say)")
    parser.add_argument("--out", type=Path, help="folder of this run (default: runs/ and the size)")
    parser.add_argument("--device", help="auto, cpu or cuda (default: auto)")
    parser.add_argument("--precision", help="fp32, bf16, or auto: the faster one here (default: auto)")
    parser.add_argument("--threads", type=int, help="CPU threads of torch, 0 = torch's choice (default: 0)")
    parser.add_argument(
        "--asr", help="recogniser of --speak_every: bundled or a faster-whisper model (default: bundled)"
    )
    parser.add_argument("--wandb", metavar="PROJECT", help="copy the TensorBoard log to this Weights & Biases project")
    settings = parser.add_argument_group("settings of the model (default: as the size or the weights have it)")
    for name, text in ADDITIONS.items():
        kind = {"action": argparse.BooleanOptionalAction} if name == "text_head" else {"type": int, "metavar": "int"}
        settings.add_argument(f"--{name}", help=text, **kind)
    settings = parser.add_argument_group("settings of the training (defaults of nano; other sizes have their recipe)")
    nano = dataclasses.asdict(TrainConfig(**recipe("nano")))
    for name, text in HELP.items():
        default = nano[name]
        boolean = {"action": argparse.BooleanOptionalAction}
        kind = boolean if isinstance(default, bool) else {"type": type(default), "metavar": type(default).__name__}
        settings.add_argument(f"--{name}", help=f"{text} (default: {default})", **kind)
    args = parser.parse_args(argv)
    if args.other_codes and not args.init_from:
        parser.error("--other_codes is of the weights of --init_from; give both")
    args.out = args.out or Path("runs") / (args.model_size if not args.init_from else "fine_tuned")
    own = Path(args.init_from) / "tokenizer"
    args.tokenizer = args.tokenizer or (own if args.init_from and own.is_dir() else TOKENIZER)
    args.lora_alpha = float(args.lora_rank) if args.lora_alpha is None else args.lora_alpha
    return args


def settings_of(args: argparse.Namespace, device: torch.device, ranks: Ranks) -> TrainConfig:
    """The recipe with what the flags change. ValueError for what cannot work."""
    given = {name: getattr(args, name) for name in HELP if hasattr(args, name)}
    settings = {**recipe(args.model_size, bool(args.init_from)), **given}
    if "lr" in given and "min_lr" not in given:
        settings["min_lr"] = given["lr"] / 10
    settings["bf16"] = ranks.from_first(choose_bf16(args.precision, device, args.out) if ranks.first else None)
    return TrainConfig(**settings)


def build(args: argparse.Namespace, tokenizer: AudioTokenizer, seed: int) -> tuple[CSM | CSMConfig, set[str]]:
    """The model, or from scratch its config only, as it may be too large; and the names of what is new in it."""
    additions = {name: getattr(args, name) for name in ADDITIONS if hasattr(args, name)}
    additions |= {"text_tokenizer": args.text_tokenizer} if args.text_tokenizer else {}
    if not args.init_from:
        config = sized(args.model_size, tokenizer, additions)
        n_text = max(config.text_vocab_size, load_text_tokenizer(config.text_tokenizer).vocab_size)
        return dataclasses.replace(config, text_vocab_size=n_text), set()
    codes = codes_of(tokenizer)
    additions |= {"audio_tokenizer": codes["audio_tokenizer"]}
    model, new = start_from(args.init_from, additions, seed, other_codes=args.other_codes)
    for name in ("n_codebooks", "codebook_size"):
        if getattr(model.config, name) != codes[name]:
            raise ValueError(
                f"{args.init_from} has {name}={getattr(model.config, name)}, the tokenizer {args.tokenizer} has "
                f"{codes[name]}; give the --tokenizer it was trained with (csm-1b: kyutai/mimi)"
            )
    n_text = load_text_tokenizer(model.config.text_tokenizer).vocab_size
    if n_text > model.config.text_vocab_size:
        raise ValueError(
            f"{args.init_from} knows {model.config.text_vocab_size} text ids, the tokenizer "
            f"{model.config.text_tokenizer} has {n_text}; give the --text_tokenizer it was trained with"
        )
    return model, new


def train_in(args: argparse.Namespace, device: torch.device, ranks: Ranks) -> int:
    c = settings_of(args, device, ranks)
    ranks.share_of(c.batch_rows, "batch_rows")
    sampling_before = read_speaking(args.init_from).sampling if args.init_from else {}
    tokenizer = load_tokenizer(args.tokenizer)
    cache = TokenCache(args.data, tokenizer)
    model, new = build(args, tokenizer, c.seed)
    config = model if isinstance(model, CSMConfig) else model.config
    train_data, val_data = data_for(config, c, args.data, cache)
    if ranks.from_first(cache.fingerprint) != cache.fingerprint:
        raise ValueError(f"{args.data} of this process is not that of the first one; all need the same files")
    trained = None
    if args.lora_rank:
        if sharded(c, ranks):
            raise ValueError("--lora_rank works with --parallel ddp only")
        trained = sum(p.numel() for p in add_lora(model, args.lora_rank, args.lora_alpha, c.seed, new))
    held = 0 if isinstance(model, CSMConfig) or device.type != "cpu" else weight_bytes(model)
    complete = ranks.from_first(is_complete(args.out, c))
    gib = 0.0 if complete else check_memory(config, c, device, ranks, trained, held)
    if isinstance(model, CSMConfig):
        model = new_model(config, c.seed, tokenizer)
    n_parameters = sum(p.numel() for p in model.parameters())
    if ranks.first and not complete:
        check_disk(args.out, n_parameters, trained, c)
        describe(args, c, device, ranks, n_parameters, trained, gib, train_data)
    spoken = None
    if c.speak_every and ranks.first and not complete:
        own = train_data.text_tokenizer
        sampling = Sampling(codebooks=c.speak_codebooks or None, temperature=c.speak_temperature)
        spoken = SpokenValidation(args.data, "val", tokenizer, own, c.speak_texts, c.seed, sampling, args.asr)
    if args.wandb and ranks.first:
        mirror_to_wandb(args.wandb, args.out)
    settings = {"data": cache.fingerprint, "init_from": args.init_from, "lora": [args.lora_rank, args.lora_alpha]}
    code = train(model, train_data, val_data, c, args.out, settings, device, ranks, spoken, new)
    if ranks.first:
        keep_speaking(sampling_before, args.out)
    return code


def keep_speaking(sampling: dict, folder: Path) -> None:
    """Weights trained further are spoken with as those they began with; what these could say is not passed on."""
    for own in (folder, folder / "best"):
        if sampling and (own / WEIGHTS).is_file() and not (own / SPEAKING).is_file():
            write_speaking(own, Speaking(sampling, notes=""))


def describe(args, c: TrainConfig, device, ranks: Ranks, n: int, trained: int | None, gib: float, data) -> None:
    """One line on what is about to run."""
    learning = f", {trained / 1e6:.1f}M of them learn" if trained is not None else ""
    spread = f" ({c.parallel})" if ranks.n > 1 else ""
    print(
        f"{args.init_from or args.model_size}: {n / 1e6:.1f}M parameters{learning}; {len(data)} conversations; "
        f"{c.batch_rows * c.grad_accum} rows of {c.row_positions} positions per step; "
        f"{'bf16' if c.bf16 else 'fp32'} on {ranks.n} x {device.type}{spread}, about {gib:.1f} GiB each"
    )


def report(folder: Path, tokenizer: Path | str) -> None:
    """What came out, in a few lines."""
    records = read_metrics(folder)
    if not records:
        print(f"{folder} holds weights but no log of their training")
        return
    first, last = records[0], records[-1]
    print(f"loss {first['train/loss']:.3f} -> {last['train/loss']:.3f} nats in {last['step'] + 1} steps")
    for metric, unit in (("val/loss", "nats held out"), ("spoken/wer", "word error rate of free speech")):
        found = [(record[metric], record["step"] + 1) for record in records if metric in record]
        if found:
            print(f"{unit}: {found[0][0]:.3f} -> {found[-1][0]:.3f}, best {min(found)[0]:.3f} at step {min(found)[1]}")
    best = f", best ones {folder / 'best'}" if (folder / "best").is_dir() else ""
    print(f"weights {folder}{best}, picture {folder / 'losses.png'}")
    own = "" if Path(tokenizer) == TOKENIZER else f" --tokenizer {tokenizer}"
    print(f"TensorBoard: tensorboard --logdir {folder}; hear it: python demo.py --checkpoint {folder}{own}")


def mirror_to_wandb(project: str, folder: Path) -> None:
    """From now on Weights & Biases copies what goes to TensorBoard; a resumed run goes on there too."""
    try:
        import wandb
    except ImportError as error:
        raise MissingRequirement("--wandb needs: pip install wandb") from error
    name = folder / "wandb-id"
    if not name.is_file():
        name.write_text(uuid.uuid4().hex)
    settings = {"project": project, "dir": str(folder), "name": folder.name, "id": name.read_text(), "resume": "allow"}
    try:
        wandb.init(**settings, sync_tensorboard=True)
    except Exception as error:  # its client raises types of its own and of its transport
        raise MissingRequirement(f"Weights & Biases refused: {first_line(error)}") from error


def main(argv: list[str] | None = None) -> int:
    args = parse_flags(argv)
    if args.lora_rank and not args.init_from:
        raise ValueError("--lora_rank changes weights that exist; give them by --init_from")
    if args.init_from and Path(args.init_from).resolve() == args.out.resolve():
        raise ValueError(f"--init_from and --out are both {args.out}; give another --out")
    if not 0 < args.lora_alpha < math.inf and args.lora_rank:
        raise ValueError(f"lora_alpha={args.lora_alpha} must be above 0 and finite")
    use_threads(args.threads)
    with join_ranks(pick_device(args.device)) as (ranks, device), contextlib.ExitStack() as held:
        if ranks.first:
            held.enter_context(only_run_in(args.out))
        code = train_in(args, device, ranks)
    if code == EXIT_DONE and ranks.first:
        report(args.out, args.tokenizer)
    return code


if __name__ == "__main__":
    raise SystemExit(run(main))
