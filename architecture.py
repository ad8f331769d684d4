"""The Conversational Speech Model: a backbone over interleaved text and audio, a depth decoder over codebooks.

Sesame, "Crossing the Uncanny Valley of Conversational Voice" (2025), section "Conversational Speech Model", and what
this project adds to it, each by a switch of the config: VoiceTextCrossAttention, ConversationalMemory, acoustic codes
behind the semantic ones, a text head. With all switches off the model is csm-1b. Tensors in, tensors out; knows nothing
of files of audio, tokenizers or training loops.

Letters: B batch, T rows, K codebooks, A codes per codebook with the special ones, D backbone width, E depth width,
N frames the depth decoder sees.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from checkpointing import load_into, load_weights, save_weights
from command_line import EXIT_CODES_HELP, EXIT_DONE, run
from conversational_memory import (
    ConversationalMemory,
    MemoryCache,
    TurnTimes,
    find_turns,
    prosody_loss,
    prosody_targets,
)
from cross_attention import (
    CrossCache,
    Streams,
    StreamState,
    VoiceTextCrossAttention,
    find_streams,
    guidance_loss,
    guided_rows,
)
from frames import IGNORE, Rows, send
from model_sizes import PRESETS, CSMConfig, Memory, frame_cost, inference_memory, preset, training_memory
from transformer import Allowed, KVCache, KVCaches, Transformer, rope_frequencies

WEIGHTS_KIND = "csm"
ROW_INPUTS = ("tokens", "mask", "positions")  # of `Rows`: what embedding and backbone take
ADDED = ("cross_attention.", "memory.")  # parameters that the published model does not have


class Terms(NamedTuple):
    """One value per term of the loss: sums over the targets, or the numbers of targets they are sums over.

    Sums and counts, so that accumulation and packing weigh every target the same.
    """

    codebook0: Tensor  # () nats, over all frames and end-of-turn frames
    depth: Tensor  # (K - 1,) nats, codebooks 1..K-1 over the amortized shares of the frames
    text: Tensor  # () nats, over text ids that are not given; 0 without a text head
    guidance: Tensor  # () attention off the diagonal, mean of the cross-attention layers; 0 unless asked for
    memory: Tensor  # () squared error of the prosody that the memory expects of a turn; 0 without a prosodic store


@dataclass
class Traces:
    """What a forward pass leaves beside its states, for losses and pictures."""

    streams: Streams | None = None
    turns: TurnTimes | None = None  # of a model with a memory, without a cache
    maps: list[Tensor] = field(default_factory=list)  # (B, H, audio rows, text rows) of each cross-attention layer
    expected_prosody: Tensor | None = None  # (B, T, F)


class Places(NamedTuple):
    """What the structure of a batch says before the model runs.

    Its sizes depend on the batch: found where the batch is made, a step on another device never waits for them.
    """

    codebook0: Tensor  # (n,) indices into B * T of the rows with a target in codebook 0
    text: Tensor  # (n,) and of those with a text target
    spans: list[list[int]]  # lengths of each row's documents
    streams: Streams | None  # of a model with cross-attention
    turns: TurnTimes | None  # of a model with a memory

    def to(self, device: torch.device) -> Places:
        parts = (part and type(part)(*(send(tensor, device) for tensor in part)) for part in (self.streams, self.turns))
        return Places(send(self.codebook0, device), send(self.text, device), self.spans, *parts)


def find_places(rows: Rows, config: CSMConfig) -> Places:
    """Of (B, T) rows, as far as a model of this config needs them."""
    live = rows.targets[..., [0, -1]].flatten(0, 1) != IGNORE  # (B T, 2)
    return Places(
        live[:, 0].nonzero().squeeze(1),
        live[:, 1].nonzero().squeeze(1),
        rows.spans(),
        find_streams(rows) if config.cross_layers else None,
        find_turns(rows) if config.has_memory else None,
    )


class CSMCache:
    """What a conversation under way keeps: keys and values, cross-attention's streams, the memory."""

    def __init__(self, model: CSM, batch_size: int = 1):
        c, like = model.config, model.text_embedding.weight
        self.keys = KVCache(c.backbone, batch_size, c.max_positions, like)
        self.memory = MemoryCache(model.memory.empty(batch_size, like.device)) if c.has_memory else None
        self.n_cross = len(c.cross_layers)
        self.forget_context()

    def forget_context(self) -> None:
        """Start the window anew; the memory stays."""
        self.keys.length = 0
        self.streams = StreamState()
        self.cross = [CrossCache() for _ in range(self.n_cross)]


class CSM(nn.Module):
    """Backbone and depth decoder, split at the zeroth codebook.

    The backbone reads the masked sum of a row's K code embeddings and its text embedding and predicts what follows:
    codebook 0 of the next frame, or the next text id. The depth decoder reads [projected hidden state, codes 0..K-2 of
    that frame] and predicts codes 1..K-1, each with its own head. One embedding table of K * A rows serves both.

    Initialisation: embeddings and heads normal with std 0.02 (tables of a row sum 1 / sqrt(K + 1) of that), the rest as
    in `Transformer`; additions are exact no-ops until their gates open.
    """

    def __init__(self, config: CSMConfig):
        super().__init__()
        self.config = config
        K, A, D, E = config.n_codebooks, config.audio_vocab_size, config.backbone.d_model, config.depth.d_model
        self.text_embedding = nn.Embedding(config.text_vocab_size, D)
        self.audio_embedding = nn.Embedding(K * A, D)  # codebook k owns rows k * A .. k * A + A - 1
        self.backbone = Transformer(config.backbone)
        self.projection = nn.Linear(D, E, bias=False)
        self.depth = Transformer(config.depth)
        self.codebook0_head = nn.Linear(D, A, bias=False)
        self.depth_heads = nn.Parameter(torch.empty(K - 1, E, A))
        nn.init.normal_(self.text_embedding.weight, std=0.02)
        nn.init.normal_(self.audio_embedding.weight, std=0.02 / math.sqrt(K + 1))
        for matrix in (self.projection.weight, self.codebook0_head.weight, self.depth_heads):
            nn.init.normal_(matrix, std=0.02)
        self.make_additions()
        self.register_buffer("code_offsets", A * torch.arange(K), persistent=False)  # (K,)

    def make_additions(self) -> None:
        """New modules for what the config adds to the published model."""
        c, D = self.config, self.config.backbone.d_model
        self.cross_attention = nn.ModuleList(VoiceTextCrossAttention(c.backbone, D) for _ in c.cross_layers)
        self.memory = None
        if c.has_memory:
            self.memory = ConversationalMemory(D, c.semantic_heads, c.prosodic_heads, c.memory_key, c.memory_value)

    @torch.no_grad()
    def adopt_codes(self, vectors: Sequence[Tensor]) -> None:
        """Let tables and heads of the codes begin as random projections of the codec's own vectors, K tensors (V, d).

        Codes that sound alike are then alike from the first step on. The scale stays that of the initialisation, and
        special codes keep their values. The semantic codebooks share a projection, the acoustic ones another, as the
        vectors of a stack add up.
        """
        c, V = self.config, self.config.codebook_size
        D, E = c.backbone.d_model, c.depth.d_model
        table = self.audio_embedding.weight.view(c.n_codebooks, c.audio_vocab_size, D)
        for first, last in ((0, c.n_semantic), (c.n_semantic, c.n_codebooks)):
            books = [book.float() - book.float().mean(dim=0) for book in vectors[first:last]]
            if not books:
                continue
            d = books[0].size(1)
            spread = torch.stack([book.square().mean() for book in books]).sum().sqrt().clamp(min=1e-6)  # of their sum
            into, onto, onto0 = torch.randn(d, D), torch.randn(d, E), torch.randn(d, D)
            for k, book in enumerate(books, start=first):
                table[k, :V] = 0.02 / math.sqrt(2 * d) * (book / spread) @ into
                alike = 0.02 / math.sqrt(d) * book / book.std().clamp(min=1e-6)  # (V, d)
                if k == 0:
                    self.codebook0_head.weight[:V] = alike @ onto0
                else:
                    self.depth_heads[k - 1, :, :V] = (alike @ onto).T

    def reset_buffers(self) -> None:
        """Compute the fixed tables anew, after `to_empty` on a model built on the meta device."""
        K, A = self.config.n_codebooks, self.config.audio_vocab_size
        self.code_offsets.copy_(A * torch.arange(K))
        for stack in (self.backbone, self.depth, *self.cross_attention):
            stack.frequencies.copy_(rope_frequencies(stack.config))

    def embed(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """(B, T, K + 1) ids and mask -> (B, T, D): masked sum of the row's embeddings."""
        B, T, _ = tokens.shape
        table = self.audio_embedding.weight
        index = (tokens[..., :-1] + self.code_offsets).flatten(0, 1)  # (B T, K)
        weights = mask[..., :-1].flatten(0, 1).to(table.dtype)
        audio = F.embedding_bag(index, table, mode="sum", per_sample_weights=weights)  # (B T, D)
        text = self.text_embedding(tokens[..., -1]) * mask[..., -1:].to(table.dtype)
        return audio.view(B, T, -1) + text

    def hidden(
        self,
        rows: Rows,
        allowed: Allowed = None,
        cache: CSMCache | None = None,
        traces: Traces | None = None,
        maps: bool = False,
        shown: Tensor | None = None,
        backbone: Callable[..., Tensor] | None = None,
    ) -> Tensor:
        """(B, T) rows -> (B, T, D) backbone states.

        Without `allowed` attention is causal over all rows. With a cache the rows continue what it holds; a model with
        a memory then reads one turn, or a part of it, at a time. `maps` asks `traces` for attention maps. `shown`
        (B, T, K + 1) says which entries are embedded, by default all that are real; `backbone` computes what the own
        one would. ValueError for more rows than `max_positions`.
        """
        c = self.config
        if rows.tokens.size(1) > c.max_positions:
            raise ValueError(f"{rows.tokens.size(1)} rows are more than the model's max_positions={c.max_positions}")
        traces = Traces() if traces is None else traces
        between = self._additions(rows, cache, traces, maps)
        embedded = self.embed(rows.tokens, rows.mask if shown is None else shown)
        return (backbone or self.backbone)(embedded, rows.positions, allowed, cache and cache.keys, between)

    def hidden_of_several(
        self, rows: Sequence[Rows], caches: Sequence[CSMCache], backbone: Callable[..., Tensor] | None = None
    ) -> Tensor:
        """The next row of each of N conversations, (1, 1) -> (N, 1, D), as `hidden` gives of each with its cache.

        They share the products with the backbone's matrices; each attends what is its own.
        """
        own = [self._additions(row, cache, Traces(), maps=False) for row, cache in zip(rows, caches, strict=True)]

        def between(layer: int, x: Tensor) -> Tensor:
            return torch.cat([each(layer, part) for each, part in zip(own, x.split(1), strict=True)])

        tokens, mask, positions = (torch.cat([getattr(row, name) for row in rows]) for name in ROW_INPUTS)
        keys = KVCaches([cache.keys for cache in caches])
        return (backbone or self.backbone)(self.embed(tokens, mask), positions, None, keys, between)

    def _additions(
        self, rows: Rows, cache: CSMCache | None, traces: Traces, maps: bool
    ) -> Callable[[int, Tensor], Tensor]:
        """What is done to the rows' states (B, T, D) behind a layer of the backbone."""
        c = self.config
        if self.memory is not None and cache is None and traces.turns is None:
            traces.turns = find_turns(rows)
        crossing = {layer: index for index, layer in enumerate(c.cross_layers)}
        if crossing and traces.streams is None:
            traces.streams = find_streams(rows, cache and cache.streams)

        def between(layer: int, x: Tensor) -> Tensor:
            if layer in crossing:
                index = crossing[layer]
                own = (cache.streams, cache.cross[index]) if cache else (None, None)
                x = self.cross_attention[index](x, traces.streams, *own, traces.maps if maps else None)
            if layer == c.memory_layer and self.memory is not None:
                if cache is not None:
                    x = self.memory.read(x, rows, cache.memory)
                else:
                    x, traces.expected_prosody = self.memory(x, rows, traces.turns)
            return x

        return between

    def end_turn(self, cache: CSMCache, prosody: Tensor) -> None:
        """Write the turn just read, whose sound is (B, F), to the memory if there is one."""
        if self.memory is not None:
            self.memory.end_turn(cache.memory, prosody)

    def text_logits(self, states: Tensor) -> Tensor:
        """(..., D) backbone states -> (..., text vocabulary). The head is the table of the text embedding."""
        return F.linear(states, self.text_embedding.weight.to(states.dtype))

    def depth_inputs(self, hidden: Tensor, codes: Tensor) -> Tensor:
        """(N, D) backbone states, (N, k) codes 0..k-1 -> (N, k + 1, E)."""
        inputs = self.audio_embedding(codes + self.code_offsets[: codes.size(1)])  # (N, k, D)
        return self.projection(torch.cat((hidden[:, None], inputs), dim=1))

    def depth_logits(self, hidden: Tensor, codes: Tensor) -> Tensor:
        """(N, D) backbone states, (N, k) true codes -> (N, k - 1, A) logits of codes 1..k-1, teacher-forced."""
        k = codes.size(1)
        positions = torch.arange(k, device=codes.device)[None]
        inputs = self.depth_inputs(hidden, codes[:, :-1])
        states = self.depth(inputs, positions)[:, 1:]  # (N, k - 1, E); position i predicts codebook i
        return torch.einsum("nke,kea->nka", states, self.depth_heads[: k - 1].to(states.dtype))

    def forward(self, rows: Rows, depth_rows: Tensor, *others, **named) -> Terms:
        """The loss, so that wrappers for several processes, which know `forward` only, can hold a model."""
        return self.loss(rows, depth_rows, *others, **named)

    def loss(
        self,
        rows: Rows,
        depth_rows: Tensor,
        guidance: bool = False,
        shown: Tensor | None = None,
        semantic_rows: Tensor | None = None,
        places: Places | None = None,
    ) -> Terms:
        """Sums of the terms of a batch; `depth_rows` (N,) indexes the B * T rows whose frame the depth decoder learns.

        Compute amortization (Sesame, section "Compute amortization"): codebook 0 on every frame, the depth decoder on
        a random share of them. Deviation: of the frames of `semantic_rows` (M,) it learns the semantic codebooks, which
        carry the words and are a third of the work. `shown` as in `hidden`. With `places`, those of the rows, nothing
        is read back from the device. `count_targets` has the counts.
        """
        places = places or find_places(rows, self.config)
        traces = Traces(places.streams, places.turns)
        allowed = places.spans if rows.tokens.device.type == "cpu" else rows.allowed()
        states = self.hidden(rows, allowed, traces=traces, maps=guidance, shown=shown)
        states = states.flatten(0, 1)  # (B T, D)
        targets = rows.targets.flatten(0, 1)  # (B T, K + 1)
        codebook0 = _summed_nats(self.codebook0_head, states, targets[:, 0], places.codebook0)
        text = codebook0.new_zeros(())
        if self.config.text_head:
            text = _summed_nats(self.text_logits, states, targets[:, -1], places.text)

        depth = self._depth_nats(states, targets[:, :-1], depth_rows)
        if semantic_rows is not None:  # also none at all: processes that share out a model must call it alike
            semantic = self._depth_nats(states, targets[:, : self.config.n_semantic], semantic_rows)
            depth = depth + F.pad(semantic, (0, len(depth) - len(semantic)))
        off_diagonal, error = codebook0.new_zeros(()), codebook0.new_zeros(())
        if guidance and traces.maps:
            parts = [guidance_loss(weights, traces.streams, rows) for weights in traces.maps]
            off_diagonal = torch.stack(parts).mean()
        if traces.expected_prosody is not None:
            error = prosody_loss(traces.expected_prosody, rows, traces.turns)
        return Terms(codebook0, depth, text, off_diagonal, error)

    def _depth_nats(self, states: Tensor, targets: Tensor, rows: Tensor) -> Tensor:
        """(B T, D) states, (B T, k) targets -> (k - 1,) nats of codebooks 1..k-1, summed over (N,) rows."""
        codes = targets[rows]  # (N, k)
        if not len(rows):  # a row that has no target: kernels of attention may refuse an empty batch
            rows, codes = rows.new_zeros(1), targets.new_full((1, targets.size(1)), IGNORE)
        logits = self.depth_logits(states[rows], codes.clamp(min=0)).float().transpose(1, 2)
        return F.cross_entropy(logits, codes[:, 1:], ignore_index=IGNORE, reduction="none").sum(dim=0)


def _summed_nats(head: Callable[[Tensor], Tensor], states: Tensor, targets: Tensor, live: Tensor) -> Tensor:
    """Cross entropy summed over the rows `live`; the others cost no head."""
    return F.cross_entropy(head(states[live]).float(), targets[live], reduction="sum")


def count_targets(
    rows: Rows,
    depth_rows: Tensor,
    guidance: bool = False,
    semantic_rows: Tensor | None = None,
    n_semantic: int = 1,
    places: Places | None = None,
) -> Terms:
    """How many targets each term of `CSM.loss` sums over; known before the model runs."""
    streams, turns = (None, None) if places is None else (places.streams, places.turns)
    live = rows.targets != IGNORE
    depth = live.flatten(0, 1)[depth_rows, 1:-1].sum(dim=0)
    if semantic_rows is not None:
        depth[: n_semantic - 1] += live.flatten(0, 1)[semantic_rows, 1:n_semantic].sum(dim=0)
    guided = guided_rows(streams or find_streams(rows), rows).sum() if guidance else torch.tensor(0)
    features = (~prosody_targets(rows, turns or find_turns(rows)).isnan()).sum()
    return Terms(live[..., 0].sum(), depth, live[..., -1].sum(), guided, features)


def pick_depth_rows(targets: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """(B, T, K + 1) targets -> (N,) indices into B * T: a random `share` of the rows whose next frame is whole.

    At least one is picked when there is any, so that small batches train the depth decoder too.
    """
    rows = (targets[..., -2] != IGNORE).flatten().nonzero().squeeze(1)
    n = min(len(rows), max(1, round(share * len(rows))))
    picked = torch.randperm(len(rows), generator=generator)[:n].sort().values
    return rows[picked.to(rows.device)]


def save_model(model: CSM, folder: Path) -> None:
    """Write `config.json` and `model.safetensors`."""
    save_weights(folder, WEIGHTS_KIND, model.config.to_dict(), model.state_dict())


def load_model(folder: Path, device: torch.device | str = "cpu") -> CSM:
    """A model written by `save_model`, in eval mode. ValueError names the first tensor that does not fit."""
    config, tensors = load_weights(Path(folder), WEIGHTS_KIND, "python train_minimal.py")
    model = CSM(CSMConfig.from_dict(config))
    load_into(model, tensors, str(folder))
    return model.to(device).eval()


def parameter_table(config: CSMConfig) -> dict[str, int]:
    """Parameters by part, counted without allocating them."""
    with torch.device("meta"):
        model = CSM(config)
    parts = {name: sum(p.numel() for p in child.parameters()) for name, child in model.named_children()}
    total = sum(p.numel() for p in model.parameters())
    return {name: n for name, n in parts.items() if n} | {"depth_heads": model.depth_heads.numel(), "total": total}


def print_costs(config: CSMConfig, n_parameters: int, args: argparse.Namespace) -> None:
    """Memory for inference and training, arithmetic and traffic of a frame."""
    batch = (args.batch_rows, args.row_positions, args.depth_share)
    memories: dict[str, Memory] = {
        "inference, fp32": inference_memory(config, n_parameters),
        "inference, bf16": inference_memory(config, n_parameters, bytes_per_weight=2),
        "fp32, CPU compiled": inference_memory(config, n_parameters, compiled=True),
        "training, fp32": training_memory(config, n_parameters, *batch),
        "training, bf16": training_memory(config, n_parameters, *batch, bf16=True),
    }
    print(f"\n{'GiB':20}{''.join(f'{name:>13}' for name in (*Memory._fields, 'total'))}")
    for name, memory in memories.items():
        print(f"{name:20}{''.join(f'{part / 2**30:13.2f}' for part in (*memory, memory.total))}")
    print(f"training: {batch[0]} rows of {batch[1]} positions, depth decoder on {batch[2]:.4g} of the frames, AdamW")
    cost = frame_cost(config)
    print(f"\none frame (80 ms) with a context of {config.max_positions} positions: {cost.flops / 1e9:.3g} GFLOP,")
    print(f"{cost.bytes_moved / 1e9:.3g} GB read in fp32, {cost.depth_passes:.4g} passes of the depth decoder")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Print the parameters of a model size by part, its memory and its cost per frame.",
        epilog=EXIT_CODES_HELP,
    )
    defaults = " (default: %(default)s)"
    parser.add_argument("--model_size", default="nano", help=f"one of {', '.join(PRESETS)}" + defaults)
    parser.add_argument("--batch_rows", type=int, default=1, help="packed rows of a training micro-batch" + defaults)
    parser.add_argument("--row_positions", type=int, default=2048, help="positions of a packed row" + defaults)
    parser.add_argument("--depth_share", type=float, default=1 / 16, help="of the frames, depth decoder" + defaults)
    args = parser.parse_args(argv)
    for name, least in (("batch_rows", 1), ("row_positions", 2)):
        if getattr(args, name) < least:
            raise ValueError(f"{name}={getattr(args, name)} must be at least {least}")
    if not 0 < args.depth_share <= 1:
        raise ValueError(f"depth_share={args.depth_share} must be above 0 and at most 1")
    config = preset(args.model_size)
    if args.row_positions > config.max_positions:
        raise ValueError(f"row_positions={args.row_positions} must be at most max_positions={config.max_positions}")
    table = parameter_table(config)
    print(f"{'parameters':20}")
    for name, count in table.items():
        print(f"{name:20}{count:>15,}")
    print_costs(config, table["total"], args)
    return EXIT_DONE


if __name__ == "__main__":
    raise SystemExit(run(main))
