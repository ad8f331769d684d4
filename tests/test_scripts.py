"""The shell scripts: same steps on every system, stop at the first failure, say how to go on.

Where a step is run, it is run in a folder of its own with small programs in the place of the long ones.
"""

import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BASH = shutil.which("bash")
needs_bash = pytest.mark.skipif(BASH is None or os.name == "nt", reason="needs bash")
SETUP = "import os, sys\nos.makedirs('.venv/bin', exist_ok=True)\nif not os.path.lexists('.venv/bin/python'):\n"
SETUP += "    os.symlink(sys.executable, '.venv/bin/python')\n"
STEP = "import sys\nopen('steps.txt', 'a').write(' '.join(sys.argv) + '\\n')\n"


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def steps_of_sh() -> list[tuple[str, str, str]]:
    """(number, what it does, command) of each step, with the names of variables taken out."""
    found = re.findall(r'^step (\d) "(.*)" \\\n    "\$(\w+)" (.*)$', read("run_experiment.sh"), re.MULTILINE)
    return [(number, title, f"{python} {command}") for number, title, python, command in found]


def steps_of_recipe(scale: str = "full", out: str = "OUT") -> list[list[str]]:
    """The command of each step of the recipe of a voice after the environment, without the interpreter."""
    file = importlib.util.spec_from_file_location("nano_voice", ROOT / "recipes" / "nano_voice.py")
    recipe = importlib.util.module_from_spec(file)
    sys.modules["nano_voice"] = recipe
    file.loader.exec_module(recipe)
    return [words for _, words in recipe.steps(recipe.SCALES[scale], out)]


def steps_of_bat() -> list[tuple[str, str, str]]:
    form = r'^set "COMMAND=%(\w+)% (.*)"\ncall :step (\d) "(.*)" \|\| goto stopped$'
    python_names = {"PYTHON": "setup_python", "VENV_PYTHON": "venv_python"}
    found = re.findall(form, read("run_experiment.bat"), re.MULTILINE)
    return [(number, title, f"{python_names[python]} {command}") for python, command, number, title in found]


@pytest.fixture
def small_experiment(tmp_path: Path) -> Path:
    """run_experiment.sh beside small programs that write down how they were called."""
    folder = tmp_path / "a folder"
    folder.mkdir()
    shutil.copy(ROOT / "run_experiment.sh", folder)
    (folder / "setup_environment.py").write_text(SETUP + STEP)
    for _, _, command in steps_of_sh()[1:]:
        (folder / command.split()[1]).write_text(STEP)
    return folder


def run_bash(*command: str | Path, **variables: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHON": sys.executable, **variables}
    return subprocess.run(
        [BASH, *map(str, command)], cwd="/", capture_output=True, text=True, env=environment, timeout=60
    )


@needs_bash
@pytest.mark.parametrize("name", ["run_experiment.sh", "run_tests.sh", ".ci/run"])
def test_a_shell_script_parses_and_may_be_executed(name):
    assert run_bash("-n", ROOT / name).returncode == 0
    assert os.access(ROOT / name, os.X_OK)
    assert read(name).startswith("#!/usr/bin/env bash\n")


def test_both_systems_run_the_same_six_numbered_steps():
    assert [number for number, _, _ in steps_of_sh()] == ["1", "2", "3", "4", "5", "6"]
    assert steps_of_sh() == steps_of_bat()


def test_every_step_calls_a_file_with_flags_it_knows():
    for _, _, command in steps_of_sh():
        _, script, *flags = command.split()
        source = read(script)
        for flag in flags:
            assert not flag.startswith("--") or f'"{flag}"' in source, f"{script} has no {flag}"


def test_every_step_of_the_recipe_calls_a_file_with_flags_it_knows():
    assert len(steps_of_recipe()) == 6
    settings = {"train.py": read("training_config.py"), "train_tokenizer.py": read("codec_training.py")}  # make flags
    for script, *flags in steps_of_recipe():
        for flag in flags:
            known = f'"{flag}"' in read(script) or f'"{flag[2:]}"' in settings.get(script, "")
            assert not flag.startswith("--") or known, f"{script} has no {flag}"


def test_both_helps_list_the_same_steps():
    helps = []
    for name in ("run_experiment.sh", "run_experiment.bat"):
        lines = re.findall(r"^(?:echo)?\s+(\[\d/6\] .*)$", read(name), re.MULTILINE)
        helps.append([line.replace("\\", "/") for line in lines if ".py" in line])
    assert len(helps[0]) == 6
    assert helps[0] == helps[1]


@pytest.mark.parametrize("name", ["run_experiment.bat", "run_tests.bat"])
def test_a_batch_file_has_windows_line_ends_and_no_dangling_label(name):
    content = (ROOT / name).read_bytes()
    assert content.count(b"\n") == content.count(b"\r\n")
    text = content.decode("ascii")
    labels = set(re.findall(r"^:(\w+)", text, re.MULTILINE))
    assert set(re.findall(r"(?:goto|call :)\s?(\w+)", text)) <= labels


def test_both_test_commands_run_the_same_tools():
    commands = []
    for name in ("run_tests.sh", "run_tests.bat"):
        found = re.findall(r"(setup_environment\.py .*|-m (?:ruff|pytest) .*)", read(name))
        commands.append([re.sub(r' *(\|\| goto failed|"\$@"|%\*)', "", line) for line in found])
    assert len(commands[0]) == 4
    assert commands[0] == commands[1]


@needs_bash
def test_the_experiment_runs_its_steps_in_order_from_any_folder(small_experiment):
    answer = run_bash(small_experiment / "run_experiment.sh")
    assert answer.returncode == 0, answer.stderr
    called = (small_experiment / "steps.txt").read_text().splitlines()
    assert called == [command.split(maxsplit=1)[1] for _, _, command in steps_of_sh()]
    for number, title, _ in steps_of_sh():
        assert f"[{number}/6] {title}" in answer.stdout
    for folder in ("runs/demo", "runs/report/report.html", "runs "):
        assert f"{small_experiment}/{folder}" in answer.stdout
    assert re.search(r"Done in 0 min \d+ s", answer.stdout)


@needs_bash
def test_the_full_experiment_runs_the_steps_of_its_recipe_at_the_scale_asked_for(small_experiment):
    for name in ("recipes/nano_voice.py", "command_line.py"):
        (small_experiment / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, small_experiment / name)
    for script, *_ in steps_of_recipe():
        (small_experiment / script).write_text(STEP)
    script, asked = small_experiment / "run_experiment.sh", ("full", "--scale", "smoke", "--out", "a place")
    done = run_bash(script, *asked)
    assert done.returncode == 0, done.stderr
    called = (small_experiment / "steps.txt").read_text().splitlines()
    assert called[1:] == [" ".join(words) for words in steps_of_recipe("smoke", "a place")]
    assert "--target_hours 0.12 --out a place/data" in called[1] and "[7/7]" in done.stdout
    (small_experiment / "train.py").write_text("raise SystemExit(4)")
    failed = run_bash(script, *asked)
    assert failed.returncode == 4
    assert "step 4 of 7 stopped with exit code 4" in failed.stderr
    assert "to go on: ./run_experiment.sh full --scale smoke --out a place" in failed.stderr
    for wrong in (("full", "--scale", "big"), ("full", "more"), ("more",)):
        refused = run_bash(script, *wrong)
        assert refused.returncode == 2 and "Traceback" not in refused.stderr
    assert "--scale" in run_bash(script, "full", "--help").stdout


def test_both_systems_make_the_voice_by_the_same_recipe():
    for name in ("run_experiment.sh", "run_experiment.bat"):
        assert "recipes/nano_voice.py" in read(name).replace("\\", "/")


@needs_bash
@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.skipif(not (ROOT / ".venv" / "bin" / "python").exists(), reason="needs the environment of run_tests.sh")
def test_a_voice_is_made_from_nothing_at_the_smoke_scale(tmp_path):
    """Every step of the recipe as it is, few steps of training: the voice says nothing, but it speaks."""
    command = [BASH, str(ROOT / "run_experiment.sh"), "full", "--scale", "smoke", "--out", str(tmp_path / "smoke")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1400)
    assert done.returncode == 0, done.stderr[-2000:]
    assert {path.name for path in (tmp_path / "smoke" / "voice").iterdir()} >= {"model.safetensors", "tokenizer"}
    assert len(list((tmp_path / "smoke" / "spoken").glob("*/conversation.wav"))) == 3
    assert (tmp_path / "smoke" / "report" / "report.html").is_file()


@needs_bash
def test_the_experiment_stops_at_a_failing_step_with_its_code_and_how_to_go_on(small_experiment):
    with open(small_experiment / "train_tokenizer.py", "a") as file:
        file.write("sys.exit(4)\n")
    answer = run_bash(small_experiment / "run_experiment.sh")
    assert answer.returncode == 4
    assert "step 3 of 6 stopped with exit code 4: .venv/bin/python train_tokenizer.py" in answer.stderr
    assert "to go on: ./run_experiment.sh" in answer.stderr
    assert len((small_experiment / "steps.txt").read_text().splitlines()) == 3


@needs_bash
def test_ctrl_c_reaches_the_step_and_ends_the_experiment_with_its_code(small_experiment):
    step = "import time\ntry:\n    open('begun', 'w').close()\n    time.sleep(30)\n"
    step += "except KeyboardInterrupt:\n    open('saved', 'w').close()\n    sys.exit(130)\n"
    with open(small_experiment / "train_minimal.py", "a") as file:
        file.write(step)
    script = subprocess.Popen(
        [BASH, str(small_experiment / "run_experiment.sh")],
        env={**os.environ, "PYTHON": sys.executable},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # tests started in the background ignore SIGINT and would hand that on
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 30
    while not (small_experiment / "begun").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(script.pid, signal.SIGINT)
    said = script.communicate(timeout=30)[1]
    assert script.returncode == 130
    assert (small_experiment / "saved").exists()
    assert "step 4 of 6 stopped with exit code 130" in said


@needs_bash
def test_a_python_that_is_not_there_stops_the_first_step(small_experiment):
    answer = run_bash(small_experiment / "run_experiment.sh", PYTHON="no-such-python")
    assert answer.returncode == 127
    assert "step 1 of 6 stopped" in answer.stderr


@needs_bash
def test_the_experiment_explains_itself_and_refuses_what_it_does_not_know():
    answer = run_bash(ROOT / "run_experiment.sh", "--help")
    assert answer.returncode == 0
    assert all(f"[{number}/6]" in answer.stdout for number in range(1, 7))
    answer = run_bash(ROOT / "run_experiment.sh", "--frobnicate")
    assert answer.returncode == 2
    assert answer.stderr.splitlines() == ["error: unknown argument --frobnicate; ./run_experiment.sh --help explains"]
