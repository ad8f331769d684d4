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
import itertools
import json
import os
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from architecture import CSM, count_targets, load_model, pick_depth_rows
from audio import SAMPLE_RATE
from audio_tokenizer import AudioTokenizer
from checkpointing import write_atomically
from codec_gates import Coded, as_values, check_gates, codebook_use, draw_gates, print_gates
from command_line import EXIT_CODES_HELP, EXIT_DONE, EXIT_PARTIAL, MissingRequirement, only_run_in, run
from conversations import Conversation, load_clips
from dataset_pipeline import ConversationDataset
from evaluation_report import (
    FULL,
    GENERATED,
    ORIGINAL,
    REAL,
    SEMANTIC,
    collect_warnings,
    drop_old_audio,
    file_digest,
    model_note,
    print_summary,
    reuse_or_measure,
    save_audio,
    write_report,
)
from generation import SHIPPED, SPEAKING, Reply, Sampling, check_tokenizer, read_speaking
from heard_conversations import (
    LEFT_OUT,
    MEASURES,
    METRICS_OF_CONVERSATIONS,
    Ears,
    Heard,
    Human,
    Turn,
    Turns,
    packages_missing,
)
from inference_model import InferenceModel
from metric_validation import (
    conversations_of,
    draw_verdicts,
    judge,
    measure_all,
    plain_verdict,
    print_verdicts,
)
from run_folder import describe_environment, read_metrics
from rvq_tokenizer import load_tokenizer
from speech_metrics import (
    METRICS,
    Figure,
    Item,
    NotMeasurable,
    Recognizer,
    Tally,
    bootstrap,
    count_errors,
)
from spoken_validation import Tools, hear_codes, mean_cosine, speak_after, spread, time_reply
from system_comparison import (
    KEY,
    differences,
    figures_of,
    measure_systems,
    preferences,
    print_comparison,
    print_preferences,
    read_system,
    warnings_of,
    write_comparison,
    write_listening_page,
)
from text_tokenizer import load_text_tokenizer
from token_cache import TokenCache
from training import batch_losses
from turn_shards import TurnRecord

FORMAT = 2  # of the report and its parts; a part of another format is measured anew
CHECKPOINT, TOKENIZER = Path("runs/minimal"), Path("runs/tokenizer")
PLAYERS = 12  # clips that the page offers to listen to
CLIPS_FOR_CODES = 10  # times `max_clips`: codebook use needs many frames and only the encoder
MOST_FITTED = 1000  # clips that the probes of the gates learn from; 4 times the held-out ones, as the splits are
CONTEXT_TURNS = 4  # that a generated turn hears before it
CONVERSED = (  # metrics of conversations that the report has of the model's turns and of the real ones
    "pitch_spread", "level_spread", "rate", "pause_share", "pitch_contour", "prosody_distance", "emotional_coherence",
    "dnsmos",
)  # fmt: skip
OF_REPLIES = ("max_replies", "codebooks", "temperature")  # settings that the tokenizer's part does not depend on
REPLY_SECONDS = 8.0  # a generated turn is cut there


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the figures depend on besides data and weights."""

    max_clips: int = 24  # held-out clips that are reconstructed and listened to
    max_replies: int = 8  # held-out turns that the model speaks
    codebooks: int | None = None  # that it speaks with; None: all
    temperature: float = Sampling.temperature  # of the codes it draws; 0: always the likeliest
    asr: str = "bundled"
    seed: int = 0  # of the choice of clips, of sampling and of the bootstrap

    def __post_init__(self) -> None:
        for name in ("max_clips", "max_replies"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        self.sampling()

    def sampling(self) -> Sampling:
        """How the model speaks. ValueError for what cannot work."""
        return Sampling(max_seconds=REPLY_SECONDS, codebooks=self.codebooks, temperature=self.temperature)


def plain(figures: dict[str, dict[str, Figure]]) -> dict[str, dict[str, dict]]:
    """Figures as values for JSON."""
    return {
        metric: {system: dataclasses.asdict(figure) for system, figure in systems.items()}
        for metric, systems in figures.items()
    }


# ---- tokenizer -------------------------------------------------------------------------------------------------------

Clip = tuple[TurnRecord, np.ndarray]


def conversation_of(turn: TurnRecord) -> str:
    """The unit of the bootstrap."""
    return f"{turn.source}/{turn.conv_key}"


def depths(tokenizer: AudioTokenizer) -> list[int]:
    """Prefixes of the codebooks that the depth curve measures; the semantic stack and the whole are among them."""
    K, S = tokenizer.config.n_codebooks, tokenizer.config.n_semantic
    return sorted({k for k in (1, 4, S, S + 1, S + 6, K) if k <= K})


def evaluate_tokenizer(
    clips: list[Clip],
    more_clips: list[Clip],
    tokenizer: AudioTokenizer,
    tools: Tools,
    settings: Settings,
    audio: Path | None,
) -> dict:
    """Everything that needs no speech model. Writes the audio of the first clips to `audio`, if given."""
    begin = time.perf_counter()
    K, S = tokenizer.config.n_codebooks, tokenizer.config.n_semantic
    tally, by_depth = Tally(), Tally()
    waves: list[dict[str, np.ndarray]] = []
    rows: list[dict] = []
    for index, (turn, samples) in enumerate(tqdm(clips, desc="reconstructing", unit="clip")):
        copies = tokenizer.copies(samples, depths(tokenizer))
        waves.append({ORIGINAL: samples, FULL: copies[K], SEMANTIC: copies[S]})
        for k, copy in copies.items():
            for metric, measure in tools.paired.items():
                by_depth.add(metric, str(k), conversation_of(turn), measure, samples, copy)
        row = {"id": turn.utt_id, "speaker": turn.speaker_id, "style": turn.style, "text": turn.text}
        rows.append({**row, "seconds": len(samples) / SAMPLE_RATE})
        if audio is not None and index < PLAYERS:
            rows[-1]["audio"] = save_audio(audio, f"clip-{index:02d}", waves[-1])
    conversations = [conversation_of(turn) for turn, _ in clips]
    if tools.recognizer is not None:
        listen(tools.recognizer, tally, conversations, rows, waves)
    same_speaker = None
    if tools.encoder is not None:
        same_speaker = compare_speakers(tools, tally, conversations, [turn.speaker_id for turn, _ in clips], waves)
    curve = plain(by_depth.figures(settings.seed))
    copies = {metric: {FULL: figure[str(K)], SEMANTIC: figure[str(S)]} for metric, figure in curve.items()}
    return {
        "codebooks": K,
        "semantic_codebooks": S,
        "bits_per_second": tokenizer.config.bits_per_second(),
        "figures": {**copies, **plain(tally.figures(settings.seed))},
        "same_speaker": same_speaker,
        "depth": curve,
        "use": codebook_use(encode_clips(more_clips, tokenizer), tokenizer.config.codebook_size),
        "clips": rows,
        "seconds": time.perf_counter() - begin,
    }


def listen(
    recognizer: Recognizer, tally: Tally, conversations: list[str], rows: list[dict], waves: list[dict[str, np.ndarray]]
) -> None:
    """Word and character errors of every system of every clip; transcripts go into `rows`."""
    for conversation, row, systems in zip(conversations, tqdm(rows, desc="listening", unit="clip"), waves, strict=True):
        row["transcripts"] = {system: recognizer.transcribe(wave) for system, wave in systems.items()}
        try:
            errors = {system: count_errors(row["text"], heard) for system, heard in row["transcripts"].items()}
        except NotMeasurable as reason:
            for system in systems:
                tally.excluded["wer", system][str(reason)] += 1
            continue
        row["wer"] = {system: counts.wrong / counts.words for system, counts in errors.items()}
        for system, counts in errors.items():
            tally.add_errors(system, conversation, counts)
            if system != ORIGINAL and ORIGINAL in errors:
                change = counts.wrong - errors[ORIGINAL].wrong
                tally.items["wer_change", system].append(Item(conversation, change, counts.words))


def compare_speakers(
    tools: Tools, tally: Tally, conversations: list[str], speakers: list[str], waves: list[dict[str, np.ndarray]]
) -> float | None:
    """Each copy against its original, and the two baselines that the number is read between.

    Returns the median cosine of two originals of a speaker; None if no speaker has two.
    """
    voices = [
        {system: tools.embed(wave) for system, wave in systems.items()}
        for systems in tqdm(waves, desc="comparing speakers", unit="clip")
    ]
    for i, (own, conversation) in enumerate(zip(voices, conversations, strict=True)):
        same = [v[ORIGINAL] for j, v in enumerate(voices) if j != i and speakers[j] == speakers[i]]
        other = [v[ORIGINAL] for j, v in enumerate(voices) if speakers[j] != speakers[i]]
        pairs = {
            f"{FULL} to its original": (FULL, [own[ORIGINAL]]),
            f"{FULL} to the speaker's other clips": (FULL, same),
            f"{SEMANTIC} to its original": (SEMANTIC, [own[ORIGINAL]]),
            "baseline: original to the speaker's other clips": (ORIGINAL, same),
            "baseline: original to other speakers": (ORIGINAL, other),
        }
        for name, (system, others) in pairs.items():
            tally.add("speaker_similarity", name, conversation, mean_cosine, own[system], others)
    originals = [(speaker, v[ORIGINAL]) for speaker, v in zip(speakers, voices, strict=True)]
    heard = [(speaker, voice) for speaker, voice in originals if not isinstance(voice, NotMeasurable)]
    cosines = [float(a @ b) for (one, a), (other, b) in itertools.combinations(heard, 2) if one == other]
    return float(np.median(cosines)) if cosines else None


@torch.inference_mode()
def encode_clips(clips: list[Clip], tokenizer: AudioTokenizer) -> list[Coded]:
    """Clips with their codes, for counts of codes and for the gates."""
    coded = []
    for turn, samples in tqdm(clips, desc="encoding", unit="clip"):
        codes = tokenizer.encode(torch.from_numpy(np.ascontiguousarray(samples))[None])[0].cpu().numpy()  # (T, K)
        coded.append(Coded(conversation_of(turn), turn.speaker_id, turn.text, samples, codes))
    return coded


def measure_gates(args: argparse.Namespace, settings: Settings) -> dict:
    """Whether the tokenizer passes the gates of `codec_gates.py`; the pictures go to `--out`."""
    tokenizer = load_tokenizer(args.tokenizer)
    limit = CLIPS_FOR_CODES * settings.max_clips
    held_out = [clip for split in ("val", "test") for clip in load_clips(args.data, split, limit, settings.seed)]
    chosen = random.Random(settings.seed).sample(range(len(held_out)), min(settings.max_clips, len(held_out)))
    tools = Tools(settings.asr)
    coded = encode_clips(held_out, tokenizer)
    clips = [held_out[i] for i in chosen]
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
        "tokenizer": {"folder": args.tokenizer.as_posix(), "fingerprint": tokenizer.fingerprint()},
        "gates": as_values(gates),
        "part": part,
        "pictures": draw_gates(part, args.out),
    }


# ---- speech model ----------------------------------------------------------------------------------------------------


def held_out_losses(
    model: CSM, dataset: ConversationDataset, limit: int, device: torch.device, seed: int
) -> list[Figure]:
    """K figures, nats per code of codebook 0..K-1, over the first `limit` documents, interval over conversations."""
    samples = dataset.samples()[:limit]
    items: list[list[Item]] = [[] for _ in range(model.config.n_codebooks)]
    for sample in tqdm(samples, desc="held-out losses", unit="document"):
        batch = dataset.collate([[sample]], seeds=None)
        depth_rows = pick_depth_rows(batch.targets, 1.0, torch.Generator())
        with torch.inference_mode():
            found = batch_losses(model, batch, depth_rows, device)
        targets = count_targets(batch, depth_rows)
        sums, counts = ([float(terms.codebook0), *terms.depth.tolist()] for terms in (found, targets))
        if not np.isfinite(sums).all():
            raise ValueError(f"the model's loss is not finite ({sums[0]} for codebook 0); its weights are broken")
        name = conversation_of(dataset.conversations[sample.conversation].turns[0])
        for own, nats, count in zip(items, sums, counts, strict=True):
            own.append(Item(name, nats, count))
    return [dataclasses.replace(bootstrap(own, seed=seed), n=int(sum(i.weight for i in own))) for own in items]


def choose_replies(conversations: list[Conversation], limit: int, seed: int) -> list[tuple[Conversation, int]]:
    """Turns to speak, spread over the conversations: those whose speaker was heard in the turns before, if any."""
    queues = []
    for conversation in conversations:
        speakers = conversation.speakers
        heard = [i for i in range(len(speakers)) if speakers[i] in speakers[max(0, i - CONTEXT_TURNS) : i]]
        random.Random(f"{seed}-{conversation.conv_id}").shuffle(heard)
        queues.append([(conversation, i) for i in heard or range(len(speakers))])
    return list(itertools.islice(spread(queues), limit))


def speak(
    model: CSM | InferenceModel,
    tokenizer: AudioTokenizer,
    dataset: ConversationDataset,
    conversation: Conversation,
    index: int,
    sampling: Sampling,
    seed: int,
) -> Reply:
    """The model's version of one turn, after the real turns before it."""
    turns = list(zip(conversation.speakers, conversation.turns, strict=True))
    before = turns[max(0, index - CONTEXT_TURNS) : index]
    context = [(speaker, turn.text, dataset.cache.codes[turn.utt_id]) for speaker, turn in before]
    speaker, turn = turns[index]
    return speak_after(model, tokenizer, dataset.text_tokenizer, context, speaker, turn.text, sampling, seed)


def evaluate_model(
    model: CSM, tokenizer: AudioTokenizer, dataset: ConversationDataset, tools: Tools, settings: Settings, audio: Path
) -> dict:
    """Losses, and what the model says when it runs freely, beside the real turns through the same tokenizer."""
    begin = time.perf_counter()
    device = next(model.parameters()).device
    tokenizer = tokenizer.to(device)
    losses = held_out_losses(model, dataset, settings.max_clips, device, settings.seed)
    choices = choose_replies(dataset.conversations, settings.max_replies, settings.seed)
    inference = InferenceModel(model)
    tally, waves, rows = Tally(), [], []
    voices: list[dict[str, np.ndarray]] = []  # what each reply is compared with
    for number, (conversation, index) in enumerate(tqdm(choices, desc="speaking", unit="turn")):
        reply = speak(inference, tokenizer, dataset, conversation, index, settings.sampling(), settings.seed + number)
        turn, speaker = conversation.turns[index], conversation.speakers[index]
        before = range(max(0, index - CONTEXT_TURNS), index)
        codes = {i: dataset.cache.codes[conversation.turns[i].utt_id] for i in (*before, index)}
        own = hear_codes(tokenizer, [codes[i] for i in before if conversation.speakers[i] == speaker])
        others = hear_codes(tokenizer, [codes[i] for i in before if conversation.speakers[i] != speaker])
        real = hear_codes(tokenizer, [codes[index][:, : settings.codebooks]])
        waves.append({GENERATED: reply.samples, REAL: real})
        voices.append({"own": own, "others": others})
        time_reply(tally, GENERATED, conversation_of(turn), reply)
        row = {"id": turn.utt_id, "speaker": turn.speaker_id, "text": turn.text, "seconds": reply.duration}
        paths = save_audio(audio, f"reply-{number:02d}", {**waves[-1], "prompt, the speaker's turns before": own})
        rows.append({**row, "ended": reply.ended, "audio": paths})
    conversations = [conversation_of(conversation.turns[0]) for conversation, _ in choices]
    if tools.recognizer is not None:
        listen(tools.recognizer, tally, conversations, rows, waves)
    if tools.encoder is not None:
        compare_replies(tools, tally, conversations, waves, voices)
    hear_conversations(tally, choices, waves)
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "codes": model.config.codebook_size,
        "losses": [dataclasses.asdict(figure) for figure in losses],
        "figures": plain(tally.figures(settings.seed)),
        "replies": rows,
        "device": device.type,
        "seconds": time.perf_counter() - begin,
    }


def conversation_metrics_missing() -> dict[str, str]:
    """Metrics of `CONVERSED` that cannot be had here, and what to install."""
    try:
        missing = packages_missing()
    except MissingRequirement as reason:
        return dict.fromkeys(CONVERSED, str(reason))
    return {metric: missing[metric] for metric in CONVERSED if metric in missing}


def hear_conversations(
    tally: Tally, choices: Sequence[tuple[Conversation, int]], waves: Sequence[dict[str, np.ndarray]]
) -> None:
    """`CONVERSED` of the generated and of the real turns, conversation by conversation."""
    missing = conversation_metrics_missing()
    turns: dict[str, dict[str, Turns]] = {GENERATED: {}, REAL: {}}  # system -> conversation -> its chosen turns
    order = sorted(range(len(choices)), key=lambda i: choices[i][1])
    for system, found in turns.items():
        for conversation, index, samples in ((*choices[i], waves[i][system]) for i in order):
            turn = conversation.turns[index]
            found.setdefault(conversation_of(turn), []).append(Turn(turn.speaker_id, turn.text, samples, None))
    wanted = [metric for metric in CONVERSED if metric not in missing]
    human = Human.of(turns[REAL]) if wanted else Human({}, {})
    for name in tqdm(turns[REAL], desc="prosody", unit="conversation", disable=not wanted):
        for system, found in turns.items():
            heard = Heard(name, found[name], turns[REAL][name], human, Ears())
            for metric in wanted:
                heard.left_out.clear()
                if tally.add(metric, system, name, MEASURES[metric], heard):
                    without = {LEFT_OUT + reason: turns for reason, turns in heard.left_out.items()}
                    tally.excluded[metric, system].update(without)


def compare_replies(
    tools: Tools,
    tally: Tally,
    conversations: list[str],
    waves: list[dict[str, np.ndarray]],
    voices: list[dict[str, np.ndarray]],
) -> None:
    """Generated and real turns against what the speaker, and the other one, said before; all through the tokenizer."""
    for conversation, systems, prompts in zip(conversations, waves, voices, strict=True):
        own, others = tools.embed(prompts["own"]), tools.embed(prompts["others"])
        spoken = {system: tools.embed(wave) for system, wave in systems.items()}
        pairs = {
            f"{GENERATED} to its speaker's turns before": (GENERATED, own),
            f"{GENERATED} to the other speaker's turns before": (GENERATED, others),
            "baseline: real turn to its speaker's turns before": (REAL, own),
            "baseline: real turn to the other speaker's turns before": (REAL, others),
        }
        for name, (system, voice) in pairs.items():
            tally.add("speaker_similarity", name, conversation, mean_cosine, spoken[system], [voice])


# ---- script ----------------------------------------------------------------------------------------------------------


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
        help=f"trained speech model (default: {CHECKPOINT}, if there, else {SHIPPED} with its own tokenizer, else "
        "only the tokenizer is)",
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
        help="check the tokenizer against its gates instead: a table, and pictures in --out; no report is written",
    )
    parser.add_argument(
        "--validate",
        action="store_true",
        help="show instead that each metric tells good from bad: degrades --max_clips turns of held-out conversations "
        "in known ways; a table, and a picture in --out. Exit code 3 if a metric fails",
    )
    parser.add_argument(
        "--systems",
        nargs="+",
        type=named_folder,
        metavar="NAME=PATH",
        help="compare instead what systems said in the same conversations; a PATH is a manifest or a folder as for "
        "collect_data.py --input, the first one is the reference, best human; comparison.html in --out",
    )
    listen_help = "with two --systems: also a page to compare so many turns by ear, blind; listening.html in --out"
    parser.add_argument("--listening", type=int, default=0, metavar="N", help=listen_help)
    answers_help = "count what listeners saved from that page, with the listening_key.json in --out"
    parser.add_argument("--answers", nargs="+", type=Path, metavar="FILE", help=answers_help)
    ser_help = "with --systems: hear emotions by this audio classifier, a hub name or a folder (default: none)"
    parser.add_argument("--ser", default="", metavar="MODEL", help=ser_help)
    squim_help = "with --systems: also quality as SQUIM hears it; downloads its weights once"
    parser.add_argument("--squim", action="store_true", help=squim_help)
    workers_help = "processes of --validate and --systems (default: number of cores)"
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help=workers_help)
    parser.add_argument("--json", action="store_true", help="print the figures as one JSON object on the last line")
    return with_defaults(parser.parse_args(argv))


def with_defaults(args: argparse.Namespace) -> argparse.Namespace:
    """What was not given: the newest of one's own, else what is shipped; and how that voice is best spoken with."""
    if args.tokenizer is None:
        args.tokenizer = SHIPPED / "tokenizer" if not TOKENIZER.is_dir() and SHIPPED.is_dir() else TOKENIZER
    if args.checkpoint is None:
        own = SHIPPED if args.tokenizer == SHIPPED / "tokenizer" else CHECKPOINT
        args.checkpoint = own if (own / "model.safetensors").is_file() else None
    spoken = {"temperature": Settings().temperature, **read_speaking(args.checkpoint or CHECKPOINT).sampling}
    for name in ("codebooks", "temperature"):
        if getattr(args, name) is None:
            setattr(args, name, spoken.get(name))
    return args


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
    shared |= {"format": FORMAT, "tokenizer": tokenizer.fingerprint(), "missing": sorted(tools.missing)}
    shared |= {"data": file_digest(args.data / "shards.jsonl")}
    report = {
        "format": FORMAT,
        "environment": describe_environment(),
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
    report["model_absent"] = f"there is no checkpoint at {checkpoint}" if model is None else None
    if model is not None:
        own = {"checkpoint": file_digest(checkpoint / "model.safetensors"), "device": args.device}
        own["missing"] = sorted({*tools.missing, *conversation_metrics_missing()})
        report["model"] = reuse_or_measure(
            args.out,
            "model",
            {**shared, **dataclasses.asdict(settings), **own, "steps": steps_of(checkpoint)},
            lambda audio: evaluate_model(
                model, tokenizer, held_out(args.data, model, tokenizer), tools, settings, audio
            ),
        )
    return {**report, "warnings": collect_warnings(report), "note": model_note(report)}


def ears_of(args: argparse.Namespace) -> tuple[Ears, dict[str, str]]:
    """What listens to conversations, and why metrics are missing: a package, or a model that was asked for."""
    ears, missing = Ears.to_be_had(args.asr, args.ser, args.squim)
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
        "data": file_digest(args.data / "shards.jsonl"),
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
    figures, found = figures_of(measured, settings.seed), differences(measured, settings.seed)
    report = {
        "format": FORMAT,
        "environment": describe_environment(),
        "settings": dataclasses.asdict(settings),
        "systems": [name for name, _ in args.systems],
        "missing": missing,
        "warnings": [f"{m} was not measured: {reason}." for m, reason in missing.items()] + warnings_of(systems, found),
        "figures": plain(figures),
        "differences": [dataclasses.asdict(each) for each in found],
        "measured": measured,
        "note": "Means over conversations, in brackets 95 % bootstrap intervals over them; then the difference to "
        f"{args.systems[0][0]} over shared conversations and p of the sign-flip test, corrected by Holm.",
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


def held_out(data: Path, model: CSM, tokenizer: AudioTokenizer) -> ConversationDataset:
    """The held-out conversations as the model reads them."""
    text_tokenizer = load_text_tokenizer(model.config.text_tokenizer)
    cache, c = TokenCache(data, tokenizer), model.config
    return ConversationDataset(data, "test", cache, text_tokenizer, c.layout, c.max_positions)


def steps_of(checkpoint: Path) -> int | None:
    """How long the run in this folder trained, if it says so."""
    logged = read_metrics(checkpoint)
    return logged[-1]["step"] + 1 if logged else None


def main(argv: list[str] | None = None) -> int:
    args = parse_flags(argv)
    settings = Settings(**{f.name: getattr(args, f.name) for f in dataclasses.fields(Settings)})
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        raise MissingRequirement(f"device {args.device!r} asked for, but this torch sees no CUDA; use --device cpu")
    torch.set_num_threads(args.threads)
    with only_run_in(args.out):
        if args.gates:
            gates = measure_gates(args, settings)
            print(json.dumps(gates, allow_nan=False) if args.json else f"pictures: {args.out}")
            return EXIT_DONE
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
