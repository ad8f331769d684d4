"""What the audio tokenizer is trained on, batch by batch; every batch is a function of seed and step alone.

Letters: B batch, N samples, T frames, U characters.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from audio import FRAME_SAMPLES, SAMPLE_RATE, to_pcm16
from rvq_tokenizer import Disguise
from spoken_text import has_digits

SPREAD = 4  # sub-frames that characters are aligned with, of a frame; 20 ms each
LONGEST_SECONDS = 6.0  # of an utterance that is used for its text
SPEEDS = (0.85, 1.18)  # pitch, formants and rate of half of the utterances are changed together
WARP = 0.3  # logarithm of the largest factor by which the content branch hears frequencies changed
TILT_DB = 3.0  # per octave; most by which it hears a voice brighter or duller
BUMP_DB = 10.0  # most of the resonance that it hears added or taken away
BUMP_HZ = (500.0, 4000.0)  # its centre
NO_PHONE = -1
MASKED = 0.2  # share of an utterance's frames that are silenced, in spans
SPAN_FRAMES = 2
UNTOLD = 0.1  # share of the crops with guessed codes whose decoder is not told who speaks


class Depths(NamedTuple):
    semantic: Tensor  # (B,) semantic codebooks each sample keeps, at least 1
    acoustic: Tensor  # (B,) acoustic codebooks each sample keeps, 0 for the semantic stack alone


class Crops:
    """All clips of a split in memory as 16-bit samples; every batch is a function of seed and step alone."""

    def __init__(self, clips: Sequence[np.ndarray]):
        """(N,) of each clip, float or int16."""
        self.clips = [to_pcm16(clip) for clip in clips]
        lengths = np.array([len(clip) for clip in self.clips], dtype=np.float64)
        self.share = lengths / lengths.sum()
        self.seconds = float(lengths.sum()) / SAMPLE_RATE

    def batch(self, seed: int, step: int, batch_size: int, n_samples: int) -> Tensor:
        """(B, n_samples): clips by their length, a random place in each, levels varied by -8 to +2 dB."""
        random = np.random.default_rng([seed, step])
        wave = np.zeros((batch_size, n_samples), dtype=np.float32)
        for row, index in zip(wave, random.choice(len(self.clips), batch_size, p=self.share), strict=True):
            clip = self.clips[index]
            start = random.integers(max(1, len(clip) - n_samples + 1))
            piece = clip[start : start + n_samples]
            row[: len(piece)] = piece / 32768 * 10 ** (random.uniform(-8, 2) / 20)
        return torch.from_numpy(wave).clamp(-1, 1)

    def whole(self, seed: int, n_frames: int) -> Iterator[Tensor]:
        """Clips in random order, each (1, T * FRAME_SAMPLES), until there are so many frames, or no more clips."""
        for index in np.random.default_rng([seed, 5]).permutation(len(self.clips)):
            if n_frames <= 0:
                return
            clip = self.clips[index]
            padded = np.pad(clip, (0, -len(clip) % FRAME_SAMPLES)) / np.float32(32768)
            n_frames -= len(padded) // FRAME_SAMPLES
            yield torch.from_numpy(padded)[None]


class Coded(NamedTuple):
    """A clip with codes that stand for it, made by something else than the tokenizer."""

    pcm: np.ndarray  # (N,) int16
    codes: np.ndarray  # (T, S)
    beside: np.ndarray  # (R, W) statistics of other clips of the speaker


class CodedCrops:
    """Crops of such clips; every batch is a function of seed and step alone."""

    def __init__(self, clips: Iterable[Coded], n_frames: int):
        """Those of fewer than `n_frames` frames are left out. ValueError: none is left, or codes of another length."""
        self.n_frames, self.clips = n_frames, []
        for clip in clips:
            if len(clip.codes) != -(-len(clip.pcm) // FRAME_SAMPLES):
                raise ValueError(f"{len(clip.codes)} frames of codes do not fit a clip of {len(clip.pcm)} samples")
            if len(clip.codes) >= n_frames:
                self.clips.append(clip)
        if not self.clips:
            raise ValueError(f"no clip lasts {n_frames} frames, the crop_frames; give fewer")
        lengths = np.array([len(clip.codes) for clip in self.clips], dtype=np.float64)
        self.share = lengths / lengths.sum()

    @property
    def statistics(self) -> Tensor:
        """(M, W) of all clips beside those of a batch."""
        return torch.from_numpy(np.concatenate([clip.beside for clip in self.clips]))

    def batch(self, seed: int, step: int, batch_size: int) -> tuple[Tensor, Tensor, Tensor]:
        """(B, n_frames * FRAME_SAMPLES) at the level of the clips, (B, n_frames, S) int64 codes of the same moments,
        and (B, W) statistics of another clip of each speaker: nan where there is none, and in some samples anyway."""
        random, n = np.random.default_rng([seed, step, 6]), self.n_frames
        wave = np.zeros((batch_size, n * FRAME_SAMPLES), dtype=np.float32)
        codes, beside = [], np.full((batch_size, self.clips[0].beside.shape[1]), np.nan, dtype=np.float32)
        for row, index in enumerate(random.choice(len(self.clips), batch_size, p=self.share)):
            clip = self.clips[index]
            first = random.integers(len(clip.codes) - n + 1)
            piece = clip.pcm[first * FRAME_SAMPLES : (first + n) * FRAME_SAMPLES]
            wave[row, : len(piece)] = piece / np.float32(32768)
            codes.append(clip.codes[first : first + n].astype(np.int64))
            if len(clip.beside) and random.random() >= UNTOLD:
                beside[row] = clip.beside[random.integers(len(clip.beside))]
        return torch.from_numpy(wave), torch.from_numpy(np.stack(codes)), torch.from_numpy(beside)


def draw_depths(seed: int, step: int, batch_size: int, n_semantic: int, n_acoustic: int) -> Depths:
    """Nested depth dropout, always a prefix of all codebooks: 60 % all, 15 % the semantic ones and some acoustic, 15 %
    the semantic ones alone, 10 % some of them.

    What a speech model says with its first codebooks must be understood. Each further codebook changes the sound less
    than the one before, so depths are drawn evenly by their logarithm.
    """
    random = np.random.default_rng([seed, step, 1])
    lot, depth = random.random(batch_size), random.random(batch_size)
    acoustic = np.select([lot < 0.60, lot < 0.75], [n_acoustic, _by_logarithm(depth, n_acoustic)], 0)
    semantic = np.where(lot < 0.90, n_semantic, _by_logarithm(depth, n_semantic))
    return Depths(torch.from_numpy(semantic), torch.from_numpy(acoustic))


def _by_logarithm(chance: np.ndarray, most: int) -> np.ndarray:
    """Chances in [0, 1) -> numbers 1..most, 1 to 2 as often as 2 to 4."""
    return np.minimum(np.exp(chance * np.log(most + 1)).astype(int), most)


def draw_disguises(seed: int, step: int, batch_size: int, share: float, which: int = 0) -> Disguise:
    """For a `share` of the samples; the others keep their voice. `which`: of several for one batch."""
    random = np.random.default_rng([seed, step, 4, which])
    disguised = random.random(batch_size) < share
    factors = np.where(disguised, np.exp(random.uniform(-WARP, WARP, batch_size)), 1.0)
    tilt = disguised * random.uniform(-TILT_DB, TILT_DB, batch_size)
    bump_hz = np.exp(random.uniform(*np.log(BUMP_HZ), batch_size))
    bump_db = disguised * random.uniform(-BUMP_DB, BUMP_DB, batch_size)
    return Disguise(*(torch.from_numpy(x).float() for x in (factors, tilt, bump_hz, bump_db)))


def letters_of(texts: Iterable[str]) -> list[str]:
    """What CTC is asked for: letters, spaces and apostrophes that occur, in lower case."""
    return sorted({c for text in texts for c in text.casefold() if c.isalpha() or c in " '"})


def character_ids(text: str, alphabet: Sequence[str]) -> np.ndarray:
    """(U,) ids from 1 of the characters of the alphabet; 0 is CTC's blank."""
    ids = {character: i for i, character in enumerate(alphabet, start=1)}
    return np.array([ids[c] for c in text.casefold() if c in ids], dtype=np.int64)


def can_be_aligned(characters: np.ndarray, n_frames: float) -> bool:
    """Whether CTC can align so many characters with the frames; equal neighbours need a blank between them."""
    repeats = int((characters[1:] == characters[:-1]).sum())
    return 0 < len(characters) <= SPREAD * n_frames - repeats


def phone_ids(alignment: Iterable[tuple[float, float, str]], n_frames: int, phones: Sequence[str]) -> np.ndarray:
    """(SPREAD * T,) which phone sounds in the middle of every sub-frame; NO_PHONE where the alignment has none."""
    ids = np.full(SPREAD * n_frames, NO_PHONE)
    middle = (np.arange(len(ids)) + 0.5) * FRAME_SAMPLES / SPREAD / SAMPLE_RATE
    for begin, end, phone in alignment:
        ids[(begin <= middle) & (middle < end)] = phones.index(phone)
    return ids


class Transcribed(NamedTuple):
    """An utterance for the heads."""

    pcm: np.ndarray  # (N,) int16
    characters: np.ndarray  # (U,) ids from 1; 0 is CTC's blank
    speaker: int
    clip: int  # which one of those given
    features: np.ndarray | None = None  # (T, D) of a teacher
    phones: np.ndarray | None = None  # (SPREAD * T,) ids from 0 of an alignment, NO_PHONE where it says nothing


class SemanticBatch(NamedTuple):
    wave: Tensor  # (B, T * FRAME_SAMPLES)
    n_frames: Tensor  # (B,)
    characters: Tensor  # (sum of U,) ids of all texts one after the other
    n_characters: Tensor  # (B,)
    speakers: Tensor  # (B,)
    features: Tensor  # (B, T, D) of a teacher; D = 0 without one
    phones: Tensor  # (B, SPREAD * T) ids from 0, NO_PHONE where none is known

    def live(self, n_frames: int) -> Tensor:
        """(B, T) whether a frame is one of its utterance."""
        return torch.arange(n_frames, device=self.n_frames.device) < self.n_frames[:, None]


class Utterances:
    """Transcribed clips of a split; every batch is a function of seed and step alone."""

    def __init__(self, clips: list[tuple[str, str, np.ndarray]]):
        """(speaker, text, samples as of `Crops`) of each clip. Too long ones, those with too little time for their text
        and those with digits, which do not say how they are read, are left out; `alphabet` holds the letters that
        occur."""
        self.alphabet = letters_of(text for _, text, _ in clips)
        self.speakers = sorted({speaker for speaker, _, _ in clips})
        self.phones: list[str] = []  # those that occur, once there is an alignment
        self.items: list[Transcribed] = []
        for number, (speaker, text, samples) in enumerate(clips):
            letters = character_ids(text, self.alphabet)
            fits = can_be_aligned(letters, len(samples) / FRAME_SAMPLES / SPEEDS[1])
            if fits and len(samples) <= LONGEST_SECONDS * SAMPLE_RATE and not has_digits(text):
                self.items.append(Transcribed(to_pcm16(samples), letters, self.speakers.index(speaker), number))

    @property
    def feature_width(self) -> int:
        """D of the teacher's features, 0 without a teacher."""
        return 0 if self.items[0].features is None else self.items[0].features.shape[1]

    def add_features(self, features: Sequence[np.ndarray]) -> None:
        """(T, D) of a teacher for every item."""
        self.items = [item._replace(features=each) for item, each in zip(self.items, features, strict=True)]

    def add_phones(self, alignments: Sequence[Sequence[tuple[float, float, str]]]) -> None:
        """(begin, end, phone) in seconds of every item; an empty alignment says nothing."""
        self.phones = sorted({phone for alignment in alignments for _, _, phone in alignment})
        self.items = [
            item._replace(phones=phone_ids(alignment, -(-len(item.pcm) // FRAME_SAMPLES), self.phones))
            for item, alignment in zip(self.items, alignments, strict=True)
        ]

    def batch(self, seed: int, step: int, batch_size: int, part: slice = slice(None)) -> SemanticBatch:
        """Random utterances, half of them at another speed, a fifth of their frames silent; `part` of them."""
        random = np.random.default_rng([seed, step, 2])
        chosen = random.integers(len(self.items), size=batch_size)
        places = range(batch_size)[part]
        own = [np.random.default_rng([seed, step, 2, place]) for place in places]  # so that parts need no others
        chosen = [self.items[chosen[place]] for place in places]
        varied = [_varied(item, random) for item, random in zip(chosen, own, strict=True)]
        n_frames = np.array([-(-len(wave) // FRAME_SAMPLES) for wave, _, _ in varied])
        padded = np.zeros((len(varied), n_frames.max() * FRAME_SAMPLES), dtype=np.float32)
        features = np.zeros((len(varied), n_frames.max(), self.feature_width), dtype=np.float32)
        phones = np.full((len(varied), SPREAD * n_frames.max()), NO_PHONE)
        for i, (wave, told, said) in enumerate(varied):
            padded[i, : len(wave)] = wave
            features[i, : len(told)] = told
            phones[i, : len(said)] = said
        return SemanticBatch(
            torch.from_numpy(padded).clamp(-1, 1),
            torch.from_numpy(n_frames),
            torch.from_numpy(np.concatenate([item.characters for item in chosen])),
            torch.tensor([len(item.characters) for item in chosen]),
            torch.tensor([item.speaker for item in chosen]),
            torch.from_numpy(features),
            torch.from_numpy(phones),
        )


def _varied(item: Transcribed, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Samples (N,) at another speed, level and with gaps, and of the same moments the teacher's features (T, D) and
    the phones (SPREAD * T,)."""
    speed = random.uniform(*SPEEDS) if random.random() < 0.5 else 1.0
    samples = item.pcm / np.float32(32768)
    places = np.arange(0, len(samples) - 1, speed)
    wave = np.interp(places, np.arange(len(samples)), samples).astype(np.float32)
    wave, silent = _masked(wave, random)
    wave, n_frames = wave * np.float32(10 ** (random.uniform(-8, 2) / 20)), len(silent)
    features, phones = np.zeros((n_frames, 0), dtype=np.float32), np.zeros(0, dtype=np.int64)
    if item.features is not None:
        frames = np.minimum(np.round(speed * np.arange(n_frames)).astype(int), len(item.features) - 1)
        features = item.features[frames].astype(np.float32)
    if item.phones is not None:
        middle = (speed * (np.arange(SPREAD * n_frames) + 0.5)).astype(int)
        phones = np.where(silent.repeat(SPREAD), NO_PHONE, item.phones[np.minimum(middle, len(item.phones) - 1)])
    return wave, features, phones


def _masked(samples: np.ndarray, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Samples (N,) of which some frames are silent now, and which (T,)."""
    n_frames, silent = len(samples) // FRAME_SAMPLES, np.zeros(-(-len(samples) // FRAME_SAMPLES), dtype=bool)
    for start in random.integers(max(1, n_frames), size=round(MASKED * n_frames / SPAN_FRAMES)):
        samples[start * FRAME_SAMPLES : (start + SPAN_FRAMES) * FRAME_SAMPLES] = 0
        silent[start : start + SPAN_FRAMES] = True
    return samples, silent


def draw_prefixes(seed: int, step: int, batch_size: int, n_semantic: int) -> Tensor:
    """(B,) how many semantic codebooks the heads see: all in 40 %, else any, few the more often: words come first."""
    random = np.random.default_rng([seed, step, 3])
    lot, depth = random.random(batch_size), _by_logarithm(random.random(batch_size), n_semantic)
    return torch.from_numpy(np.where(lot < 0.4, n_semantic, depth))
