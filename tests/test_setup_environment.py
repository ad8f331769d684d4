"""setup_environment.py on real environments, with a folder of tiny packages in the place of the package index."""

import ast
import contextlib
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

import setup_environment
from command_line import EXIT_BUSY, EXIT_INPUT, EXIT_MISSING, EXIT_STORAGE, run

ROOT = Path(__file__).resolve().parent.parent
PYTHONS = [(3, 10), (3, 11), (3, 12), (3, 13)]
SPLIT = "OSError: libc10_cuda.so: cannot open shared object file: No such file or directory"


def write_wheel(folder: Path, name: str, version: str, source: str = "", needs: tuple[str, ...] = ()) -> None:
    """A package of one file, as an index would serve it."""
    info = f"{name}-{version}.dist-info"
    metadata = [f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"]
    metadata += [f"Requires-Dist: {need}\n" for need in needs]
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{name}.py", source)
        wheel.writestr(f"{info}/METADATA", "".join(metadata))
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", f"{name}.py,,\n{info}/METADATA,,\n{info}/WHEEL,,\n{info}/RECORD,,\n")


def write_unbuildable_source(folder: Path, name: str, version: str) -> None:
    """A source package whose build fails, as one does that needs a compiler where there is none."""
    top = f"{name}-{version}"
    project = '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
    backend = "def build_wheel(*arguments, **keywords):\n    raise SystemExit('no compiler')\n"
    with zipfile.ZipFile(folder / f"{top}.zip", "w") as archive:
        archive.writestr(f"{top}/pyproject.toml", project)
        archive.writestr(f"{top}/backend.py", backend)
        archive.writestr(f"{top}/PKG-INFO", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


@pytest.fixture(scope="module")
def first_environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with pip and nothing else, made once; the tests work on copies."""
    venv = tmp_path_factory.mktemp("first") / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    return venv


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with requirements files whose packages lie beside it, reached through pip's own settings."""
    index = tmp_path / "index"
    index.mkdir()
    write_wheel(index, "below", "1.0")
    write_wheel(index, "above", "2.0", needs=("below",))
    write_wheel(index, "alone", "3.0", needs=("not-to-be-had",))
    write_unbuildable_source(index, "compiled", "4.0")
    root = tmp_path / "root"
    root.mkdir()
    (root / "requirements.txt").write_text("# the core\nabove==2.0  # the upper one\n")
    (root / "requirements-data.txt").write_text("below==1.0  # the lower one\n")
    (root / "requirements-eval.txt").write_text(
        'old==1; python_version < "3.10"  # for a Python that is not supported\n'
    )
    (root / "requirements-eval-nodeps.txt").write_text("alone==3.0  # without what it asks for\n")
    (root / "requirements-eval-source.txt").write_text("compiled==4.0  # a figure\n")
    (root / "requirements-dev.txt").write_text("")
    (root / "requirements-common-voice.txt").write_text("")
    (root / "requirements-filters.txt").write_text("")
    for extra in ("wandb", "play", "web"):
        (root / f"requirements-{extra}.txt").write_text("")
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    return root


@pytest.fixture
def venv(first_environment: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(first_environment, tmp_path / "venv", symlinks=True))


@pytest.fixture
def full(first_environment: Path, root: Path, tmp_path: Path) -> Path:
    """An environment with every extra of `root`, installed once."""
    made = first_environment.parent / "full"
    if not made.exists():
        shutil.copytree(first_environment, made, symlinks=True)
        assert setup(root, made) == 0
    return Path(shutil.copytree(made, tmp_path / "full", symlinks=True))


def setup(root: Path, venv: Path, *flags: str) -> int:
    return run(lambda argv: setup_environment.main(argv, root=root), ["--venv", str(venv), *flags])


def site_packages(venv: Path) -> Path:
    return next(venv.glob("[Ll]ib/**/site-packages"))


def cut_off_index(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on pip finds an index address where nothing answers."""
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")


# --- what the repository's own files say


@pytest.mark.parametrize("python", PYTHONS)
def test_every_python_gets_one_exact_release_of_each_package(python):
    files = setup_environment.requirement_files(ROOT, list(setup_environment.EXTRAS))
    assert sorted(files) == sorted(ROOT.glob("requirements*.txt"))
    names = [pin.name for path in files for pin in setup_environment.read_pins(path, python)]
    assert len(names) == len(set(names))
    texts = [pin.adds for path in files for pin in setup_environment.read_pins(path, python)]
    assert all(texts), "each pin says what it is for"


@pytest.mark.parametrize("python", PYTHONS)
def test_torch_and_torchaudio_are_pinned_to_the_same_release(python):
    versions = {pin.name: pin.version for pin in setup_environment.read_pins(ROOT / "requirements.txt", python)}
    assert versions["torch"] == versions["torchaudio"]


def test_pip_reads_the_requirements_files_as_this_project_does():
    parser = "import sys\nfrom pip._internal.req.req_file import parse_requirements\n"
    parser += "from pip._internal.network.session import PipSession\n"
    parser += "from pip._vendor.packaging.requirements import Requirement\n"
    parser += (
        "for line in (line for path in sys.argv[1:] for line in parse_requirements(path, session=PipSession())):\n"
    )
    parser += "    one = Requirement(line.requirement)\n"
    parser += "    if one.marker is None or one.marker.evaluate():\n        print(one.name + str(one.specifier))\n"
    paths = sorted(ROOT.glob("requirements*.txt"))
    answer = subprocess.run(
        [sys.executable, "-c", parser, *map(str, paths)], capture_output=True, text=True, check=True
    )
    pins = [pin for path in paths for pin in setup_environment.read_pins(path, sys.version_info[:2])]
    assert answer.stdout.lower().split() == [f"{pin.name}=={pin.version}" for pin in pins]


@pytest.mark.parametrize("line", ["torch>=2", "torch", "-r other.txt", "torch==2.11.0 numpy==2.0", "git+https://x/y"])
def test_a_line_that_is_no_exact_pin_is_refused_with_its_number(tmp_path, line):
    path = tmp_path / "requirements.txt"
    path.write_text(f"# first\nnumpy==2.0\n{line}\n")
    with pytest.raises(ValueError, match=r"line 3: expected name==version"):
        setup_environment.read_pins(path, (3, 11))


def test_an_older_python_reads_the_file_and_is_told_in_one_line(monkeypatch, capsys):
    source = (ROOT / "setup_environment.py").read_text(encoding="utf-8")
    ast.parse(source, feature_version=(3, 7))
    monkeypatch.setattr(sys, "version_info", (3, 9, 18, "final", 0))
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(ROOT / "setup_environment.py"), run_name="__main__")
    assert stopped.value.code == EXIT_MISSING
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert "Python 3.9" in said[0]
    assert "3.10 to 3.13" in said[0]


# --- installing


def test_what_is_missing_is_installed_and_a_second_run_needs_no_index(root, venv, monkeypatch, capfd):
    assert setup(root, venv) == 0
    said = capfd.readouterr()
    assert "ready:" in said.out
    assert (site_packages(venv) / "alone.py").exists()
    assert "compiled==4.0 was not installed" in said.out
    assert "a figure" in said.out
    cut_off_index(monkeypatch)
    assert setup(root, venv) == 0
    assert "pip install -r" not in capfd.readouterr().out


def test_check_reports_what_is_missing_and_changes_nothing(root, venv, capfd):
    before = sorted(path.relative_to(venv) for path in venv.rglob("*"))
    assert setup(root, venv, "--check") == EXIT_MISSING
    said = capfd.readouterr()
    assert said.err.strip().startswith("error: above==2.0 is missing (and 2 more)")
    assert "--extras data eval" in said.err
    assert "- below 1.0" in said.out
    assert sorted(path.relative_to(venv) for path in venv.rglob("*")) == before
    assert setup(root, venv.parent / "nowhere", "--check") == EXIT_MISSING
    assert not (venv.parent / "nowhere").exists()


def test_check_is_content_without_what_may_fail_to_build(root, full, capfd):
    assert setup(root, full, "--check") == 0
    assert "- compiled 4.0" in capfd.readouterr().out


def test_an_extra_that_is_for_other_pythons_is_no_success():
    setup_environment.refuse_unfit(ROOT, ["common-voice"], (3, 12))
    with pytest.raises(setup_environment.SetupFailed, match=r"common-voice has nothing for Python 3\.11") as refused:
        setup_environment.refuse_unfit(ROOT, ["data", "common-voice"], (3, 11))
    assert refused.value.code == EXIT_MISSING


def test_an_extra_that_is_not_asked_for_is_left_out(root, venv):
    assert setup(root, venv, "--extras") == 0
    assert not (site_packages(venv) / "alone.py").exists()


def test_a_half_written_package_is_completed(root, full, capfd):
    (site_packages(full) / "above.py").unlink()
    (site_packages(full) / "above-2.0.dist-info" / "INSTALLER").unlink()
    assert setup(root, full, "--check") == EXIT_MISSING
    assert "above" in capfd.readouterr().err
    assert setup(root, full) == 0
    assert (site_packages(full) / "above.py").exists()


def test_a_half_written_pip_is_completed(root, full):
    (site_packages(full) / "pip" / "__main__.py").unlink()
    next(site_packages(full).glob("pip-*.dist-info/INSTALLER")).unlink()
    assert setup(root, full) == 0
    assert (site_packages(full) / "pip" / "__main__.py").exists()


def test_an_environment_killed_while_its_tools_were_unpacked_is_completed(root, full):
    shutil.rmtree(next(site_packages(full).glob("pip-*.dist-info")))
    for mark in site_packages(full).glob("setuptools-*.dist-info/INSTALLER"):  # from Python 3.12 on there is none
        mark.unlink()
    assert setup(root, full, "--extras") == 0
    assert setup(root, full, "--extras", "--check") == 0


def test_a_lost_dependency_of_a_pin_is_found_and_installed(root, full, capfd):
    shutil.rmtree(site_packages(full) / "below-1.0.dist-info")
    assert setup(root, full, "--extras", "--check") == EXIT_MISSING
    assert "above 2.0 requires below, which is not installed" in capfd.readouterr().err
    assert setup(root, full, "--extras") == 0
    assert (site_packages(full) / "below-1.0.dist-info").exists()


def test_another_release_is_replaced_by_the_pinned_one(root, full):
    write_wheel(root.parent / "index", "above", "2.1")
    (root / "requirements.txt").write_text("above==2.1  # the upper one\n")
    assert setup(root, full, "--extras") == 0
    assert [path.name for path in site_packages(full).glob("above-*")] == ["above-2.1.dist-info"]


def test_a_build_label_does_not_count_as_another_release(tmp_path):
    pin = setup_environment.Pin("torch", "2.11.0", "tensors", tmp_path)
    for version, missing in (("2.11.0+cpu", False), ("2.11.0", False), ("2.11.1+cpu", True), ("2.1", True)):
        packages = setup_environment.Packages((3, 11), {"torch": version}, {}, {})
        assert bool(setup_environment.missing_pins([pin], packages)) == missing


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="kills a group of processes")
def test_an_installation_killed_at_any_moment_is_completed_by_the_next(root, tmp_path):
    command = "import sys, pathlib, setup_environment as s; sys.exit(s.main(sys.argv[2:], pathlib.Path(sys.argv[1])))"
    words = [sys.executable, "-c", command, str(root), "--venv", str(tmp_path / "new"), "--extras", "data"]
    for seconds in (0.5, 2.5, 2.0):
        process = subprocess.Popen(words, cwd=ROOT, start_new_session=True, stdout=subprocess.DEVNULL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=seconds)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    time.sleep(0.2)
    assert subprocess.run(words, cwd=ROOT, stdout=subprocess.DEVNULL).returncode == 0
    assert (site_packages(tmp_path / "new") / "above.py").exists()


# --- what can go wrong


def test_without_a_network_there_is_one_line_with_the_remedy(root, venv, monkeypatch, capfd):
    cut_off_index(monkeypatch)
    assert setup(root, venv) == EXIT_MISSING
    last = capfd.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("error: the package index was not reached")
    assert "check the network" in last


@pytest.mark.parametrize("failure", [SPLIT, "RuntimeError: compiled with different CUDA versions"])
def test_a_pair_that_does_not_load_gives_one_line_with_the_remedy(root, venv, capfd, failure):
    kind, text = failure.split(": ", maxsplit=1)
    write_wheel(root.parent / "index", "torch", "2.11.0")
    write_wheel(root.parent / "index", "torchaudio", "2.11.0", source=f"raise {kind}({text!r})\n")
    (root / "requirements.txt").write_text("torch==2.11.0  # tensors\ntorchaudio==2.11.0  # audio\n")
    assert setup(root, venv, "--extras") == EXIT_MISSING
    last = capfd.readouterr().err.strip().splitlines()[-1]
    assert text in last
    assert last.endswith("-m pip install --force-reinstall torch==2.11.0 torchaudio==2.11.0")


@pytest.mark.parametrize(
    ("said", "code", "remedy"),
    [
        (
            "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device",
            EXIT_STORAGE,
            "full",
        ),
        (
            "ERROR: Could not install packages due to an OSError: [Errno 13] Permission denied: 'x'",
            EXIT_STORAGE,
            "writ",
        ),
        ("ERROR: Failed building wheel for pesq", EXIT_MISSING, "compiler"),
        ("urllib3.exceptions.ReadTimeoutError: HTTPSConnectionPool: Read timed out.", EXIT_MISSING, "network"),
        ("ERROR: No matching distribution found for torch==2.11.0", EXIT_MISSING, "pinned release"),
        ("WARNING: Retrying after connection broken\nERROR: something new", EXIT_MISSING, "exit code 1"),
    ],
)
def test_what_pip_says_becomes_one_line_with_an_exit_code(venv, monkeypatch, said, code, remedy):
    (site_packages(venv) / "pip" / "__main__.py").write_text(
        f"import sys\nprint({said!r}, file=sys.stderr)\nsys.exit(1)\n"
    )
    with pytest.raises(setup_environment.SetupFailed, match=remedy) as stopped:
        setup_environment.pip_install(venv, "anything")
    assert stopped.value.code == code
    assert "\n" not in str(stopped.value)


def test_too_little_disk_is_said_before_anything_is_downloaded(tmp_path, monkeypatch):
    pin = setup_environment.Pin("torch", "2.11.0", "tensors", tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**10, 9 * 10**9, 10**9))
    with pytest.raises(setup_environment.SetupFailed, match=r"has 1\.0 GB free and the installation needs") as stopped:
        setup_environment.check_disk(tmp_path, [pin])
    assert stopped.value.code == EXIT_STORAGE
    setup_environment.check_disk(tmp_path, [])  # nothing big to come: nothing to refuse


def test_torch_is_installed_alone_and_first_so_that_its_downloads_are_gone_before_the_others_come(
    tmp_path, monkeypatch
):
    file, called = tmp_path / "requirements.txt", []
    pins = [setup_environment.Pin(name, "2.11.0", "", file) for name in ("numpy", "torch", "torchaudio")]
    monkeypatch.setattr(setup_environment, "pip_install", lambda venv, *words: called.append(words))
    setup_environment.install(tmp_path, pins, setup_environment.Packages((3, 11), {"pip": "25"}, {}, {}))
    assert called == [("torch==2.11.0", "torchaudio==2.11.0"), ("-r", str(file))]


def test_a_python_without_the_venv_module_is_told_what_to_install(root, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(setup_environment.importlib.util, "find_spec", lambda name: None)
    assert setup(root, tmp_path / "new") == EXIT_MISSING
    assert f"apt install python3.{sys.version_info.minor}-venv" in capfd.readouterr().err


def test_a_folder_that_holds_something_else_is_refused_and_left_alone(root, tmp_path, capfd):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("words")
    assert setup(root, tmp_path / "mine") == EXIT_INPUT
    assert "not a virtual environment (it holds thesis.txt)" in capfd.readouterr().err
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="needs a user who may not write everywhere")
def test_a_folder_that_may_not_be_written_is_said_in_one_line(root, tmp_path, capfd):
    tmp_path.chmod(0o500)
    assert setup(root, tmp_path / "new") == EXIT_STORAGE
    tmp_path.chmod(0o700)
    assert "Permission denied; choose a folder you may write to" in capfd.readouterr().err


def test_an_environment_of_another_python_is_refused(root, venv, monkeypatch, capfd):
    packages = setup_environment.Packages((3, 14), {"pip": "25"}, {}, {})
    monkeypatch.setattr(setup_environment, "read_packages", lambda folder: packages)
    assert setup(root, venv) == EXIT_MISSING
    assert "holds Python 3.14, and 3.10 to 3.13 is needed" in capfd.readouterr().err


def test_a_second_setup_of_the_same_environment_waits_its_turn(root, venv, capfd):
    with setup_environment.only_setup_of(venv):
        command = "import sys, pathlib, setup_environment as s; from command_line import run\n"
        command += "sys.exit(run(lambda argv: s.main(argv, pathlib.Path(sys.argv[1])), sys.argv[2:]))"
        words = [sys.executable, "-c", command, str(root), "--venv", str(venv)]
        answer = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert answer.returncode == EXIT_BUSY
    assert "another setup_environment.py works in" in answer.stderr


def test_help_names_every_exit_code(capsys):
    with pytest.raises(SystemExit) as stopped:
        setup_environment.main(["--help"])
    assert stopped.value.code == 0
    said = capsys.readouterr().out
    assert all(word in said for word in ("--venv", "--extras", "--check", "exit codes", "5 a needed package"))
