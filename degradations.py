"""Speech made worse in one known way at a time, so that a metric can be shown to tell good from bad.

A degradation is a function of samples (N,) float32 at 24 kHz and a severity; severity 0 goes through the same analysis
and synthesis and is what the others are compared with, so that what is measured is the change and not the vocoder.
Pitch and tempo are changed with WORLD (Morise et al. 2016, IEICE Trans. E99-D). All draws come from `random`.
Knows nothing of metrics.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np

from audio import SAMPLE_RATE
from audio_tokenizer import AudioTokenizer
from conversation_metrics import HOP_SECONDS, SHORTEST_PAUSE, SHORTEST_SECONDS, levels
from generation import SHIPPED
from rvq_tokenizer import load_tokenizer
from synthetic_voices import FRAME_S, track_f0

VERSION = 1  # of what a severity does, also by the tokenizer shipped; values kept under another are measured anew
Degrade = Callable[[np.ndarray, float, np.random.Generator], np.ndarray]
PAUSE_SECONDS = 0.3
WORD_SECONDS = 0.35  # about one word
QUIET_DB = 35.0  # below the loudest hop


def with_world(
    samples: np.ndarray, change: Callable[[np.ndarray], np.ndarray], tempo: float = 1.0, formants: float = 1.0
) -> np.ndarray:
    """(N,) -> (N / tempo,): `change` maps the F0 (T,) of voiced frames in octaves; formants move by a factor."""
    import pyworld

    if len(samples) < SHORTEST_SECONDS * SAMPLE_RATE:  # too short to analyse
        return samples
    x = np.ascontiguousarray(samples, dtype=np.float64)
    f0 = track_f0(x, SAMPLE_RATE, 60.0, 500.0)
    times = np.arange(len(f0)) * FRAME_S
    envelope = pyworld.cheaptrick(x, f0, times, SAMPLE_RATE)  # (T, bins)
    noise = pyworld.d4c(x, f0, times, SAMPLE_RATE)
    if formants != 1.0:
        bins = np.arange(envelope.shape[1])
        envelope = np.stack([np.interp(bins / formants, bins, frame) for frame in envelope])
    voiced = f0 > 0
    if voiced.any():
        f0[voiced] = np.clip(2.0 ** change(np.log2(f0[voiced])), 50, 700)
    layers = (np.ascontiguousarray(layer) for layer in (envelope, noise))
    made = pyworld.synthesize(f0, *layers, SAMPLE_RATE, 1000 * FRAME_S / tempo)
    return made[: int(len(x) / tempo)].astype(np.float32)


def flatten_pitch(samples: np.ndarray, severity: float, random: np.random.Generator) -> np.ndarray:
    """Pitch moves less, by the share `severity`; 1 is monotone, below 0 exaggerates."""
    return with_world(samples, lambda octaves: np.median(octaves) + (1 - severity) * (octaves - np.median(octaves)))


def misplace_pitch(samples: np.ndarray, severity: float, random: np.random.Generator) -> np.ndarray:
    """The contour is mixed with its mirror image around the median: the same spread where severity is 1."""
    return with_world(samples, lambda octaves: np.median(octaves) + (1 - 2 * severity) * (octaves - np.median(octaves)))


def shift_pitch(samples: np.ndarray, severity: float, random: np.random.Generator) -> np.ndarray:
    """All pitch higher by `severity` semitones."""
    return with_world(samples, lambda octaves: octaves + severity / 12)


def change_speaker(samples: np.ndarray, severity: float, random: np.random.Generator) -> np.ndarray:
    """Towards another person: at 1 half an octave and a fifth of the formants higher."""
    return with_world(samples, lambda octaves: octaves + severity / 2, formants=1 + severity / 5)


def stretch(samples: np.ndarray, severity: float, random: np.random.Generator) -> np.ndarray:
    """Slower by the share `severity`, at the same pitch."""
    return with_world(samples, lambda octaves: octaves, tempo=1 / (1 + severity))


def excite(samples: np.ndarray, severity: float, random: np.random.Generator) -> np.ndarray:
    """Aroused: at 1 pitch 3 semitones higher, its range half as wide again, faster by 0.12, louder by 4 dB."""

    def change(octaves: np.ndarray) -> np.ndarray:
        middle = np.median(octaves)
        return middle + severity / 4 + (1 + severity / 2) * (octaves - middle)

    return with_world(samples, change, tempo=1 + 0.12 * severity) * np.float32(10 ** (4 * severity / 20))


def insert_pauses(samples: np.ndarray, severity: float, random: np.random.Generator) -> np.ndarray:
    """`severity` silences of 0.3 s, where the speech is softest within equal parts of the turn."""
    n = int(severity)
    level = levels(samples)
    edges = np.linspace(0.1, 0.9, n + 1) * len(level)
    places = [int(a) + int(np.argmin(level[int(a) : int(b) + 1])) for a, b in itertools.pairwise(edges)]
    hop, silence = int(HOP_SECONDS * SAMPLE_RATE), np.zeros(int(PAUSE_SECONDS * SAMPLE_RATE), np.float32)
    parts = np.split(samples, [place * hop for place in places])
    return np.concatenate([piece for part in parts[:-1] for piece in (part, silence)] + [parts[-1]])


def remove_pauses(samples: np.ndarray, severity: float, random: np.random.Generator) -> np.ndarray:
    """Every silence of 0.15 s or more within the turn is shorter by the share `severity`."""
    hop = int(HOP_SECONDS * SAMPLE_RATE)
    level = levels(samples)
    quiet = level <= level.max() - QUIET_DB
    keep = np.ones(len(level), dtype=bool)
    start = 0
    for stop in [*(np.flatnonzero(np.diff(quiet)) + 1), len(quiet)]:
        if quiet[start] and (stop - start) * HOP_SECONDS >= SHORTEST_PAUSE:
            keep[start : start + round(severity * (stop - start))] = False
        start = stop
    whole = samples[: len(level) * hop].reshape(-1, hop)[keep].reshape(-1)
    return np.concatenate([whole, samples[len(level) * hop :]])


def add_noise(samples: np.ndarray, severity: float, random: np.random.Generator) -> np.ndarray:
    """White noise `40 - severity` dB below the speech; none at 0."""
    if severity == 0:
        return samples
    noise = random.standard_normal(len(samples))
    power = np.mean(np.square(samples, dtype=np.float64)) * 10 ** ((severity - 40) / 10)
    return (samples + noise * np.sqrt(power)).astype(np.float32)


def clip(samples: np.ndarray, severity: float, random: np.random.Generator) -> np.ndarray:
    """Cut at the level that a share `severity` of the samples exceeds, and as loud as before."""
    if severity == 0:
        return samples
    limit = np.quantile(np.abs(samples), 1 - severity)
    cut = np.clip(samples, -limit, limit)
    return (cut * np.sqrt(np.mean(samples**2) / max(np.mean(cut**2), 1e-12))).astype(np.float32)


def drop_words(samples: np.ndarray, severity: float, random: np.random.Generator) -> np.ndarray:
    """Pieces of 0.35 s, a share `severity` of them, are cut out."""
    size = int(WORD_SECONDS * SAMPLE_RATE)
    pieces = [samples[start : start + size] for start in range(0, len(samples), size)]
    kept = [piece for piece, lot in zip(pieces, random.random(len(pieces)), strict=True) if lot >= severity]
    return np.concatenate(kept or [samples[:0]])


def flatten_level(samples: np.ndarray, severity: float, random: np.random.Generator) -> np.ndarray:
    """Level of the speech moves less around its median, by the share `severity`; silence moves with the loudest."""
    level = levels(samples)
    speech = level > level.max() - QUIET_DB
    decibels = -severity * (np.where(speech, level, level.max()) - np.median(level[speech]))
    hop = HOP_SECONDS * SAMPLE_RATE
    smooth = np.interp(np.arange(len(samples)), (np.arange(len(level)) + 0.5) * hop, decibels)
    return (samples * 10 ** (smooth / 20)).astype(np.float32)


@functools.cache
def shipped_tokenizer() -> AudioTokenizer:
    return load_tokenizer(Path(__file__).parent / SHIPPED / "tokenizer")


def leave_out_codebooks(samples: np.ndarray, severity: float, random: np.random.Generator) -> np.ndarray:
    """Through the tokenizer in this repository, without the last `severity` of its codebooks."""
    if not len(samples):
        return samples
    left = shipped_tokenizer().config.n_codebooks - int(severity)
    return shipped_tokenizer().copies(samples, [left])[left]


def gain(samples: np.ndarray, severity: float, random: np.random.Generator) -> np.ndarray:
    """Louder by `severity` dB."""
    return samples * np.float32(10 ** (severity / 20))


# ---- conversations ---------------------------------------------------------------------------------------------------


def shuffled(items: list, severity: float, random: np.random.Generator) -> list:
    """A share `severity` of the items change places among themselves; none keeps its own, where two or more move."""
    places = np.flatnonzero(random.random(len(items)) < severity)
    moved = list(items)
    for place, source in zip(places, np.roll(places, 1), strict=True):
        moved[place] = items[source]
    return moved
