"""Do a model's replies answer what was asked? python benchmarks/fitting_replies.py runs/replies

Takes what `demo.py --mode batch` wrote for requests of `export_conversations.py --to replies` on data of the source
`questions`. A reply fits if it is one of the answers in corpus/questions.txt to the question before it, with any values
in the slots but those that the question named. By chance: every reply held against the next three questions instead.
The spoken words are not heard here; `evaluation_framework.py --systems` does that.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from command_line import EXIT_CODES_HELP, EXIT_DONE, run
from speech_sources import QUESTIONS, read_patterns
from synthetic_voices import (
    CENTS,
    MINUTES,
    MONTHS,
    ONES,
    ORDINALS,
    SLOT,
    WEEKDAYS,
    number_words,
    price_words,
    slot_kind,
    time_words,
)


def any_of(values: list[str]) -> str:
    """Longest first, so that "two" does not end where "two hundred" stands."""
    return "|".join(sorted(map(re.escape, values), key=len, reverse=True))


DIGIT = any_of(ONES[:10])
VALUES = {
    "weekday": any_of(WEEKDAYS),
    "date": f"the (?:{any_of(ORDINALS)}) of (?:{any_of(MONTHS)})",
    "number": any_of([number_words(n) for n in range(3, 100)]),
    "big": any_of([number_words(n) for n in range(101, 2401)]),
    "time": any_of([time_words(h, m) for h in range(1, 13) for m in MINUTES]),
    "price": any_of([price_words(d, c) for d in range(3, 161) for c in set(CENTS)]),
    "phone": f"(?:{DIGIT}) (?:{DIGIT}) (?:{DIGIT}), (?:{DIGIT}) (?:{DIGIT}) (?:{DIGIT}) (?:{DIGIT})",
}


def patterns() -> list[tuple[re.Pattern[str], str]]:
    """Of every line: what matches its question, its values by name, and its answer as it stands."""
    lines = read_patterns(QUESTIONS)
    return [(re.compile(expression(question, {}), re.IGNORECASE), answer) for question, answer in lines]


def expression(text: str, known: dict[str, str]) -> str:
    """A text with slots, each there once -> a regular expression, `known` values as they are."""
    parts = SLOT.split(text)  # outside, slot, outside, ...
    found = [re.escape(part) for part in parts]
    for place in range(1, len(parts), 2):
        slot = parts[place]
        values = VALUES[slot_kind(slot)]
        found[place] = re.escape(known[slot]) if slot in known else f"(?P<{slot}>{values})"
    return "".join(found)


def fits(question: str, reply: str, known: list[tuple[re.Pattern[str], str]]) -> bool:
    """Whether a reply is an answer to the question, among `patterns()`; False if nobody asks that."""
    for pattern, answer in known:
        if asked := pattern.fullmatch(question):
            answered = re.fullmatch(expression(answer, asked.groupdict()), reply, re.IGNORECASE)
            if answered and all_differ({**asked.groupdict(), **answered.groupdict()}):
                return True
    return False


def all_differ(values: dict[str, str]) -> bool:
    """Whether the slots of each kind, as {time} and {time2}, hold different values."""
    said = [(slot_kind(slot), value.lower()) for slot, value in values.items()]
    return len(set(said)) == len(said)


def exchanges(folder: Path) -> list[tuple[str, str]]:
    """(question, reply) of all conversations of a batch. ValueError: there are none."""
    found = []
    for path in sorted(folder.glob("*/result.json")):
        turns = json.loads(path.read_text(encoding="utf-8"))["turns"]
        found += [
            (before["text"], turn["text"])
            for before, turn in itertools.pairwise(turns)
            if "heard" in before and "heard" not in turn
        ]
    if not found:
        raise ValueError(f"{folder} holds no replies to turns that were heard; see --help")
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXIT_CODES_HELP, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="of demo.py --mode batch")
    parser.add_argument("--json", action="store_true", help="print the figures as one JSON object on the last line")
    args = parser.parse_args(argv)
    found, known = exchanges(args.folder), patterns()
    right = [fits(question, reply, known) for question, reply in found]
    n = len(found)
    others = [k for k in (1, 2, 3) if k % n]
    chance = [fits(found[(i + k) % n][0], reply, known) for i, (_, reply) in enumerate(found) for k in others]
    for (question, reply), fit in zip(found, right, strict=True):
        print(f"{'fits ' if fit else 'WRONG'}  {question}  {reply}")
    figures = {"replies": n, "fitting": sum(right) / n, "by_chance": sum(chance) / len(chance) if chance else None}
    print(f"{n} replies, {figures['fitting']:.0%} fit the question; of other questions {sum(chance)} of {len(chance)}")
    if args.json:
        print(json.dumps(figures))
    return EXIT_DONE


if __name__ == "__main__":
    raise SystemExit(run(main))
