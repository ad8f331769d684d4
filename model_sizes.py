"""What fixes the shapes of a model, the sizes that have a name, and what a size costs in memory and arithmetic.

Letters: K codebooks, S semantic ones, A codes per codebook with the special ones, C acoustic delay in frames.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import NamedTuple

from cross_attention import POOL
from frames import FrameLayout
from transformer import TransformerConfig


@dataclass(frozen=True, kw_only=True)
class CSMConfig:
    """Everything that fixes the shapes of a model. ValueError names field and value of what cannot work."""

    backbone: TransformerConfig
    depth: TransformerConfig
    text_tokenizer: str = "bytes"
    text_vocab_size: int = 258
    n_codebooks: int = 32
    codebook_size: int = 512  # of the tokenizer; special codes come after it
    n_special_codes: int = 1  # ours: end of turn; csm-1b: 3, unused
    zero_end_of_turn: bool = False  # csm-1b ends a turn with an all-zero frame
    max_positions: int = 2048  # longest sequence, about two minutes
    audio_tokenizer: str = ""  # fingerprint of the tokenizer whose codes the weights know; empty = any that fits
    n_semantic: int = 1  # codebooks of the first stage
    acoustic_delay: int = 0  # frames after which acoustic codes re-enter the backbone; csm-1b: 0
    cross_attention_every: int = 0  # backbone layers for one VoiceTextCrossAttention; 0 = none
    semantic_heads: int = 0  # of the ConversationalMemory; 0 = no such store
    prosodic_heads: int = 0
    memory_key: int = 64  # a head of the memory is a matrix of memory_value x memory_key
    memory_value: int = 128
    text_head: bool = False  # predict text too, with the table of the text embedding
    text_per_chunk: int = 20  # joint order: so many text ids, then ...
    frames_per_chunk: int = 12  # ... so many frames, until the text is written
    frames_per_text_id: float = 12.5 / 15  # speaking rate to begin with: 15 bytes a second
    layout: FrameLayout = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        least = {"n_codebooks": 2, "codebook_size": 2, "text_vocab_size": 2, "max_positions": 2, "n_semantic": 1}
        least |= dict.fromkeys(("acoustic_delay", "cross_attention_every", "semantic_heads", "prosodic_heads"), 0)
        least |= dict.fromkeys(("memory_key", "memory_value", "text_per_chunk", "frames_per_chunk"), 1)
        for name, value in least.items():
            if getattr(self, name) < value:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {value}")
        if not self.zero_end_of_turn and self.n_special_codes < 1:
            raise ValueError(f"n_special_codes={self.n_special_codes} must be at least 1 to hold the end of turn")
        if self.n_semantic > self.n_codebooks:
            raise ValueError(f"n_semantic={self.n_semantic} must be at most n_codebooks={self.n_codebooks}")
        if self.acoustic_delay and self.zero_end_of_turn:
            raise ValueError(
                f"acoustic_delay={self.acoustic_delay} must be 0 with zero_end_of_turn, whose end needs all codes"
            )
        if self.acoustic_delay and self.n_semantic == self.n_codebooks:
            raise ValueError(
                f"acoustic_delay={self.acoustic_delay} must be 0: n_semantic={self.n_semantic} leaves no acoustic codes"
            )
        if self.cross_attention_every > self.backbone.n_layers:
            raise ValueError(
                f"cross_attention_every={self.cross_attention_every} exceeds the {self.backbone.n_layers} layers"
            )
        if self.frames_per_chunk % POOL:
            raise ValueError(f"frames_per_chunk={self.frames_per_chunk} must be a multiple of {POOL}")
        if self.frames_per_text_id <= 0:
            raise ValueError(f"frames_per_text_id={self.frames_per_text_id} must be above 0")
        names = {f.name for f in dataclasses.fields(FrameLayout)} & {f.name for f in dataclasses.fields(self)}
        object.__setattr__(self, "layout", FrameLayout(**{name: getattr(self, name) for name in names}))

    @property
    def audio_vocab_size(self) -> int:
        return self.codebook_size + self.n_special_codes

    @property
    def has_memory(self) -> bool:
        return self.semantic_heads + self.prosodic_heads > 0

    @property
    def memory_layer(self) -> int:
        """The block after which the memory is written from and read, half way up."""
        return max(0, self.backbone.n_layers // 2 - 1)

    @property
    def cross_layers(self) -> list[int]:
        """The blocks that a VoiceTextCrossAttention follows."""
        every = self.cross_attention_every
        return [i for i in range(self.backbone.n_layers) if (i + 1) % every == 0] if every else []

    def to_dict(self) -> dict:
        """Plain values that `from_dict` takes back."""
        values = dataclasses.asdict(self)
        del values["layout"]
        return values

    @classmethod
    def from_dict(cls, values: dict) -> CSMConfig:
        """Inverse of `to_dict`; ValueError for unknown or missing fields."""
        try:
            stacks = {name: TransformerConfig(**values[name]) for name in ("backbone", "depth")}
            return cls(**{**values, **stacks})
        except (TypeError, KeyError) as error:
            raise ValueError(f"model config does not fit this version: {error}") from error


LLAMA = {"rope_scale": 32}
ADDITIONS = {"n_semantic": 10, "acoustic_delay": 4, "text_head": True}  # of every size that is ours
SMALL_MEMORY = {"semantic_heads": 4, "prosodic_heads": 4, "memory_key": 32, "memory_value": 64}
LARGE = {"codebook_size": 2048, "cross_attention_every": 4, "semantic_heads": 8, "prosodic_heads": 8, **ADDITIONS}

PRESETS: dict[str, CSMConfig] = {
    "nano": CSMConfig(
        backbone=TransformerConfig(n_layers=8, d_model=256, n_heads=4, n_kv_heads=2, d_ff=768),
        depth=TransformerConfig(n_layers=4, d_model=256, n_heads=4, n_kv_heads=2, d_ff=512),
        cross_attention_every=4,
        **SMALL_MEMORY,
        **ADDITIONS,
    ),
    "micro": CSMConfig(
        backbone=TransformerConfig(n_layers=12, d_model=768, n_heads=12, n_kv_heads=4, d_ff=2048),
        depth=TransformerConfig(n_layers=4, d_model=512, n_heads=8, n_kv_heads=2, d_ff=1536),
        cross_attention_every=4,
        **SMALL_MEMORY,
        **ADDITIONS,
    ),
    # Deviation: of tiny, small and medium only the sums are published (1B + 100M, 3B + 250M, 8B + 300M). The backbones
    # have the dimensions of Llama 3.2 1B, Llama 3.2 3B and Llama 3.1 8B, the depth decoders csm-1b's with more layers.
    "tiny": CSMConfig(
        backbone=TransformerConfig(n_layers=16, d_model=2048, n_heads=32, n_kv_heads=8, d_ff=8192, **LLAMA),
        depth=TransformerConfig(n_layers=4, d_model=1024, n_heads=8, n_kv_heads=2, d_ff=8192, **LLAMA),
        **LARGE,
    ),
    "small": CSMConfig(
        backbone=TransformerConfig(n_layers=28, d_model=3072, n_heads=24, n_kv_heads=8, d_ff=8192, **LLAMA),
        depth=TransformerConfig(n_layers=9, d_model=1024, n_heads=8, n_kv_heads=2, d_ff=8192, **LLAMA),
        **LARGE,
    ),
    "medium": CSMConfig(
        backbone=TransformerConfig(n_layers=32, d_model=4096, n_heads=32, n_kv_heads=8, d_ff=14336, **LLAMA),
        depth=TransformerConfig(n_layers=11, d_model=1024, n_heads=8, n_kv_heads=2, d_ff=8192, **LLAMA),
        **LARGE,
    ),
    "csm-1b": CSMConfig(
        backbone=TransformerConfig(n_layers=16, d_model=2048, n_heads=32, n_kv_heads=8, d_ff=8192, **LLAMA),
        depth=TransformerConfig(n_layers=4, d_model=1024, n_heads=8, n_kv_heads=2, d_ff=8192, **LLAMA),
        text_tokenizer="sesame/csm-1b",
        text_vocab_size=128_256,
        frames_per_text_id=12.5 / 3.5,
        text_per_chunk=5,
        frames_per_chunk=16,
        codebook_size=2048,
        n_special_codes=3,
        zero_end_of_turn=True,
    ),
}
WITHOUT_ADDITIONS = {  # what turns additions of a size of ours off
    "n_semantic": 1,
    "acoustic_delay": 0,
    "cross_attention_every": 0,
    "semantic_heads": 0,
    "prosodic_heads": 0,
    "text_head": False,
}
PUBLISHED = {  # ... and what further turns it into the published model, end of turn and special codes included
    **WITHOUT_ADDITIONS,
    "zero_end_of_turn": True,
    "n_special_codes": PRESETS["csm-1b"].n_special_codes,
}


def preset(name: str, **changes: object) -> CSMConfig:
    """A preset with some fields changed. ValueError for an unknown name."""
    if name not in PRESETS:
        raise ValueError(f"unknown model size {name!r}; choose one of {', '.join(PRESETS)}")
    return dataclasses.replace(PRESETS[name], **changes)


class Memory(NamedTuple):
    """Bytes."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    caches: int

    @property
    def total(self) -> int:
        return sum(self)


def inference_memory(config: CSMConfig, n_parameters: int, bytes_per_weight: int = 4, compiled: bool = False) -> Memory:
    """One conversation with a full context: weights, KV caches of both stages, the ConversationalMemory in fp32.

    `caches` has blocks, heads and inputs of the depth decoder once more, as `DepthLoop` holds them;
    `compiled`, on a CPU, those of the backbone too.
    """
    d, K = config.depth, config.n_codebooks
    cached = d.d_model * ((K - 1) * config.codebook_size + K * config.audio_vocab_size)
    for s in (d, config.backbone) if compiled else (d,):
        cached += s.n_layers * (2 * s.d_model**2 + 2 * s.d_model * s.n_kv_heads * s.d_head + 3 * s.d_model * s.d_ff)
    for stack, positions in ((config.backbone, config.max_positions), (config.depth, config.n_codebooks)):
        cached += 2 * stack.n_layers * stack.n_kv_heads * stack.d_head * positions
    b = config.backbone  # every row of the context is text or audio; audio counts for a quarter, as pools
    cached += 2 * len(config.cross_layers) * b.n_kv_heads * b.d_head * config.max_positions
    heads = config.semantic_heads + config.prosodic_heads
    state = 4 * 2 * heads * config.memory_key * config.memory_value  # and its copy faded to the turn under way
    return Memory(n_parameters * bytes_per_weight, 0, 0, 0, cached * bytes_per_weight + state)


def training_memory(
    config: CSMConfig,
    n_parameters: int,
    batch_rows: int,
    row_positions: int,
    depth_share: float,
    bf16: bool = False,
    recompute: bool = False,
) -> Memory:
    """One micro-batch of rows full of audio: fp32 weights, gradients and AdamW, and what the backward pass keeps.

    Counted by hand from what each operation saves; tested against what autograd really keeps. With `recompute` blocks
    keep their input, and one block at a time the rest.
    """
    rows = batch_rows * row_positions
    b, d = config.backbone, config.depth
    frames = max(1, round(depth_share * rows))
    kept = 0
    for stack, positions in ((b, rows), (d, frames * config.n_codebooks)):
        of_block, between = _block_bytes(stack, bf16), 4 * stack.d_model
        each = stack.n_layers * between + of_block if recompute else stack.n_layers * of_block
        kept += positions * each
    across = _block_bytes(dataclasses.replace(b, d_ff=b.d_model), bf16) * 3 // 2  # both directions, gathered rows
    kept += rows * len(config.cross_layers) * across + rows * 12 * config.n_codebooks
    heads = config.semantic_heads + config.prosodic_heads
    kept += 4 * rows * 2 * heads * (config.memory_key + config.memory_value)
    logits = rows * config.audio_vocab_size + frames * (config.n_codebooks - 1) * config.audio_vocab_size
    mask = batch_rows * row_positions**2
    copies = 2 * n_parameters if bf16 else 0  # autocast's, of the weights
    return Memory(n_parameters * 4, n_parameters * 4, n_parameters * 8, kept + 2 * logits * 4 + mask + copies, 0)


def _block_bytes(c: TransformerConfig, bf16: bool) -> int:
    """What the backward pass of one block keeps of one position; under autocast the residual stream stays fp32."""
    D, heads, groups = c.d_model, c.n_heads, c.n_kv_heads * c.d_head
    if bf16:
        return 30 * D + 4 * groups + 8 * c.d_ff + 4 * heads + 8
    return 4 * (8 * D + 2 * groups + 4 * c.d_ff + heads + 2)


class FrameCost(NamedTuple):
    """One generated frame, batch 1."""

    depth_passes: float  # of the depth decoder
    flops: float  # two for a multiplication with addition
    bytes_moved: float  # weights and KV cache read, each once a pass


def frame_cost(config: CSMConfig, bytes_per_weight: int = 4, context: int | None = None) -> FrameCost:
    """Arithmetic and memory traffic of a frame: one backbone row, then stage 1 and 2 of the depth decoder.

    `context`: rows that the backbone looks back on; by default as many as it can.
    """
    context = config.max_positions if context is None else context
    K, S, C, A = config.n_codebooks, config.n_semantic, config.acoustic_delay, config.audio_vocab_size
    b, d = config.backbone, config.depth
    passes = K - 1.0 if C == 0 else S - 1 + (K - S) / C
    backbone = b.n_layers * _block_matrices(b) + len(config.cross_layers) * _block_matrices(b) // 2
    projection, heads = b.d_model * d.d_model, (K - 1) * d.d_model * A
    positions = K if C == 0 else K + S  # stage 2 reads its chunk's semantic codes anew
    calls = 1 if C == 0 else 2  # of the decoder: what it reads of codes lies ready, of the backbone's state it does not
    flops = 2 * (backbone + b.d_model * A + heads + calls * projection + positions * d.n_layers * _block_matrices(d))
    cache = 2 * b.n_layers * b.n_kv_heads * b.d_head * context
    flops += 4 * b.n_layers * b.n_heads * b.d_head * context
    stage_two = heads * (K - S) / (K - 1) * (1 - 1 / max(1, C))  # heads that a chunk of frames shares
    read = backbone + b.d_model * A + cache + heads - stage_two
    read += passes * d.n_layers * _block_matrices(d) + projection * (1 if C == 0 else 1 + 1 / C)
    return FrameCost(passes, flops, read * bytes_per_weight)


def _block_matrices(c: TransformerConfig) -> int:
    """Weights of one block."""
    return 2 * c.d_model**2 + 2 * c.d_model * c.n_kv_heads * c.d_head + 3 * c.d_model * c.d_ff
