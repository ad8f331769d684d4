"""What a training shows of itself: gates and half-lives, attention maps, memory in use, the picture of its log."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from architecture import CSM, Traces
from conversational_memory import MemoryStore
from dataset_pipeline import ConversationDataset
from parallel import whole
from run_folder import plot_metrics, read_metrics

HEARD = ("wer", "wer_recorded", "cer", "cer_by_chance", "run_away", "similarity")  # what is drawn of it
SHOWN_ROWS = 400  # of an attention map, along each side


def gate_values(model: CSM) -> dict[str, float]:
    """tanh of every gate (0 = closed) and the half-lives of the memory in seconds, by the names of the log."""
    gates = ((name, parameter) for name, parameter in model.named_parameters() if name.endswith("gate"))
    values = {f"gates/{name}": whole(parameter).tanh().item() for name, parameter in gates}
    for name, store in model.named_modules():
        if isinstance(store, MemoryStore):
            seconds = whole(store.half_lives()).tolist()
            values |= {f"half_lives/{name}.{i}": s for i, s in enumerate(seconds)}
    return values


@torch.no_grad()
def attention_figures(model: CSM, dataset: ConversationDataset, device: torch.device) -> Iterator[tuple[str, object]]:
    """(name, figure) of every cross-attention layer: whom the voice of a held-out conversation attends in the text."""
    if not model.config.cross_layers:
        return
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    was_training = model.training
    rows = dataset.collate([dataset.plan(seed=0, epoch=0)[0][:1]], seeds=None).to(device)
    traces = Traces()
    model.eval().hidden(rows, rows.allowed(), traces=traces, maps=True)
    model.train(was_training)
    for layer, weights in zip(model.config.cross_layers, traces.maps, strict=True):
        shown: Tensor = weights[0].float().mean(dim=0)[:SHOWN_ROWS, :SHOWN_ROWS].cpu()  # (audio rows, text rows)
        figure, axis = plt.subplots(figsize=(7, 6))
        axis.imshow(shown.T.numpy(), aspect="auto", origin="lower", vmax=max(shown.max().item(), 1e-6))
        axis.set(title=f"after block {layer}, mean of the heads", xlabel="audio row", ylabel="text row")
        yield f"attention/{layer}", figure


def memory_gib(device: torch.device) -> float | None:
    """Most memory this process has used so far, in GiB: the GPU's if it works on one; None on Windows."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if sys.platform == "win32":
        return None
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


def plot_training(folder: Path, n_codebooks: int) -> None:
    """`losses.png`: losses, each codebook, gradient, what is heard, gates; panels without data are left out."""
    records = read_metrics(folder)
    named = {name for record in records for name in record}
    some = sorted({0, 1, *range(4, n_codebooks, 4), n_codebooks - 1})
    groups = {
        "nats per target": [f"{split}/{name}" for split in ("train", "val") for name in ("codebook0", "depth", "text")],
        "training loss by codebook": [f"codebooks_train/{k:02d}" for k in some],
        "gradient norm": ["train/grad_norm"],
        "free-running speech": [f"spoken/{name}" for name in HEARD],
        "gates": sorted(name for name in named if name.startswith("gates/")),
    }
    present = {title: [name for name in names if name in named] for title, names in groups.items()}
    plot_metrics(folder, {title: names for title, names in present.items() if names}, folder / "losses.png")
