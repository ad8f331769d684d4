"""Features of a pretrained speech model that the semantic codebooks may be asked to tell: an optional teacher.

Published models of `torchaudio.pipelines` (WavLM, HuBERT), whose weights are downloaded at the first use. Features are
brought to the codec's frames and kept on disk, so that a clip is computed once. Letters: N samples, T frames, D width.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchaudio.functional as AF
from torch import Tensor, nn
from tqdm import tqdm

from audio import FRAME_SAMPLES, SAMPLE_RATE
from checkpointing import write_atomically
from command_line import MissingRequirement

TEACHERS = ("WAVLM_BASE", "WAVLM_BASE_PLUS", "WAVLM_LARGE", "HUBERT_BASE", "HUBERT_LARGE")
TEACHER_RATE = 16_000  # Hz, of all of them
HOP = 320  # samples at that rate, 20 ms a feature
POOLED = 8  # features in the mean of a frame, which lasts 4: half a frame to each side is seen


def load_teacher(name: str) -> tuple[nn.Module, int]:
    """The pretrained model and the layer to read. MissingRequirement if its weights are not here and not to be had."""
    import torchaudio.pipelines

    try:
        model = getattr(torchaudio.pipelines, name).get_model()
    except OSError as error:
        raise MissingRequirement(
            f"teacher {name}: its weights cannot be downloaded ({error}); "
            "fetch them once on a machine with a network and copy its ~/.cache/torch/hub/checkpoints here"
        ) from error
    return model.eval().requires_grad_(False), 24 if name.endswith("LARGE") else 9


@torch.inference_mode()
def frame_features(model: nn.Module, layer: int, samples: Tensor) -> Tensor:
    """(N,) at 24 kHz -> (ceil(N / FRAME_SAMPLES), D): means of the layer's features around each codec frame."""
    n_frames = -(-len(samples) // FRAME_SAMPLES)
    wave = AF.resample(samples[None], SAMPLE_RATE, TEACHER_RATE)
    wave = F.pad(wave, (0, max(0, HOP * 4 * n_frames + HOP - wave.size(1))))
    features = model.extract_features(wave, num_layers=layer)[0][-1].transpose(1, 2)  # (1, D, about 4 T)
    return F.avg_pool1d(features, POOLED, 4, padding=POOLED // 4, count_include_pad=False)[0].T[:n_frames]


def teacher_features(
    clips: Sequence[np.ndarray],
    folder: Path,
    name: str,
    device: torch.device | str,
    model: nn.Module | None = None,
    layer: int = 0,
) -> list[np.ndarray]:
    """(T, D) float16 of each (N,) clip, from `folder` where they are, else computed on `device`; `model` for tests,
    else the published one."""
    paths = [folder / f"{name}-{hashlib.sha256(clip.tobytes()).hexdigest()[:32]}.npy" for clip in clips]
    missing = [(clip, path) for clip, path in zip(clips, paths, strict=True) if not path.is_file()]
    if missing and model is None:
        model, layer = load_teacher(name)
        model.to(device)
    folder.mkdir(parents=True, exist_ok=True)
    for clip, path in tqdm(missing, desc=f"features of {name}", unit="clip", disable=not missing):
        wave = torch.from_numpy(clip.astype(np.float32) / 32768).to(device)
        content = io.BytesIO()
        np.save(content, frame_features(model, layer, wave).half().cpu().numpy())
        write_atomically(path, content.getvalue())
    return [np.load(path) for path in paths]
