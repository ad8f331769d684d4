"""The sweep: settings that exist, runs that are kept, a table and JSON of the same figures."""

import importlib
import json

import pytest

from command_line import EXIT_DONE, EXIT_INPUT, run

sweep = importlib.import_module("benchmarks.sweep")


def test_runs_that_differ_in_one_setting_are_set_side_by_side(tmp_path, shared_data, tokenizer_folder, capfd):
    flags = ["--vary", "depth_share=1,0.25", "--out", str(tmp_path), "--json", "--data", str(shared_data)]
    flags += ["--tokenizer", str(tokenizer_folder), "--max_steps", "2", "--batch_rows", "1", "--row_positions", "160"]
    flags += ["--precision", "fp32", "--device", "cpu", "--threads", "1"]
    assert run(sweep.main, flags) == EXIT_DONE
    found = json.loads(capfd.readouterr().out.splitlines()[-1])["results"]
    assert set(found) == {"depth_share=1", "depth_share=0.25"}
    assert all(values["val/loss"] > 0 and values["frames_per_s"] > 0 for values in found.values())
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.pt")}
    assert run(sweep.main, flags) == EXIT_DONE
    assert json.loads(capfd.readouterr().out.splitlines()[-1])["results"] == found
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.pt")} == before


@pytest.mark.parametrize("text", ["speed=1,2", "lr", "lr=", "lr=1,,2"])
def test_a_setting_that_does_not_exist_is_refused(capsys, text):
    assert run(sweep.main, ["--vary", text]) == EXIT_INPUT
    assert f"--vary {text}: expected NAME=V1,V2" in capsys.readouterr().err


def test_a_run_that_fails_is_named(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:  # the code of train.py is that of the sweep
        run(sweep.main, ["--vary", "lr=-1", "--out", str(tmp_path)])
    assert stopped.value.code == EXIT_INPUT
    assert "lr=-1 ended with exit code 2: error: lr=-1.0 must be above 0" in capsys.readouterr().err
