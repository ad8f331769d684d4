"""Exit codes, one-line errors, stop signals, the folder lock, flags."""

import argparse
import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from command_line import (
    EXIT_BUSY,
    EXIT_INPUT,
    EXIT_MISSING,
    EXIT_SIGINT,
    EXIT_SIGTERM,
    EXIT_STORAGE,
    FolderBusy,
    MissingRequirement,
    Several,
    StopSignals,
    first_line,
    only_run_in,
    run,
)


def raising(error):
    def main(argv):
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (ValueError("bad value"), EXIT_INPUT, "bad value"),
        (FileNotFoundError("no file at x"), EXIT_INPUT, "no file at x"),
        (FloatingPointError("not finite"), EXIT_INPUT, "not finite"),
        (OSError(errno.ENOSPC, "", "out.bin"), EXIT_STORAGE, "out.bin: No space left on device; free some space"),
        (PermissionError(errno.EACCES, "", "out"), EXIT_STORAGE, "out: Permission denied; choose a folder you may"),
        (MissingRequirement("pip install x"), EXIT_MISSING, "pip install x"),
        (FolderBusy("another run"), EXIT_BUSY, "another run"),
    ],
)
def test_what_a_user_can_mend_is_one_line_and_a_code(capsys, error, code, said):
    assert run(raising(error)) == code
    out = capsys.readouterr()
    assert out.err.startswith(f"error: {said}")
    assert out.err.count("\n") == 1


def test_the_first_line_of_an_error_that_says_nothing_is_its_kind():
    assert first_line(TimeoutError()) == "TimeoutError"
    assert first_line(ValueError("one\ntwo")) == "one"


def test_our_own_mistakes_keep_their_traceback():
    with pytest.raises(AssertionError):
        run(raising(AssertionError("a mistake of ours")))


def test_ctrl_c_outside_a_loop_is_one_line(capsys):
    assert run(raising(KeyboardInterrupt())) == EXIT_SIGINT
    assert capsys.readouterr().err == "stopped by Ctrl-C; run the same command again to go on\n"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, EXIT_SIGINT), (signal.SIGTERM, EXIT_SIGTERM)])
def test_a_signal_is_a_flag_inside_and_what_it_was_outside(number, code):
    before = signal.getsignal(number)
    with StopSignals() as stop:
        assert stop.exit_code == 0
        os.kill(os.getpid(), number)
        assert stop.received == number
        assert stop.exit_code == code
        os.kill(os.getpid(), signal.SIGTERM)  # torchrun passes on what a scheduler has sent to every process
        assert stop.received == number
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(number) == before


CHILD = """
import pathlib, signal, sys, time
def save(number, frame):
    time.sleep(0.6)  # longer than a parent waits that does not know of its child
    pathlib.Path("saved").touch()
    sys.exit(128 + number)
signal.signal(signal.SIGINT, save), signal.signal(signal.SIGTERM, save)
pathlib.Path("ready").touch()
time.sleep(30)
"""


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals")
@pytest.mark.parametrize(("send", "number"), [(os.killpg, signal.SIGINT), (os.kill, signal.SIGTERM)])
def test_a_child_saves_before_the_process_that_started_it_ends(tmp_path, send, number):
    (tmp_path / "child.py").write_text(CHILD)
    code = "import sys, command_line as c; sys.exit(c.run_child([sys.executable, 'child.py']).returncode)"
    path = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, env=path, start_new_session=True)
    for _ in range(400):
        if (tmp_path / "ready").exists():
            break
        time.sleep(0.05)
    send(parent.pid, number)
    assert parent.wait(20) == 128 + number and (tmp_path / "saved").exists()


def test_a_folder_holds_one_run_and_is_free_after_a_kill(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from command_line import only_run_in\n"
        "with only_run_in(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "new" / "folder")]
    process = subprocess.Popen(command, cwd=Path(__file__).parent.parent, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    with pytest.raises(FolderBusy, match="another run works in"), only_run_in(tmp_path / "new" / "folder"):
        pass
    process.kill()
    process.wait()
    process.stdout.close()
    with only_run_in(tmp_path / "new" / "folder"):
        pass


def test_a_lock_beside_a_folder_leaves_the_folder_alone(tmp_path):
    with only_run_in(tmp_path / "deep" / "out", beside=True):
        assert not (tmp_path / "deep" / "out").exists()
        with pytest.raises(FolderBusy, match="out; wait"), only_run_in(tmp_path / "deep" / "out", beside=True):
            pass


@pytest.mark.parametrize("default", [None, [], ["other"]])
def test_a_flag_given_again_adds_to_what_was_given(default):
    parser = argparse.ArgumentParser()
    parser.add_argument("--local", action=Several, nargs="*", default=default)
    assert parser.parse_args([]).local == default
    assert parser.parse_args(["--local"]).local == []
    for _ in range(2):  # the default is not changed
        assert parser.parse_args(["--local", "a", "b", "--local", "c"]).local == ["a", "b", "c"]


def test_every_flag_of_several_values_may_be_given_again():
    root = Path(__file__).resolve().parents[1]
    for script in (*root.glob("*.py"), *root.glob("benchmarks/*.py")):
        text = script.read_text(encoding="utf-8")
        assert script.name == "command_line.py" or 'nargs="+"' not in text, f"{script.name}: action=Several instead"
