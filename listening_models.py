"""Pretrained listeners behind flags: speech emotion recognition (--ser) and SQUIM (--squim). Both download weights.

What they say is not validated here, as their weights cannot be shipped: see the metrics' definitions. Samples are
float32 (N,) at 24 kHz.
"""

from __future__ import annotations

import numpy as np
import torch
import torchaudio.functional as AF

from audio import SAMPLE_RATE
from command_line import MissingRequirement
from speech_metrics import Metric, require_speech

RATE = 16000  # Hz, of both
SHORTEST_SECONDS = 0.5  # what is shorter is padded with silence: the networks need some frames

LISTENER_METRICS = {
    "emotion_agreement": Metric(
        title="Emotion agreement",
        unit="share of probability",
        better="higher",
        definition="Overlap of the probabilities that a speech emotion recogniser (--ser) gives to its classes for a "
        "turn and for the real turn in the same place, which is what the context called for.",
        reference="1 identity; two real turns of one conversation for what chance gives. Such recognisers hear words "
        "and speakers too (arXiv 2604.26347): read it beside emotional coherence",
        source="the recogniser's own",
        needs=("transformers",),
    ),
    "squim_pesq": Metric(
        title="SQUIM PESQ",
        unit="MOS-LQO, 1 to 4.6",
        better="higher",
        definition="PESQ that a network predicts without a reference (--squim), 16 kHz.",
        reference="3 and more clean speech",
        source="Kumar et al., arXiv 2304.01448; torchaudio.pipelines.SQUIM_OBJECTIVE",
    ),
    "squim_stoi": Metric(
        title="SQUIM STOI",
        unit="0 to 1",
        better="higher",
        definition="STOI that a network predicts without a reference (--squim), 16 kHz.",
        reference="0.9 and more clean speech",
        source="as SQUIM PESQ",
    ),
}


def at_rate(samples: np.ndarray) -> torch.Tensor:
    """(N,) -> (1, M) at 16 kHz. NotMeasurable: silent."""
    wave = AF.resample(torch.from_numpy(require_speech(samples))[None], SAMPLE_RATE, RATE)
    return torch.nn.functional.pad(wave, (0, max(0, int(SHORTEST_SECONDS * RATE) - wave.size(1))))


class EmotionRecognizer:
    """Probabilities of emotions, by any audio classifier of transformers: hub name or folder."""

    def __init__(self, name: str):
        try:
            from transformers import AutoFeatureExtractor, AutoModelForAudioClassification
        except ImportError as error:
            raise MissingRequirement("--ser needs transformers: pip install transformers") from error
        try:
            self._features = AutoFeatureExtractor.from_pretrained(name)
            self._model = AutoModelForAudioClassification.from_pretrained(name, use_safetensors=True).eval()
        except Exception as error:  # hub, network and file errors come in many types
            raise MissingRequirement(
                f"--ser {name}: no audio classifier to be had there ({str(error).splitlines()[0]}); "
                "give the folder of a downloaded one"
            ) from error

    @torch.inference_mode()
    def probabilities(self, samples: np.ndarray) -> np.ndarray:
        """(N,) -> (classes,). NotMeasurable: silent."""
        given = self._features(at_rate(samples)[0].numpy(), sampling_rate=RATE, return_tensors="pt")
        return self._model(**given).logits[0].softmax(dim=0).numpy()

    def agreement(self, samples: np.ndarray, real: np.ndarray) -> float:
        """(N,), (M,) -> LISTENER_METRICS["emotion_agreement"]."""
        return float(np.minimum(self.probabilities(samples), self.probabilities(real)).sum())


class Squim:
    """STOI and PESQ without a reference."""

    def __init__(self):
        import torchaudio.pipelines

        try:
            self._model = torchaudio.pipelines.SQUIM_OBJECTIVE.get_model().eval()
        except OSError as error:
            raise MissingRequirement(
                f"--squim: its weights cannot be downloaded ({error}); "
                "fetch them once on a machine with a network and copy its ~/.cache/torch/hub/torchaudio here"
            ) from error

    @torch.inference_mode()
    def stoi_pesq(self, samples: np.ndarray) -> tuple[float, float]:
        """(N,) -> STOI, PESQ. NotMeasurable: silent."""
        stoi, pesq, _ = self._model(at_rate(samples))
        return float(stoi), float(pesq)
