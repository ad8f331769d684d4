"""Does a model keep the voice and the style it hears? python benchmarks/voices_and_styles.py --report DIR --data DIR

Takes what `evaluation_framework.py --checkpoint` wrote about a model that was trained on several voices and styles
(`collect_data.py --voices ... --styles ...`): each turn was spoken after real turns of its speaker in its style. Voice:
the nearest of the speakers' mean embeddings (resemblyzer). Style: the most likely of the speaker's styles by six
features of prosody that are normal in each style with one covariance (linear discriminant). Both are learnt from turns
of the training split, and told of the real turns too, through the same codebooks: no classifier is perfect.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from tqdm import tqdm

from audio import read_audio
from command_line import EXIT_CODES_HELP, EXIT_DONE, run
from conversation_metrics import Prosody, prosody_of
from conversations import load_clips
from evaluation_report import GENERATED, REAL
from run_folder import describe_environment
from speech_metrics import Figure, Item, NotMeasurable, SpeakerEncoder, bootstrap
from speech_sources import read_utf8
from turn_shards import read_turns

FEATURES = ("pitch", "pitch_spread", "level_spread", "rate", "pause_share", "tilt")
Heard = tuple[str, str, np.ndarray, str]  # speaker, style, (N,) samples at 24 kHz, text


def features(prosody: Prosody) -> np.ndarray:
    """(6,) without the level, which every conversation is brought to the same of."""
    return np.array([getattr(prosody, name) for name in FEATURES])


class Listener:
    """Tells voices and styles as the turns it was given have them. ValueError: a single voice or style."""

    def __init__(self, turns: Sequence[Heard]):
        self.encoder = SpeakerEncoder()
        voices: dict[str, list[np.ndarray]] = defaultdict(list)
        styles: dict[tuple[str, str], list[np.ndarray]] = defaultdict(list)
        for speaker, style, samples, text in tqdm(turns, desc="learning voices and styles", unit="turn"):
            try:
                styles[speaker, style].append(features(prosody_of(samples, text)))
                voices[speaker].append(self.encoder.embed(samples))
            except NotMeasurable:
                continue
        if len(voices) < 2 or len({style for _, style in styles}) < 2:
            raise ValueError("the data has a single voice or style, so that there is nothing to tell apart")
        self.voices = {speaker: np.mean(own, axis=0) for speaker, own in voices.items()}
        self.styles = {key: np.mean(own, axis=0) for key, own in styles.items()}
        within = np.concatenate([np.array(own) - self.styles[key] for key, own in styles.items()])
        self.precision = np.linalg.pinv(np.cov(within.T))

    def require(self, speaker: str) -> None:
        """NotMeasurable: nothing of the speaker was learnt, so that neither can be told."""
        if speaker not in self.voices:
            raise NotMeasurable("no turn of the speaker was learnt")

    def voice(self, samples: np.ndarray) -> str:
        own = self.encoder.embed(samples)
        return max(self.voices, key=lambda speaker: own @ self.voices[speaker] / np.linalg.norm(self.voices[speaker]))

    def style(self, speaker: str, samples: np.ndarray, text: str) -> str:
        self.require(speaker)
        own = features(prosody_of(samples, text))
        known = {style: own - mean for (who, style), mean in self.styles.items() if who == speaker}
        return min(known, key=lambda style: known[style] @ self.precision @ known[style])


def told(listener: Listener, turns: Sequence[tuple[str, Heard]], seed: int) -> dict[str, Figure]:
    """Shares of turns, each with its conversation, whose voice and style are told right; the styles one by one too."""
    right: dict[str, list[Item]] = defaultdict(list)
    without: dict[str, Counter[str]] = defaultdict(Counter)
    for conversation, (speaker, style, samples, text) in turns:
        try:
            listener.require(speaker)
            right["voice"].append(Item(conversation, float(listener.voice(samples) == speaker)))
        except NotMeasurable as reason:
            without["voice"][str(reason)] += 1
        try:
            item = Item(conversation, float(listener.style(speaker, samples, text) == style))
        except NotMeasurable as reason:
            without["style"][str(reason)] += 1
        else:
            right["style"].append(item)
            right[style].append(item)
    return {name: bootstrap(items, without[name], seed) for name, items in right.items()}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXIT_CODES_HELP, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--report", type=Path, default=Path("runs/report"), help="of evaluation_framework.py (default: %(default)s)")
    add("--data", type=Path, required=True, help="the data that it measured the model on")
    add("--learn", type=int, default=800, help="turns that voices and styles are learnt from (default: %(default)s)")
    add("--seed", type=int, default=0, help="of their choice and of the intervals (default: %(default)s)")
    add("--json", action="store_true", help="print the figures as one JSON object on the last line")
    args = parser.parse_args(argv)
    replies = (json.loads(read_utf8(args.report / "report.json")).get("model") or {}).get("replies")
    if not replies:
        raise ValueError(
            f"{args.report} is the report of a tokenizer alone; give evaluation_framework.py a --checkpoint"
        )
    known = {turn.utt_id: turn for turn in read_turns(args.data, with_audio=False)}
    if missing := [row["id"] for row in replies if row["id"] not in known]:
        raise ValueError(f"{args.data} has no turn {missing[0]}: it is not the data of {args.report}")
    learnt = load_clips(args.data, "train", args.learn, args.seed)
    listener = Listener([(turn.speaker_id, turn.style or "none", samples, turn.text) for turn, samples in learnt])
    found = {}
    for system in (REAL, GENERATED):
        turns = []
        for row in tqdm(replies, desc=system, unit="turn"):
            turn = known[row["id"]]
            path = row["audio"].get(system)  # a reply without a frame has none
            samples = read_audio(args.report / path)[0] if path else np.zeros(0, dtype=np.float32)
            turns.append((turn.conv_key, (turn.speaker_id, turn.style or "none", samples, turn.text)))
        found[system] = told(listener, turns, args.seed)
    for name in found[REAL]:
        row = [f"{name:10}"]
        for system, figures in found.items():
            f = figures.get(name)
            interval = "" if f is None or f.low is None else f" [{100 * f.low:.0f}, {100 * f.high:.0f}]"
            row.append(f"{system}: {100 * f.value:.1f} %{interval} of {f.n}" if f else f"{system}: none")
        print("   ".join(row))
    if args.json:
        values = {system: {name: dataclasses.asdict(f) for name, f in own.items()} for system, own in found.items()}
        print(json.dumps({**values, "environment": describe_environment()}))
    return EXIT_DONE


if __name__ == "__main__":
    raise SystemExit(run(main))
