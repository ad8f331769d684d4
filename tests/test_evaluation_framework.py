"""The evaluation as a user runs it, on real speech: what it measures, keeps, refuses; that it tells good from bad."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import full_model, tiny_model, tiny_tokenizer, turn_record
from spoken_clips import SENTENCES, other_speaker, speech

import evaluation_framework
import heard_conversations
from architecture import save_model
from audio import SAMPLE_RATE, read_audio, resample
from command_line import EXIT_BUSY, EXIT_DONE, EXIT_INPUT, EXIT_MISSING, only_run_in, run
from conversations import split_of
from dataset_pipeline import ConversationDataset
from evaluation_framework import main
from evaluation_report import FULL, GENERATED, ORIGINAL, REAL, SEMANTIC, collect_warnings, model_note, players, show
from heard_conversations import Ears
from held_out_evaluation import (
    CONTEXT_TURNS,
    CONVERSED,
    Settings,
    choose_replies,
    compare_speakers,
    evaluate_tokenizer,
    held_out_losses,
    listen,
)
from rvq_tokenizer import save_tokenizer
from speech_metrics import Tally
from spoken_validation import Tools
from text_tokenizer import ByteTokenizer
from token_cache import TokenCache
from training import evaluate_losses
from turn_shards import Collection

HELD_OUT = [name for name in (f"talk{i}" for i in range(100)) if split_of(name) == "test"][:2]


@pytest.fixture(scope="module")
def spoken_data(tmp_path_factory):
    """Two held-out conversations of three turns, two speakers."""
    folder = tmp_path_factory.mktemp("spoken") / "data"
    turns = []
    for c, name in enumerate(HELD_OUT):
        for i in range(3):
            sentence = (2 * c + i) % len(SENTENCES)
            samples = resample((speech, other_speaker)[i % 2](sentence), SAMPLE_RATE, 16_000)
            turns.append(turn_record(name, i, "ab"[i % 2], SENTENCES[sentence], samples))
    folder.mkdir()
    Collection(folder).commit("test", "1", HELD_OUT, turns, [])
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    save_model(tiny_model(max_positions=1024), folder)
    return folder


@pytest.fixture(scope="module")
def tools():
    return Tools("bundled")


def flags(data: Path, tokenizer: Path, out: Path, *more: str) -> list[str]:
    sizes = ["--max_clips", "4", "--max_replies", "1"]
    return ["--data", str(data), "--tokenizer", str(tokenizer), "--out", str(out), *sizes, *more]


@pytest.fixture(scope="module")
def finished(spoken_data, tokenizer_folder, checkpoint, tmp_path_factory):
    """The folder of a whole evaluation."""
    out = tmp_path_factory.mktemp("report")
    assert main(flags(spoken_data, tokenizer_folder, out, "--checkpoint", str(checkpoint))) == EXIT_DONE
    return out


def report_of(folder: Path) -> dict:
    return json.loads((folder / "report.json").read_text(encoding="utf-8"))


def test_the_report_tells_originals_from_an_untrained_tokenizer(finished):
    figures = report_of(finished)["tokenizer"]["figures"]
    assert figures["wer"][ORIGINAL]["value"] <= 0.1
    assert figures["wer"][FULL]["value"] >= 0.8 and figures["wer_change"][FULL]["value"] >= 0.7
    assert figures["stoi"][FULL]["value"] < 0.6
    if importlib.util.find_spec("pesq"):  # built from source, so not everywhere
        assert figures["pesq_wb"][FULL]["value"] < 1.5
    assert figures["log_mel_l1"][FULL]["value"] > 0.5


def test_every_figure_accounts_for_every_clip(finished):
    report = report_of(finished)
    for part, clips in (("tokenizer", 4), ("model", 1)):
        for metric, systems in report[part]["figures"].items():
            for system, figure in systems.items():
                assert figure["n"] + sum(figure["excluded"].values()) == clips, (metric, system)
                assert metric in report["metrics"]


def test_the_model_is_heard_in_conversation_beside_the_real_turns(finished):
    figures = report_of(finished)["model"]["figures"]
    assert set(CONVERSED) <= set(figures)
    assert 1 <= figures["dnsmos"][REAL]["value"] <= 5
    contour = figures["pitch_contour"][REAL]  # its own reference; noise, through an untrained tokenizer, has none
    assert contour["value"] == pytest.approx(1) if contour["n"] else contour["excluded"]
    assert figures["emotional_coherence"][REAL]["excluded"]  # one turn has no course


def test_the_markdown_has_every_figure(finished):
    text, report = (finished / "report.md").read_text(encoding="utf-8"), report_of(finished)
    for part in ("tokenizer", "model"):
        for metric, systems in report[part]["figures"].items():
            assert report["metrics"][metric]["title"] in text
            assert all(f"| {system} |" in text for system in systems)


def test_every_figure_comes_with_definition_unit_and_source(finished):
    report = report_of(finished)
    used = {metric for part in ("tokenizer", "model") for metric in report[part]["figures"]}
    assert used <= set(report["metrics"])
    for metric in report["metrics"].values():
        told = {name: value for name, value in metric.items() if name != "needs"}  # some need no package
        assert all(told.values()) and len(metric["definition"]) > 40
    assert report["metrics"]["wer"]["needs"] == ["faster_whisper", "whisper_normalizer", "jiwer"]
    assert report["metrics"]["log_mel_l1"]["needs"] == []
    assert {"command", "commit", "torch"} <= set(report["environment"]) and report["settings"]["seed"] == 0


def test_the_page_needs_nothing_but_the_files_beside_it(finished):
    page = (finished / "report.html").read_text(encoding="utf-8")
    linked = re.findall(r'(?:src|href)="([^"]+)"', page)
    assert len(linked) >= 4 * 3 + 2 + 5
    for path in linked:
        assert not path.startswith(("/", "http")) and (finished / path).stat().st_size > 0
    assert "http" not in page.replace("http-equiv", "")
    for wav in finished.glob("audio/tokenizer-*/*.wav"):
        assert len(read_audio(wav)[0]) > SAMPLE_RATE


def test_few_conversations_and_few_frames_are_warned_of(finished):
    warnings = " ".join(report_of(finished)["warnings"])
    assert "2 held-out conversations" in warnings and "frames" in warnings


def test_a_second_run_measures_only_what_changed(finished, spoken_data, tokenizer_folder, tmp_path, capsys):
    before = report_of(finished)
    other = tmp_path / "other"
    save_model(tiny_model(seed=1, max_positions=1024), other)
    begin = time.perf_counter()
    arguments = flags(spoken_data, tokenizer_folder, finished, "--checkpoint", str(other), "--json")
    assert main(arguments) == EXIT_DONE
    printed = capsys.readouterr().out
    assert "tokenizer: unchanged" in printed and "model: unchanged" not in printed
    after = json.loads(printed.strip().splitlines()[-1])
    assert after == report_of(finished)
    assert after["tokenizer"] == before["tokenizer"] and after["model"]["losses"] != before["model"]["losses"]
    assert time.perf_counter() - begin < 60
    audio = {path.name.split("-")[0] for path in (finished / "audio").iterdir()}
    assert len(list((finished / "audio").iterdir())) == 2 and audio == {"tokenizer", "model"}


def test_other_data_another_tokenizer_or_a_new_package_measure_the_model_anew(
    finished, spoken_data, tokenizer_folder, checkpoint, tmp_path, monkeypatch, capsys
):
    for part in ("tokenizer", "model"):
        content = {**report_of(finished)[part], "clips": [], "replies": []}
        del content["inputs"]
        monkeypatch.setattr(evaluation_framework, f"evaluate_{part}", lambda *given, content=content: content)
    data, tokenizer = tmp_path / "data", tmp_path / "tokenizer"
    shutil.copytree(spoken_data, data)
    shutil.copytree(tokenizer_folder, tokenizer)

    def measured_anew() -> bool:
        assert main(flags(data, tokenizer, tmp_path / "report", "--checkpoint", str(checkpoint))) == EXIT_DONE
        return "model: unchanged" not in capsys.readouterr().out

    assert measured_anew() and not measured_anew()
    more = turn_record("new", 0, "a", SENTENCES[0], resample(speech(0), SAMPLE_RATE, 16_000))
    Collection(data).commit("test", "1", ["new"], [more], [])
    assert measured_anew() and not measured_anew()
    save_tokenizer(tiny_tokenizer(seed=1), tokenizer)
    assert measured_anew() and not measured_anew()
    monkeypatch.setitem(sys.modules, "pystoi", None)  # makes importing it fail
    assert measured_anew()


def test_validation_loads_no_model_that_it_does_not_ask(tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr(heard_conversations, "EmotionRecognizer", None)
    monkeypatch.setattr(heard_conversations, "Squim", None)
    monkeypatch.setattr(evaluation_framework, "conversations_of", lambda *_: {})
    monkeypatch.setattr(evaluation_framework, "measure_all", lambda *args: given.extend(args) or [])
    monkeypatch.setattr(evaluation_framework, "draw_verdicts", lambda *_: None)
    (tmp_path / "shards.jsonl").touch()
    asked = ["--validate", "--ser", "nowhere", "--squim", "--data", str(tmp_path), "--out", str(tmp_path)]
    assert main(asked) == EXIT_DONE
    assert given[2] == Ears()


@pytest.mark.slow
def test_a_killed_run_leaves_the_last_report_whole_and_the_next_completes(
    shared_data, tokenizer_folder, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "report"
    small = [*flags(shared_data, tokenizer_folder, out), "--max_clips", "1"]
    assert main(small) == EXIT_DONE
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file() and path.name != ".lock"}
    script = Path(evaluation_framework.__file__)
    command = [sys.executable, str(script), *small, "--seed", "5"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while len(list((out / "audio").iterdir())) < 2:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    for path, content in before.items():
        assert path.read_bytes() == content, path
    (out / "part-tokenizer.json").write_text('{"inputs": {')  # a damaged part is measured anew
    assert main([*small, "--seed", "5"]) == EXIT_DONE
    assert report_of(out)["settings"]["seed"] == 5 and report_of(out)["tokenizer"]["figures"]["stoi"][FULL]["n"] == 1
    assert report_of(out)["model"] is None and "no checkpoint at" in report_of(out)["note"]
    assert len(list((out / "audio").iterdir())) == 1


def test_a_missing_package_leaves_its_metric_out_and_says_what_to_install(
    shared_data, tokenizer_folder, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    for package in ("pesq", "faster_whisper", "resemblyzer", "distillmos"):
        monkeypatch.setitem(sys.modules, package, None)  # makes importing it fail
    assert main([*flags(shared_data, tokenizer_folder, tmp_path / "report")]) == EXIT_DONE
    figures = report_of(tmp_path / "report")["tokenizer"]["figures"]
    assert set(figures) == {"log_mel_l1", "stoi"}
    printed = capsys.readouterr().out
    assert "PESQ wide band was not measured: pesq not installed" in printed and "setup_environment.py" in printed


@pytest.mark.parametrize(
    ("changes", "code", "words"),
    [
        (["--max_clips", "0"], EXIT_INPUT, "max_clips=0 must be at least 1"),
        (["--data", "nowhere"], EXIT_INPUT, "collect_data.py"),
        (["--tokenizer", "nowhere"], EXIT_INPUT, "no rvq_tokenizer at nowhere"),
        (["--checkpoint", "nowhere"], EXIT_INPUT, "no csm at nowhere"),
        (["--asr", "./nowhere"], EXIT_MISSING, "--asr bundled"),
        (["--device", "gpu"], EXIT_INPUT, "device 'gpu' cannot be used here"),
        (["--threads", "0"], EXIT_INPUT, "--threads must be at least 1"),
        (["--workers", "-1"], EXIT_INPUT, "--workers must be at least 1"),
        (["--listening", "-1"], EXIT_INPUT, "--listening N needs two --systems"),
    ],
)
def test_bad_input_is_one_line_and_a_documented_code(
    changes, code, words, shared_data, tokenizer_folder, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    arguments = [*flags(shared_data, tokenizer_folder, tmp_path / "report"), *changes]
    assert run(main, arguments) == code
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1
    assert not (tmp_path / "report" / "report.json").exists()


def test_a_model_of_another_tokenizer_is_refused(shared_data, tokenizer_folder, tmp_path, capsys):
    arguments = flags(shared_data, tokenizer_folder, tmp_path / "report", "--checkpoint", str(tmp_path / "model"))
    save_model(tiny_model(codebook_size=8), tmp_path / "model")
    assert run(main, arguments) == EXIT_INPUT
    assert "the tokenizer has codebook_size=16, the model 8" in capsys.readouterr().err
    save_model(tiny_model(audio_tokenizer="another"), tmp_path / "model")
    assert run(main, arguments) == EXIT_INPUT
    assert "trained on codes of another tokenizer" in capsys.readouterr().err


def test_two_evaluations_do_not_share_a_folder(shared_data, tokenizer_folder, tmp_path, capsys):
    with only_run_in(tmp_path):
        assert run(main, flags(shared_data, tokenizer_folder, tmp_path)) == EXIT_BUSY
    assert "another run works in" in capsys.readouterr().err


def test_silenced_words_and_swapped_speakers_show_in_the_figures(tools):
    """The whole path from waves to figures, with copies that are good and bad on purpose."""
    waves, rows = [], []
    for i in range(3):
        cut = speech(i).copy()
        cut[int(0.35 * len(cut)) : int(0.75 * len(cut))] = 0
        waves.append({ORIGINAL: speech(i), FULL: speech(i) * 0.7, SEMANTIC: cut})
        rows.append({"text": SENTENCES[i], "language": "en"})
    tally = Tally()
    listen(tools.recognizer, tally, list("abc"), rows, waves)
    figures = tally.figures(seed=0)
    assert figures["wer_change"][FULL].value <= 0.05 < 0.2 < figures["wer_change"][SEMANTIC].low
    assert figures["wer_deletions"][SEMANTIC].value > 4 * figures["wer_insertions"][SEMANTIC].value

    for i in range(3):
        waves.append({ORIGINAL: other_speaker(i), FULL: speech(i), SEMANTIC: other_speaker(i) * 0.5})
    tally = Tally()
    compare_speakers(tools, tally, list("abcdef"), list("xxxyyy"), waves)
    values = {name: figure.value for name, figure in tally.figures(seed=0)["speaker_similarity"].items()}
    assert (
        values["baseline: original to the speaker's other clips"] > values["baseline: original to other speakers"] + 0.1
    )
    tally = Tally()
    compare_speakers(tools, tally, list("abc"), list("yyy"), waves[3:])  # every reconstruction has another's voice
    swapped = tally.figures(seed=0)["speaker_similarity"]
    assert compare_speakers(tools, Tally(), list("abc"), ["local:unknown"] * 3, waves[3:]) is None  # may be one or many
    assert swapped[f"{FULL} to its original"].value < swapped[f"{SEMANTIC} to its original"].value - 0.2
    assert swapped["baseline: original to other speakers"].excluded == {"no clip to compare with": 3}


def test_unmeasurable_clips_are_counted_by_reason(tools, tokenizer, tmp_path):
    silent, short = np.zeros(SAMPLE_RATE, np.float32), speech(0)[:4000]
    clips = [
        (dataclasses.replace(turn_record("talk", i, "a", text, speech(0)), audio=None), samples)
        for i, (text, samples) in enumerate((("...", speech(0)), ("Hello there.", silent), ("Good morning.", short)))
    ]
    (tmp_path / "audio" / "part").mkdir(parents=True)
    part = evaluate_tokenizer(clips, clips, tokenizer, tools, Settings(), tmp_path / "audio" / "part")
    figures = part["figures"]
    assert figures["wer"][ORIGINAL]["excluded"] == {"the text has no words": 1} and figures["wer"][ORIGINAL]["n"] == 2
    assert figures["stoi"][FULL]["excluded"] == {"the clip is silent": 1, "less than 0.4 s of speech for STOI": 1}
    assert figures["stoi"][FULL]["n"] == 1 and figures["stoi"][FULL]["low"] is None
    baseline = figures["speaker_similarity"]["baseline: original to the speaker's other clips"]
    assert baseline["value"] is None and sum(baseline["excluded"].values()) == 3


@pytest.mark.parametrize("make", [tiny_model, full_model], ids=["plain", "full"])
def test_held_out_losses_agree_with_training_and_a_uniform_model_scores_the_uniform_guess(shared_data, tokenizer, make):
    model = make()
    cache = TokenCache(shared_data, tokenizer)
    dataset = ConversationDataset(shared_data, "test", cache, ByteTokenizer(), model.config.layout, 256)
    figures = held_out_losses(model, dataset, 100, torch.device("cpu"), seed=0)
    expected = evaluate_losses(model, dataset)
    assert [figure.value for figure in figures] == pytest.approx([expected["c0"], *expected["depth"]], rel=1e-4)
    assert figures[1].n == expected["frames"] and figures[0].low <= figures[0].value <= figures[0].high
    with torch.no_grad():
        model.codebook0_head.weight.zero_()
        model.depth_heads.zero_()
    uniform = held_out_losses(model, dataset, 3, torch.device("cpu"), seed=0)
    assert [figure.value for figure in uniform] == pytest.approx([math.log(17)] * 4, rel=1e-5)
    with torch.no_grad():
        model.codebook0_head.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        held_out_losses(model, dataset, 1, torch.device("cpu"), seed=0)


def test_replies_are_spread_over_conversations_and_their_speaker_was_heard(shared_data, tokenizer):
    cache, layout = TokenCache(shared_data, tokenizer), tiny_model().config.layout
    conversations = ConversationDataset(shared_data, "test", cache, ByteTokenizer(), layout, 256).conversations
    chosen = choose_replies(conversations, len(conversations), seed=0)
    assert len({conversation.conv_id for conversation, _ in chosen}) == len(conversations)
    for conversation, index in chosen:
        assert conversation.speakers[index] in conversation.speakers[max(0, index - CONTEXT_TURNS) : index]
    assert chosen == choose_replies(conversations, len(conversations), seed=0)
    assert {c.conv_id for c, _ in choose_replies(conversations, 1, seed=0)} != {
        c.conv_id for seed in range(9) for c, _ in choose_replies(conversations, 1, seed)
    }, "not always those of the first source"
    single = dataclasses.replace(conversations[0], turns=conversations[0].turns[:1], speakers=(0,))
    assert choose_replies([single], 5, seed=0) == [(single, 0)]


def test_texts_of_users_are_escaped_in_the_page():
    row = {
        "text": "<script>x</script>",
        "speaker": "a&b",
        "audio": {ORIGINAL: 'a".wav'},
        "transcripts": {ORIGINAL: "<b>"},
    }
    cell = players([row])
    assert "<script" not in cell and "<b>" not in cell and 'src="a&quot;.wav"' in cell


def test_figures_are_shown_with_unit_and_interval():
    figure = {"value": 0.1234, "low": 0.1, "high": 0.2}
    assert show("wer", figure) == "12.3 % (10.0 to 20.0)" and show("stoi", figure, interval=False) == "0.123"
    assert (
        show("wer", {**figure, "low": None}) == "12.3 %" and show("wer", {**figure, "value": None}) == "not measurable"
    )


def test_babble_is_called_babble_and_speech_is_not(finished):
    report = {"model": {"inputs": {"steps": 100}, "figures": {"wer": {GENERATED: {"value": 1.3}}}}}
    assert "after 100 training steps babbles: 130%" in model_note(report)
    report["model"]["figures"]["wer"][GENERATED]["value"] = 0.2
    assert "babbles" not in model_note(report)
    whole = report_of(finished)
    enough = {**whole, "model": None, "missing": {}}
    enough["tokenizer"] = {**whole["tokenizer"], "figures": {}, "use": {"frames": 320, "codes": 16}}
    assert collect_warnings(enough) == []


@pytest.mark.parametrize(
    ("there", "tokenizer", "checkpoint"),
    [
        ((), "runs/tokenizer", None),
        (("pretrained/nano",), "pretrained/nano/tokenizer", "pretrained/nano"),
        (("pretrained/nano", "runs/minimal"), "pretrained/nano/tokenizer", "pretrained/nano"),  # of another tokenizer
        (("pretrained/nano", "runs/minimal", "runs/tokenizer"), "runs/tokenizer", "runs/minimal"),
        (("pretrained/nano", "runs/tokenizer"), "runs/tokenizer", None),
    ],
)
def test_what_is_measured_by_default_fits_together(tmp_path, monkeypatch, there, tokenizer, checkpoint):
    monkeypatch.chdir(tmp_path)
    for folder in there:
        (tmp_path / folder / "tokenizer").mkdir(parents=True)
        (tmp_path / folder / "model.safetensors").touch()
    args = evaluation_framework.parse_flags([])
    assert args.tokenizer.as_posix() == tokenizer
    assert (args.checkpoint and args.checkpoint.as_posix()) == checkpoint
    assert evaluation_framework.parse_flags(["--tokenizer", "kyutai/mimi"]).checkpoint is None
