"""What a listener would hear of held-out texts that a speech model speaks freely; measured at intervals of a training.

A low teacher-forced loss does not prove intelligible speech, so `SpokenValidation` lets the model speak the same few
texts again and again and writes down what a recogniser hears. What the evaluation does in the same way is here too:
choosing turns, speaking after others, hearing codes. Knows nothing of batches, losses or reports.
"""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import random
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import torch

from architecture import CSM
from audio_tokenizer import AudioTokenizer
from command_line import MissingRequirement
from conversations import split_of
from generation import Conversation, Reply, Sampling
from inference_model import InferenceModel
from speech_metrics import (
    EVALUATION_PACKAGES,
    METRICS,
    Figure,
    Item,
    NotMeasurable,
    Recognizer,
    SpeakerEncoder,
    Tally,
    count_errors,
    log_mel_distance,
    normalise,
    pesq_wb,
    stoi,
)
from text_tokenizer import TextTokenizer
from token_cache import TokenCache
from turn_shards import TurnRecord, read_turns

FEWEST_WORDS = 3  # of a text to speak; a recogniser guesses single words
EMPTY_SECONDS = 0.1  # a turn with less audio says nothing
CLIPS = 4  # that are kept to listen to
SPOKEN = "spoken"
Choice = TypeVar("Choice")
PAIRED = {"log_mel_l1": log_mel_distance, "stoi": stoi, "pesq_wb": pesq_wb}


# ---- tools -----------------------------------------------------------------------------------------------------------


class Tools:
    """The metrics that can be had here; `missing` says what to install for the others."""

    def __init__(self, asr: str):
        self.missing: dict[str, str] = {}
        for metric in (*PAIRED, "wer", "speaker_similarity", "distill_mos"):
            absent = [name for name in METRICS[metric].needs if not _imports(name)]
            if absent:
                self.missing[metric] = f"{', '.join(absent)} not installed: {EVALUATION_PACKAGES}"
        self.recognizer = None if "wer" in self.missing else Recognizer(asr)
        self.encoder = None if "speaker_similarity" in self.missing else SpeakerEncoder()
        self.paired = {name: measure for name, measure in PAIRED.items() if name not in self.missing}

    def embed(self, samples: np.ndarray) -> np.ndarray | NotMeasurable:
        """The embedding, or the reason why there is none."""
        if not len(samples):
            return NotMeasurable("no clip to compare with")
        try:
            return self.encoder.embed(samples)
        except NotMeasurable as reason:
            return reason


def _imports(name: str) -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            importlib.import_module(name)
        except ImportError:
            return False
    return True


def mean_cosine(voice: np.ndarray | NotMeasurable, others: Sequence[np.ndarray | NotMeasurable]) -> float:
    """Mean cosine of an embedding to others. NotMeasurable: it is missing itself, or there is none to compare with."""
    if isinstance(voice, NotMeasurable):
        raise voice
    present = [other for other in others if not isinstance(other, NotMeasurable)]
    if not present:
        raise NotMeasurable("no clip to compare with")
    return float(np.mean([voice @ other for other in present]))


def time_reply(tally: Tally, system: str, conversation: str, reply: Reply) -> None:
    """How long a reply took and whether it ended; an empty one is counted as excluded."""
    tally.items["ended", system].append(Item(conversation, float(reply.ended)))
    if not len(reply.samples):
        for metric in ("real_time_factor", "first_audio"):
            tally.excluded[metric, system]["empty reply"] += 1
        return
    tally.items["real_time_factor", system].append(Item(conversation, reply.seconds, reply.duration))
    tally.items["first_audio", system].append(Item(conversation, reply.seconds_to_first_audio))


# ---- turns to speak --------------------------------------------------------------------------------------------------


def spread(queues: Iterable[Sequence[Choice]]) -> Iterator[Choice]:
    """The first of every queue, then the second of every queue that has one, and so on."""
    rounds = itertools.chain.from_iterable(itertools.zip_longest(*queues))
    return (choice for choice in rounds if choice is not None)


def speak_after(
    model: CSM | InferenceModel,
    tokenizer: AudioTokenizer,
    text_tokenizer: TextTokenizer,
    before: Sequence[tuple[int, str, np.ndarray]],
    speaker: int,
    text: str,
    sampling: Sampling,
    seed: int,
) -> Reply:
    """`text` as the model speaks it after turns of others or its own: (speaker, text, (T, K) codes) each."""
    conversation = Conversation(model, tokenizer, text_tokenizer, sampling=sampling, seed=seed)
    for other_speaker, other_text, codes in before:
        conversation.add_turn(other_speaker, other_text, codes=torch.from_numpy(codes.astype(np.int64)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an empty reply is a result here
        return conversation.speak(speaker, text)


@torch.inference_mode()
def hear_codes(tokenizer: AudioTokenizer, parts: Sequence[np.ndarray]) -> np.ndarray:
    """(T, K) codes of some turns -> their audio one after the other, (N,); empty for no turns."""
    waves = [tokenizer.decode(torch.from_numpy(part.astype(np.int64))[None])[0].cpu().numpy() for part in parts]
    return np.concatenate(waves) if waves else np.zeros(0, np.float32)


# ---- validation ------------------------------------------------------------------------------------------------------


class Prompted(NamedTuple):
    """A held-out turn to speak, and another one of its speaker that the model hears before it."""

    turn: TurnRecord
    prompt: TurnRecord


def run_away_after(turn: TurnRecord) -> float:
    """Seconds at which the model's version of a turn is cut: it has run away."""
    return 2 + 2 * turn.duration_s


def choose_prompted(turns: Iterable[TurnRecord], n_texts: int, seed: int, max_seconds: float) -> list[Prompted]:
    """Up to `n_texts` turns of different texts, in English, spread over the speakers, up to `max_seconds` long.

    The prompt is the longest of the speaker's earlier turns in the conversation, else of all others of the speaker.
    """
    of_speaker: dict[tuple[str, str], list[TurnRecord]] = defaultdict(list)
    for turn in turns:
        if turn.duration_s <= max_seconds and turn.lang.startswith("en"):
            of_speaker[turn.source, turn.speaker_id].append(turn)
    order = random.Random(seed)
    queues = [order.sample(own, len(own)) for own in of_speaker.values()]
    order.shuffle(queues)
    chosen: dict[str, Prompted] = {}
    for turn in spread(queues):
        others = [other for other in of_speaker[turn.source, turn.speaker_id] if other.utt_id != turn.utt_id]
        earlier = [o for o in others if o.conv_key == turn.conv_key and o.turn_index < turn.turn_index]
        prompt = max(earlier or others, key=lambda other: other.duration_s, default=None)
        if prompt is not None and turn.text not in chosen and len(normalise(turn.text).split()) >= FEWEST_WORDS:
            chosen[turn.text] = Prompted(turn, prompt)
        if len(chosen) == n_texts:
            break
    return list(chosen.values())


def error_rates(texts: Sequence[str], heard: Sequence[str], seed: int) -> dict[str, Figure]:
    """wer, cer and their like of all texts together, with intervals over texts. ValueError: one has no words."""
    tally = Tally()
    for number, (text, transcript) in enumerate(zip(texts, heard, strict=True)):
        tally.add_errors(SPOKEN, str(number), count_errors(text, transcript))
    return {metric: systems[SPOKEN] for metric, systems in tally.figures(seed).items()}


def spoken_values(
    texts: Sequence[str],
    heard: Sequence[str],
    replies: Sequence[Reply],
    voices: Sequence[tuple[np.ndarray | NotMeasurable, np.ndarray | NotMeasurable]] = (),
    seed: int = 0,
) -> dict[str, float]:
    """What was to be said, what was heard, the replies, and the voices of replies and prompts -> values for the log.

    A value that cannot be had is left out: the interval of a single text, the speed of silence, the similarity where no
    reply and its prompt both hold enough speech. ValueError: one of the texts has no words.
    """
    errors, tally = error_rates(texts, heard, seed), Tally()
    by_chance = error_rates(texts, [*heard[1:], heard[0]], seed) if len(texts) > 1 else None
    for reply in replies:
        time_reply(tally, SPOKEN, "", reply)
    for own, prompt in voices:
        tally.add("speaker_similarity", SPOKEN, "", mean_cosine, own, [prompt])
    means = {metric: systems[SPOKEN].value for metric, systems in tally.figures(seed).items()}
    values = {
        "spoken/wer": errors["wer"].value,
        "spoken/wer_low": errors["wer"].low,
        "spoken/wer_high": errors["wer"].high,
        "spoken/cer": errors["cer"].value,
        "spoken/cer_by_chance": by_chance and by_chance["cer"].value,
        "spoken/run_away": 1 - means["ended"],
        "spoken/empty": sum(reply.duration < EMPTY_SECONDS for reply in replies) / len(replies),
        "spoken/similarity": means.get("speaker_similarity"),
        "spoken/seconds_per_second": means["real_time_factor"],
    }
    return {name: value for name, value in values.items() if value is not None}


class Spoken(NamedTuple):
    """One measurement."""

    values: dict[str, float]  # by their names in the log
    clips: list[tuple[str, np.ndarray]]  # text, (N,) samples at 24 kHz; the first few turns, without empty ones
    lines: list[str]  # "text -> heard", of all


class SpokenValidation:
    """The held-out turns that are spoken, and what they are measured with; both stay the same for the whole training.

    MissingRequirement: no recogniser. ValueError: the split holds nothing to speak. The tokenizer stays on its device.
    """

    def __init__(
        self,
        data_dir: Path,
        split: str,
        tokenizer: AudioTokenizer,
        text_tokenizer: TextTokenizer,
        n_texts: int = 8,
        seed: int = 0,
        sampling: Sampling | None = None,  # its `codebooks` are heard of recorded turns too
        asr: str = "bundled",
        max_seconds: float = 10.0,  # longer recorded turns are not chosen
    ):
        if n_texts < 1:
            raise ValueError(f"n_texts={n_texts} must be at least 1")
        sampling = sampling or Sampling()
        codebooks = sampling.codebooks
        if codebooks is not None and codebooks > tokenizer.config.n_codebooks:
            raise ValueError(f"codebooks={codebooks} must be at most the tokenizer's {tokenizer.config.n_codebooks}")
        self.tokenizer, self.text_tokenizer, self.seed, self.sampling = tokenizer, text_tokenizer, seed, sampling
        with torch.random.fork_rng(devices=[]):  # the speaker encoder draws weights before it loads its own
            self.tools = Tools(asr)
        if self.tools.recognizer is None:
            raise MissingRequirement(f"speech cannot be validated: {self.tools.missing['wer']}")
        cache = TokenCache(data_dir, tokenizer)
        turns = (turn for turn in read_turns(data_dir, False, cache.entries) if split_of(turn.split_group) == split)
        self.chosen = choose_prompted(turns, n_texts, seed, max_seconds)
        if not self.chosen:
            raise ValueError(
                f"{data_dir} has no English turn in split {split!r} with {FEWEST_WORDS} words or more, up to "
                f"{max_seconds} s and another turn of its speaker; collect more with collect_data.py"
            )
        self.texts = [turn.text for turn, _ in self.chosen]
        self.prompts = [(0, prompt.text, cache.codes[prompt.utt_id]) for _, prompt in self.chosen]
        self.prompt_voices = self._voices([hear_codes(tokenizer, [codes]) for _, _, codes in self.prompts])
        recorded = [hear_codes(tokenizer, [cache.codes[turn.utt_id][:, :codebooks]]) for turn, _ in self.chosen]
        self.wer_recorded = error_rates(self.texts, self._transcripts(recorded), seed)["wer"].value

    def measure(self, model: CSM) -> Spoken:
        """Let the model speak the texts. The same weights say the same; random state and mode are left as they were.

        `values`: spoken/wer with its 95 % interval over texts (wer_low, wer_high), the character error rate (cer) and
        that of what was heard against the text of another turn (cer_by_chance), the share of turns that run_away
        (cut at 2 s and twice the recorded turn) or are empty, the similarity of voice and prompt (mean cosine),
        seconds_per_second of audio, and wer_recorded, the rate of the recorded turns through as many codebooks.
        """
        was_training = model.training
        model.eval()
        try:
            inference = InferenceModel(model)
            replies = [
                speak_after(
                    inference,
                    self.tokenizer,
                    self.text_tokenizer,
                    [before],
                    0,
                    turn.text,
                    dataclasses.replace(self.sampling, max_seconds=run_away_after(turn)),
                    self.seed + number,
                )
                for number, ((turn, _), before) in enumerate(zip(self.chosen, self.prompts, strict=True))
            ]
        finally:
            model.train(was_training)
        waves = [reply.samples for reply in replies]
        heard = self._transcripts(waves)
        voices = list(zip(self._voices(waves), self.prompt_voices, strict=True))
        values = spoken_values(self.texts, heard, replies, voices, self.seed)
        named = zip(self.texts[:CLIPS], waves, strict=False)
        return Spoken(
            values=values | {"spoken/wer_recorded": self.wer_recorded},
            clips=[(text, samples) for text, samples in named if len(samples)],
            lines=[f"{text} -> {transcript}" for text, transcript in zip(self.texts, heard, strict=True)],
        )

    def _transcripts(self, waves: list[np.ndarray]) -> list[str]:
        return [self.tools.recognizer.transcribe(samples) for samples in waves]

    def _voices(self, waves: list[np.ndarray]) -> list[np.ndarray | NotMeasurable]:
        """Embeddings, or none at all without an encoder."""
        return [] if self.tools.encoder is None else [self.tools.embed(samples) for samples in waves]
