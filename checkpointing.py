"""Files of weights and of training state: atomic save, checked load.

Weights for use are a folder with `config.json` and `model.safetensors`. Training state is one `.pt` file of tensors
and plain values that loads with `weights_only=True`. Knows nothing of which model it holds.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as serialize
from torch import nn

FORMAT = 1  # of both kinds of file; a reader refuses others
STATE_PATTERN = re.compile(r"state-(\d{8})\.pt")


class ErrorKeepingFile:
    """A file for writers that turn a full disk into an error of their own: `error` holds the OSError."""

    def __init__(self, file: BinaryIO):
        self.file = file
        self.error: OSError | None = None

    def write(self, content: bytes) -> int:
        try:
            return self.file.write(content)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self.file.flush()


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[ErrorKeepingFile]:
    """Write a file that appears whole or not at all, also after a crash of the machine; OSError when it cannot."""
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "wb") as file:
            keeper = ErrorKeepingFile(file)
            try:
                yield keeper
            except RuntimeError as error:
                raise keeper.error or error from error
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)  # half of a file would only keep a full disk full
        raise OSError(error.errno, os.strerror(error.errno or 0), str(path)) from error


def write_atomically(path: Path, content: bytes) -> None:
    """The file holds all of `content` or what it held before, also after a crash of the machine."""
    with replacing(path) as file:
        file.write(content)


def file_digest(path: Path) -> str:
    """SHA-256 of a file's content."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def save_tensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    """A safetensors file, whole or not at all; OSError when it cannot be written."""
    own = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with replacing(path) as file:
        file.write(serialize(own, metadata))


def save_weights(folder: Path, kind: str, config: dict, tensors: dict[str, torch.Tensor]) -> None:
    """Write `config.json` and `model.safetensors`; `kind` names the architecture and is checked on load."""
    folder.mkdir(parents=True, exist_ok=True)
    content = json.dumps({"format": FORMAT, "kind": kind, "config": config}, indent=2) + "\n"
    write_atomically(folder / "config.json", content.encode())
    save_tensors(folder / "model.safetensors", tensors)


def load_weights(folder: Path, kind: str, maker: str = "") -> tuple[dict, dict[str, torch.Tensor]]:
    """The config and tensors of a folder written by `save_weights`. ValueError if it is not of this kind.

    `maker` is the command that makes one, for the message where there is none.
    """
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            remedy = f"; train one with: {maker} --out {folder}" if maker else ""
            raise FileNotFoundError(f"no {kind} at {folder}: {name} is missing{remedy}")
    try:
        content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        found = (content["format"], content["kind"])
        config = content["config"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / 'config.json'} was not written by this project ({error})") from error
    if found != (FORMAT, kind):
        raise ValueError(f"{folder} holds {found[1]!r} of format {found[0]}; expected {kind!r} of format {FORMAT}")
    try:
        return config, load_file(folder / "model.safetensors")
    except SafetensorError as error:
        raise ValueError(f"{folder / 'model.safetensors'} is damaged: {error}") from error


def load_into(module: nn.Module, tensors: dict[str, torch.Tensor], source: str) -> None:
    """Copy tensors into a module; ValueError names the first missing, unknown or misshapen tensor."""
    own = module.state_dict()
    for name, tensor in own.items():
        if name not in tensors:
            raise ValueError(f"{source}: tensor {name} {tuple(tensor.shape)} is missing")
        if tensors[name].shape != tensor.shape:
            raise ValueError(
                f"{source}: tensor {name} has shape {tuple(tensors[name].shape)}, expected {tuple(tensor.shape)}"
            )
    unknown = sorted(set(tensors) - set(own))
    if unknown:
        raise ValueError(f"{source}: tensor {unknown[0]} {tuple(tensors[unknown[0]].shape)} is not known to this model")
    module.load_state_dict(tensors)


def save_state(folder: Path, step: int, state: dict, keep_last: int = 2) -> Path:
    """Write `state-<step>.pt` atomically, then drop all but the newest `keep_last`. Tensors and plain values only."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"state-{step:08d}.pt"
    with replacing(path) as file:
        torch.save({"format": FORMAT, "step": step, **state}, file)
    files = state_files(folder)
    end = files.index(path) + 1
    for old in files[:end][:-keep_last] + files[end:]:
        old.unlink()  # also a later one, which was damaged or it would have been gone on from
    return path


def state_files(folder: Path) -> list[Path]:
    """Training states in a folder, oldest step first."""
    return sorted(path for path in folder.glob("state-*.pt") if STATE_PATTERN.fullmatch(path.name))


def step_of(path: Path) -> int:
    """Of one of `state_files`."""
    return int(path.stem.rpartition("-")[2])


def load_state(path: Path) -> dict:
    """One training state. ValueError: torn or of another format; OSError, MemoryError: the machine cannot read it."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        found = state["format"]
    except Exception as error:  # torch.load raises many types for a torn file
        if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno) or "memory" in str(error):
            raise  # nothing is wrong with the file
        raise ValueError(f"{path} is damaged or was not written by this project ({type(error).__name__})") from error
    if found != FORMAT:
        raise ValueError(f"{path} has format {found}, this code reads {FORMAT}")
    return state


def load_newest_state(folder: Path) -> dict | None:
    """The newest state that loads, or None if there are no files; a torn one is named in a warning and passed over.

    ValueError if no file loads: who began anew would lose what may still be saved.
    """
    files = state_files(folder)
    for path in reversed(files):
        try:
            return load_state(path)
        except ValueError as error:
            warnings.warn(f"{error}; using the one before it", stacklevel=2)
    if files:
        raise ValueError(f"none of the training states in {folder} can be read; move them away to begin anew")
    return None
