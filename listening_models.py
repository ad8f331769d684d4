"""Pretrained listeners behind flags: emotions (--ser), SQUIM (--squim) and phones (--phones). All download weights.

What they say is not validated here, as their weights cannot be shipped: see the metrics' definitions. Samples are
float32 (N,) at 24 kHz.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torchaudio.functional as AF

from audio import SAMPLE_RATE
from command_line import NEEDS_DEV, MissingRequirement, first_line
from speech_metrics import Metric, require_speech

RATE = 16000  # Hz, of all
SHORTEST_SECONDS = 0.5  # what is shorter is padded with silence: the networks need some frames

Unit = str | tuple[str, str]  # a phone, or two that are written as one
# ARPAbet -> how espeak writes it in American English, allophones of one phone together
IPA = {
    "AA": "ɑː ɑ", "AE": "æ", "AH": "ʌ ə ɐ", "AO": "ɔː ɔ", "AW": "aʊ", "AY": "aɪ", "B": "b", "CH": "tʃ", "D": "d",
    "DH": "ð", "EH": "ɛ e", "ER": "ɜː ɚ", "EY": "eɪ", "F": "f", "G": "ɡ g", "HH": "h", "IH": "ɪ ᵻ", "IY": "iː i",
    "JH": "dʒ", "K": "k", "L": "l ɫ", "M": "m", "N": "n", "NG": "ŋ", "OW": "oʊ əʊ", "OY": "ɔɪ", "P": "p", "R": "ɹ r",
    "S": "s", "SH": "ʃ", "T": "t ɾ", "TH": "θ", "UH": "ʊ", "UW": "uː u", "V": "v", "W": "w", "Y": "j", "Z": "z",
    "ZH": "ʒ",
}  # fmt: skip
# What it may write as one
JOINED = {
    ("AA", "R"): "ɑːɹ", ("AH", "L"): "əl", ("AO", "R"): "ɔːɹ oːɹ", ("AY", "ER"): "aɪɚ", ("EH", "R"): "ɛɹ",
    ("IH", "R"): "ɪɹ", ("UH", "R"): "ʊɹ",
}  # fmt: skip

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


@contextlib.contextmanager
def loading(flag: str, kind: str) -> Iterator[None]:
    """MissingRequirement, in one line, where a model of transformers cannot be had."""
    try:
        yield
    except ImportError as error:
        raise MissingRequirement(f"{flag} needs transformers: {NEEDS_DEV}") from error
    except Exception as error:  # hub, network and file errors come in many types
        raise MissingRequirement(
            f"{flag}: no {kind} to be had there ({first_line(error)}); give the folder of a downloaded one"
        ) from error


class EmotionRecognizer:
    """Probabilities of emotions, by any audio classifier of transformers: hub name or folder."""

    def __init__(self, name: str):
        with loading(f"--ser {name}", "audio classifier"):
            from transformers import AutoFeatureExtractor, AutoModelForAudioClassification

            self._features = AutoFeatureExtractor.from_pretrained(name)
            self._model = AutoModelForAudioClassification.from_pretrained(name, use_safetensors=True).eval()

    @torch.inference_mode()
    def probabilities(self, samples: np.ndarray) -> np.ndarray:
        """(N,) -> (classes,). NotMeasurable: silent."""
        given = self._features(at_rate(samples)[0].numpy(), sampling_rate=RATE, return_tensors="pt")
        return self._model(**given).logits[0].softmax(dim=0).numpy()

    def agreement(self, samples: np.ndarray, real: np.ndarray) -> float:
        """(N,), (M,) -> LISTENER_METRICS["emotion_agreement"]."""
        return float(np.minimum(self.probabilities(samples), self.probabilities(real)).sum())


class PhoneRecognizer:
    """How likely phones were said, by any CTC model of transformers that writes them as espeak does.

    Sesame transcribed its homographs with facebook/wav2vec2-lv-60-espeak-cv-ft.
    """

    def __init__(self, name: str):
        with loading(f"--phones {name}", "phoneme recogniser"):
            from transformers import AutoFeatureExtractor, AutoModelForCTC, AutoTokenizer

            self._features = AutoFeatureExtractor.from_pretrained(name)
            self._model = AutoModelForCTC.from_pretrained(name, use_safetensors=True).eval()
            tokenizer = AutoTokenizer.from_pretrained(name, do_phonemize=False)
        written, self._blank = tokenizer.get_vocab(), tokenizer.pad_token_id
        self._tokens = {
            phone: [written[ipa] for ipa in spelt.split() if ipa in written]
            for phone, spelt in {**IPA, **JOINED}.items()
        }
        if lacking := [phone for phone in IPA if not self._tokens[phone]]:
            raise MissingRequirement(f"--phones {name}: it writes no {', '.join(lacking)} as espeak does; give another")

    @torch.inference_mode()
    def likelihoods(self, samples: np.ndarray, readings: Sequence[Sequence[str]]) -> list[float]:
        """(N,), words of phones in ARPAbet -> nats of all of each reading, -inf where it is too long.

        Connectionist temporal classification (Graves et al. 2006, section 4.1) over phones instead of tokens.
        NotMeasurable: silent.
        """
        given = self._features(at_rate(samples)[0].numpy(), sampling_rate=RATE, return_tensors="pt")
        tokens = self._model(**given).logits[0].log_softmax(dim=-1)  # (T, tokens)
        return [-self._loss(tokens, words) for words in readings]

    def _loss(self, tokens: torch.Tensor, words: Sequence[str]) -> float:
        """(T, tokens) -> nats; every pair that may be written as one is taken in the likelier of its two spellings."""
        units: list[Unit] = [phone for word in words for phone in word.split()]
        ends = set(itertools.accumulate(len(word.split()) for word in words))
        found = self._loss_of(tokens, units)
        for place in reversed(range(len(units) - 1)):
            pair = (units[place], units[place + 1])
            if place + 1 not in ends and self._tokens.get(pair):
                joined = [*units[:place], pair, *units[place + 2 :]]
                loss = self._loss_of(tokens, joined)
                if loss < found:
                    units, found = joined, loss
        return found

    def _loss_of(self, tokens: torch.Tensor, units: Sequence[Unit]) -> float:
        """(T, tokens) -> nats of all paths that write these units."""
        places = {unit: place for place, unit in enumerate(dict.fromkeys(units), start=1)}
        columns = [tokens[:, self._blank], *(tokens[:, self._tokens[unit]].logsumexp(dim=-1) for unit in places)]
        targets = torch.tensor([[places[unit] for unit in units]])
        lengths = torch.tensor([len(tokens)]), torch.tensor([len(units)])
        loss = torch.nn.functional.ctc_loss(torch.stack(columns, dim=1)[:, None], targets, *lengths, reduction="sum")
        return float(loss) if math.isfinite(loss) else math.inf


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
