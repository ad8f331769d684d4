"""Kyutai's Mimi behind the interface of our own tokenizer: 24 kHz audio to 12.5 frames per second and back.

The codec of csm-1b (Moshi, arXiv 2410.00037): 1 semantic and up to 31 acoustic codebooks of 2,048 codes. The layers and
weights are those of `transformers.MimiModel`; its own streaming decoder forgets the convolutions between two calls, so
here every convolution keeps the state it needs, and the two transformers keep the keys of their sliding window. What
comes out of a stream is what comes out of the whole, at a cost per frame that does not grow.

A last, unfinished frame is padded with zero samples, as Kyutai's own code does; `MimiModel.encode` pads within its
layers instead, which gives another last frame there and the same codes everywhere else.

Dims: B batch, N samples, T frames, K codebooks, C channels, L time steps of a layer.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from audio import FRAME_RATE, FRAME_SAMPLES, SAMPLE_RATE
from audio_tokenizer import AudioTokenizer, CodeShape
from command_line import NEEDS_DEV, MissingRequirement

if TYPE_CHECKING:
    from transformers import DynamicCache, MimiModel

HUB_NAME = "kyutai/mimi"


class State(NamedTuple):
    """What one direction remembers between two calls; changed in place."""

    batch_size: int
    convolutions: dict[nn.Module, Tensor]  # of each: inputs it needs again, or what it still owes
    keys: DynamicCache  # keys and values of the last `sliding_window` - 1 steps


class MimiTokenizer(AudioTokenizer):
    """The codec, for use and not for training. The layers are shared with `model`, which is not needed any more."""

    delay_samples = 0  # the decoder is causal and gives whole frames

    def __init__(self, model: MimiModel, n_codebooks: int | None = None):
        super().__init__()
        c = model.config
        check_mimi(c)
        most = c.num_quantizers
        n_codebooks = most if n_codebooks is None else n_codebooks
        if not c.num_semantic_quantizers < n_codebooks <= most:
            raise ValueError(f"n_codebooks={n_codebooks} must lie in {c.num_semantic_quantizers + 1}..{most}")
        self.config = CodeShape(
            n_codebooks=n_codebooks, n_semantic=c.num_semantic_quantizers, codebook_size=c.codebook_size
        )
        # some releases of transformers put the parts into two halves, others side by side
        halves = hasattr(model.encoder, "encoder_seanet")
        front, back = (model.encoder, model.decoder) if halves else (model, model)
        self.encoder = front.encoder_seanet if halves else model.encoder
        self.encoder_transformer, self.downsample = front.encoder_transformer, front.downsample
        self.quantizer = model.quantizer
        self.upsample, self.decoder_transformer = back.upsample, back.decoder_transformer
        self.decoder = back.decoder_seanet if halves else model.decoder

    @property
    def device(self) -> torch.device:
        return self.downsample.conv.weight.device

    def code_vectors(self) -> list[Tensor]:
        q = self.quantizer
        stacks = (q.semantic_residual_vector_quantizer, q.acoustic_residual_vector_quantizer)
        vectors = [layer.codebook.embed.detach() for stack in stacks for layer in stack.layers]
        return vectors[: self.config.n_codebooks]

    def encoder_state(self, batch_size: int) -> State:
        return initial_state(self.encoder_transformer, batch_size)

    def encode_frames(self, wave: Tensor, state: State) -> tuple[Tensor, State]:
        """(B, T * FRAME_SAMPLES) -> (B, T, K) and the state."""
        x = wave[:, None]  # (B, 1, N)
        for layer in self.encoder.layers:
            x = step(layer, x, state)
        x = attend(self.encoder_transformer, x, state)  # (B, C, 2 T)
        latents = step(self.downsample, x, state)  # (B, C, T)
        codes = self.quantizer.encode(latents, self.config.n_codebooks)  # (K, B, T)
        return codes.permute(1, 2, 0), state

    def decoder_state(self, batch_size: int) -> State:
        return initial_state(self.decoder_transformer, batch_size)

    def decode_frames(self, codes: Tensor, state: State) -> tuple[Tensor, State]:
        """(B, T, K') -> (B, T * FRAME_SAMPLES) and the state."""
        latents = self.quantizer.decode(codes.transpose(1, 2))  # (B, C, T)
        x = step(self.upsample, latents, state)  # (B, C, 2 T)
        x = attend(self.decoder_transformer, x, state)
        for layer in self.decoder.layers:
            x = step(layer, x, state)
        return x[:, 0], state

    def decode_end(self, state: State) -> Tensor:
        return torch.zeros(state.batch_size, 0, device=self.device)

    def _apply(self, *args, **kwargs) -> MimiTokenizer:
        """Behind `to`. The codebooks that transformers keeps beside its buffers would stay on the old device."""
        for module in self.quantizer.modules():
            if hasattr(module, "_embed"):
                module._embed = None
        return super()._apply(*args, **kwargs)


def initial_state(transformer: nn.Module, batch_size: int) -> State:
    from transformers import DynamicCache

    return State(batch_size, {}, DynamicCache(config=transformer.config))


def attend(transformer: nn.Module, x: Tensor, state: State) -> Tensor:
    """(B, C, L) -> (B, C, L), each step seeing itself and the steps before it in its sliding window."""
    out = transformer(x.transpose(1, 2), past_key_values=state.keys, use_cache=True)
    return out.last_hidden_state.transpose(1, 2)


def step(layer: nn.Module, x: Tensor, state: State) -> Tensor:
    """(B, C, L) through a convolution, a residual block or an activation of Mimi, going on where the state ends."""
    if hasattr(layer, "block"):
        y = x
        for inner in layer.block:
            y = step(inner, y, state)
        return step(layer.shortcut, x, state) + y
    conv = getattr(layer, "conv", None)
    if isinstance(conv, nn.Conv1d):
        return convolve(conv, layer.pad_mode, x, state.convolutions)
    if isinstance(conv, nn.ConvTranspose1d):
        return spread(conv, x, state.convolutions)
    return layer(x)


def convolve(conv: nn.Conv1d, pad_mode: str, x: Tensor, states: dict[nn.Module, Tensor]) -> Tensor:
    """(B, C, L) -> (B, C', L / stride); L is a multiple of the stride. The state is the last inputs."""
    n_past = conv.dilation[0] * (conv.kernel_size[0] - 1) + 1 - conv.stride[0]
    if conv in states:
        past = states[conv]
    elif pad_mode == "replicate":
        past = x[..., :1].expand(-1, -1, n_past)
    else:
        past = x.new_zeros(*x.shape[:2], n_past)
    padded = torch.cat([past, x], dim=-1)
    states[conv] = padded[..., padded.size(-1) - n_past :].clone()  # a view would keep all of it alive
    return conv(padded)


def spread(conv: nn.ConvTranspose1d, x: Tensor, states: dict[nn.Module, Tensor]) -> Tensor:
    """(B, C, L) -> (B, C', L * stride). The state is what the last input gives to the outputs after its own.

    A kernel is twice the stride, so that an output has two inputs. torch's own transposed convolution takes several
    times as long for the few steps of one frame on a CPU.
    """
    stride, groups = conv.stride[0], conv.groups
    weight = conv.weight.unflatten(0, (groups, -1))  # (g, C / g, C' / g, 2 * stride)
    parts = torch.einsum("bgil,giok->blgok", x.unflatten(1, (groups, -1)), weight).flatten(2, 3)
    own, later = parts.split(stride, dim=-1)  # (B, L, C', stride) each
    before = states[conv] if conv in states else torch.zeros_like(later[:, :1])
    states[conv] = later[:, -1:].clone()
    y = (own + torch.cat([before, later[:, :-1]], dim=1)).transpose(1, 2).flatten(2)  # (B, C', L * stride)
    return y if conv.bias is None else y + conv.bias[:, None]


def check_mimi(c: object) -> None:
    """ValueError for a config whose frames are not ours, or whose layers look ahead."""
    product = 2 * math.prod(c.upsampling_ratios)  # the step from 25 to 12.5 per second doubles it
    found = {
        "sampling_rate": (c.sampling_rate, SAMPLE_RATE),
        "frame_rate": (c.frame_rate, FRAME_RATE),
        "samples per frame": (product, FRAME_SAMPLES),
        "audio_channels": (c.audio_channels, 1),
        "use_causal_conv": (c.use_causal_conv, True),
        "trim_right_ratio": (c.trim_right_ratio, 1.0),
    }
    for name, (theirs, ours) in found.items():
        if theirs != ours:
            raise ValueError(f"this Mimi has {name}={theirs}; only {ours} is supported")
    if c.pad_mode not in ("constant", "replicate"):
        raise ValueError(f"this Mimi has pad_mode={c.pad_mode!r}; only 'constant' and 'replicate' are supported")


def is_mimi(name_or_path: str | Path) -> bool:
    """Whether this is Mimi's name on the hub, or a folder that holds a Mimi in transformers' format."""
    path = Path(name_or_path)
    if not path.is_dir():
        return path.as_posix() == HUB_NAME
    try:
        return json.loads((path / "config.json").read_text(encoding="utf-8")).get("model_type") == "mimi"
    except (OSError, ValueError, AttributeError):
        return False  # whoever reads the folder next says what is wrong with it


def load_mimi(name_or_path: str | Path = HUB_NAME, n_codebooks: int | None = None) -> MimiTokenizer:
    """Mimi by its hub name or from a local folder (`config.json`, `model.safetensors`), ready for use.

    `n_codebooks` keeps only the first ones; by default all, 32 in the published weights. MissingRequirement where
    transformers or the hub is missing, FileNotFoundError or ValueError for a folder that is not a whole Mimi.
    """
    path = Path(name_or_path)
    try:
        from transformers import MimiModel
    except ImportError as error:
        raise MissingRequirement(f"the tokenizer {path.as_posix()} needs transformers: {NEEDS_DEV}") from error
    local = path.is_dir()
    if not local and path.as_posix() != HUB_NAME:
        raise FileNotFoundError(f"no Mimi at {path}: give a folder, or {HUB_NAME} for the published weights")
    if local and not is_mimi(path):
        raise ValueError(f"{path} holds no config.json of a Mimi")
    try:
        model, found = MimiModel.from_pretrained(
            path if local else HUB_NAME, dtype=torch.float32, use_safetensors=True, output_loading_info=True
        )
    except OSError as error:
        if error.errno is not None:  # a full disk and the like, named as everywhere
            raise
        if local:
            raise FileNotFoundError(f"no Mimi weights in {path}: model.safetensors is missing") from error
        raise MissingRequirement(
            f"{HUB_NAME} is neither in the local cache nor to be had from the hub; "
            "where there is a network, download it to a folder and give that folder"
        ) from error
    except Exception as error:  # the library raises many types for a torn file or a config that does not fit it
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} is damaged or not a whole Mimi ({type(error).__name__}: {reason})") from error
    if found["missing_keys"]:
        raise ValueError(f"{path}: tensor {min(found['missing_keys'])} is missing")
    return MimiTokenizer(model.eval(), n_codebooks).eval()
