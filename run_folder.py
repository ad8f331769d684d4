"""The folder of one training run: settings, one JSON line per step, TensorBoard, a picture of the losses.

Layout: `settings.json`, `metrics.jsonl`, `tensorboard/`, `losses.png`, `state-<step>.pt` (see `checkpointing.py`).
Knows nothing of what is trained. Names of metrics are `group/name`, SI units.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

from audio import SAMPLE_RATE
from checkpointing import write_atomically

PANELS = 3  # of a picture, side by side


def describe_environment(device: torch.device | str = "cpu") -> dict:
    """What a result needs to be repeated: command, commit, versions, and the hardware that it was computed on."""
    here = Path(__file__).parent
    try:
        git = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=here, capture_output=True, text=True)
        commit = git.stdout.strip()
    except OSError:
        commit = ""  # no git here
    on_gpu = torch.device(device).type == "cuda"
    return {
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "commit": commit or "unknown",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name(device) if on_gpu else platform.processor() or "cpu",
        "threads": torch.get_num_threads(),
    }


class RunLog:
    """Scalars of a run to `metrics.jsonl` and TensorBoard. Resuming at step s drops what was logged from s on."""

    def __init__(self, folder: Path, settings: dict, start: int, device: torch.device | str = "cpu"):
        from torch.utils.tensorboard import SummaryWriter

        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        content = json.dumps({**settings, "environment": describe_environment(device)}, indent=2, default=str) + "\n"
        write_atomically(folder / "settings.json", content.encode())
        kept = [json.dumps(record) + "\n" for record in read_metrics(folder) if record["step"] < start]
        write_atomically(folder / "metrics.jsonl", "".join(kept).encode())
        self.file = open(folder / "metrics.jsonl", "a", encoding="utf-8")  # noqa: SIM115 - closed by close()
        self.tensorboard = SummaryWriter(folder / "tensorboard", purge_step=start)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """One line and one TensorBoard point per name."""
        self.file.write(json.dumps({"step": step, **values}) + "\n")
        self.file.flush()
        for name, value in values.items():
            self.tensorboard.add_scalar(name, value, step)

    def speech(self, step: int, clips: list[tuple[str, np.ndarray]], lines: list[str]) -> None:
        """(title, (N,) samples at 24 kHz) to hear and lines to read, in TensorBoard."""
        for number, (title, samples) in enumerate(clips):
            self.tensorboard.add_audio(f"speech/{number} {title[:60]}", samples[None], step, SAMPLE_RATE)
        self.tensorboard.add_text("speech", "\n\n".join(lines), step)

    def close(self) -> None:
        self.file.close()
        self.tensorboard.close()


def read_metrics(folder: Path) -> list[dict]:
    """All whole lines of `metrics.jsonl`; a last line torn by a kill is left out."""
    path = folder / "metrics.jsonl"
    records = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records


def read_settings(folder: Path) -> dict | None:
    """Settings the run was started with, or None for a new folder."""
    path = folder / "settings.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def refuse_other_settings(folder: Path, settings: dict) -> None:
    """ValueError if the run in `folder` was started with other settings than these; it names the first one."""
    previous = read_settings(folder)
    if previous is None:
        return
    before = by_name({name: previous[name] for name in settings if name in previous})
    now = by_name(json.loads(json.dumps(settings, default=str)))
    for name in {**now, **before}:
        if name not in before:
            raise ValueError(
                f"the run in {folder} was started by a version that did not know {name}; "
                "give another --out to start anew"
            )
        if before[name] != now.get(name):
            raise ValueError(
                f"the run in {folder} was started with {name}={before[name]}, now it is {now.get(name)}; "
                "give the same value to go on, or another --out to start anew"
            )


def by_name(settings: dict) -> dict:
    """Settings of groups under group.name."""
    flat = {}
    for name, value in settings.items():
        flat |= {f"{name}.{key}": v for key, v in value.items()} if isinstance(value, dict) else {name: value}
    return flat


def plot_metrics(folder: Path, groups: dict[str, list[str]], path: Path) -> None:
    """One panel per group of metric names over steps, to a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    records = read_metrics(folder)
    columns = min(len(groups), PANELS)
    rows = -(-len(groups) // PANELS)
    figure, axes = plt.subplots(rows, columns, figsize=(6 * columns, 4 * rows), squeeze=False)
    for axis in axes.flat[len(groups) :]:
        axis.axis("off")
    for axis, (title, names) in zip(axes.flat[: len(groups)], groups.items(), strict=True):
        for name in names:
            points = [(record["step"], record[name]) for record in records if name in record]
            if points:
                axis.plot(*zip(*points, strict=True), label=name, linewidth=1)
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.3)
        axis.legend(fontsize="x-small", ncols=2)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
