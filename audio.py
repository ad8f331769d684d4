"""Reading, writing, resampling and loudness of mono audio; the rates of the whole project.

Knows nothing of codes, models or data sets. Samples are float32 in [-1, 1], shape (N,).
"""

from __future__ import annotations

import contextlib
import io
import os
from pathlib import Path

import numpy as np
import soundfile
import soxr

SAMPLE_RATE = 24_000  # Hz, of the codec
TARGET_LUFS = -23.0  # loudness of all speech that models learn from and hear (EBU R 128)
PEAK_DBFS = -1.0  # and its highest peak
MIN_RMS_DBFS = -50.0  # below, a clip is silence
FRAME_RATE = 12.5  # codec frames per second
FRAME_SAMPLES = int(SAMPLE_RATE / FRAME_RATE)  # 1920 samples, 80 ms
OGG_HEADER = 27  # bytes of a page before the sizes of its segments


def read_audio(source: Path | str | bytes, sample_rate: int | None = SAMPLE_RATE) -> tuple[np.ndarray, int]:
    """A file or its bytes -> mono float32 samples (N,) and their rate; `sample_rate=None` keeps the native one.

    Channels are averaged. ValueError: unreadable, empty, shorter than its header says, or not finite.
    """
    name = "audio bytes" if isinstance(source, bytes) else str(source)
    if not isinstance(source, bytes) and not Path(source).is_file():
        raise FileNotFoundError(f"no audio file at {source}")
    content = source if isinstance(source, bytes) else Path(source).read_bytes()
    if is_cut_short(content):
        raise ValueError(f"{name}: truncated, the file ends before its audio does")
    try:
        with soundfile.SoundFile(io.BytesIO(content)) as file:
            declared, rate = file.frames, file.samplerate
            samples = file.read(dtype="float32", always_2d=True)  # (N, channels)
    except (soundfile.LibsndfileError, MemoryError) as error:
        raise ValueError(f"{name}: not readable as wav, flac, ogg or mp3 ({error})") from error
    if declared - len(samples) > max(0.1 * rate, 0.02 * declared):
        raise ValueError(f"{name}: truncated, header says {declared} samples, found {len(samples)}")
    if not np.isfinite(samples).all():
        raise ValueError(f"{name}: holds samples that are not finite")
    wanted = sample_rate or rate
    mono = resample(samples.mean(axis=1), rate, wanted)
    if len(mono) == 0:
        raise ValueError(f"{name}: holds no samples" + (f" at {wanted} Hz" if len(samples) else ""))
    return mono, wanted


def is_cut_short(content: bytes) -> bool:
    """Whether a wav or ogg file lacks its end. libsndfile reads such files without a word, as shorter ones."""
    if content[:4] == b"RIFF":
        size = int.from_bytes(content[4:8], "little")  # of what follows
        return size not in (0, 2**32 - 1) and size + 8 > len(content) + 1  # those two: length unknown when written
    if content[:4] == b"OggS":  # RFC 3533, 6
        page = content[content.rfind(b"OggS") :]
        if len(page) < OGG_HEADER or not page[5] & 4:  # flag of the last page of a stream
            return True
        sizes = page[OGG_HEADER : OGG_HEADER + page[OGG_HEADER - 1]]  # of its segments
        return len(page) < OGG_HEADER + page[OGG_HEADER - 1] + sum(sizes)
    return False


def resample(samples: np.ndarray, rate: int, new_rate: int) -> np.ndarray:
    """(N,) at `rate` -> (N * new_rate / rate,) at `new_rate`, soxr high quality."""
    return samples if rate == new_rate else soxr.resample(samples, rate, new_rate, quality="HQ")


def to_pcm16(samples: np.ndarray) -> np.ndarray:
    """Float samples in [-1, 1] -> int16, rounded, clipped at full scale; int16 as it is."""
    samples = np.asarray(samples)
    if samples.dtype == np.int16:
        return samples
    return np.clip(np.rint(samples.astype(np.float64) * 32768), -32768, 32767).astype(np.int16)


def write_wav(path: Path, samples: np.ndarray, sample_rate: int = SAMPLE_RATE) -> None:
    """Write (N,) samples as 16-bit PCM; the file appears whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_bytes(encode_pcm16(samples, sample_rate, "WAV"))
        os.replace(partial, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise OSError(error.errno, os.strerror(error.errno or 0), str(path)) from error


def encode_pcm16(samples: np.ndarray, sample_rate: int, container: str = "FLAC") -> bytes:
    """(N,) float samples -> the bytes of a 16-bit FLAC or WAV file."""
    buffer = io.BytesIO()
    soundfile.write(buffer, to_pcm16(samples), sample_rate, format=container, subtype="PCM_16")
    return buffer.getvalue()


def rms_dbfs(samples: np.ndarray) -> float:
    """Root mean square level in dB relative to full scale; -inf for digital silence."""
    power = float(np.mean(np.square(samples, dtype=np.float64))) if len(samples) else 0.0
    return 10 * np.log10(power) if power > 0 else float("-inf")


def at_level(samples: np.ndarray, dbfs: float) -> np.ndarray:
    """(N,) with a root mean square level of `dbfs`; digital silence as it is."""
    level = rms_dbfs(samples)
    return samples * np.float32(10 ** ((dbfs - level) / 20)) if np.isfinite(level) else samples


def loudness_lufs(samples: np.ndarray, sample_rate: int) -> float:
    """Integrated loudness by ITU-R BS.1770-4; under 0.4 s (one gating block) the RMS level stands in for it.

    torchaudio's weighting filters are approximate: at 24 kHz it reads 0.3 dB low.
    """
    import torch
    import torchaudio.functional as F

    if len(samples) < 0.4 * sample_rate:
        return rms_dbfs(samples)
    return float(F.loudness(torch.from_numpy(np.ascontiguousarray(samples))[None], sample_rate))


def at_loudness(samples: np.ndarray, sample_rate: int = SAMPLE_RATE, lufs: float = TARGET_LUFS) -> np.ndarray:
    """(N,) with an integrated loudness of `lufs`, less where the peak would pass `PEAK_DBFS`; what is too soft to be
    speech as it is."""
    found = loudness_lufs(samples, sample_rate)
    if not found >= MIN_RMS_DBFS:
        return samples
    loudest = max(float(np.abs(samples).max()), 1e-9)  # a Python number keeps the samples' precision
    return samples * min(10 ** ((lufs - float(found)) / 20), 10 ** (PEAK_DBFS / 20) / loudest)
