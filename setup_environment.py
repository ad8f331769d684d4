"""Creates, completes and checks the environment that every other script runs in: python setup_environment.py

Standard library only. Running it again installs only what is missing, so it also completes an interrupted installation;
`--check` changes nothing. Knows nothing of audio or models: what to install stands in the requirements files.
"""

import sys

if sys.version_info < (3, 10):  # before anything that an older Python cannot run; 5 is command_line.EXIT_MISSING
    sys.stderr.write("error: this is Python %d.%d, and 3.10 to 3.13 is needed; " % sys.version_info[:2])
    sys.stderr.write("name such a Python, for example: python3.12 setup_environment.py\n")
    sys.exit(5)

import argparse
import contextlib
import ctypes
import importlib.util
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from command_line import (
    EXIT_CODES_HELP,
    EXIT_DONE,
    EXIT_MISSING,
    EXIT_SIGTERM,
    EXIT_STORAGE,
    FolderBusy,
    MissingRequirement,
    Several,
    run,
)

ROOT: Path = Path(__file__).resolve().parent  # a SyntaxError here means: this Python is too old, use 3.10 to 3.13
ENVIRONMENT_GB = 6.7  # measured on Linux with every extra, most of it the GPU libraries that torch brings along
DOWNLOAD_GB = 2.4  # what pip keeps in the temporary folder until torch is installed; the rest, later, is 0.5 GB
BOTH_GB = 7.5  # the most there is of both at one time

EXTRAS = {
    "data": "the built-in voice: collect_data.py --sources synthetic",
    "eval": "word error rate, STOI, PESQ, Distill-MOS and speaker similarity in evaluation_framework.py",
    "filters": "voice activity (collect_data.py --vad), and DNSMOS there (--min_dnsmos) and in evaluation_framework.py",
    "dev": "the test suite and the linter: run_tests.sh",
    "wandb": "Weights & Biases, for train.py --wandb",
    "play": "the sound device, for demo.py",
    "web": "the server, for demo.py --mode web",
    "common-voice": "Mozilla's client, for collect_data.py --sources common_voice; Python 3.12 or later",
}
# An extra has requirements-<extra>.txt, and for what pip cannot install in the same way files with these endings
NO_DEPS = "-nodeps.txt"  # installed without its dependencies
FROM_SOURCE = "-source.txt"  # built on this machine, and done without where that fails


class Pin(NamedTuple):
    name: str  # lower case, with single hyphens
    version: str
    adds: str  # what it is for: the comment behind it
    file: Path  # the requirements file that names it


class Packages(NamedTuple):
    """What an environment holds."""

    python: tuple[int, int]
    whole: dict[str, str]  # name -> version
    halves: dict[str, str]  # left half-written by an interrupted pip
    requires: dict[str, list[str]]  # name -> names it depends on


class SetupFailed(RuntimeError):
    """The installation cannot go on; holds the exit code, the text is one line with the remedy."""

    def __init__(self, code: int, remedy: str):
        super().__init__(remedy)
        self.code = code


# Both probes run in the environment and print one line of JSON. pip writes INSTALLER after all other files of a
# package, so a package without it is not whole.
PACKAGES_PROBE = """
import importlib.metadata as metadata, json, re, sys
canonical = lambda name: re.sub("[-_.]+", "-", name).lower()
whole, halves, requires = {}, {}, {}
for package in metadata.distributions():
    if package.read_text("METADATA") and package.metadata["Name"]:
        name = canonical(package.metadata["Name"])
        (whole if package.read_text("INSTALLER") else halves)[name] = package.version
        needs = [need for need in package.requires or [] if "extra ==" not in need]
        requires[name] = [canonical(re.match("[A-Za-z0-9._-]+", need).group()) for need in needs]
print(json.dumps([sys.version_info[:2], whole, halves, requires]))
"""
PAIR_PROBE = """
import json, time
import torch, torchaudio
def seconds(kind):
    matrix, times = torch.ones(512, 512, dtype=kind), []
    for _ in range(10):
        start = time.perf_counter()
        matrix @ matrix
        times.append(time.perf_counter() - start)
    return min(times)
gpus = []
for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
    found = torch.cuda.get_device_properties(index)
    bf16 = "bf16" if torch.cuda.is_bf16_supported() else "no bf16"
    gpus.append(f"{found.name}, {found.total_memory / 2**30:.0f} GiB, {bf16}")
if torch.backends.mps.is_available():
    gpus.append("Apple GPU (mps)")
print(json.dumps({"torch": torch.__version__, "torchaudio": torchaudio.__version__, "gpus": gpus,
                  "bf16": seconds(torch.float32) / seconds(torch.bfloat16)}))
"""

NETWORK_REMEDY = (
    "the package index was not reached, or it has no file for this system; check the network, the proxy and "
    "`pip config list`, then run this again: what is installed stays"
)
# What pip says on stderr -> exit code and remedy; the first that fits counts
PIP_FAILURES = (
    (r"Errno 28|No space left|WinError 112", EXIT_STORAGE, "the disk is full; free some space and run this again"),
    (r"Errno 122|quota", EXIT_STORAGE, "the disk quota is used up; free some space and run this again"),
    (r"Long Path", EXIT_STORAGE, "enable long paths in Windows, or clone into a folder with a shorter path"),
    (r"Errno 13|Permission denied|WinError 5\b", EXIT_STORAGE, "a file may not be written; pip names it above"),
    (r"Failed building|Failed to build|Could not build|Visual C\+\+", EXIT_MISSING, "a C/C++ compiler is needed"),
    (
        r"from versions: none|Connection|Max retries|name resolution|unreachable|[Tt]imed? ?out|SSL|[Pp]roxy",
        EXIT_MISSING,
        NETWORK_REMEDY,
    ),
    (r"No matching distribution", EXIT_MISSING, "the package index lacks a pinned release; pip names it above"),
)


def canonical(name: str) -> str:
    """A package name as package indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def read_pins(path: Path, python: tuple[int, int]) -> list[Pin]:
    """The exact pins of a requirements file that hold for a Python version. Raises ValueError naming the line."""
    form = r'([\w.-]+)==([\w.+!]+)(?:; python_version (<|>=) "(\d+)\.(\d+)")?(?:\s+#\s*(.*))?'
    pins = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip() or line.startswith("#"):
            continue
        match = re.fullmatch(form, line.rstrip())
        if match is None:
            raise ValueError(f"{path} line {number}: expected name==version, got {line!r}")
        name, version, sign, major, minor, adds = match.groups()
        if sign is None or (python < (int(major), int(minor))) == (sign == "<"):
            pins.append(Pin(canonical(name), version, adds or "", path))
    return pins


def requirement_files(root: Path, extras: list[str]) -> list[Path]:
    """The files of the core and of the extras in the order of installation."""
    plain = [root / "requirements.txt", *(root / f"requirements-{extra}.txt" for extra in extras)]
    special = [root / f"requirements-{extra}{ending}" for ending in (NO_DEPS, FROM_SOURCE) for extra in extras]
    return plain + [path for path in special if path.exists()]


def missing_pins(pins: list[Pin], packages: Packages | None) -> list[Pin]:
    """Pins that the environment lacks; a build label that is not pinned, such as +cpu or +cu126, does not matter."""
    whole = packages.whole if packages else {}
    return [pin for pin in pins if pin.version not in (whole.get(pin.name), whole.get(pin.name, "").split("+")[0])]


def check_system() -> None:
    """Raises MissingRequirement for a Python or a system that torch has no build for."""
    if sys.version_info[:2] > (3, 13):
        raise MissingRequirement(
            f"this is Python {platform.python_version()}, and 3.10 to 3.13 is needed; "
            "name such a Python, for example: python3.12 setup_environment.py"
        )
    if sys.maxsize < 2**32:
        raise MissingRequirement("this is a 32-bit Python, for which there is no torch; install a 64-bit Python")
    if sys.platform == "darwin" and platform.machine() == "x86_64":
        raise MissingRequirement(
            "there is no torch 2.11 for Intel Macs, nor for an Intel Python on Apple silicon; use an arm64 Python"
        )


def python_of(venv: Path) -> Path:
    return venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def isolated(python: Path | str, *arguments: str) -> list[str]:
    """A command of that Python which neither the current folder nor PYTHON* variables can change."""
    return [str(python), "-I", *arguments]


def read_packages(venv: Path) -> Packages | None:
    """What the environment holds, or None when its Python does not run."""
    command = isolated(python_of(venv), "-c", PACKAGES_PROBE)
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    python, whole, halves, requires = json.loads(answer.stdout)
    return Packages(tuple(python), whole, halves, requires)


def broken_dependencies(venv: Path, pins: list[Pin], packages: Packages) -> list[str]:
    """What `pip check` complains of among the pins and all they depend on; pins without dependencies are let be."""
    ours = [pin.name for pin in pins if not pin.file.name.endswith(NO_DEPS)]
    for name in ours:  # grows while it is read
        ours += [need for need in packages.requires.get(name, []) if need not in ours]
    answer = subprocess.run(isolated(python_of(venv), "-m", "pip", "check"), capture_output=True, text=True)
    lines = answer.stdout.splitlines() if answer.returncode else []
    return [line for line in lines if " " in line and canonical(line.split()[0]) in ours]


@contextlib.contextmanager
def only_setup_of(venv: Path) -> Iterator[None]:
    """Hold a lock in the folder until this process and the pip it started have ended. Raises FolderBusy."""
    with open(venv / ".setup.lock", "a+") as file:
        try:
            if os.name == "nt":
                import msvcrt

                msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
            else:
                import fcntl

                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.set_inheritable(file.fileno(), True)
        except OSError as error:
            raise FolderBusy(f"another setup_environment.py works in {venv}; wait for it to end") from error
        yield


def check_folder(venv: Path) -> None:
    """Raises ValueError for a folder that holds something else than an environment."""
    parts = {"bin", "include", "Include", "lib", "lib64", "Lib", "Scripts", ".setup.lock", ".gitignore"}
    if venv.is_dir() and not (venv / "pyvenv.cfg").exists():
        others = [path.name for path in venv.iterdir() if path.name not in parts]
        if others:
            raise ValueError(f"{venv} is not a virtual environment (it holds {min(others)}); choose another --venv")


def create_venv(venv: Path) -> None:
    """Make the environment or complete one whose making was interrupted; a whole one is left as it is."""
    packages = read_packages(venv)
    if packages is not None and not (3, 10) <= packages.python <= (3, 13):
        raise MissingRequirement(
            f"{venv} holds Python {packages.python[0]}.{packages.python[1]}, and 3.10 to 3.13 is needed; "
            "delete that folder or choose another --venv"
        )
    if packages is not None and "pip" in packages.whole:
        return
    if importlib.util.find_spec("venv") is None or importlib.util.find_spec("ensurepip") is None:
        raise MissingRequirement(
            "this Python cannot make virtual environments (its module venv or ensurepip is missing); "
            f"on Debian and Ubuntu: apt install python3.{sys.version_info.minor}-venv"
        )
    for name in {"pip", "setuptools"} & set(packages.halves if packages else ()):
        for folder in venv.glob(f"[Ll]ib/**/site-packages/{name}-*.dist-info"):
            shutil.rmtree(folder)  # else ensurepip takes what is half-written for whole
    print(f"making the environment {venv} with Python {platform.python_version()}", flush=True)
    answer = subprocess.run(isolated(sys.executable, "-m", "venv", str(venv)), capture_output=True, text=True)
    made = read_packages(venv)
    if answer.returncode or made is None or "pip" not in made.whole:
        said = (answer.stderr + answer.stdout).strip().splitlines() or ["its Python does not run"]
        raise MissingRequirement(f"{venv} could not be made ({said[-1]}); delete that folder and run this again")


def check_disk(venv: Path, missing: list[Pin]) -> None:
    """Raises SetupFailed when torch is still to come and will not fit."""
    if not any(pin.name == "torch" for pin in missing):
        return
    share = 1.0 if sys.platform == "linux" else 0.35  # elsewhere torch comes without GPU libraries
    temporary = Path(tempfile.gettempdir())
    needs = [(venv, BOTH_GB)]
    if venv.stat().st_dev != temporary.stat().st_dev:
        needs = [(venv, ENVIRONMENT_GB), (temporary, DOWNLOAD_GB)]
    for folder, size in needs:
        free = shutil.disk_usage(folder).free / 1e9
        if free < size * share:
            raise SetupFailed(
                EXIT_STORAGE,
                f"{folder} has {free:.1f} GB free and the installation needs {size * share:.1f} GB; free some space, "
                "or have the environment (--venv) or the temporary folder (TMPDIR) on another disk",
            )


def pip_install(venv: Path, *arguments: str) -> None:
    """Run pip and let its progress pass through. Raises SetupFailed with one line that says what to do."""
    print("$ pip install " + " ".join(arguments), flush=True)
    command = isolated(python_of(venv), "-m", "pip", "install", "--disable-pip-version-check", *arguments)
    said = ""
    # close_fds=False: pip inherits the lock, so that an orphaned pip keeps a second setup away
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, errors="replace", close_fds=False) as process:
        try:
            for line in process.stderr:
                sys.stderr.write(line)
                said += "" if line.startswith("WARNING") else line
        except BaseException:
            process.terminate()
            raise
    if process.returncode:
        for pattern, code, remedy in PIP_FAILURES:
            if re.search(pattern, said):
                raise SetupFailed(code, remedy)
        raise SetupFailed(EXIT_MISSING, f"pip stopped with exit code {process.returncode}; its message is above")


def install(venv: Path, pins: list[Pin], packages: Packages) -> None:
    """Let pip add what is missing; it leaves alone what is there."""
    missing = missing_pins(pins, packages)
    for name, version in packages.halves.items():  # pip would take a half-written package for an installed one
        pip_install(venv, "--ignore-installed", "--no-deps", f"{name}=={version}")
    special = [pin for pin in missing if pin.file.name.endswith((NO_DEPS, FROM_SOURCE))]
    if len(special) < len(missing) or broken_dependencies(venv, pins, packages):
        print("downloading, then unpacking; while it unpacks pip may say nothing for minutes", flush=True)
        largest = [f"{pin.name}=={pin.version}" for pin in missing if pin.name in ("torch", "torchaudio")]
        if largest:
            pip_install(venv, *largest)  # first and alone: its downloads are gone before the others come
        plain = dict.fromkeys(pin.file for pin in pins if not pin.file.name.endswith((NO_DEPS, FROM_SOURCE)))
        pip_install(venv, *(word for file in plain for word in ("-r", str(file))))
    for pin in special:
        if pin.file.name.endswith(NO_DEPS):
            pip_install(venv, "--no-deps", f"{pin.name}=={pin.version}")
        else:
            build_from_source(venv, pin)


def build_from_source(venv: Path, pin: Pin) -> None:
    """Try once to build the pin; a failure is remembered in the environment and costs only what the pin adds."""
    failures = venv / "could-not-build.txt"
    requirement = f"{pin.name}=={pin.version}"
    if failures.exists() and requirement in failures.read_text().splitlines():
        return
    try:
        pip_install(venv, "--quiet", requirement)
    except SetupFailed as error:
        with open(failures, "a") as file:
            file.write(requirement + "\n")
        print(f"{requirement} was not installed ({error}); to be done without: {pin.adds}")
        print(f"to try again: {python_of(venv)} -m pip install {requirement}")


def check_pair(venv: Path, pins: list[Pin]) -> dict[str, object]:
    """Import torch and torchaudio in the environment -> what they report. Raises MissingRequirement."""
    answer = subprocess.run(isolated(python_of(venv), "-c", PAIR_PROBE), capture_output=True, text=True)
    if answer.returncode == 0:
        return json.loads(answer.stdout.splitlines()[-1])
    said = (answer.stderr.strip().splitlines() or [f"exit code {answer.returncode}"])[-1]
    versions = [f"{pin.name}=={pin.version}" for pin in pins if pin.name in ("torch", "torchaudio")]
    if re.search(r"DLL load failed|WinError 126", said):
        raise MissingRequirement(f"torch does not load ({said}); install Microsoft's Visual C++ Redistributable (x64)")
    raise MissingRequirement(
        f"{' and '.join(versions)} do not load together ({said}); install a fitting pair: "
        f"{python_of(venv)} -m pip install --force-reinstall {' '.join(versions)}"
    )


def memory_gib() -> float:
    """Main memory of this machine in GiB."""
    if os.name == "nt":
        kibibytes = ctypes.c_ulonglong()
        ctypes.windll.kernel32.GetPhysicallyInstalledSystemMemory(ctypes.byref(kibibytes))
        return kibibytes.value / 2**20
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30


def cpu_name() -> str:
    """The processor's name as its system gives it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        match = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text(errors="replace"))
        return match.group(1) if match else platform.machine()
    if sys.platform == "darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    return platform.processor()


def report_machine(venv: Path) -> None:
    """Print system, processor, memory and disk."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    folder = next(path for path in (venv, *venv.absolute().parents) if path.is_dir())
    print(f"system    {platform.platform(terse=True)} {platform.machine()}, Python {platform.python_version()}")
    print(f"cpu       {cpu_name()}, {cores} cores for this process")
    print(f"memory    {memory_gib():.1f} GiB")
    print(f"disk      {shutil.disk_usage(folder).free / 1e9:.1f} GB free for {venv}")


def report_pair(facts: dict[str, object]) -> None:
    """Print what torch found to compute with."""
    print(f"torch     {facts['torch']} and torchaudio {facts['torchaudio']} load together")
    print(f"bf16      matrix products on this CPU take 1/{facts['bf16']:.1f} of the time of fp32 (measured)")
    print(f"gpu       {'; '.join(facts['gpus']) or 'none; everything runs on the CPU'}")
    if not facts["gpus"] and shutil.which("nvidia-smi"):
        print("          nvidia-smi is here but torch sees no GPU: update its driver, or install torch's CUDA build")


def report_extras(root: Path, packages: Packages | None) -> None:
    """Print a table of the optional packages: present or absent, and what each adds."""
    python = packages.python if packages else sys.version_info[:2]
    for extra, adds in EXTRAS.items():
        pins = [pin for path in requirement_files(root, [extra])[1:] for pin in read_pins(path, python)]
        absent = missing_pins(pins, packages)
        state = "present" if not absent else "absent" if len(absent) == len(pins) else "in part"
        state = state if pins else f"nothing for Python {python[0]}.{python[1]}"
        print(f"\nextra {extra} ({state}): {adds}")
        for pin in pins:
            print(f"  {'-' if pin in absent else '+'} {pin.name + ' ' + pin.version:32} {pin.adds}")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Create, complete or check the Python environment of this project.", epilog=EXIT_CODES_HELP
    )
    parser.add_argument("--venv", type=Path, default=Path(".venv"), help="folder of the environment (default: .venv)")
    parser.add_argument(
        "--extras",
        action=Several,
        nargs="*",
        choices=list(EXTRAS),
        default=["data", "eval"],
        help="optional parts to install: "
        + "; ".join(f"{name}: {adds}" for name, adds in EXTRAS.items())
        + " (default: data eval; nothing after --extras: none of them)",
    )
    parser.add_argument("--check", action="store_true", help="change nothing; exit code 5 when something is missing")
    return parser


def refuse_unfit(root: Path, extras: list[str], python: tuple[int, int]) -> None:
    """SetupFailed where all packages of an extra are for other Pythons."""
    for extra in extras:
        if not any(read_pins(path, python) for path in requirement_files(root, [extra])[1:]):
            found = f"extra {extra} has nothing for Python {python[0]}.{python[1]} ({EXTRAS[extra]})"
            raise SetupFailed(EXIT_MISSING, f"{found}; the rest is ready")


def check(root: Path, venv: Path, extras: list[str]) -> list[str]:
    """Report on the machine and the environment -> what is wrong, one line each. SetupFailed where nothing is, but an
    extra is not for this Python."""
    packages = read_packages(venv)
    python = packages.python if packages else sys.version_info[:2]
    pins = [pin for path in requirement_files(root, extras) for pin in read_pins(path, python)]
    report_machine(venv)
    wrong = [] if packages else [f"there is no environment {venv}"]
    if packages:
        needed = [pin for pin in missing_pins(pins, packages) if not pin.file.name.endswith(FROM_SOURCE)]
        wrong += [f"{pin.name}=={pin.version} is missing" for pin in needed]
        wrong += [f"{name} {version} is half-installed" for name, version in packages.halves.items()]
        wrong += broken_dependencies(venv, pins, packages)
        if {"torch", "torchaudio"} <= packages.whole.keys():
            try:
                report_pair(check_pair(venv, pins))
            except MissingRequirement as error:
                wrong.append(str(error))
    report_extras(root, packages)
    if not wrong:
        refuse_unfit(root, extras, python)
    return wrong


def stop(number: int, frame: object) -> None:
    raise SystemExit(EXIT_SIGTERM)


def main(argv: list[str] | None = None, root: Path = ROOT) -> int:
    args = make_parser().parse_args(argv)
    signal.signal(signal.SIGTERM, stop)
    try:
        check_system()
        check_folder(args.venv)
        if not args.check:
            args.venv.mkdir(parents=True, exist_ok=True)
            with only_setup_of(args.venv):
                complete(root, args.venv, args.extras)
        wrong = check(root, args.venv, args.extras)
    except SetupFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return error.code
    if wrong:
        rest = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        install_command = f"python setup_environment.py --venv {args.venv} --extras {' '.join(args.extras)}".rstrip()
        remedy = "" if "pip install" in wrong[0] else f"; run: {install_command}"
        print(f"\nerror: {wrong[0]}{rest}{remedy}", file=sys.stderr)
        return EXIT_MISSING
    print(f"\nready: {python_of(args.venv)}")
    return EXIT_DONE


def complete(root: Path, venv: Path, extras: list[str]) -> None:
    """Bring the environment to what the requirements files name."""
    before = read_packages(venv)
    files = requirement_files(root, extras)
    python = before.python if before else sys.version_info[:2]
    pins = [pin for path in files for pin in read_pins(path, python)]
    check_disk(venv, missing_pins(pins, before))
    create_venv(venv)
    packages = read_packages(venv)
    install(venv, pins, packages)


if __name__ == "__main__":
    raise SystemExit(run(main))
