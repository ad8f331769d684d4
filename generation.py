"""Speaking a turn: prompt, sampling, the KV-cached frame loop and the state of a conversation.

The codec is passed in; nothing here reads or writes files. Letters: B batch, K codebooks, A codes with special ones,
D backbone width.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from architecture import CSM, CSMConfig
from audio import FRAME_RATE, SAMPLE_RATE
from frames import Rows, Turn, concatenate
from rvq_tokenizer import RVQTokenizer
from text_tokenizer import TextTokenizer, clean_text, encode_turn
from transformer import KVCache


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How codes are drawn; the same for both stages, csm-1b's defaults. ValueError for values that cannot work."""

    temperature: float = 0.9  # 0 = always the likeliest code
    top_k: int = 50
    max_seconds: float = 10.0  # a turn that has not ended by then is cut
    min_seconds: float = 0.0  # no end of turn before; not for csm-1b, whose end is an ordinary frame

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ValueError(f"temperature={self.temperature} must be 0 or more")
        if self.top_k < 1:
            raise ValueError(f"top_k={self.top_k} must be at least 1")
        if self.max_seconds < 1 / FRAME_RATE:
            raise ValueError(f"max_seconds={self.max_seconds} must be at least one frame, {1 / FRAME_RATE} s")
        if not 0 <= self.min_seconds <= self.max_seconds:
            raise ValueError(f"min_seconds={self.min_seconds} must lie between 0 and max_seconds={self.max_seconds}")

    @property
    def max_frames(self) -> int:
        return int(self.max_seconds * FRAME_RATE)

    @property
    def min_frames(self) -> int:
        return math.ceil(self.min_seconds * FRAME_RATE)


class Reply(NamedTuple):
    """One spoken turn."""

    samples: np.ndarray  # (N,) float32 at 24 kHz
    codes: Tensor  # (T, K) int64
    ended: bool  # False: cut at `max_seconds`
    seconds_to_first_audio: float  # wall time from the request to the first decoded frame; nan when there is none
    seconds: float  # wall time for the whole turn

    @property
    def duration(self) -> float:
        """Seconds of audio."""
        return len(self.samples) / SAMPLE_RATE

    @property
    def real_time_factor(self) -> float:
        """Compute time over audio time, lower is better; nan for an empty turn."""
        return self.seconds / self.duration if len(self.samples) else float("nan")


def draw(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """(B, A) logits -> (B,) codes."""
    if sampling.temperature == 0:
        return logits.argmax(dim=-1)
    values, index = logits.float().topk(min(sampling.top_k, logits.size(-1)), dim=-1)  # (B, k)
    choice = torch.multinomial((values / sampling.temperature).softmax(dim=-1), 1, generator=generator)  # (B, 1)
    return index.gather(1, choice).squeeze(1)


def generate_frame(
    model: CSM,
    hidden: Tensor,
    depth_cache: KVCache,
    sampling: Sampling,
    generator: torch.Generator,
    may_end: bool = True,
) -> Tensor:
    """(B, D) backbone states of the last row -> (B, K) codes of the next frame; end of turn is code V in codebook 0.

    Only codebook 0 may take a special code, and only that of the end of turn, if the turn `may_end`.
    """
    c = model.config
    allowed_first = c.codebook_size if c.zero_end_of_turn or not may_end else c.layout.end_of_turn + 1
    code = draw(model.codebook0_head(hidden)[:, :allowed_first], sampling, generator)
    codes = [code]
    if not c.zero_end_of_turn and bool((code == c.layout.end_of_turn).all()):
        return torch.cat((code[:, None], code.new_zeros(len(code), c.n_codebooks - 1)), dim=1)
    depth_cache.length = 0  # the depth decoder forgets from frame to frame, the backbone does not
    inputs = torch.stack((model.projection(hidden), model.embed_code(0, code)), dim=1)  # (B, 2, E)
    for k in range(1, c.n_codebooks):
        start = depth_cache.length
        positions = torch.arange(start, start + inputs.size(1), device=hidden.device)[None]
        state = model.depth(inputs, positions, cache=depth_cache)[:, -1]  # (B, E)
        code = draw((state @ model.depth_heads[k - 1])[:, : c.codebook_size], sampling, generator)
        codes.append(code)
        inputs = model.embed_code(k, code)[:, None] if k < c.n_codebooks - 1 else inputs
    return torch.stack(codes, dim=1)


def check_tokenizer(config: CSMConfig, tokenizer: RVQTokenizer) -> None:
    """ValueError unless the model's codes are this tokenizer's."""
    for name in ("n_codebooks", "codebook_size"):
        theirs, ours = getattr(tokenizer.config, name), getattr(config, name)
        if theirs != ours:
            raise ValueError(f"the tokenizer has {name}={theirs}, the model {ours}; use the one it was trained with")
    if config.audio_tokenizer and config.audio_tokenizer != tokenizer.fingerprint():
        raise ValueError(
            "the model was trained on codes of another tokenizer; give the folder of that one, or train the model anew"
        )


class Conversation:
    """A conversation that a model takes part in; the KV cache of earlier turns is kept from turn to turn.

    When a new turn would not fit the model's positions, whole oldest turns leave the context, with a warning.
    """

    def __init__(
        self,
        model: CSM,
        tokenizer: RVQTokenizer,
        text_tokenizer: TextTokenizer,
        *,
        sampling: Sampling | None = None,
        seed: int = 0,
    ):
        check_tokenizer(model.config, tokenizer)
        self.model, self.tokenizer, self.text_tokenizer = model, tokenizer, text_tokenizer
        self.sampling = sampling or Sampling()
        self.device = next(model.parameters()).device
        self.generator = torch.Generator(self.device).manual_seed(seed)
        self.turns: list[Turn] = []
        weight = model.text_embedding.weight
        self.cache = KVCache(model.config.backbone, 1, model.config.max_positions, weight)
        self.depth_cache = KVCache(model.config.depth, 1, model.config.n_codebooks, weight)

    def add_turn(
        self, speaker: int, text: str, *, samples: np.ndarray | None = None, codes: Tensor | None = None
    ) -> None:
        """Add what somebody said, as (N,) samples at 24 kHz or (T, K) codes. ValueError when it cannot fit at all."""
        if (samples is None) == (codes is None):
            raise ValueError("give a turn either samples or codes")
        if codes is None:
            wave = torch.from_numpy(np.ascontiguousarray(samples, dtype=np.float32))[None]
            with torch.inference_mode():
                codes = self.tokenizer.encode(wave.to(self.device))[0].cpu()
        turn = Turn(encode_turn(self.text_tokenizer, speaker, clean_text(text)), codes)
        self._make_room(len(turn.text_ids) + len(turn.codes) + 1)
        self._read(self.model.config.layout.turn_rows(turn))
        self.turns.append(turn)

    def stream(self, speaker: int, text: str) -> Iterator[np.ndarray]:
        """Say `text` as `speaker`: yields samples as soon as each 80 ms frame is decoded; together they are the turn.

        The turn joins the conversation when it ends, when it is cut at `max_seconds`, or when the caller stops
        reading; `turns[-1].codes` holds its frames and `ended` says whether the model ended it.
        """
        layout = self.model.config.layout
        prompt = Turn(encode_turn(self.text_tokenizer, speaker, clean_text(text)), None)
        self._make_room(len(prompt.text_ids) + self.sampling.max_frames + 1)
        decoder = self.tokenizer.decoder_stream(1)
        lead_in = decoder.delay_samples
        spoken: list[Tensor] = []
        unread: list[Rows] = []  # frames that the backbone has not read yet
        self.ended = False
        hidden = self._read(layout.turn_rows(prompt))
        try:
            while len(spoken) < self.sampling.max_frames:
                may_end = len(spoken) >= self.sampling.min_frames
                with torch.inference_mode():
                    frame = generate_frame(self.model, hidden, self.depth_cache, self.sampling, self.generator, may_end)
                self.ended = bool(layout.is_end_of_turn(frame[0]))
                if self.ended:
                    break
                spoken.append(frame[0].cpu())
                unread = [layout.audio_rows(frame.cpu())]
                samples = decoder.push(frame[:, None])[0].cpu().numpy()  # (1920,)
                yield samples[lead_in:]
                lead_in = 0
                hidden, unread = self._read(unread[0]), []
            if spoken:
                yield decoder.flush()[0].cpu().numpy()
        finally:
            self._read(concatenate([*unread, layout.end_rows()]))
            codes = torch.stack(spoken) if spoken else torch.empty(0, layout.n_codebooks, dtype=torch.int64)
            self.turns.append(Turn(prompt.text_ids, codes))

    def speak(self, speaker: int, text: str) -> Reply:
        """Say `text` as `speaker`; returns the whole turn. An immediate end gives empty audio and a warning."""
        start = time.perf_counter()
        first, chunks = float("nan"), []
        for samples in self.stream(speaker, text):
            first = time.perf_counter() - start if not chunks else first
            chunks.append(samples)
        if not chunks:
            warnings.warn(f"the model ended the turn {text!r} at once, there is no audio", stacklevel=2)
        samples = np.concatenate(chunks) if chunks else np.zeros(0, dtype=np.float32)
        return Reply(samples, self.turns[-1].codes, self.ended, first, time.perf_counter() - start)

    @property
    def _context_rows(self) -> int:
        return sum(len(turn.text_ids) + len(turn.codes) + 1 for turn in self.turns)

    @torch.inference_mode()
    def _read(self, rows: Rows) -> Tensor:
        """Run rows through the backbone behind what the cache holds; (1, D) state of the last one."""
        tokens, mask = rows.tokens[None].to(self.device), rows.mask[None].to(self.device)
        return self.model.hidden(tokens, mask, cache=self.cache)[:, -1]

    def _make_room(self, needed: int) -> None:
        """Drop whole oldest turns until `needed` more rows fit, and read the rest anew if any was dropped."""
        limit = self.model.config.max_positions
        if needed > limit:
            raise ValueError(
                f"a turn of {needed} rows (text and up to {self.sampling.max_seconds} s of audio) does not fit "
                f"the model's {limit} positions; shorten it or lower max_seconds"
            )
        dropped = 0
        while self._context_rows + needed > limit:
            self.turns.pop(0)
            dropped += 1
        if dropped:
            warnings.warn(f"{dropped} oldest turns left the context of {limit} positions", stacklevel=3)
            self.cache.length = 0
            if self.turns:
                self._read(concatenate([self.model.config.layout.turn_rows(turn) for turn in self.turns]))
