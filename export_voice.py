"""One folder to pass on, of a trained speech model and its tokenizer: python export_voice.py --out pretrained/nano

Weights in half precision (float16), half the size; the tokenizer in `tokenizer/`; how to speak with it in
`speaking.json`, which demo.py and evaluation_framework.py take their defaults from; with --voices clips of these, which
its speakers sound like; a model card `README.md` with what the run itself wrote down: data, licences, settings,
hardware, last figures. The rounded tokenizer is a tokenizer of its own, so its fingerprint is written into the model.
Nothing is lost if it is stopped: run it again.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch

from architecture import CSM, WEIGHTS_KIND, load_model
from audio_tokenizer import AudioTokenizer
from checkpointing import save_weights, write_atomically
from command_line import EXIT_CODES_HELP, EXIT_DONE, Several, run
from conversations import choose_clip
from generation import VOICES, Sampling, Speaking, check_tokenizer, write_speaking
from run_folder import read_metrics, read_settings
from rvq_tokenizer import KIND, RVQTokenizer, load_tokenizer
from turn_shards import Collection, TurnRecord, ledgers, read_columns, read_ledger, read_turns

LICENCE = "Apache-2.0"
CLIPS = "clips"  # the name of their source in the ledger


def halved(module: torch.nn.Module, name: str, small: Sequence[str] = ()) -> dict[str, torch.Tensor]:
    """The tensors in float16, those named in `small` in float8 (e5m2). ValueError: one does not fit or is not there."""
    tensors = {key: t.half() if t.is_floating_point() else t for key, t in module.state_dict().items()}
    if unknown := sorted(set(small) - set(tensors)):
        raise ValueError(f"{name} has no tensor {unknown[0]}")
    bad = [key for key, tensor in tensors.items() if tensor.is_floating_point() and not torch.isfinite(tensor).all()]
    if bad:
        raise ValueError(f"{name}: {bad[0]} does not fit float16 or is not finite; it cannot be exported")
    return {key: tensor.to(torch.float8_e5m2) if key in small else tensor for key, tensor in tensors.items()}


def export(model: CSM, tokenizer: AudioTokenizer, out: Path, speaking: Speaking, small: Sequence[str] = ()) -> None:
    """Write both, and how to speak with them. ValueError: the tokenizer is not the model's, or Mimi."""
    check_tokenizer(model.config, tokenizer)
    if not isinstance(tokenizer, RVQTokenizer):
        raise ValueError("only a tokenizer of train_tokenizer.py is exported with its model; Mimi is had by its name")
    chosen = Sampling(**speaking.sampling).codebooks
    if chosen is not None and chosen > tokenizer.config.n_codebooks:
        raise ValueError(f"codebooks={chosen} must be at most the tokenizer's {tokenizer.config.n_codebooks}")
    codec, weights = halved(tokenizer, "the tokenizer"), halved(model, "the model", small)
    save_weights(out / "tokenizer", KIND, dataclasses.asdict(tokenizer.config), codec)
    config = dataclasses.replace(model.config, audio_tokenizer=load_tokenizer(out / "tokenizer").fingerprint())
    save_weights(out, WEIGHTS_KIND, config.to_dict(), weights)
    write_speaking(out, speaking)


def clips_to_pass_on(data: Path, names: Sequence[str]) -> list[TurnRecord]:
    """A clip of each of these voices in each of its styles. ValueError: one is not there, or may not be passed on."""
    turns = list(read_turns(data, with_audio=False))
    free, chosen = [turn for turn in turns if turn.redistributable], set()
    for name in names:
        voice = choose_clip(turns, name).speaker_id
        own = [turn for turn in free if turn.speaker_id == voice]
        if not own:
            licences = sorted({turn.license for turn in turns if turn.speaker_id == voice})
            raise ValueError(
                f"no clip of {voice} is marked as redistributable (licence: {', '.join(licences)}; recordings of your "
                "own never are), so none goes with the voice"
            )
        chosen |= {choose_clip(own, voice, style).utt_id for style in {turn.style for turn in own}}
    clips = [turn for turn in read_turns(data, with_audio=True) if turn.utt_id in chosen]
    return [dataclasses.replace(turn, conv_key=turn.utt_id, turn_index=0) for turn in clips]  # each at its own level


def write_clips(clips: Sequence[TurnRecord], out: Path) -> None:
    """As collected data in `VOICES` under `out`, in place of those of an earlier export."""
    folder = out / VOICES
    if folder.exists():
        shutil.rmtree(folder)
    if clips:
        folder.mkdir(parents=True)
        Collection(folder).commit(CLIPS, "1", sorted(turn.utt_id for turn in clips), list(clips), [])


def check_clips_folder(folder: Path) -> None:
    """ValueError unless it holds nothing but what an export wrote, if it is there."""
    if folder.exists() and {entry.source for entry in (read_ledger(folder) if ledgers(folder) else ())} != {CLIPS}:
        raise ValueError(f"{folder} holds what no export wrote, and would be replaced; choose another --out")


def data_line(data: Path) -> str:
    """Hours, turns, voices and licences of the collection."""
    rows = list(read_columns(data, ["duration_s", "speaker_id", "license", "source"]))
    seconds, *names = zip(*rows, strict=True)
    voices, licences, sources = (sorted(set(column)) for column in names)
    said = f"{sum(seconds) / 3600:.2f} h, {len(rows)} turns of {len(voices)} voice(s) from {', '.join(sources)}"
    return f"{said}; licences: {', '.join(licences)}"


def judged(checkpoint: Path, run_folder: Path) -> tuple[int | None, dict]:
    """The step of the weights, None where it is the run's last, and what was measured of them, held out."""
    records = read_metrics(run_folder)
    best = checkpoint / "best.json"
    if best.is_file():
        step = json.loads(best.read_text(encoding="utf-8"))["step"]
        return step, next((record for record in records if record["step"] == step - 1), {})
    measured = [record for record in records if "spoken/wer" in record or "val/loss" in record]
    return None, measured[-1] if measured else {}


def runs_of(folder: Path) -> list[dict]:
    """Settings of the run in a folder; before them, as far as these are still there, those of what it began with."""
    settings = read_settings(folder) or {}
    begun = Path(settings.get("init_from") or folder)
    earlier = runs_of(begun) if begun != folder and read_settings(begun) else []
    return [*earlier, settings]


def model_card(model: CSM, checkpoint: Path, run_folder: Path, tokenizer: Path, data: Path, speaking: Speaking) -> str:
    """What a user must know, from what the runs wrote down."""
    step, found = judged(checkpoint, run_folder)
    histories = {"model": runs_of(run_folder), "tokenizer": runs_of(tokenizer)}
    runs = [(name, settings) for name, own in histories.items() for settings in own]
    rows = []
    for name, settings in runs:
        own, place = settings.get("train", settings), settings.get("environment", {})
        where = (
            f"{place.get('device', 'unknown')}, {place.get('threads', '?')} CPU thread(s), torch {place.get('torch')}"
        )
        steps, seed = own.get("max_steps", "unknown"), own.get("seed", "unknown")
        steps = f"{step} of {steps}" if settings is histories["model"][-1] and step is not None else steps
        part = "its decoder" if own.get("keep_codes") else name
        rows.append(f"| {part} | {steps} | {seed} | {place.get('commit', 'unknown')} | {where} |")
    last = {key: value for key, value in found.items() if key.startswith(("spoken/", "val/"))}
    commands = [f"    {s['environment']['command']}" for _, s in runs if "command" in s.get("environment", {})]
    figures = [f"| {key} | {value:.4g} |" for key, value in last.items() if isinstance(value, int | float)]
    size = sum(p.numel() for p in model.parameters()) / 1e6
    first = [(name, own[0].get("init_from")) for name, own in histories.items()]
    begun = [f", the {name} further from {origin}" for name, origin in first if origin]
    trained = f"trained by this repository{''.join(begun)}" if begun else "trained from scratch by this repository"
    parts = [
        "# Model card",
        f"{size:.1f} million parameters and an audio tokenizer, {trained}. Licence of the weights: {LICENCE}.",
        speaking.notes,
        "## Data",
        data_line(data) + ".",
        "## Training",
        "\n".join(["| | steps | seed | commit | hardware |", "|---|---|---|---|---|", *rows]),
        "\n".join(["Commands:", "", *commands]),
        "## Figures of these weights, held-out texts",
        "\n".join(["| | |", "|---|---|", *figures]) if figures else "not measured",
        "`spoken/` is what a recogniser heard when it spoke freely (shares; `_low` and `_high` bound 95 % intervals), "
        f"`val/` are held-out losses in nats. It speaks with: {json.dumps(speaking.sampling)}.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def clips_part(clips: Sequence[TurnRecord]) -> str:
    """The part of the model card on the clips that go with the voice."""
    if not clips:
        return ""
    rows = sorted({(turn.speaker_id, turn.style or "", turn.license, turn.attribution) for turn in clips})
    table = ["| voice | style | licence | by |", "|---|---|---|---|", *(f"| {' | '.join(row)} |" for row in rows)]
    return "\n".join(["", f"## Clips of its voices, in `{VOICES}/`", "", *table, ""])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXIT_CODES_HELP, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    shown = " (default: %(default)s)"
    add("--checkpoint", type=Path, default=Path("runs/nano"), help="folder of train.py" + shown)
    add(
        "--run", type=Path, metavar="DIR", help="folder of the run it is from, for the model card (default: checkpoint)"
    )
    add("--tokenizer", type=Path, default=Path("runs/tokenizer"), help="folder of its tokenizer" + shown)
    add("--data", type=Path, default=Path("data"), help="what it was trained on, for the model card" + shown)
    add("--out", type=Path, required=True, metavar="DIR", help="folder to write")
    add("--codebooks", type=int, help="it speaks best with the first so many (default: all)")
    add("--temperature", type=float, default=Sampling.temperature, help="of the codes it draws" + shown)
    alone = "it has learnt single sentences only: longer texts are spoken sentence by sentence"
    add("--one_sentence", action="store_true", help=alone)
    small = "tensors that need not be exact, in float8, e.g. depth_heads: half the bytes, up to 12 %% of error"
    add("--float8", action=Several, default=[], metavar="NAME", help=small)
    ahead = (
        "a reply of its own is written so many ids ahead of its speech (default: as it was trained); 200 writes all "
    )
    ahead += "of it first, as a model of --joint 0 has learnt"
    add("--text_per_chunk", type=int, metavar="N", help=ahead)
    voices = "clips of these voices of --data go with it: speakers 0, 1, ... sound like them unless told otherwise"
    add("--voices", action=Several, default=[], metavar="NAME", help=voices)
    add("--notes", default="", metavar="TEXT", help="what it can, for the model card and for who speaks with it")
    args = parser.parse_args(argv)
    sampling = {"temperature": args.temperature, "codebooks": args.codebooks, "one_sentence": args.one_sentence}
    speaking = Speaking(sampling, args.notes, args.voices)
    model, tokenizer = load_model(args.checkpoint), load_tokenizer(args.tokenizer)
    if args.text_per_chunk is not None:
        model.config = dataclasses.replace(model.config, text_per_chunk=args.text_per_chunk)
    read = [(given, args.out) for given in (args.checkpoint, args.run, args.tokenizer) if given is not None]
    for given, written in (*read, (args.tokenizer, args.out / "tokenizer")):
        if given.resolve() == written.resolve():
            raise ValueError(f"--out {args.out} would overwrite {given}, which is read; choose another")
    card = model_card(model, args.checkpoint, args.run or args.checkpoint, args.tokenizer, args.data, speaking)
    check_clips_folder(args.out / VOICES)
    clips = clips_to_pass_on(args.data, args.voices) if args.voices else []
    card += clips_part(clips)
    export(model, tokenizer, args.out, speaking, args.float8)
    write_clips(clips, args.out)
    write_atomically(args.out / "README.md", card.encode())
    size = sum(path.stat().st_size for path in args.out.rglob("*") if path.is_file()) / 1e6
    print(f"{args.out}: {size:.1f} MB; python demo.py --checkpoint {args.out}")
    return EXIT_DONE


if __name__ == "__main__":
    raise SystemExit(run(main))
