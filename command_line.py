"""What every script shares at its edge: exit codes, one-line errors, stop signals, one run per folder, config flags.

Knows nothing of audio, models or data. Only the standard library and `filelock` (imported where used), so that
`setup_environment.py` can rely on the exit codes before anything is installed.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import errno
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

EXIT_DONE = 0
EXIT_INPUT = 2  # wrong flag, missing or unreadable file, data or checkpoint of another kind
EXIT_PARTIAL = 3  # some items failed or the target was not reached; what failed is listed
EXIT_STORAGE = 4  # no space left or no write permission
EXIT_MISSING = 5  # a package, program or network address that is needed is not there
EXIT_BUSY = 6  # another run works in the same folder
EXIT_SIGINT = 128 + signal.SIGINT  # Ctrl-C: progress was saved
EXIT_SIGTERM = 128 + signal.SIGTERM

EXIT_CODES_HELP = (
    "exit codes: 0 done, 2 bad flag or input, 3 partly done, 4 no disk space or no write permission, "
    "5 a needed package or address is missing, 6 another run uses the folder, 130 or 143 stopped with progress saved"
)


class MissingRequirement(RuntimeError):
    """A package, program or network address that the request needs is not there; the text says what to install."""


class FolderBusy(RuntimeError):
    """Another run holds the lock of the folder."""


def exit_code_of(error: BaseException) -> int | None:
    """The documented exit code for an error a user can mend, or None for a mistake of ours."""
    if isinstance(error, MissingRequirement):
        return EXIT_MISSING
    if isinstance(error, FolderBusy):
        return EXIT_BUSY
    if isinstance(error, OSError):
        storage = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EFBIG}
        return EXIT_STORAGE if error.errno in storage else EXIT_INPUT
    if isinstance(error, ValueError | FloatingPointError):
        return EXIT_INPUT
    return None


NEEDS_DEV = "python setup_environment.py --extras data eval dev"  # brings transformers


class Several(argparse.Action):
    """`--flag a --flag b` is `--flag a b`; argparse alone forgets what was given first."""

    def __init__(self, *args, nargs="+", **kwargs):
        super().__init__(*args, nargs=nargs, **kwargs)

    def __call__(self, parser, namespace, values, option_string=None):
        before = getattr(namespace, self.dest)
        setattr(namespace, self.dest, [*(() if before is self.default else before), *values])


def run(main: Callable[[list[str] | None], int], argv: list[str] | None = None) -> int:
    """Call `main(argv)`; what a user can mend becomes one line on stderr and an exit code, the rest a traceback."""
    try:
        return main(argv)
    except KeyboardInterrupt:
        print("stopped by Ctrl-C; run the same command again to go on", file=sys.stderr)
        return EXIT_SIGINT
    except Exception as error:
        code = exit_code_of(error)
        if code is None:
            raise
        print(f"error: {describe(error)}", file=sys.stderr)
        return code


def first_line(error: BaseException) -> str:
    """Of what a library says, or what kind of error it is."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def describe(error: BaseException) -> str:
    """One line for an error; system errors name the file and what to do."""
    if isinstance(error, OSError) and error.errno is not None:
        where = f"{error.filename}: " if error.filename else ""
        remedy = {
            errno.ENOSPC: "; free some space and run the same command again",
            errno.EACCES: "; choose a folder you may write to",
            errno.EROFS: "; choose a folder you may write to",
        }.get(error.errno, "")
        return f"{where}{os.strerror(error.errno)}{remedy}"
    return str(error)


def end_with_parent() -> None:
    """For a process of a pool: a process whose parent was killed would wait for work for ever."""

    def wait() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


class StopSignals:
    """Turns SIGINT and SIGTERM into a flag that a loop reads between two steps, so that it can save first.

    Use as a context manager. `stop.received` is None or the number of the first signal. Ctrl-C after it acts at once;
    SIGTERM again, as workers get it from a scheduler and from torchrun, changes nothing.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._previous: dict[int, object] = {}

    def __enter__(self) -> StopSignals:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: object) -> None:
        if self.received is None:
            self.received = number
        elif number == signal.SIGINT:
            raise KeyboardInterrupt

    @property
    def exit_code(self) -> int:
        """128 + the signal's number, as shells report it; 0 when no signal came."""
        return 0 if self.received is None else 128 + self.received


def run_child(command: list[str], **options: Any) -> subprocess.CompletedProcess:
    """As `subprocess.run`, but signals are the child's: Ctrl-C reaches it through the terminal, SIGTERM is passed on,
    and this process waits until it has saved."""
    passed_on = []

    def pass_on(number: int, frame: object) -> None:
        passed_on.append(number)
        if child is not None:
            child.terminate()

    child = None
    before = {signal.SIGTERM: signal.signal(signal.SIGTERM, pass_on)}
    before[signal.SIGINT] = signal.signal(signal.SIGINT, lambda *_: None)
    try:
        with subprocess.Popen(command, **options) as child:
            if passed_on:
                child.terminate()
            out, errors = child.communicate()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return subprocess.CompletedProcess(command, child.returncode, out, errors)


@contextlib.contextmanager
def only_run_in(folder: Path, beside: bool = False) -> Iterator[None]:
    """Create `folder` and hold its lock; the system releases it even after kill -9. Raises FolderBusy.

    With the lock `beside` it, the folder is left to the caller.
    """
    import filelock

    lock = folder.with_name(f".{folder.name}.lock") if beside else folder / ".lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    try:
        with filelock.FileLock(lock, timeout=0):
            yield
    except filelock.Timeout as error:
        raise FolderBusy(f"another run works in {folder}; wait for it or choose another folder") from error


def add_config_flags(parser: argparse.ArgumentParser, config_class: type, help_texts: dict[str, str]) -> None:
    """One flag per dataclass field; the dataclass is the only place that holds a default."""
    for field in dataclasses.fields(config_class):
        text = help_texts[field.name] + f" (default: {field.default})"
        if isinstance(field.default, bool):
            action = argparse.BooleanOptionalAction
            parser.add_argument(f"--{field.name}", action=action, default=field.default, help=text)
        else:
            kind = type(field.default)
            parser.add_argument(f"--{field.name}", type=kind, default=field.default, help=text, metavar=kind.__name__)


PART_HELP = (
    "do only part I (from 0) of N of the work, beside others that do the rest (default: under torchrun its rank)"
)


def part(text: str) -> tuple[int, int]:
    """I/N of the command line -> (I, N)."""
    index, sign, of = text.partition("/")
    if not (sign and index.isdigit() and of.isdigit() and int(index) < int(of)):
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N with I from 0 to N - 1, for example 3/16")
    return int(index), int(of)


def default_part() -> tuple[int, int]:
    """This process's rank of all that torchrun has started; everything without torchrun."""
    rank, of = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    return (rank, of) if rank < of else (0, 1)  # torchrun sets both; other programs may set one of them
