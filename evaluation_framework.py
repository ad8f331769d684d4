"""Measure a tokenizer and a speech model on held-out clips: python evaluation_framework.py

Writes `report.json` (every figure with its definition, interval and sample size), `report.md` and `report.html`
(tables, plots and audio to listen to) into `--out`. The tokenizer part needs no checkpoint. A part whose inputs are
unchanged is taken from the last run, so a stopped or repeated run goes on from there. A metric whose package is not
installed is left out, and the report says what to install. The metrics themselves: `speech_metrics.py`, and of
conversations `heard_conversations.py`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import random
from pathlib import Path

from architecture import load_model
from audio_tokenizer import fingerprint
from checkpointing import file_digest, write_atomically
from codec_gates import as_values, check_gates, codebook_use, draw_gates, print_gates
from command_line import EXIT_CODES_HELP, EXIT_DONE, EXIT_PARTIAL, Several, only_run_in, run
from conversations import load_clips
from dataset_pipeline import as_read_by
from evaluation_report import (
    collect_warnings,
    drop_old_audio,
    model_note,
    print_summary,
    reuse_or_measure,
    write_report,
)
from generation import SHIPPED, SPEAKING, check_tokenizer, read_speaking
from heard_conversations import (
    METRICS_OF_CONVERSATIONS,
    VERSION,
    Ears,
    packages_missing,
)
from held_out_evaluation import (
    CONVERSED,
    Settings,
    conversation_metrics_missing,
    encode_clips,
    evaluate_model,
    evaluate_tokenizer,
    plain,
    steps_of,
)
from metric_validation import (
    conversations_of,
    draw_verdicts,
    judge,
    measure_all,
    plain_verdict,
    print_verdicts,
)
from ranks import pick_device, use_threads
from run_folder import describe_environment
from rvq_tokenizer import load_tokenizer
from speech_metrics import METRICS
from spoken_validation import Tools
from system_comparison import (
    KEY,
    differences,
    figures_of,
    measure_systems,
    preferences,
    print_comparison,
    print_preferences,
    read_system,
    unlike,
    warnings_of,
    write_comparison,
    write_listening_page,
)
from turn_shards import data_digest

FORMAT = 6  # of the report and its parts; a part of another format is measured anew
CHECKPOINT, TOKENIZER = Path("runs/minimal"), Path("runs/tokenizer")
CLIPS_FOR_CODES = 10  # times `max_clips`: codebook use needs many frames and only the encoder
MOST_FITTED = 1000  # clips that the probes of the gates learn from
OF_REPLIES = ("max_replies", "codebooks", "temperature")  # settings that the tokenizer's part does not depend on


def named_folder(text: str) -> tuple[str, Path]:
    name, sign, path = text.partition("=")
    if not sign or not name or not path:
        raise argparse.ArgumentTypeError(f"{text}: expected NAME=PATH, for example human=recordings")
    return name, Path(path)


def parse_flags(argv: list[str] | None) -> argparse.Namespace:
    defaults = Settings()
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0], epilog=EXIT_CODES_HELP)
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder of collect_data.py (default: data)")
    parser.add_argument(
        "--tokenizer",
        type=Path,
        help=f"trained tokenizer, or kyutai/mimi (default: {TOKENIZER}, if there, else that of {SHIPPED})",
    )
    parser.add_argument(
        "--checkpoint",
        type=Path,
        help=f"trained speech model (default: {CHECKPOINT} beside {TOKENIZER}; where that is not, {SHIPPED} with its "
        "own tokenizer; else only the tokenizer is measured)",
    )
    parser.add_argument("--out", type=Path, default=Path("runs/report"), help="folder to write (default: %(default)s)")
    parser.add_argument(
        "--max_clips", type=int, default=defaults.max_clips, help="held-out clips to measure (default: %(default)s)"
    )
    parser.add_argument(
        "--max_replies", type=int, default=defaults.max_replies, help="turns the model speaks (default: %(default)s)"
    )
    told = f"(default: as the checkpoint's {SPEAKING} says, else %s)"
    codebooks_help = f"it speaks with the first so many of every frame {told % 'all'}"
    parser.add_argument("--codebooks", type=int, help=codebooks_help)
    temperature_help = f"of the codes it draws, 0 = always the likeliest {told % defaults.temperature}"
    parser.add_argument("--temperature", type=float, help=temperature_help)
    parser.add_argument(
        "--asr",
        default=defaults.asr,
        help="recogniser for word errors: a faster-whisper model name (downloaded, for example large-v3) or a folder; "
        "'bundled' is Whisper tiny.en from an installed package (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=defaults.seed, help="of clips and sampling (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="of the speech model, cpu or cuda (default: %(default)s)")
    parser.add_argument(
        "--gates",
        action="store_true",
        help="check the tokenizer against its gates instead: a table, and pictures in --out; no report is written. "
        "Exit code 3 if it misses one",
    )
    parser.add_argument(
        "--validate",
        action="store_true",
        help="show instead that each metric tells good from bad: degrades --max_clips turns of held-out conversations "
        "in known ways; a table, and a picture in --out. Exit code 3 if a metric fails",
    )
    parser.add_argument(
        "--systems",
        action=Several,
        type=named_folder,
        metavar="NAME=PATH",
        help="compare instead what systems said in the same conversations; a PATH is a manifest or a folder as for "
        "collect_data.py --input, the first one is the reference, best human; comparison.html in --out",
    )
    listen_help = "with two --systems: also a page to compare so many turns by ear, blind; listening.html in --out"
    parser.add_argument("--listening", type=int, default=0, metavar="N", help=listen_help)
    answers_help = "count what listeners saved from that page, with the listening_key.json in --out"
    parser.add_argument("--answers", action=Several, type=Path, metavar="FILE", help=answers_help)
    ser_help = "with --systems: hear emotions by this audio classifier, a hub name or a folder (default: none)"
    parser.add_argument("--ser", default="", metavar="MODEL", help=ser_help)
    squim_help = "with --systems: also quality as SQUIM hears it; downloads its weights once"
    parser.add_argument("--squim", action="store_true", help=squim_help)
    phones_help = "with --systems: tell pronunciations by this phoneme recogniser, a hub name or a folder, for example "
    phones_help += "facebook/wav2vec2-lv-60-espeak-cv-ft (default: pocketsphinx)"
    parser.add_argument("--phones", default="", metavar="MODEL", help=phones_help)
    workers_help = "processes of --validate and --systems (default: number of cores)"
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help=workers_help)
    parser.add_argument("--json", action="store_true", help="print the figures as one JSON object on the last line")
    args = parser.parse_args(argv)
    for name in ("threads", "workers"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} must be at least 1, got {getattr(args, name)}")
    if args.listening < 0 or (args.listening and not args.systems):
        raise ValueError("--listening N needs two --systems and a number of turns from 1")
    return with_defaults(args)


def with_defaults(args: argparse.Namespace) -> argparse.Namespace:
    """What was not given: the newest of one's own, else what is shipped; and how that voice is best spoken with."""
    if args.tokenizer is None:
        args.tokenizer = SHIPPED / "tokenizer" if not TOKENIZER.is_dir() and SHIPPED.is_dir() else TOKENIZER
    if args.checkpoint is None:
        own = {SHIPPED / "tokenizer": SHIPPED, TOKENIZER: CHECKPOINT}.get(args.tokenizer)
        args.checkpoint = own if own and (own / "model.safetensors").is_file() else None
    spoken = {"temperature": Settings().temperature, **read_speaking(args.checkpoint or CHECKPOINT).sampling}
    for name in ("codebooks", "temperature"):
        if getattr(args, name) is None:
            setattr(args, name, spoken.get(name))
    return args


def measure_gates(args: argparse.Namespace, settings: Settings) -> dict:
    """Whether the tokenizer passes the gates of `codec_gates.py`; the pictures go to `--out`."""
    tokenizer = load_tokenizer(args.tokenizer)
    limit = CLIPS_FOR_CODES * settings.max_clips
    spare = [clip for split in ("val", "test") for clip in load_clips(args.data, split, limit, settings.seed)]
    chosen = random.Random(settings.seed).sample(range(len(spare)), min(settings.max_clips, len(spare)))
    tools = Tools(settings.asr)
    coded = encode_clips(spare, tokenizer)
    clips = [spare[i] for i in chosen]
    fit = encode_clips(load_clips(args.data, "train", min(4 * limit, MOST_FITTED), settings.seed), tokenizer)
    part = evaluate_tokenizer(clips, clips, tokenizer, tools, settings, None)
    part["use"] = codebook_use(coded, tokenizer.config.codebook_size)
    own = (tools.recognizer, tools.encoder, tools.missing)
    gates = check_gates(part, fit, coded, [coded[i] for i in chosen], tokenizer, *own, settings.seed)
    print_gates(gates, part)
    return {
        "format": FORMAT,
        "environment": describe_environment(),
        "settings": dataclasses.asdict(settings),
        "tokenizer": {"folder": args.tokenizer.as_posix(), "fingerprint": fingerprint(tokenizer.config, tokenizer)},
        "gates": as_values(gates),
        "part": part,
        "pictures": draw_gates(part, args.out),
    }


def measure(args: argparse.Namespace, settings: Settings) -> dict:
    """Both parts, measured or taken from the last run, as the content of the report."""
    tokenizer = load_tokenizer(args.tokenizer)
    checkpoint = args.checkpoint or CHECKPOINT
    model = load_model(checkpoint, args.device) if args.checkpoint else None
    if model is not None:
        check_tokenizer(model.config, tokenizer)
    more_clips = load_clips(args.data, "test", CLIPS_FOR_CODES * settings.max_clips, settings.seed)
    clips = random.Random(settings.seed).sample(more_clips, min(settings.max_clips, len(more_clips)))
    tools = Tools(settings.asr)
    shared = {name: value for name, value in dataclasses.asdict(settings).items() if name not in OF_REPLIES}
    shared |= {
        "format": FORMAT,
        "version": VERSION,
        "tokenizer": fingerprint(tokenizer.config, tokenizer),
        "missing": sorted(tools.missing),
    }
    shared |= {"data": data_digest(args.data)}
    report = {
        "format": FORMAT,
        "environment": describe_environment(args.device),
        "settings": dataclasses.asdict(settings),
        "metrics": {
            **{name: dataclasses.asdict(metric) for name, metric in METRICS.items()},
            **{name: dataclasses.asdict(METRICS_OF_CONVERSATIONS[name]) for name in CONVERSED},
        },
        "missing": {**tools.missing, **(conversation_metrics_missing() if model is not None else {})},
    }
    report["tokenizer"] = reuse_or_measure(
        args.out,
        "tokenizer",
        shared,
        lambda audio: evaluate_tokenizer(clips, more_clips, tokenizer, tools, settings, audio),
    )
    report["model"] = None
    absent = f"there is no checkpoint at {checkpoint} for this tokenizer"
    report["model_absent"] = absent if model is None else None
    if model is not None:
        weights = [file_digest(checkpoint / name) for name in ("model.safetensors", "config.json")]
        own = {"checkpoint": weights, "device": args.device}
        own["hardware"] = [platform.node(), args.threads]  # what the times depend on
        own["missing"] = sorted({*tools.missing, *conversation_metrics_missing()})
        report["model"] = reuse_or_measure(
            args.out,
            "model",
            {**shared, **dataclasses.asdict(settings), **own, "steps": steps_of(checkpoint)},
            lambda audio: evaluate_model(
                model, tokenizer, as_read_by(model.config, args.data, "test", tokenizer), tools, settings, audio
            ),
        )
    return {**report, "warnings": collect_warnings(report), "note": model_note(report)}


def ears_of(args: argparse.Namespace) -> tuple[Ears, dict[str, str]]:
    """What listens to conversations, and why metrics are missing: a package, or a model that was asked for."""
    ears, missing = Ears.to_be_had(args.asr, args.ser, args.squim, args.phones)
    return ears, {**packages_missing(), **missing}


def validate(args: argparse.Namespace, settings: Settings) -> int:
    """Whether the metrics tell good from bad, on real held-out conversations of --data; the exit code."""
    ears, missing = Ears(args.asr), packages_missing()
    chosen = conversations_of(args.data, settings.max_clips, settings.seed)
    records = measure_all(chosen, missing, ears, settings.seed, args.workers, args.out)
    verdicts = judge(records, settings.seed)
    print_verdicts(verdicts)
    for metric, reason in missing.items():
        print(f"{metric} was not validated: {reason}")
    draw_verdicts(verdicts, args.out / "validation.png")
    result = {
        "format": FORMAT,
        "environment": describe_environment(),
        "settings": dataclasses.asdict(settings),
        "data": data_digest(args.data),
        "conversations": len(chosen),
        "turns": sum(map(len, chosen.values())),
        "missing": missing,
        "verdicts": [plain_verdict(verdict) for verdict in verdicts],
    }
    write_atomically(args.out / "validation.json", (json.dumps(result, indent=1, allow_nan=False) + "\n").encode())
    print(json.dumps(result, allow_nan=False) if args.json else f"picture: {args.out / 'validation.png'}")
    return EXIT_PARTIAL if any(verdict.passed is False for verdict in verdicts) else EXIT_DONE


def compare(args: argparse.Namespace, settings: Settings) -> int:
    """Systems side by side; exit code 3 where some of what they said could not be read."""
    if len({name for name, _ in args.systems}) < len(args.systems):
        raise ValueError("--systems: two of them have one name")
    if args.listening and len(args.systems) != 2:
        raise ValueError(f"--listening compares two systems, --systems names {len(args.systems)}")
    ears, missing = ears_of(args)
    systems = [read_system(name, path) for name, path in args.systems]
    measured = measure_systems(systems, {**missing, **ears.missing()}, ears, args.workers, args.out)
    apart = {system.name: unlike(system, systems[0]) for system in systems[1:]}
    figures, found = figures_of(measured, settings.seed), differences(measured, settings.seed, apart)
    report = {
        "format": FORMAT,
        "environment": describe_environment(),
        "settings": dataclasses.asdict(settings),
        "systems": [name for name, _ in args.systems],
        "ears": dataclasses.asdict(ears),
        "missing": missing,
        "warnings": [f"{m} was not measured: {reason}." for m, reason in missing.items()]
        + warnings_of(systems, figures, found),
        "figures": plain(figures),
        "differences": [dataclasses.asdict(each) for each in found],
        "measured": measured,
        "note": "Means over conversations, in brackets 95 % bootstrap intervals over them; then the difference to "
        f"{args.systems[0][0]} over shared conversations and p of the sign-flip test, corrected by Holm. "
        f"Words are heard by {args.asr}, pronunciations by {ears.phones or 'pocketsphinx'}.",
    }
    write_comparison(args.out, systems, report, figures, found)
    print_comparison(report, figures, found)
    if args.listening:
        n = write_listening_page(args.out, *systems, args.listening, settings.seed)
        print(f"{n} pairs to compare by ear: {args.out / 'listening.html'}")
    print(f"comparison: {args.out / 'comparison.html'}, comparison.md and comparison.json")
    if args.json:
        print(json.dumps(report, allow_nan=False))
    return EXIT_PARTIAL if any(system.refused for system in systems) else EXIT_DONE


def main(argv: list[str] | None = None) -> int:
    args = parse_flags(argv)
    settings = Settings(**{f.name: getattr(args, f.name) for f in dataclasses.fields(Settings)})
    args.device = str(pick_device(args.device))
    use_threads(args.threads)
    with only_run_in(args.out):
        if args.gates:
            gates = measure_gates(args, settings)
            print(json.dumps(gates, allow_nan=False) if args.json else f"pictures: {args.out}")
            return EXIT_PARTIAL if any(gate["passed"] is False for gate in gates["gates"]) else EXIT_DONE
        if args.validate:
            return validate(args, settings)
        if args.answers:
            found = preferences(args.out / KEY, args.answers, settings.seed)
            print_preferences(found)
            print(json.dumps(found, allow_nan=False) if args.json else "", end="\n" if args.json else "")
            return EXIT_DONE
        if args.systems:
            return compare(args, settings)
        report = measure(args, settings)
        write_report(args.out, report)
        drop_old_audio(args.out, report)
    print_summary(report)
    print(f"report: {args.out / 'report.html'} and {args.out / 'report.json'}")
    if args.json:
        print(json.dumps(report, allow_nan=False))
    return EXIT_DONE


if __name__ == "__main__":
    raise SystemExit(run(main))
