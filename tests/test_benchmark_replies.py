"""Whether a reply answers the question."""

from __future__ import annotations

import importlib
import itertools
import json

import pytest

from command_line import EXIT_DONE, EXIT_INPUT, run
from speech_sources import question_answers

benchmark = importlib.import_module("benchmarks.fitting_replies")


@pytest.fixture(scope="module")
def known():
    return benchmark.patterns()


def test_every_real_answer_fits_its_question_and_few_fit_another(known):
    pairs = list(itertools.islice(question_answers(), 300))
    assert all(benchmark.fits(question, answer, known) for question, answer in pairs)
    others = [benchmark.fits(a[0], b[1], known) for a, b in itertools.pairwise(pairs)]
    assert sum(others) / len(others) < 0.2


@pytest.mark.parametrize(
    ("question", "reply", "right"),
    [
        ("What time is it?", "It is ten past four.", False),  # no time as it is said here
        ("What time is it?", "It is four ten.", True),
        ("What time is it?", "It is Monday.", False),
        ("Is room nine free?", "Room nine is free on Monday.", True),
        ("Is room nine free?", "Room eight is free on Monday.", False),
        ("Is room nine free?", "Room nine is free on Monday. Room", False),
        ("Do we meet at half past one?", "No, we meet at two ten.", True),
        ("Do we meet at half past one?", "No, we meet at half past one.", False),
        ("Have you eaten?", "It is four ten.", False),
    ],
)
def test_a_reply_fits_word_by_word(question, reply, right, known):
    assert benchmark.fits(question, reply, known) == right


def test_replies_of_a_batch_are_counted(tmp_path, capsys):
    said = [("What time is it?", "It is four ten."), ("Is it three dollars?", "Yes, it is four dollars.")]
    turns = [turn for q, a in said for turn in ({"text": q, "heard": "q.wav"}, {"text": a})]
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "result.json").write_text(json.dumps({"turns": turns}))
    assert run(benchmark.main, [str(tmp_path), "--json"]) == EXIT_DONE
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {"replies": 2, "fitting": 0.5, "by_chance": 0.0}
    (tmp_path / "empty").mkdir()
    assert run(benchmark.main, [str(tmp_path / "empty")]) == EXIT_INPUT
    assert "holds no replies" in capsys.readouterr().err
