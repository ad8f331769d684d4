"""The log of a run: lines, resume, settings that changed, picture."""

import json

import pytest

from run_folder import RunLog, plot_metrics, read_metrics, refuse_other_settings


def log_steps(folder, start, stop, settings=None):
    log = RunLog(folder, settings or {"lr": 0.1}, start)
    for step in range(start, stop):
        log.scalars(step, {"train/loss": 1.0 / (step + 1)})
    log.close()


def test_a_resumed_log_has_every_step_once(tmp_path):
    log_steps(tmp_path, 0, 5)
    with open(tmp_path / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"step": 5, "train/l')  # torn by a kill
    log_steps(tmp_path, 3, 6)
    assert [record["step"] for record in read_metrics(tmp_path)] == [0, 1, 2, 3, 4, 5]


def test_settings_and_environment_are_kept(tmp_path):
    log_steps(tmp_path, 0, 1)
    content = json.loads((tmp_path / "settings.json").read_text())
    assert content["lr"] == 0.1
    assert {"command", "commit", "torch", "python"} <= content["environment"].keys()


def test_changed_settings_are_refused_and_named(tmp_path):
    refuse_other_settings(tmp_path, {"lr": 0.1})  # a new folder takes any
    log_steps(tmp_path, 0, 1)
    refuse_other_settings(tmp_path, {"lr": 0.1})
    with pytest.raises(ValueError, match=r"was started with lr=0\.1, now it is 0\.2"):
        refuse_other_settings(tmp_path, {"lr": 0.2})


def test_the_picture_shows_what_was_logged(tmp_path):
    log_steps(tmp_path, 0, 20)
    plot_metrics(tmp_path, {"loss": ["train/loss", "not/logged"]}, tmp_path / "losses.png")
    assert (tmp_path / "losses.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "losses.png").stat().st_size > 5000
