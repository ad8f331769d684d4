"""What every audio tokenizer here has in common: the shape of its codes, its streams, its checks, its fingerprint.

`rvq_tokenizer.py` and `mimi_tokenizer.py` fill this in; training, generation and evaluation ask for no more than
`AudioTokenizer`. Knows no codec. Dims: B batch, N samples at 24 kHz, T frames (12.5 per second), K codebooks.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from audio import FRAME_RATE, FRAME_SAMPLES

CHUNK_FRAMES = 250  # longer pieces pass in chunks of 20 s, so that memory does not grow with their length


@dataclass(frozen=True, kw_only=True)
class CodeShape:
    n_codebooks: int
    n_semantic: int  # the first ones; the others are acoustic
    codebook_size: int

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if getattr(self, field.name) <= 0:
                raise ValueError(f"{field.name}={getattr(self, field.name)} must be positive")
        if self.n_semantic >= self.n_codebooks:
            raise ValueError(f"n_semantic={self.n_semantic} must be less than n_codebooks={self.n_codebooks}")

    @property
    def n_acoustic_codebooks(self) -> int:
        return self.n_codebooks - self.n_semantic

    def bits_per_second(self, n_codebooks: int | None = None) -> float:
        return FRAME_RATE * (n_codebooks or self.n_codebooks) * math.log2(self.codebook_size)


class AudioTokenizer(nn.Module):
    """What training, generation and evaluation need of a tokenizer; the codecs add what `Codec` asks for."""

    config: CodeShape

    def encode(self, wave: Tensor) -> Tensor:
        """(B, N) float samples -> codes (B, ceil(N / FRAME_SAMPLES), K) int64; the end is padded with zeros.

        ValueError: another shape or type, no samples, or samples that are not finite.
        """
        return encode_whole(self, wave)

    def decode(self, codes: Tensor, voice: Tensor | None = None) -> Tensor:
        """(B, T, K') codes of the first K' <= K codebooks -> (B, T * FRAME_SAMPLES). K' = n_semantic drops the detail.

        `voice` as of `voice_of`.
        ValueError: another shape or type, no frames, too many codebooks, or codes out of range.
        """
        return decode_whole(self, codes, voice)

    @torch.inference_mode()
    def copies(self, samples: np.ndarray, prefixes: Sequence[int]) -> dict[int, np.ndarray]:
        """(N,) -> what the first k codebooks give back, (N,) each, for every k in `prefixes`."""
        codes = self.encode(torch.from_numpy(np.ascontiguousarray(samples))[None])  # (1, T, K)
        return {k: self.decode(codes[..., :k])[0, : len(samples)].cpu().numpy() for k in prefixes}

    def encoder_stream(self, batch_size: int) -> EncoderStream:
        return EncoderStream(self, batch_size)

    def decoder_stream(self, batch_size: int, voice: Tensor | None = None) -> DecoderStream:
        """`voice` as of `voice_of`."""
        return DecoderStream(self, batch_size, voice)

    def voice_of(self, codes: Tensor) -> Tensor | None:
        """What the decoder is told of who says (T, K) codes; None: it cannot be told."""
        return None

    def fingerprint(self) -> str:
        """SHA-256 over config and what makes codes: those of two tokenizers mean the same only if it is equal."""
        return fingerprint(self.config, self)


class Codec(Protocol):
    """What the streams below need of a tokenizer: whole frames in, whole frames out, and a state between calls."""

    config: CodeShape
    device: torch.device
    delay_samples: int  # the decoder's output lags its codes by so much

    def encoder_state(self, batch_size: int) -> Any: ...

    def encode_frames(self, wave: Tensor, state: Any) -> tuple[Tensor, Any]:
        """(B, T * FRAME_SAMPLES) -> (B, T, K) and the new state; T is at least 1."""

    def decoder_state(self, batch_size: int) -> Any: ...

    def decode_frames(self, codes: Tensor, state: Any) -> tuple[Tensor, Any]:
        """(B, T, K') -> (B, T * FRAME_SAMPLES), late by `delay_samples`, and the new state."""

    def decode_end(self, state: Any) -> Tensor:
        """The last (B, delay_samples)."""

    def code_vectors(self) -> list[Tensor]:
        """What every code of each codebook adds to the latent of its stack, semantic or acoustic: K tensors (V, d)."""


class EncoderStream:
    """Codes of a waveform that arrives in pieces of any length; equal to `encode` of the whole.

    Keeps less than one frame of samples and the state of the layers, however long the stream.
    """

    def __init__(self, codec: Codec, batch_size: int):
        self.codec, self.batch_size = codec, batch_size
        self.reset()

    def reset(self) -> None:
        self.state = self.codec.encoder_state(self.batch_size)
        self.waiting = torch.zeros(self.batch_size, 0, device=self.codec.device)  # samples of an unfinished frame

    @torch.no_grad()
    def push(self, wave: Tensor) -> Tensor:
        """(B, N) -> (B, n, K): the n frames these samples complete; the rest waits. ValueError as for `encode`."""
        check_wave(wave)
        if len(wave) != self.batch_size:
            raise ValueError(f"the stream was opened for {self.batch_size} waveforms, got {len(wave)}")
        samples = torch.cat([self.waiting, wave.to(self.waiting)], dim=1)
        whole = samples.size(1) // FRAME_SAMPLES * FRAME_SAMPLES
        parts, state = [samples.new_zeros(len(wave), 0, self.codec.config.n_codebooks, dtype=torch.int64)], self.state
        for chunk in samples[:, :whole].split(CHUNK_FRAMES * FRAME_SAMPLES, dim=1) if whole else ():
            codes, state = self.codec.encode_frames(chunk, state)
            parts.append(codes)
        self.state, self.waiting = state, samples[:, whole:].clone()  # a view would keep all samples alive
        return torch.cat(parts, dim=1)

    def flush(self) -> Tensor:
        """The last, unfinished frame, padded with zeros: (B, 0 or 1, K); then the stream is as new."""
        missing = -self.waiting.size(1) % FRAME_SAMPLES
        codes = self.push(self.waiting.new_zeros(self.batch_size, missing))
        self.reset()
        return codes


class DecoderStream:
    """Waveform of codes that arrive frame by frame, `delay_samples` late; equal to `decode` of the whole.

    All pushes and the flush together are `delay_samples` of lead-in and then what `decode` returns.
    """

    def __init__(self, codec: Codec, batch_size: int, voice: Tensor | None = None):
        """`voice`: of who speaks, to be told the decoder of a codec that can be."""
        self.codec, self.batch_size, self.told = codec, batch_size, () if voice is None else (voice,)
        self.delay_samples = codec.delay_samples
        self.reset()

    def reset(self) -> None:
        self.state = self.codec.decoder_state(self.batch_size, *self.told)

    @torch.no_grad()
    def push(self, codes: Tensor) -> Tensor:
        """(B, n, K') -> (B, n * FRAME_SAMPLES). ValueError as for `decode`."""
        check_codes(codes, self.codec.config)
        if len(codes) != self.batch_size:
            raise ValueError(f"the stream was opened for {self.batch_size} sequences, got {len(codes)}")
        parts = []
        for chunk in codes.to(self.codec.device).split(CHUNK_FRAMES, dim=1):
            wave, self.state = self.codec.decode_frames(chunk, self.state)
            parts.append(wave)
        return torch.cat(parts, dim=1)

    def flush(self) -> Tensor:
        """The last (B, delay_samples); then the stream is as new."""
        wave = self.codec.decode_end(self.state)
        self.reset()
        return wave


@torch.no_grad()
def encode_whole(codec: Codec, wave: Tensor) -> Tensor:
    """`AudioTokenizer.encode` by one stream."""
    check_wave(wave)
    if wave.size(1) == 0:
        raise ValueError("audio holds no samples")
    stream = EncoderStream(codec, len(wave))
    return torch.cat([stream.push(wave), stream.flush()], dim=1)


@torch.no_grad()
def decode_whole(codec: Codec, codes: Tensor, voice: Tensor | None = None) -> Tensor:
    """`AudioTokenizer.decode` by one stream."""
    check_codes(codes, codec.config)
    stream = DecoderStream(codec, len(codes), voice)
    return torch.cat([stream.push(codes), stream.flush()], dim=1)[:, codec.delay_samples :]


def fingerprint(config: CodeShape, module: nn.Module) -> str:
    """SHA-256 over the config and the module's tensors."""
    digest = hashlib.sha256(json.dumps(dataclasses.asdict(config), sort_keys=True).encode())
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def check_wave(wave: Tensor) -> None:
    if wave.ndim != 2 or not wave.is_floating_point():
        raise ValueError(f"audio must be float samples of shape (B, N), got {wave.dtype} {tuple(wave.shape)}")
    if not torch.isfinite(wave).all():
        raise ValueError("audio holds samples that are not finite")


def check_codes(codes: Tensor, config: CodeShape) -> None:
    if codes.ndim != 3 or codes.dtype != torch.int64 or not 1 <= codes.size(2) <= config.n_codebooks:
        expected = f"int64 (B, T, 1..{config.n_codebooks})"
        raise ValueError(f"codes must be {expected}, got {codes.dtype} {tuple(codes.shape)}")
    if codes.numel() == 0:
        raise ValueError(f"codes hold no frames: {tuple(codes.shape)}")
    if not 0 <= int(codes.min()) <= int(codes.max()) < config.codebook_size:
        found = f"{int(codes.min())}..{int(codes.max())}"
        raise ValueError(f"codes must lie in [0, {config.codebook_size}), got {found}")
