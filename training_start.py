"""What happens before the first step of a training: model and data for the tokenizer, checks of memory and disk."""

from __future__ import annotations

import dataclasses
import errno
import os
import shutil
from pathlib import Path

import torch

from architecture import CSM, parameter_table
from audio_tokenizer import AudioTokenizer, Codec, CodeShape
from dataset_pipeline import ConversationDataset
from model_sizes import PRESETS, CSMConfig, preset, training_memory
from ranks import Ranks
from text_tokenizer import load_text_tokenizer
from token_cache import TokenCache
from training_config import TrainConfig, mixture

MARGIN = 1.1  # of the estimated memory, for what libraries take
CGROUPS = {  # of a container: limit, what is taken, and the part of memory.stat that is a cache of files
    Path("/sys/fs/cgroup"): ("memory.max", "memory.current", "inactive_file"),
    Path("/sys/fs/cgroup/memory"): ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


def codes_of(tokenizer: AudioTokenizer) -> dict[str, object]:
    """The fields of a CSMConfig that follow the tokenizer."""
    return shape_of(tokenizer.config) | {"audio_tokenizer": tokenizer.fingerprint()}


def shape_of(config: CSMConfig | CodeShape) -> dict[str, int]:
    """What a model and its tokenizer must have in common."""
    return {f.name: getattr(config, f.name) for f in dataclasses.fields(CodeShape)}


def new_model(config: CSMConfig, seed: int, tokenizer: Codec) -> CSM:
    """Random weights that know the tokenizer's codes, the gates of cross-attention open; a seed gives the same ones."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = CSM(config)
        model.adopt_codes([vectors.cpu() for vectors in tokenizer.code_vectors()])
    for layer in model.cross_attention:
        layer.open_gates()
    return model


def data_for(
    config: CSMConfig, c: TrainConfig, data: Path, cache: TokenCache
) -> tuple[ConversationDataset, ConversationDataset]:
    """Training conversations in the mixture of `c`, and held-out ones as they are. ValueError without any to learn."""
    shared = cache, load_text_tokenizer(config.text_tokenizer), config.layout, c.row_positions
    train_data = ConversationDataset(data, "train", *shared, mixture(c, config))
    if not len(train_data):
        raise ValueError(f"{data} holds no training conversations; collect more: python collect_data.py --out {data}")
    return train_data, ConversationDataset(data, "val", *shared)


def free_memory(device: torch.device) -> int | None:
    """Bytes that a training may still take on a device; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    if not meminfo.is_file():
        return None
    facts = dict(line.split(":", 1) for line in meminfo.read_text(encoding="ascii").splitlines())
    free = 1024 * int(facts["MemAvailable"].split()[0])
    for folder, (limit, used, cache) in CGROUPS.items():
        if (folder / limit).is_file() and (text := (folder / limit).read_text().strip()).isdigit():
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            taken = int((folder / used).read_text()) - int(stat[cache])  # the cache of files gives way
            free = min(free, max(0, int(text) - taken))
    return free


def needed_memory(config: CSMConfig, c: TrainConfig, processes: int, trained: int | None = None) -> float:
    """Bytes for each of `processes`; `trained` parameters of all learn (None: every one)."""
    n = parameter_table(config)["total"]
    rows = max(1, c.batch_rows // processes)
    share = c.depth_share + c.semantic_share * config.n_semantic / config.n_codebooks
    memory = training_memory(config, n, rows, c.row_positions, min(1.0, share), c.bf16, c.recompute)
    learnt = 1.0 if trained is None else trained / n
    states = memory.weights + learnt * (memory.gradients + memory.optimizer)
    return MARGIN * (states / (processes if c.parallel == "fsdp" else 1) + memory.activations)


def weight_bytes(model: CSM) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


def check_memory(
    config: CSMConfig, c: TrainConfig, device: torch.device, ranks: Ranks, trained: int | None, held: int = 0
) -> float:
    """GiB that the training will take on each device. ValueError, with the sizes that fit, if there are not so many.

    `held`: bytes of it that this process has taken already, by weights it has loaded.
    """
    # processes on CPUs of one machine share its memory
    sharing = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if device.type == "cpu" else 1
    needed, free = (needed_memory(config, c, ranks.n, trained), free_memory(device))
    free = None if free is None else free + held * sharing
    if free is not None and needed * sharing > free:
        sizes = {
            name: dataclasses.replace(size, **shape_of(config)) for name, size in PRESETS.items() if name != "csm-1b"
        }
        fitting = [name for name, size in sizes.items() if needed_memory(size, c, ranks.n) * sharing <= free]
        raise ValueError(
            f"this training needs about {needed * sharing / 2**30:.1f} GiB and {free / 2**30:.1f} GiB are free; with "
            f"these rows there is room for {', '.join(fitting) or 'no size'}; or lower --batch_rows and "
            "--row_positions, give --recompute, or share the model over more devices with --parallel fsdp"
        )
    return needed / 2**30


def check_disk(folder: Path, n_parameters: int, trained: int | None, c: TrainConfig) -> None:
    """OSError if the training states and the weights to export will not fit beside each other."""
    trained = n_parameters if trained is None else trained
    folder.mkdir(parents=True, exist_ok=True)
    held = sum(file.stat().st_size for file in folder.rglob("*") if file.suffix in (".pt", ".safetensors"))
    state = 4 * (n_parameters + 2 * trained)  # weights and moments
    needed = state * (c.keep_last + 1) + 2 * 4 * n_parameters  # one more state while one is written
    if shutil.disk_usage(folder).free + held < needed:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), f"{folder} ({needed / 2**30:.1f} GiB are needed)")


def sized(name: str, tokenizer: AudioTokenizer, changes: dict[str, object]) -> CSMConfig:
    """A named size for the codes of a tokenizer, with some fields changed. ValueError for what cannot work."""
    return preset(name, **{**codes_of(tokenizer), **changes})
