"""Hear a checkpoint speak: python demo.py --mode test

Speaks fixed conversations to wav files and measures, for each turn, its duration, the time to its first audio and the
real-time factor (compute time over audio time, below 1 is faster than speech).
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from architecture import CSM, load_model
from audio import SAMPLE_RATE, read_audio, rms_dbfs, write_wav
from audio_tokenizer import AudioTokenizer
from checkpointing import write_atomically
from command_line import EXIT_CODES_HELP, EXIT_DONE, only_run_in, run
from generation import Conversation, Reply, Sampling
from run_folder import describe_environment, read_settings
from rvq_tokenizer import load_tokenizer
from text_tokenizer import load_text_tokenizer

TEST_CONVERSATIONS: dict[str, list[tuple[int, str]]] = {  # (speaker, text)
    "one-sentence": [(0, "Good morning, it is nice to hear from you.")],
    "two-friends": [
        (0, "Have you eaten yet? I was about to make some soup."),
        (1, "Not yet, and soup sounds wonderful. What kind is it?"),
        (0, "Tomato, with the bread we bought on Saturday."),
        (1, "Then I will be there in twenty minutes."),
    ],
    "good-news": [
        (0, "You will not believe it, they gave me the job!"),
        (1, "That is fantastic! When do you start?"),
    ],
}
GAP_SECONDS = 0.3  # of silence between the turns of a conversation's file
FEW_STEPS = 5000  # below this a model of any size babbles
BABBLE = (
    "This model was trained for {steps} steps, so its voice babbles: speech-like sound without words. To read its "
    "text it needs 10 or more hours of varied speech and tens of thousands of steps; see the README, 'What to expect'."
)


def parse_flags(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], epilog=EXIT_CODES_HELP)
    defaults = " (default: %(default)s)"
    parser.add_argument("--mode", choices=["test"], default="test", help="test: speak fixed conversations" + defaults)
    parser.add_argument(
        "--checkpoint", type=Path, default=Path("runs/minimal"), help="folder of a trained model" + defaults
    )
    parser.add_argument(
        "--tokenizer",
        type=Path,
        default=Path("runs/tokenizer"),
        help="folder of its tokenizer, or kyutai/mimi" + defaults,
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/demo"), help="folder for wav files and summary" + defaults
    )
    parser.add_argument(
        "--voice", type=Path, help="wav, flac, ogg or mp3 that speaker 0 is to sound like; needs --voice_text"
    )
    parser.add_argument("--voice_text", help="what is said in --voice")
    parser.add_argument("--temperature", type=float, default=Sampling.temperature, help="0 = likeliest code" + defaults)
    parser.add_argument("--codebooks", type=int, help="speak with the first so many of every frame; fewer are faster")
    parser.add_argument("--top_k", type=int, default=Sampling.top_k, help="codes to draw from" + defaults)
    parser.add_argument("--max_seconds", type=float, default=5.0, help="cut a turn that has not ended" + defaults)
    parser.add_argument("--min_seconds", type=float, default=1.5, help="a turn does not end before" + defaults)
    parser.add_argument("--seed", type=int, default=0, help="of the draws" + defaults)
    parser.add_argument(
        "--threads", type=int, default=1, help="CPU threads; one is fastest for single frames" + defaults
    )
    args = parser.parse_args(argv)
    if (args.voice is None) != (args.voice_text is None):
        parser.error("--voice and --voice_text go together: the clip and what is said in it")
    return args


def speak_conversation(conversation: Conversation, turns: list[tuple[int, str]], folder: Path, bar: tqdm) -> list[dict]:
    """Speak the turns, write one wav per turn and `conversation.wav`; one row of measurements per turn."""
    folder.mkdir(parents=True, exist_ok=True)
    pieces, rows = [], []
    for number, (speaker, text) in enumerate(turns, start=1):
        reply = conversation.speak(speaker, text)
        path = folder / f"turn-{number}-speaker-{speaker}.wav"
        if len(reply.samples):
            write_wav(path, reply.samples)
            pieces += [reply.samples, np.zeros(int(GAP_SECONDS * SAMPLE_RATE), dtype=np.float32)]
        rows.append(measure(reply, speaker, text, path))
        bar.update()
    if pieces:
        write_wav(folder / "conversation.wav", np.concatenate(pieces[:-1]))
    return rows


def measure(reply: Reply, speaker: int, text: str, path: Path) -> dict:
    """What is reported of a turn; numbers that an empty turn does not have are None."""
    numbers = {
        "seconds": reply.duration,
        "seconds_to_first_audio": reply.seconds_to_first_audio,
        "real_time_factor": reply.real_time_factor,
        "level_dbfs": float(rms_dbfs(reply.samples)),
    }
    finite = {name: round(value, 4) if math.isfinite(value) else None for name, value in numbers.items()}
    file = str(path) if len(reply.samples) else None
    return {"speaker": speaker, "text": text, "file": file, **finite, "ended_by_itself": reply.ended}


def warm_up(model: CSM, tokenizer: AudioTokenizer) -> None:
    """One short turn, so that the first measured turn does not pay for first calls."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        talk = Conversation(
            model, tokenizer, load_text_tokenizer(model.config.text_tokenizer), sampling=Sampling(max_seconds=0.4)
        )
        talk.speak(0, "Hello.")


def test_mode(args: argparse.Namespace, model: CSM, tokenizer: AudioTokenizer) -> dict[str, list[dict]]:
    """Speak all fixed conversations; rows per conversation."""
    text_tokenizer = load_text_tokenizer(model.config.text_tokenizer)
    sampling = Sampling(
        temperature=args.temperature,
        top_k=args.top_k,
        max_seconds=args.max_seconds,
        min_seconds=args.min_seconds,
        codebooks=args.codebooks,
    )
    voice = read_audio(args.voice)[0] if args.voice else None
    results = {}
    n_turns = sum(len(turns) for turns in TEST_CONVERSATIONS.values())
    with tqdm(total=n_turns, desc="speaking", unit="turn") as bar:
        for name, turns in TEST_CONVERSATIONS.items():
            conversation = Conversation(model, tokenizer, text_tokenizer, sampling=sampling, seed=args.seed)
            if voice is not None:
                conversation.add_turn(0, args.voice_text, samples=voice)
            results[name] = speak_conversation(conversation, turns, args.out / name, bar)
    return results


def print_results(results: dict[str, list[dict]], args: argparse.Namespace) -> None:
    timing = f"{'first audio':>13}{'real-time factor':>18}"
    print(f"{'conversation':14}{'turn':>5}{'speaker':>8}{'seconds':>9}{timing}{'level':>9}  end")
    rows = [(name, number, row) for name, group in results.items() for number, row in enumerate(group, start=1)]
    for name, number, row in rows:
        if row["file"] is None:
            print(f"{name:14}{number:>5}{row['speaker']:>8}{'empty':>9}")
            continue
        level = f"{row['level_dbfs']:.1f} dB" if row["level_dbfs"] is not None else "silent"
        end = "by itself" if row["ended_by_itself"] else f"cut at {args.max_seconds:g} s"
        timing = f"{row['seconds_to_first_audio'] * 1000:>10.0f} ms{row['real_time_factor']:>18.2f}"
        print(f"{name:14}{number:>5}{row['speaker']:>8}{row['seconds']:>9.2f}{timing}{level:>9}  {end}")
    spoken = [row for _, _, row in rows if row["file"]]
    if spoken:
        first = statistics.median(row["seconds_to_first_audio"] for row in spoken) * 1000
        factor = statistics.median(row["real_time_factor"] for row in spoken)
        print(f"median: first audio after {first:.0f} ms, real-time factor {factor:.2f}")


def main(argv: list[str] | None = None) -> int:
    args = parse_flags(argv)
    if args.threads < 1:
        raise ValueError(f"--threads {args.threads} must be at least 1")
    torch.set_num_threads(args.threads)
    with only_run_in(args.out):
        model, tokenizer = load_model(args.checkpoint), load_tokenizer(args.tokenizer)
        start = time.perf_counter()
        warm_up(model, tokenizer)
        results = test_mode(args, model, tokenizer)
        settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
        summary = {"settings": settings, "environment": describe_environment(), "conversations": results}
        write_atomically(args.out / "summary.json", (json.dumps(summary, indent=2) + "\n").encode())
    print_results(results, args)
    steps = ((read_settings(args.checkpoint) or {}).get("train") or {}).get("max_steps")
    if steps is not None and steps < FEW_STEPS:
        print(BABBLE.format(steps=steps))
    print(f"wav files and summary.json in {args.out}, {time.perf_counter() - start:.0f} s")
    return EXIT_DONE


if __name__ == "__main__":
    raise SystemExit(run(main))
