"""One model on several processes: replicated (DDP) or sharded (FSDP2), and its training state as whole tensors.

The state says nothing of how it was spread, so a run may go on with other processes and the other way of spreading.
Knows nothing of what the model is, only that its `forward` gives the loss.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from ranks import Ranks

WAYS = ("ddp", "fsdp")


def distribute(model: nn.Module, blocks: list[nn.Module], way: str, ranks: Ranks, device: torch.device) -> nn.Module:
    """What to call for the loss of a model that is the same in every process.

    `fsdp` shards every one of `blocks` by itself and the rest together; `model` then holds shards. Both average
    gradients over the processes. ValueError for an unknown way.
    """
    if way not in WAYS:
        raise ValueError(f"parallel={way} is not one of {', '.join(WAYS)}")
    if ranks.n == 1:
        return model
    if way == "ddp":
        devices = [device] if device.type == "cuda" else None
        shared = {"gradient_as_bucket_view": True}  # else a second copy of all gradients
        return DistributedDataParallel(model, devices, find_unused_parameters=True, broadcast_buffers=False, **shared)
    mesh = dist.init_device_mesh(device.type, (ranks.n,))
    for block in blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def whole(tensor: Tensor) -> Tensor:
    """A tensor, put together from its shards if it has any; all processes must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def begin_moments(optimizer: torch.optim.Optimizer) -> None:
    """AdamW's state of every parameter from the start, so that it is saved for those that wait for a gradient too."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            moments = {name: torch.zeros_like(p) for name in ("exp_avg", "exp_avg_sq")}
            optimizer.state[p] = {"step": torch.zeros((), device=p.device if group["fused"] else "cpu"), **moments}


def gather(tensors: Mapping[str, Tensor], ranks: Ranks) -> dict[str, Tensor]:
    """Whole tensors in main memory, one after the other, for the first process (the others get none); all must ask."""
    gathered = {}
    for name, tensor in tensors.items():
        complete = whole(tensor)
        if ranks.first:
            gathered[name] = complete.detach().cpu()
    return gathered


def moments_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Tensor]]:
    """The optimizer's state of every parameter, by the parameter's name."""
    return {name: optimizer.state[p] for name, p in model.named_parameters() if p in optimizer.state}


def training_state(model: nn.Module, optimizer: torch.optim.Optimizer, ranks: Ranks) -> dict:
    """Weights and moments by name, whole and in main memory, for the first process; all processes must ask."""
    weights = model.state_dict()  # first: after an evaluation this is what makes FSDP put its shards back
    moments = moments_of(model, optimizer)
    assert len(moments) == len(optimizer.state), "some parameters of the optimizer are not the model's"
    return {
        "model": gather(weights, ranks),
        "moments": {name: gather(of_one, ranks) for name, of_one in moments.items()},
    }


def restore(model: nn.Module, optimizer: torch.optim.Optimizer, state: dict | None, ranks: Ranks, source: str) -> None:
    """Take back what `training_state` gave; only the first process needs to have it.

    ValueError names the first tensor that is missing, unknown or misshapen.
    """
    own = {"model": model.state_dict(), "moments": moments_of(model, optimizer)}
    reason = ranks.from_first(_misfit(own, state, source) if ranks.first else None)
    if reason:
        raise ValueError(reason)
    for name, tensor in own["model"].items():
        _fill(tensor, state and state["model"][name], ranks)
    for name, moments in own["moments"].items():
        for key, tensor in moments.items():
            _fill(tensor, state and state["moments"][name][key], ranks)


def _misfit(own: dict, state: dict, source: str) -> str | None:
    for part in ("model", "moments"):
        if part not in state:
            return f"{source}: the state has no {part}; it was written by another version"
        for name in [*own[part], *state[part]]:
            if name not in own[part] or name not in state[part]:
                return f"{source}: {part} {name} is {'unknown' if name in state[part] else 'missing'}"
    for name, tensor in own["model"].items():
        if tensor.shape != state["model"][name].shape:
            return f"{source}: {name} has shape {tuple(state['model'][name].shape)}, expected {tuple(tensor.shape)}"
    return None


@torch.no_grad()
def _fill(own: Tensor, value: Tensor | None, ranks: Ranks) -> None:
    """Copy what the first process gives into every process's tensor or shard."""
    if isinstance(own, DTensor):
        device = own.to_local().device
        given = torch.empty(own.shape, dtype=own.dtype, device=device) if value is None else value.to(own.dtype)
        own.copy_(distribute_tensor(given.to(device), own.device_mesh, own.placements))
        return
    if value is not None:
        own.copy_(value)
    ranks.copy_from_first([own])
