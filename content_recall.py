"""Whether a speaker still knows, k exchanges later, what he was told: conversations and the metric.

Somebody tells a fact, k other exchanges follow, he asks for the fact, and the system answers in its own words: right if
a recogniser hears the word in the answer. Sentences: `corpus/recall.json`, written for this project. How well a voice
and a style are kept over turns is measured in any conversation: `conversation_metrics.py`.

    python content_recall.py --out recall.json    # the conversations, for demo.py --mode batch --input recall.json
"""

from __future__ import annotations

import argparse
import functools
import json
import re
from collections.abc import Sequence
from pathlib import Path

from checkpointing import write_atomically
from command_line import EXIT_CODES_HELP, EXIT_DONE, Several, run
from speech_metrics import NOT_ASKED, Metric, NotMeasurable, normalise

SENTENCES = Path(__file__).parent / "corpus" / "recall.json"
NAME = re.compile(r"recall-([a-z]+)-([0-9]+)")
USER, SYSTEM = 0, 1

CONTENT_RECALL = Metric(
    title="Content recall",
    unit="share right",
    better="higher",
    definition="Share of conversations in which the last turn, as a recogniser hears it, holds the word that was told "
    "k exchanges before; conversations of `content_recall.py`.",
    reference="0 without memory or understanding; known answers: 1",
    source="after the recall tasks of long-context benchmarks; sentences of this project",
    needs=("faster_whisper", "whisper_normalizer"),
)


@functools.cache
def _content() -> dict:
    return json.loads(SENTENCES.read_text(encoding="utf-8"))


def most_between() -> int:
    return len(_content()["between"])


def conversations(between: Sequence[int]) -> dict[str, list[dict]]:
    """Name -> turns as `demo.py --mode batch` takes them; every fact at every distance. The last turn is the system's.

    ValueError: a distance that there are not enough exchanges for.
    """
    if wrong := [k for k in between if not 0 <= k <= most_between()]:
        raise ValueError(f"{wrong[0]} exchanges between telling and asking; 0 to {most_between()} are there")
    made = {}
    for number, fact in enumerate(_content()["facts"]):
        for k in between:
            others = [_content()["between"][(number + i) % most_between()] for i in range(k)]
            said = [(USER, fact["told"]), (SYSTEM, "I see.")]
            said += [turn for pair in others for turn in zip((USER, SYSTEM), pair, strict=True)]
            turns = [{"speaker": speaker, "text": text} for speaker, text in (*said, (USER, fact["asked"]))]
            made[f"recall-{fact['name']}-{k}"] = [*turns, {"speaker": SYSTEM}]
    return made


def answers_to(name: str) -> list[str]:
    """Words of which one must be in the answer of the conversation `name`. NotMeasurable: it is none of these."""
    if (answers := _answers(name)) is None:
        raise NotMeasurable(f"{NOT_ASKED}not a conversation that asks for what was told")
    return answers


def is_recall(name: str) -> bool:
    """Whether it is the name of one of these conversations."""
    return _answers(name) is not None


def _answers(name: str) -> list[str] | None:
    found = NAME.fullmatch(name)
    return {fact["name"]: fact["answers"] for fact in _content()["facts"]}.get(found[1]) if found else None


def turns_between(name: str) -> int:
    """Exchanges between telling and asking in the conversation `name`. NotMeasurable: it is none of these."""
    answers_to(name)
    return int(NAME.fullmatch(name)[2])


def recalled(name: str, answer: str) -> float:
    """1 if the answer, as it was heard, holds the word that the conversation `name` asks for, else 0."""
    return float(bool(set(answers_to(name)) & set(normalise(answer).split())))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Write the conversations as demo.py --mode batch speaks and answers them.", epilog=EXIT_CODES_HELP
    )
    parser.add_argument("--out", type=Path, default=Path("recall.json"), help="(default: recall.json)")
    help_text = f"exchanges between telling and asking, 0 to {most_between()} (default: 0 2 5)"
    parser.add_argument("--between", type=int, action=Several, default=[0, 2, 5], metavar="K", help=help_text)
    args = parser.parse_args(argv)
    made = [{"id": name, "turns": turns} for name, turns in conversations(args.between).items()]
    write_atomically(args.out, (json.dumps({"conversations": made}, indent=1) + "\n").encode())
    print(f"{args.out}: {len(made)} conversations")
    return EXIT_DONE


if __name__ == "__main__":
    raise SystemExit(run(main))
