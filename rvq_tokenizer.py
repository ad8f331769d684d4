"""Hierarchical, causal, streaming speech codec: waveform to 10 semantic and 22 acoustic codebooks and back.

Log-mel -> ConvNeXt stem -> content branch and acoustic branch -> two parallel residual quantisers -> sum -> ConvNeXt
decoder -> inverse STFT. The split quantiser follows Mimi (Moshi, arXiv 2410.00037, 3.3): the acoustic stack sees the
full features, not what the semantic stack left over. The ISTFT head follows Vocos (arXiv 2306.00814).
Every layer is causal and takes the state it needs, so the whole-file path is the streaming path in one large chunk.
Algorithmic delay: one codec frame (80 ms) in the encoder and `DELAY_SAMPLES` (30 ms) in the decoder.

Knows nothing of texts, data sets or training schedules. Dims: B batch, N samples, T codec frames (12.5 per second),
F fine frames (100 per second), K codebooks, V codes per codebook, D width. Audio is 24 kHz mono in [-1, 1].

    python rvq_tokenizer.py --tokenizer runs/tokenizer in.wav out.wav --codebooks 10
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
import torchaudio.functional as AF
from torch import Tensor, nn

from audio import FRAME_SAMPLES, SAMPLE_RATE, read_audio, write_wav
from audio_tokenizer import AudioTokenizer, CodeShape, fingerprint
from checkpointing import load_into, load_weights, save_weights
from command_line import EXIT_CODES_HELP, run
from matrix_order import arrange_for_few_rows
from mimi_tokenizer import is_mimi, load_mimi
from residual_quantizer import ResidualQuantizer, scale_gradient

KIND = "rvq_tokenizer"
FFT = 960  # samples, 40 ms
HOP = 240  # samples, 10 ms
FINE = FRAME_SAMPLES // HOP  # 8 fine frames per codec frame
OVERLAP = FFT // HOP - 1  # a fine frame shares samples with the next 3
DELAY_SAMPLES = FFT - HOP  # the decoder's output lags its codes by 720 samples, 30 ms
D_VOICE = 128  # width of the hidden layer that hears who speaks
KERNEL = 7  # frames seen by a depthwise convolution
LOG_MEL_FLOOR = 1e-5
FEW_FRAMES = 128  # up to here a depthwise convolution takes longer to start than to compute


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig(CodeShape):
    n_codebooks: int = 32
    n_semantic: int = 10
    codebook_size: int = 512
    codebook_dim: int = 64
    n_mels: int = 100
    d_stem: int = 192
    d_branch: int = 384
    d_decoder: int = 256
    n_stem: int = 2  # ConvNeXt blocks at 100 Hz, shared by the branches
    n_content: int = 2  # blocks at 12.5 Hz
    n_acoustic: int = 2
    n_coarse: int = 2  # decoder blocks at 12.5 Hz
    n_fine: int = 6  # decoder blocks at 100 Hz
    codebook_decay: float = 0.98  # of the moving averages that move the codebooks

    def __post_init__(self):
        super().__post_init__()
        if self.codebook_decay >= 1:
            raise ValueError(f"codebook_decay={self.codebook_decay} must be less than 1")


PRESETS = {
    "debug": TokenizerConfig(
        codebook_size=16, codebook_dim=8, n_mels=40, d_stem=16, d_branch=24, d_decoder=16,
        n_stem=1, n_content=1, n_acoustic=1, n_coarse=1, n_fine=1,
    ),
    "cpu": TokenizerConfig(),
    "gpu": TokenizerConfig(
        codebook_size=2048, codebook_dim=128, d_stem=256, d_branch=576, d_decoder=512,
        n_content=3, n_acoustic=3, n_coarse=3, n_fine=8, codebook_decay=0.99,
    ),
}  # fmt: skip


class ConvNeXtStack(nn.Module):
    """Causal ConvNeXt blocks (arXiv 2201.03545, without the downsampling), expansion 3."""

    def __init__(self, dim: int, n_blocks: int):
        super().__init__()
        self.dim, self.n_blocks = dim, n_blocks
        self.blocks = nn.ModuleList(ConvNeXtBlock(dim) for _ in range(n_blocks))

    def initial_state(self, batch_size: int) -> Tensor:
        """The frames before the first one are zero: (blocks, B, KERNEL - 1, D)."""
        return self.blocks[0].scale.new_zeros(self.n_blocks, batch_size, KERNEL - 1, self.dim)

    def forward(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """(B, F, D) and the last frames each block has seen -> (B, F, D) and the new last frames."""
        seen = []
        for block, past in zip(self.blocks, state, strict=True):
            padded = torch.cat([past, x], dim=1)  # (B, KERNEL - 1 + F, D)
            seen.append(padded[:, -(KERNEL - 1) :])
            x = x + block(padded)
        return x, torch.stack(seen)


class ConvNeXtBlock(nn.Module):
    """The residual part of one block: depthwise convolution, norm, two pointwise layers, layer scale."""

    def __init__(self, dim: int):
        super().__init__()
        self.mix = nn.Conv1d(dim, dim, KERNEL, groups=dim)
        self.norm = nn.LayerNorm(dim)
        self.expand = nn.Linear(dim, 3 * dim)
        self.contract = nn.Linear(3 * dim, dim)
        self.scale = nn.Parameter(torch.full((dim,), 0.1))

    def forward(self, padded: Tensor) -> Tensor:
        """(B, KERNEL - 1 + F, D) -> (B, F, D)"""
        few = padded.size(1) < FEW_FRAMES and not torch.is_grad_enabled()
        by_windows = few or padded.dtype == torch.float64
        x = self.windows(padded) if by_windows else self.mix(padded.transpose(1, 2)).transpose(1, 2)
        return self.scale * self.contract(F.gelu(self.expand(self.norm(x))))

    def windows(self, padded: Tensor) -> Tensor:
        """`mix` as a sum over windows: no depthwise convolution of torch is fast in float64, or on a few frames."""
        seen = padded.unfold(1, KERNEL, 1).transpose(2, 3)  # (B, F, KERNEL, D)
        return (seen * self.mix.weight[:, 0].T.contiguous()).sum(dim=2) + self.mix.bias


class Disguise(NamedTuple):
    """Another voice with the same words, for the content branch in training; each (B,)."""

    factors: Tensor  # of all frequencies
    tilt: Tensor  # dB per octave around 1 kHz
    bump_hz: Tensor  # centre of a resonance an octave wide
    bump_db: Tensor

    def part(self, rows: slice, device: torch.device) -> Disguise:
        return Disguise(*(x[rows].to(device) for x in self))


class EncoderState(NamedTuple):
    samples: Tensor  # (B, FFT - HOP) the last samples
    stem: Tensor  # (n_stem, B, KERNEL - 1, d_stem)
    content: Tensor  # (n_content, B, KERNEL - 1, d_branch)
    acoustic: Tensor  # (n_acoustic, B, KERNEL - 1, d_branch)


class Encoder(nn.Module):
    """Waveform to the latents of the two branches."""

    def __init__(self, config: TokenizerConfig):
        super().__init__()
        bank = AF.melscale_fbanks(FFT // 2 + 1, 0.0, SAMPLE_RATE / 2, config.n_mels, SAMPLE_RATE, norm="slaney")
        self.register_buffer("mel_bank", bank, persistent=False)  # (FFT / 2 + 1, n_mels)
        hertz = torch.arange(FFT // 2 + 1) * (SAMPLE_RATE / FFT)
        centres = (bank * hertz[:, None]).sum(dim=0) / bank.sum(dim=0)
        self.register_buffer("centres", centres, persistent=False)  # (n_mels,) Hz
        self.register_buffer("window", torch.hann_window(FFT), persistent=False)
        self.lift = nn.Linear(config.n_mels, config.d_stem)
        self.stem = ConvNeXtStack(config.d_stem, config.n_stem)
        self.to_content = nn.Linear(FINE * config.d_stem, config.d_branch)
        self.content = ConvNeXtStack(config.d_branch, config.n_content)
        self.content_out = nn.Sequential(nn.LayerNorm(config.d_branch), nn.Linear(config.d_branch, config.codebook_dim))
        self.to_acoustic = nn.Linear(FINE * config.d_stem, config.d_branch)
        self.acoustic = ConvNeXtStack(config.d_branch, config.n_acoustic)
        self.acoustic_out = nn.Sequential(
            nn.LayerNorm(config.d_branch), nn.Linear(config.d_branch, config.codebook_dim)
        )

    def initial_state(self, batch_size: int) -> EncoderState:
        stacks = (self.stem, self.content, self.acoustic)
        samples = self.window.new_zeros(batch_size, FFT - HOP)
        return EncoderState(samples, *(stack.initial_state(batch_size) for stack in stacks))

    def log_mel(self, samples: Tensor) -> Tensor:
        """(B, FFT - HOP + F * HOP) -> (B, F, n_mels), about zero mean and unit spread on speech."""
        with torch.autocast(samples.device.type, enabled=False):
            spectrum = torch.stft(samples, FFT, HOP, window=self.window, center=False, return_complex=True).abs()
            mel = spectrum.transpose(1, 2) @ self.mel_bank  # (B, F, n_mels)
            return 0.5 * (mel.clamp(min=LOG_MEL_FLOOR).log() + 5)

    def disguised(self, mel: Tensor, other: Disguise) -> Tensor:
        """(B, F, n_mels) as another voice with the same words would give it."""
        octaves = (self.centres[None] / other.bump_hz[:, None]).log2()  # (B, n_mels)
        gain_db = other.tilt[:, None] * (self.centres / 1000).log2() + other.bump_db[:, None] * (-2 * octaves**2).exp()
        mel = mel + 0.5 * math.log(10) / 20 * gain_db[:, None]  # half the natural logarithm, as in `log_mel`
        wanted = self.centres / other.factors[:, None]  # (B, n_mels) Hz
        above = torch.searchsorted(self.centres, wanted).clamp(1, len(self.centres) - 1)
        low, high = self.centres[above - 1], self.centres[above]
        share = ((wanted - low) / (high - low)).clamp(0, 1)[:, None]  # (B, 1, n_mels)
        below, above = ((i[:, None].expand_as(mel)) for i in (above - 1, above))
        return torch.lerp(mel.gather(2, below), mel.gather(2, above), share)

    def frames(self, mel: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """(B, F, n_mels) -> the stem's output by codec frames (B, T, FINE * d_stem), and its state."""
        fine, state = self.stem(self.lift(mel), state)  # (B, F, d_stem)
        return fine.unflatten(1, (-1, FINE)).flatten(2), state

    def forward(
        self, wave: Tensor, state: EncoderState, disguise: Disguise | None = None
    ) -> tuple[Tensor, Tensor, EncoderState]:
        """(B, T * FRAME_SAMPLES) -> content latents and acoustic latents, each (B, T, codebook_dim), and the state.

        With a disguise the content branch hears another voice; for training.
        """
        samples = torch.cat([state.samples, wave], dim=1)
        mel = self.log_mel(samples)
        frames, stem = self.frames(mel, state.stem)
        told = frames if disguise is None else self.frames(self.disguised(mel, disguise), state.stem)[0]
        content, content_state = self.content(self.to_content(told), state.content)
        acoustic, acoustic_state = self.acoustic(self.to_acoustic(frames), state.acoustic)
        new_state = EncoderState(samples[:, -(FFT - HOP) :].clone(), stem, content_state, acoustic_state)
        return self.content_out(content), self.acoustic_out(acoustic), new_state

    def content_alone(self, wave: Tensor, disguise: Disguise | None = None) -> Tensor:
        """(B, T * FRAME_SAMPLES) from silence on -> content latents (B, T, codebook_dim), as `forward` gives them."""
        state = self.initial_state(len(wave))
        mel = self.log_mel(torch.cat([state.samples, wave], dim=1))
        told, _ = self.frames(mel if disguise is None else self.disguised(mel, disguise), state.stem)
        return self.content_out(self.content(self.to_content(told), state.content)[0])


class DecoderState(NamedTuple):
    coarse: Tensor  # (n_coarse, B, KERNEL - 1, d_branch)
    fine: Tensor  # (n_fine, B, KERNEL - 1, d_decoder)
    overlap: Tensor  # (B, OVERLAP, HOP) what fine frames gave beyond the last sample that went out
    voice: Tensor | None = None  # (B or 1, 1, d_branch) what the decoder was told of who speaks


class Decoder(nn.Module):
    """Latents to waveform, `DELAY_SAMPLES` late: block t goes out when the fine frame t + 3 has been added."""

    def __init__(self, config: TokenizerConfig):
        super().__init__()
        self.coarse = ConvNeXtStack(config.d_branch, config.n_coarse)
        self.spread = nn.Linear(config.d_branch, FINE * config.d_decoder)
        self.fine = ConvNeXtStack(config.d_decoder, config.n_fine)
        self.norm = nn.LayerNorm(config.d_decoder)
        self.head = nn.Linear(config.d_decoder, 2 * (FFT // 2 + 1))
        # Hann windows a quarter apart add up to 2
        self.register_buffer("window", torch.hann_window(FFT) / 2, persistent=False)
        cover = self.window.view(OVERLAP + 1, HOP)
        tail = torch.stack([cover[k + 1 :].sum(dim=0) for k in range(OVERLAP)])  # (OVERLAP, HOP) cover after the end
        self.register_buffer("tail_gain", 1 / tail.clamp(min=0.25), persistent=False)

    def initial_state(self, batch_size: int) -> DecoderState:
        overlap = self.window.new_zeros(batch_size, OVERLAP, HOP)
        coarse, fine = (stack.initial_state(batch_size) for stack in (self.coarse, self.fine))
        return DecoderState(coarse, fine, overlap)

    def forward(self, latents: Tensor, state: DecoderState) -> tuple[Tensor, DecoderState]:
        """(B, T, d_branch) -> (B, T * FRAME_SAMPLES), late by `DELAY_SAMPLES`, and the state."""
        coarse, coarse_state = self.coarse(latents, state.coarse)
        spread = self.spread(coarse).unflatten(2, (FINE, -1)).flatten(1, 2)  # (B, F, d_decoder)
        fine, fine_state = self.fine(spread, state.fine)
        blocks = self.overlap_add(self.synthesize(fine), state.overlap)  # (B, F + OVERLAP, HOP)
        wave = blocks[:, :-OVERLAP].flatten(1)
        return wave, DecoderState(coarse_state, fine_state, blocks[:, -OVERLAP:].clone(), state.voice)

    def synthesize(self, fine: Tensor) -> Tensor:
        """(B, F, d_decoder) -> windowed frames (B, F, FFT): log-magnitude and phase from one layer, in float32."""
        with torch.autocast(fine.device.type, enabled=False):
            log_magnitude, phase = self.head(self.norm(fine.float())).chunk(2, dim=-1)  # (B, F, FFT / 2 + 1) each
            # the largest bin of a full-scale sine is FFT / 2 = 480, exp(6.2)
            magnitude = log_magnitude.clamp(max=7).exp()
            spectrum = torch.complex(magnitude * phase.cos(), magnitude * phase.sin())  # torch.polar is slower
            return torch.fft.irfft(spectrum, n=FFT) * self.window

    def overlap_add(self, frames: Tensor, overlap: Tensor) -> Tensor:
        """(B, F, FFT) and what earlier frames left (B, OVERLAP, HOP) -> (B, F + OVERLAP, HOP)"""
        parts = frames.unflatten(2, (OVERLAP + 1, HOP))  # (B, F, OVERLAP + 1, HOP)
        blocks = F.pad(overlap, (0, 0, 0, parts.size(1)))
        for k in range(OVERLAP + 1):
            blocks = blocks + F.pad(parts[:, :, k], (0, 0, k, OVERLAP - k))
        return blocks

    def finish(self, state: DecoderState) -> Tensor:
        """The last (B, DELAY_SAMPLES), scaled up where fewer windows than usual overlap."""
        return (state.overlap * self.tail_gain).flatten(1)


class ExactEncoder:
    """Encoder and codebooks in float64, for `encode`: however the audio is cut, near ties between codes go one way.

    In float32 a product of matrices differs in its last bit with the number of frames at once; where two codes are
    almost equally near, that changes the code and with it all deeper levels (1 % of the codes of speech).
    """

    def __init__(self, tokenizer: RVQTokenizer):
        dtype = torch.float32 if tokenizer.device.type == "mps" else torch.float64  # Apple's GPUs have no float64
        self.encoder = copy.deepcopy(tokenizer.encoder).requires_grad_(False).to(dtype)
        arrange_for_few_rows(self.encoder)
        self.semantic, self.acoustic = (stack.books(dtype) for stack in (tokenizer.semantic, tokenizer.acoustic))
        self.version = self.version_of(tokenizer)

    def is_of(self, tokenizer: RVQTokenizer) -> bool:
        """Whether the tokenizer's weights and codebooks are still those this was made from."""
        return self.version == self.version_of(tokenizer)

    @staticmethod
    def version_of(tokenizer: RVQTokenizer) -> list[tuple[int, ...]]:
        parts = (tokenizer.encoder, tokenizer.semantic, tokenizer.acoustic)
        tensors = [tensor for part in parts for tensor in (*part.parameters(), *part.buffers())]
        moves = (tokenizer.semantic.n_moves, tokenizer.acoustic.n_moves)
        return [moves, *((tensor.data_ptr(), tensor._version) for tensor in tensors)]


class Voice(nn.Module):
    """What the decoder is told of who speaks, from the statistics of a clip's codes.

    A speech model's guesses of the semantic codes say the words and little of the voice (`spoken_codes.py`); a clip of
    the speaker has it in all of its codes. Deviation: csm-1b's codec is told nothing; acoustic codes tell it.
    """

    def __init__(self, config: TokenizerConfig):
        super().__init__()
        self.width = 4 * config.codebook_dim  # mean and spread of content and acoustic latents
        self.register_buffer("centre", torch.zeros(self.width))
        self.register_buffer("spread", torch.ones(self.width))
        self.hidden = nn.Linear(self.width, D_VOICE)
        self.out = nn.Linear(D_VOICE, config.d_branch)
        for parameter in self.out.parameters():
            nn.init.zeros_(parameter)  # nothing is told at first

    @torch.no_grad()
    def fit(self, statistics: Tensor) -> None:
        """(M, width) of many clips: what they have in common says nothing."""
        self.centre.copy_(statistics.mean(dim=0))
        self.spread.copy_(statistics.std(dim=0, correction=0).clamp(min=1e-3))

    def forward(self, statistics: Tensor) -> Tensor:
        """(B, width), nan where nothing is known of the speaker -> (B, 1, d_branch)"""
        told = ~statistics.isnan().any(dim=1, keepdim=True)  # (B, 1)
        normal = ((statistics - self.centre) / self.spread).nan_to_num()
        return (self.out(F.gelu(self.hidden(normal))) * told)[:, None]


class Reconstruction(NamedTuple):
    wave: Tensor  # (B, N)
    codes: Tensor  # (B, T, K) int64
    commitment: Tensor  # ()


class RVQTokenizer(AudioTokenizer):
    """The codec. `forward` and `autoencode` are for training, `encode` and `decode` and the streams for use."""

    delay_samples = DELAY_SAMPLES

    def __init__(self, config: TokenizerConfig, voiced: bool = False):
        """`voiced`: its decoder can be told who speaks."""
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        books = {"dim": config.codebook_dim, "n_codes": config.codebook_size, "decay": config.codebook_decay}
        self.semantic = ResidualQuantizer(config.n_semantic, **books)
        self.acoustic = ResidualQuantizer(config.n_acoustic_codebooks, **books)
        self.semantic_out = nn.Linear(config.codebook_dim, config.d_branch, bias=False)
        self.acoustic_out = nn.Linear(config.codebook_dim, config.d_branch, bias=False)
        # the decoder is told how many acoustic codebooks it gets, and trusts few of them less: without either, one
        # sounds worse than none
        self.known_depth = nn.Parameter(torch.zeros(config.n_acoustic_codebooks + 1, config.d_branch))
        self.depth_gain = nn.Parameter(torch.ones(config.n_acoustic_codebooks + 1, config.d_branch))
        self.decoder = Decoder(config)
        self.voice = Voice(config) if voiced else None
        self.exact: ExactEncoder | None = None  # made at the first use

    @property
    def device(self) -> torch.device:
        return self.semantic_out.weight.device

    def latents(self, wave: Tensor, disguise: Disguise | None = None) -> tuple[Tensor, Tensor]:
        """(B, T * FRAME_SAMPLES) -> content and acoustic latents before quantisation, each (B, T, codebook_dim).

        `disguise` as in `Encoder.forward`.
        """
        content, acoustic, _ = self.encoder(wave, self.encoder.initial_state(len(wave)), disguise)
        return content, acoustic

    def mix(self, content: Tensor, acoustic: Tensor, acoustic_depth: Tensor | int) -> Tensor:
        """Latents after quantisation, each (B, T, codebook_dim), and how many acoustic codebooks each sample has (B,),
        or all of them, -> the decoder's input (B, T, d_branch)."""
        heard = self.acoustic_out(acoustic) * self.depth_gain[acoustic_depth, None]
        return self.semantic_out(content) + heard + self.known_depth[acoustic_depth, None]

    def synthesize(
        self, content: Tensor, acoustic: Tensor, acoustic_depth: Tensor, voice: Tensor | None = None
    ) -> Tensor:
        """Latents after quantisation, each (B, T, codebook_dim), and how many acoustic codebooks each sample has (B,)
        -> (B, T * FRAME_SAMPLES), aligned with the input. `voice` (B, 1, d_branch) is that of who speaks."""
        mixed = self.mix(content, acoustic, acoustic_depth)
        mixed = mixed if voice is None else mixed + voice
        wave, state = self.decoder(mixed, self.decoder.initial_state(len(mixed)))
        return torch.cat([wave, self.decoder.finish(state)], dim=1)[:, DELAY_SAMPLES:]

    def autoencode(
        self, wave: Tensor, acoustic_depth: Tensor, content_gradient: float = 1.0, disguise: Disguise | None = None
    ) -> Tensor:
        """Without quantisation: (B, N) -> (B, N). Samples with `acoustic_depth` (B,) of 0 use the content alone.

        The gradient of the reconstruction reaches the content branch times `content_gradient`.
        """
        content, acoustic = self.latents(wave, disguise)
        content = scale_gradient(content, content_gradient)
        heard = acoustic_depth > 0
        depth = heard * self.config.n_acoustic_codebooks
        return self.synthesize(content, acoustic * heard.view(-1, 1, 1), depth)

    def forward(
        self,
        wave: Tensor,
        semantic_depth: Tensor,
        acoustic_depth: Tensor,
        content_gradient: float = 1.0,
        disguise: Disguise | None = None,
    ) -> Reconstruction:
        """(B, T * FRAME_SAMPLES) and the codebooks each sample keeps (B,) -> reconstruction through the quantisers."""
        content, acoustic = self.latents(wave, disguise)
        semantic = self.semantic(scale_gradient(content, content_gradient), semantic_depth)
        detail = self.acoustic(acoustic, acoustic_depth)
        codes = torch.cat([semantic.codes, detail.codes], dim=-1)
        commitment = (semantic.commitment + detail.commitment) / 2
        return Reconstruction(self.synthesize(semantic.latents, detail.latents, acoustic_depth), codes, commitment)

    def decode_frozen(
        self,
        wave: Tensor,
        semantic_depth: Tensor,
        acoustic_depth: Tensor,
        given: Tensor | None = None,
        statistics: Tensor | None = None,
    ) -> Tensor:
        """As `forward`, but encoder and codebooks stay as they are and take no gradient: (B, N) -> (B, N).

        Codes are found in float32 under any autocast: in bfloat16 one in eight would not be that of `encode`. `given`
        (B, T, S) are semantic codes to be used in their place; below 0 in the samples that keep their own. `statistics`
        (B, width) are those of clips of who speaks, of a tokenizer that is `voiced`.
        """
        with torch.no_grad(), torch.autocast(wave.device.type, enabled=False):
            content, acoustic = self.latents(wave)
            content = self.semantic.nearest(content, semantic_depth)
            if given is not None:
                content = torch.where(given[:, :, :1] < 0, content, self.semantic.decode(given.clamp(min=0)))
            acoustic = self.acoustic.nearest(acoustic, acoustic_depth)
        voice = None if statistics is None else self.voice(statistics)
        return self.synthesize(content, acoustic, acoustic_depth, voice)

    @torch.no_grad()
    def statistics(self, codes: Tensor) -> Tensor:
        """(T, K) codes of a clip -> (width,) what `Voice` makes a voice of."""
        S = self.config.n_semantic
        latents = torch.cat([self.semantic.decode(codes[:, :S]), self.acoustic.decode(codes[:, S:])], dim=1)
        return torch.cat([latents.mean(dim=0), latents.std(dim=0, correction=0)])

    @torch.no_grad()
    def voice_of(self, codes: Tensor) -> Tensor | None:
        """(1, 1, d_branch) of (T, K) codes; None of fewer codebooks, or without a decoder that was trained for it."""
        if self.voice is None or not len(codes) or codes.size(1) < self.config.n_codebooks:
            return None
        return self.voice(self.statistics(codes)[None])

    def lookup(self, codes: Tensor) -> Tensor:
        """(B, T, K') -> the decoder's input (B, T, d_branch)."""
        n_semantic = self.config.n_semantic
        depth = max(0, codes.size(-1) - n_semantic)
        content = self.semantic.decode(codes[..., :n_semantic])
        acoustic = self.acoustic.decode(codes[..., n_semantic:]) if depth else torch.zeros_like(content)
        return self.mix(content, acoustic, depth)

    def fingerprint(self) -> str:
        """Of encoder and codebooks: with a decoder that was trained further, codes mean what they did."""
        parts = {"encoder": self.encoder, "semantic": self.semantic, "acoustic": self.acoustic}
        return fingerprint(self.config, nn.ModuleDict(parts))

    def code_vectors(self) -> list[Tensor]:
        return [level.codebook.detach() for stack in (self.semantic, self.acoustic) for level in stack.levels]

    def encoder_state(self, batch_size: int) -> EncoderState:
        self.exact = self.exact if self.exact and self.exact.is_of(self) else ExactEncoder(self)
        return self.exact.encoder.initial_state(batch_size)

    def encode_frames(self, wave: Tensor, state: EncoderState) -> tuple[Tensor, EncoderState]:
        """(B, T * FRAME_SAMPLES) -> (B, T, K) and the new state."""
        content, acoustic, state = self.exact.encoder(wave.to(state.samples), state)
        books = (self.exact.semantic, self.exact.acoustic)
        return torch.cat([b.encode(x) for b, x in zip(books, (content, acoustic), strict=True)], dim=-1), state

    def decoder_state(self, batch_size: int, voice: Tensor | None = None) -> DecoderState:
        return self.decoder.initial_state(batch_size)._replace(voice=voice)

    def decode_frames(self, codes: Tensor, state: DecoderState) -> tuple[Tensor, DecoderState]:
        """(B, T, K') -> (B, T * FRAME_SAMPLES), late by `DELAY_SAMPLES`, and the new state."""
        mixed = self.lookup(codes)
        return self.decoder(mixed if state.voice is None else mixed + state.voice, state)

    def decode_end(self, state: DecoderState) -> Tensor:
        return self.decoder.finish(state)


def save_tokenizer(tokenizer: RVQTokenizer, folder: Path) -> None:
    save_weights(folder, KIND, dataclasses.asdict(tokenizer.config), tokenizer.state_dict())


def load_tokenizer(folder: Path | str, device: torch.device | str = "cpu") -> AudioTokenizer:
    """A tokenizer written by `save_tokenizer`, or Mimi by its hub name or from its folder; for use, not for training.

    ValueError or FileNotFoundError if there is none.
    """
    if is_mimi(folder):
        return load_mimi(folder).to(device)
    config, tensors = load_weights(Path(folder), KIND, "python train_tokenizer.py")
    try:
        voiced = any(name.startswith("voice.") for name in tensors)
        tokenizer = RVQTokenizer(TokenizerConfig(**config), voiced)
    except TypeError as error:
        raise ValueError(f"{folder}: config.json is of another version ({error})") from error
    load_into(tokenizer, tensors, str(folder))
    arrange_for_few_rows(tokenizer.decoder)
    return tokenizer.to(device).eval()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Encode an audio file to codes and decode them again.", epilog=EXIT_CODES_HELP
    )
    parser.add_argument("input", type=Path, help="wav, flac, ogg or mp3; any rate, channels are averaged")
    parser.add_argument("output", type=Path, help="wav to write, 24 kHz, 16 bit")
    parser.add_argument(
        "--tokenizer", type=Path, default=Path("runs/tokenizer"), help="folder of a trained tokenizer, or kyutai/mimi"
    )
    parser.add_argument("--codebooks", type=int, default=None, help="decode only the first N (default: all)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    args = parser.parse_args(argv)
    if args.threads < 1:
        raise ValueError(f"--threads {args.threads} must be at least 1")
    torch.set_num_threads(args.threads)
    tokenizer = load_tokenizer(args.tokenizer)
    used = tokenizer.config.n_codebooks if args.codebooks is None else args.codebooks
    if not 1 <= used <= tokenizer.config.n_codebooks:
        raise ValueError(f"--codebooks {used} must lie in 1..{tokenizer.config.n_codebooks}")
    wave = torch.from_numpy(read_audio(args.input)[0])[None]  # (1, N)
    seconds = wave.size(1) / SAMPLE_RATE
    begin = time.perf_counter()
    codes = tokenizer.encode(wave)
    encoded = time.perf_counter()
    decoded = tokenizer.decode(codes[..., :used])
    done = time.perf_counter()
    write_wav(args.output, decoded[0, : wave.size(1)].numpy())
    print(f"{args.output}: {codes.size(1)} frames for {seconds:.2f} s, {used} of {codes.size(2)} codebooks")
    print(f"bitrate {tokenizer.config.bits_per_second(used) / 1000:.2f} kbit/s")
    rate = f"encoder {(encoded - begin) / seconds:.3f}, decoder {(done - encoded) / seconds:.3f}"
    print(f"real-time factor at {args.threads} thread(s): {rate}")
    return 0


if __name__ == "__main__":
    raise SystemExit(run(main))
