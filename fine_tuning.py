"""Start a training from existing weights: csm-1b in either published layout or a folder of ours; all of them or LoRA.

What a start adds to its source is an exact no-op until it learns. LoRA (arXiv 2106.09685) learns a change of low rank
to every matrix of the blocks and is merged exactly.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Set
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from architecture import ADDED, CSM, WEIGHTS_KIND
from checkpointing import load_into, load_weights
from command_line import MissingRequirement
from conversational_memory import in_own_precision
from model_sizes import CSMConfig, preset
from weight_layouts import is_ours, load_published

HUB_NAMES = {"csm-1b": "sesame/csm-1b"}
HUB_FILES = ["*.safetensors", "config.json", "tokenizer*", "special_tokens_map.json"]
# What a checkpoint knows already stays as it is: its weights would mean something else
KEPT = ("cross_attention_every", "semantic_heads", "prosodic_heads", "text_head", "audio_tokenizer")


def start_from(
    source: str,
    additions: dict[str, object],
    seed: int,
    published: CSMConfig | None = None,
    other_codes: bool = False,
) -> tuple[CSM, set[str]]:
    """A model in fp32 and train mode with the weights of `source`, and the names of its parameters that are new.

    `source` is a folder of ours, a file or folder of either published layout (of `published`, by default csm-1b), or a
    name on the hub; `additions` are the fields of its CSMConfig to change. New parameters are drawn from `seed`, and
    the model gives what its source gives until they learn. With `other_codes` the weights are taken although they know
    the codes of another tokenizer. ValueError for a change that the weights cannot take and for
    tensors that do not fit, FileNotFoundError or MissingRequirement where there are none.
    """
    path = find_weights(source)
    ours = is_ours(path)
    if ours:
        values, tensors = load_weights(path, WEIGHTS_KIND)
        before = CSMConfig.from_dict(values)
    else:
        before = published or preset("csm-1b")
    config = dataclasses.replace(before, **additions)
    for name in KEPT:
        old, new = getattr(before, name), getattr(config, name)
        if old and new != old and not (other_codes and name == "audio_tokenizer"):
            hint = "leave it as it is"
            hint += "; or --other_codes, for a tokenizer trained from that one" if name == "audio_tokenizer" else ""
            raise ValueError(f"{source} has {name}={old}, which cannot become {new}; {hint}")
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)
        model = CSM(config) if ours else load_published(path, config)
    with torch.device("meta"):
        known = CSM(before).state_dict()
    own = model.state_dict()
    added = {name for name in own if name.startswith(ADDED) and name not in known}
    if ours:
        load_into(model, {name: own[name] for name in added} | tensors, source)
    return model.train(), added


def find_weights(source: str) -> Path:
    """A local path, or else the folder that the hub's files of that name were downloaded to."""
    path = Path(source)
    if path.exists():
        return path
    name = HUB_NAMES.get(source, source)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise FileNotFoundError(f"no weights at {source}: give a folder, a file, or a name on the hub as sesame/csm-1b")
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise MissingRequirement(f"no folder or file {source}; the hub needs: pip install huggingface_hub") from error
    try:
        return Path(snapshot_download(name, allow_patterns=HUB_FILES))
    except Exception as error:  # the hub's client raises types of its own and of its transport
        if isinstance(error, OSError) and error.errno is not None:  # a full disk and the like, named as everywhere
            raise
        raise MissingRequirement(
            f"there is no folder or file {source}, and {name} is not to be had from the hub ({type(error).__name__}); "
            "accept its terms there and log in with: hf auth login, or download it elsewhere and give its local folder"
        ) from error


class LowRank(nn.Module):
    """Parametrization of a weight: W (out, in) -> W + alpha / rank B A. B (out, rank) is 0 at first: an exact no-op.

    A (rank, in) is normal with std 1 / sqrt(rank): with alpha = rank the first step of Adam changes W by as much as it
    would without LoRA, so that a learning rate means the same in both.
    """

    def __init__(self, weight: Tensor, rank: int, alpha: float, generator: torch.Generator):
        super().__init__()
        self.scale = alpha / rank
        drawn = torch.randn(rank, weight.size(1), generator=generator) / math.sqrt(rank)
        self.A = nn.Parameter(drawn.to(weight))
        self.B = nn.Parameter(weight.new_zeros(weight.size(0), rank))

    def forward(self, weight: Tensor) -> Tensor:
        with in_own_precision(weight):  # autocast would round the change before it is added
            return torch.addmm(weight, self.B, self.A, alpha=self.scale)


def add_lora(model: CSM, rank: int, alpha: float, seed: int, keep: Set[str] = frozenset()) -> list[nn.Parameter]:
    """LoRA on all linear layers of the blocks of backbone and depth decoder; returns the parameters left to train.

    Those are A and B of every layer and the parameters named in `keep`; all others are frozen. The names of the state
    dict change: training state loads into a model that `add_lora` was called on, weights for use are `merged_state`.
    A weight is computed anew each time a layer runs, once per forward pass: in training there is nothing to save, but
    evaluation and generation are faster within `torch.nn.utils.parametrize.cached()`. ValueError for a rank or alpha
    that cannot work.
    """
    blocks = [*model.backbone.blocks, *model.depth.blocks]
    linears = [module for block in blocks for module in block.modules() if isinstance(module, nn.Linear)]
    most = min(min(linear.weight.shape) for linear in linears)
    if not 1 <= rank <= most:
        raise ValueError(f"rank={rank} must lie in 1..{most}, the shorter side of the smallest matrix it changes")
    if alpha <= 0:
        raise ValueError(f"alpha={alpha} must be above 0")
    assert keep <= {name for name, _ in model.named_parameters()}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in keep)
    generator = torch.Generator().manual_seed(seed)
    for linear in linears:
        parametrize.register_parametrization(linear, "weight", LowRank(linear.weight, rank, alpha, generator))
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


@torch.no_grad()
def merged_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of a model without LoRA that computes the same; the model stays as it is."""
    merged = {}
    for name, tensor in model.state_dict().items():
        layer, _, part = name.partition(".parametrizations.weight.")
        if not part:
            merged[name] = tensor
        elif part == "original":
            merged[f"{layer}.weight"] = model.get_submodule(layer).weight
    return merged
