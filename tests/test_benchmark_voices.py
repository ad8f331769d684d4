"""Whether voices and styles that are known are told."""

from __future__ import annotations

import importlib
import json

import numpy as np
import pytest
from conftest import voice

from command_line import EXIT_INPUT, run

benchmark = importlib.import_module("benchmarks.voices_and_styles")
pytest.importorskip("resemblyzer")
pytest.importorskip("parselmouth")
PITCHES = {("a", "calm"): 100, ("a", "excited"): 130, ("b", "calm"): 210, ("b", "excited"): 270}


def turns(n: int, seed: int) -> list:
    """(conversation, (speaker, style, samples, text)): styles differ in pitch, voices in pitch and colour."""
    random, found = np.random.default_rng(seed), []
    for index in range(n):
        for (speaker, style), pitch in PITCHES.items():
            samples = voice(2 + random.random(), pitch * random.uniform(0.97, 1.03), rate=24_000)
            if speaker == "b":
                samples = np.diff(samples, prepend=samples[:1]) * 4
            noise = 0.001 * random.standard_normal(len(samples)).astype(np.float32)
            found.append((f"{speaker}{style}{index}", (speaker, style, samples + noise, "x" * random.integers(20, 30))))
    return found


def test_known_voices_and_styles_are_told_and_false_ones_are_not():
    listener = benchmark.Listener([turn for _, turn in turns(6, seed=0)])
    right = turns(3, seed=1)
    figures = benchmark.told(listener, right, seed=0)
    assert {name: figure.value for name, figure in figures.items()} == dict.fromkeys(figures, 1.0)
    assert set(figures) == {"voice", "style", "calm", "excited"} and figures["style"].n == len(right)
    other = {"a": "b", "b": "a", "calm": "excited", "excited": "calm"}
    wrong = [(name, (speaker, other[style], *rest)) for name, (speaker, style, *rest) in right]
    assert benchmark.told(listener, wrong, seed=0)["style"].value == 0
    wrong = [(name, (other[speaker], style, *rest)) for name, (speaker, style, *rest) in right]
    assert benchmark.told(listener, wrong, seed=0)["voice"].value == 0
    unknown = benchmark.told(listener, [(name, ("c", *rest)) for name, (_, *rest) in right], seed=0)
    assert not unknown  # nobody learnt who c is


def test_the_report_must_be_of_a_model_and_of_this_data(tmp_path, shared_data, capsys):
    for model, message in ((None, "of a tokenizer alone"), ({"replies": [{"id": "x"}]}, "has no turn x")):
        (tmp_path / "report.json").write_text(json.dumps({"model": model}))
        flags = ["--report", str(tmp_path), "--data", str(shared_data)]
        assert run(benchmark.main, flags) == EXIT_INPUT
        assert message in capsys.readouterr().err
