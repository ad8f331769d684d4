"""How well the forced choice of `pronunciation.py` hears pronunciations that are known, and its thresholds.

    python benchmarks/known_pronunciations.py [--write] [--json]

The piper voice speaks every sentence with either pronunciation, given as phonemes. Thresholds are judged on
sentences that they were not fitted on, also with a share of the homographs said wrongly. Then the voice reads them all.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import re
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))

from audio import SAMPLE_RATE, resample
from checkpointing import write_atomically
from command_line import EXIT_CODES_HELP, EXIT_DONE, run
from pronunciation import RELIABLE, SENTENCES, Asked, PronunciationReader, sentences
from synthetic_voices import load_voice, speak


class Known(NamedTuple):
    """A sentence said with one of the pronunciations."""

    number: int
    asked: Asked
    which: int
    margin: float


WRONG = (0.0, 0.25, 0.5, 0.75, 1.0)  # shares of the homographs that are said wrongly


def spoken_with(voice, text: str, asked: Asked, which: int | None) -> np.ndarray:
    """(N,) at 24 kHz; the word with pronunciation `which`, or as the voice reads it."""
    if which is not None:
        text = re.sub(rf"\b{asked.word.word}\b", f"[[{asked.word.ipa[which]}]]", text, flags=re.IGNORECASE)
    samples, rate = speak(voice, text)
    return resample(samples, rate, SAMPLE_RATE)


def fitted(margins: list[tuple[int, float]]) -> float:
    """(pronunciation, margin) -> the threshold with the most right; halfway between the two margins around it."""
    values = sorted(margin for _, margin in margins if math.isfinite(margin))
    edges = [values[0] - 0.1, *((a + b) / 2 for a, b in itertools.pairwise(values)), values[-1] + 0.1]
    return max(edges, key=lambda edge: (share_right(margins, edge), -abs(edge)))


def share_right(margins: list[tuple[int, float]], threshold: float) -> float:
    """Mean over the two pronunciations of the share that is heard right."""
    return float(np.mean([np.mean([(m <= threshold) == w for w, m in margins if w == which]) for which in (0, 1)]))


def hear_all(seed: int) -> tuple[list[Known], list[tuple[Asked, float]]]:
    """The margins of all sentences with either pronunciation, and as the voice reads them."""
    reader, voice = PronunciationReader(), load_voice(seed)
    known, plain = [], []
    for number, (text, asked) in enumerate(tqdm(sentences().items(), desc="speaking and hearing", unit="sentence")):
        for which in (0, 1):
            margin = reader.margin(spoken_with(voice, text, asked, which), text)
            known.append(Known(number, asked, which, margin))
        plain.append((asked, reader.margin(spoken_with(voice, text, asked, None), text)))
    return known, plain


def fit_words(known: list[Known]) -> dict[str, dict]:
    """Word -> its threshold from all its sentences; the share right by thresholds of every other one on the rest, both
    ways, and with no threshold."""
    found = {}
    for word in dict.fromkeys(each.asked.word.word for each in known):
        rows = [each for each in known if each.asked.word.word == word]
        halves = [[(each.which, each.margin) for each in rows if each.number % 2 == part] for part in (0, 1)]
        limits = [fitted(half) for half in halves]
        right = np.mean([share_right(halves[1 - part], limits[part]) for part in (0, 1)])
        everything = [*halves[0], *halves[1]]
        facts = {"threshold": round(fitted(everything), 4), "known": round(float(right), 3), "limits": limits}
        found[word] = {**facts, "without": round(share_right(everything, 0.0), 3), "n": len(rows)}
    return found


def right_with_wrong_ones(known: list[Known], found: dict[str, dict], seed: int) -> dict[str, float]:
    """Homographs right where a share of them is said wrongly, by thresholds fitted on other sentences."""
    words = {word for word, facts in found.items() if facts["known"] >= RELIABLE}
    rows = [each for each in known if each.asked.meant is not None and each.asked.word.word in words]
    heard = {
        (each.number, each.which): int(each.margin <= found[each.asked.word.word]["limits"][1 - each.number % 2])
        for each in rows
    }
    meant = {each.number: each.asked.meant for each in rows}
    order = np.random.default_rng(seed).permutation(sorted(meant))
    found = {}
    for share in WRONG:
        wrong = set(order[: round(share * len(order))].tolist())
        right = [heard[number, which ^ (number in wrong)] == which for number, which in meant.items()]
        found[str(share)] = round(float(np.mean(right)), 3)
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], epilog=EXIT_CODES_HELP)
    parser.add_argument("--write", action="store_true", help=f"put the thresholds into {SENTENCES.name}")
    parser.add_argument("--seed", type=int, default=0, help="of the voice and of the choice of wrong ones (default: 0)")
    parser.add_argument("--json", action="store_true", help="last line: one JSON object")
    args = parser.parse_args(argv)
    known, plain = hear_all(args.seed)
    found = fit_words(known)
    limits = {word: facts["threshold"] for word, facts in found.items()}
    told = {word for word, facts in found.items() if facts["known"] >= RELIABLE}  # as the metric
    asked_for = [each for each in plain if each[0].meant is not None and each[0].word.word in told]
    read = [(margin <= limits[asked.word.word]) == asked.meant for asked, margin in asked_for]
    report = {"words": found, "wrong": right_with_wrong_ones(known, found, args.seed), "read": float(np.mean(read))}
    print(f"{'word':10} threshold  right  without threshold  n")
    for word, facts in found.items():
        print(f"{word:10} {facts['threshold']:9.4f}  {facts['known']:5.2f}  {facts['without']:17.2f}  {facts['n']}")
    print(f"homographs right with a share said wrongly: {report['wrong']}")
    print(f"the voice reads the plain sentences: homographs right {report['read']:.2f}, n={len(read)}")
    if args.write:
        content = json.loads(SENTENCES.read_text(encoding="utf-8"))
        for entry in (*content["homographs"], *content["words_said_in_two_ways"]):
            entry |= {name: found[entry["word"]][name] for name in ("threshold", "known")}
        write_atomically(SENTENCES, (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())
    if args.json:
        print(json.dumps(report))
    return EXIT_DONE


if __name__ == "__main__":
    raise SystemExit(run(main))
