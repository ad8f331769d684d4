"""How a turn sounds, in a few numbers: what the prosodic memory is written with and learns to expect.

Six features, each of the order of 1. They are absolute, not relative to the speaker's own mean, so that they also tell
voices apart. Deviation: `z` scores within a speaker need speech of his that a first turn does not have.
"""

from __future__ import annotations

import numpy as np
import torch

from audio import SAMPLE_RATE, resample
from frames import N_PROSODY

PITCH_RATE = 8_000  # Hz, enough for the pitch of voices and nine times cheaper
HOP_SECONDS = 0.01
LOWEST, HIGHEST = 60, 500  # Hz
ACTIVE_DB = 30.0  # a hop is speech if it is at most this far below the loudest
VOICED_DB = 15.0
SHORTEST_SECONDS = 0.2


def prosody_features(samples: np.ndarray, n_characters: int) -> torch.Tensor:
    """(N,) samples at 24 kHz of a text of so many characters -> (6,) float32; all nan for less than 0.2 s or silence.

    Pitch (octaves from 150 Hz), its spread (interquartile range, half octaves), level (10 dB from -23 dBFS), its spread
    (10 dB), pause share, articulation rate (octaves from 15 characters a second of speech).
    """
    from torchaudio.functional import detect_pitch_frequency

    unknown = torch.full((N_PROSODY,), torch.nan)
    hop = int(HOP_SECONDS * SAMPLE_RATE)
    if len(samples) < SHORTEST_SECONDS * SAMPLE_RATE or not np.abs(samples).max() > 1e-4:
        return unknown
    hops = samples[: len(samples) // hop * hop].reshape(-1, hop)
    level = 10 * np.log10((hops.astype(np.float64) ** 2).mean(axis=1) + 1e-10)  # (n,) dBFS
    active = level > level.max() - ACTIVE_DB
    slow = torch.from_numpy(resample(samples, SAMPLE_RATE, PITCH_RATE))[None]
    pitch = detect_pitch_frequency(
        slow, PITCH_RATE, frame_time=HOP_SECONDS, win_length=20, freq_low=LOWEST, freq_high=HIGHEST
    )[0].numpy()
    n = min(len(pitch), len(level))
    octaves = np.log2(np.maximum(pitch[:n][level[:n] > level.max() - VOICED_DB], 1.0) / 150)
    if len(octaves) == 0:
        return unknown
    low, middle, high = np.quantile(octaves, (0.25, 0.5, 0.75))
    speech = active.sum() * HOP_SECONDS
    rate = np.log2(max(n_characters, 1) / speech / 15)
    values = (
        middle,
        2 * (high - low),
        (level[active].mean() + 23) / 10,
        level[active].std() / 10,
        1 - active.mean(),
        rate,
    )
    return torch.tensor(values, dtype=torch.float32)
