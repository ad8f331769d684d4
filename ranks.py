"""The processes of one training run: alone, or one per GPU (or CPU core) under `torchrun`.

Each process works on its share of every batch; gradients are averaged, so that N processes take the steps that one
would take with the whole batch. Knows nothing of models or data.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")
PATIENCE = timedelta(hours=12)  # for the first process's measuring and preparing; torchrun ends all if one fails


@dataclass(frozen=True)
class Ranks:
    """This process among `n`; with one process nothing is exchanged."""

    rank: int = 0
    n: int = 1

    @property
    def first(self) -> bool:
        """The process that writes, prints and measures."""
        return self.rank == 0

    def share_of(self, batch_size: int, name: str = "batch_size") -> slice:
        """Rows of a global batch that this process works on. ValueError if they do not divide evenly."""
        if batch_size % self.n:
            raise ValueError(f"{name}={batch_size} must be a multiple of the {self.n} processes")
        each = batch_size // self.n
        return slice(self.rank * each, (self.rank + 1) * each)

    def average_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Every gradient becomes its mean over the processes. A parameter without one counts as zeros, and has one
        afterwards: leave out what no process trains."""
        if self.n == 1:
            return
        parameters = list(parameters)
        flat = torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in parameters])
        dist.all_reduce(flat)
        flat /= self.n
        for p, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            p.grad = part.view_as(p)

    def sum(self, values: Tensor) -> Tensor:
        """Of a tensor of the same shape in every process."""
        if self.n > 1:
            values = values.clone()
            dist.all_reduce(values)
        return values

    def mean(self, values: Tensor) -> Tensor:
        """Of a tensor of the same shape in every process."""
        return self.sum(values) / self.n if self.n > 1 else values

    def any(self, flag: bool) -> bool:
        """Whether it is true in at least one process."""
        if self.n == 1:
            return flag
        found = [None] * self.n
        dist.all_gather_object(found, flag)
        return any(found)

    def from_first(self, value: T) -> T:
        """What the first process holds, in all of them. Plain values."""
        if self.n == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box)
        return box[0]

    def first_then_others(self, work: Callable[[], T]) -> T:
        """Its result in every process; the others begin when the first has done it, and find what it left on disk."""
        if self.n == 1:
            return work()
        if self.first:
            result = work()
            dist.barrier()
            return result
        dist.barrier()
        return work()

    def copy_from_first(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite tensors with those of the first process."""
        for tensor in tensors if self.n > 1 else ():
            dist.broadcast(tensor, src=0)


def over_ranks(count: int, device: torch.device) -> float:
    """Sum of a count over the processes of the run, for code that is not told of them."""
    if not dist.is_initialized():
        return float(count)
    counted = torch.tensor(float(count), device=device)
    dist.all_reduce(counted)
    return counted.item()


def pick_device(name: str) -> torch.device:
    """Under torchrun `cuda` is the GPU of this process. ValueError for one that this machine does not have, or has
    fewer of than torchrun started processes."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device {name} asked for, but this torch sees no CUDA; use --device cpu")
    local = os.environ.get("LOCAL_RANK", "")  # of torchrun; the first GPU is another process's
    if name.startswith("cuda") and local and int(local) >= torch.cuda.device_count():
        raise ValueError(
            f"process {local} of this machine has no GPU, there are {torch.cuda.device_count()}; "
            f"start torchrun with --nproc_per_node {torch.cuda.device_count()}"
        )
    if name == "cuda" and local:
        name = f"cuda:{local}"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # the words of every backend are other ones
        raise ValueError(f"device {name!r} cannot be used here; give auto, cpu or cuda") from error
    return device


def use_threads(n: int) -> None:
    """CPU threads of torch in this process; 0 leaves torch's choice. ValueError for fewer."""
    if n < 0:
        raise ValueError(f"threads={n} must be 0 or more")
    if n:
        torch.set_num_threads(n)


def bf16_speed(device: torch.device) -> float:
    """How many times as fast as in fp32 a product of matrices is in bf16; infinity or 0 elsewhere than on a CPU."""
    if device.type != "cpu":
        return float("inf") if torch.cuda.is_bf16_supported() else 0.0
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        matrix = torch.ones(768, 768, dtype=dtype)
        rounds = []
        for _ in range(6):
            began = time.perf_counter()
            matrix @ matrix
            rounds.append(time.perf_counter() - began)
        seconds[dtype] = min(rounds)
    return seconds[torch.float32] / seconds[torch.bfloat16]


def warn_of_slow_bf16(device: torch.device) -> None:
    """One line if who asked for bf16 would train faster in fp32."""
    speed = bf16_speed(device)
    if speed < 1:
        times = f"take {1 / speed:.1f} times as long as in fp32" if speed else "are not to be had"
        print(f"note: products in bf16 {times} on this {device.type}; without --precision the faster one is taken")


@contextlib.contextmanager
def join_ranks(device: torch.device) -> Iterator[tuple[Ranks, torch.device]]:
    """This process's place as `torchrun` set it (RANK, WORLD_SIZE, LOCAL_RANK), and its device; alone without torchrun.

    Processes talk by NCCL on GPUs and by Gloo on CPUs. `device` is from `pick_device`.
    """
    n = int(os.environ.get("WORLD_SIZE", "1"))
    if n == 1:
        yield Ranks(), device
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
    yield Ranks(dist.get_rank(), n), device
    dist.barrier()  # a process that leaves while another still talks to it can be aborted by Gloo's threads
    dist.destroy_process_group()  # not after an error: the others may wait for this process, and the reason be unsaid
