"""The shipped voice: small enough, whole, and understood by a recogniser."""

from pathlib import Path

import numpy as np
import pytest

from command_line import EXIT_DONE, run
from demo import main, parse_flags, voice_of
from generation import SHIPPED, check_tokenizer
from speech_metrics import Recognizer, count_errors

FOLDER = Path(__file__).resolve().parent.parent / SHIPPED
MOST_BYTES = 60e6
SENTENCES = (  # not in the data it was trained on
    "The train leaves at ten forty-five and arrives at half past two.",
    "We meet on Wednesday at nine twenty.",
    "There are four hundred and eleven people here.",
    "Your room is number sixty-three.",
)


@pytest.fixture(scope="module")
def engine():
    return voice_of(parse_flags(["--checkpoint", str(FOLDER)])).load()


def test_it_is_small_and_says_where_it_is_from(engine):
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < MOST_BYTES
    check_tokenizer(engine.model.model.config, engine.tokenizer)
    card = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert all(word in card for word in ("steps", "seed", "hardware", "Licence", " h, "))


def test_it_reads_sentences_that_a_recogniser_understands(engine):
    """Half of the words at least, where the text of another sentence would get next to none right."""
    recognizer, heard = Recognizer(), []
    for seed, text in enumerate(SENTENCES):
        reply = engine.conversation(seed).speak(0, text)
        assert reply.ended and np.isfinite(reply.samples).all()
        heard.append(recognizer.transcribe(reply.samples))

    def rate(transcripts: list[str]) -> float:
        errors = [count_errors(text, said) for text, said in zip(SENTENCES, transcripts, strict=True)]
        return sum(each.wrong for each in errors) / sum(each.words for each in errors)

    assert rate(heard) < 0.5, heard
    assert rate([*heard[1:], heard[0]]) > 0.9


def test_the_demo_speaks_with_it_by_default(tmp_path, capsys):
    flags = ["--mode", "batch", "--input", str(FOLDER.parents[1] / "corpus" / "spoken_numbers.json")]
    assert run(main, [*flags, "--checkpoint", str(FOLDER), "--out", str(tmp_path / "out")]) == EXIT_DONE
    assert len(list((tmp_path / "out").glob("*/conversation.wav"))) == 3
    assert parse_flags(flags).checkpoint == str(SHIPPED)
