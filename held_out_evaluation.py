"""What a tokenizer and a speech model do on held-out clips: the two parts of the report of `evaluation_framework.py`.

The metrics themselves: `speech_metrics.py`, and of conversations `heard_conversations.py`. Dims: N samples at 24 kHz,
T frames, K codebooks.
"""

from __future__ import annotations

import dataclasses
import itertools
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from architecture import CSM, count_targets, pick_depth_rows
from audio import SAMPLE_RATE
from audio_tokenizer import AudioTokenizer
from codec_gates import Coded, codebook_use
from command_line import MissingRequirement
from conversations import Conversation
from dataset_pipeline import ConversationDataset
from evaluation_report import FULL, GENERATED, ORIGINAL, REAL, SEMANTIC, save_audio
from generation import Reply, Sampling
from heard_conversations import LEFT_OUT, MEASURES, Ears, Heard, Human, Turn, Turns, packages_missing
from inference_model import InferenceModel
from run_folder import read_metrics
from speech_metrics import (
    Figure,
    Item,
    NotMeasurable,
    Recognizer,
    Tally,
    bootstrap,
    count_errors,
    distill_mos,
    require_english,
)
from spoken_validation import Tools, hear_codes, mean_cosine, run_away_after, speak_after, spread, time_reply
from training import batch_losses
from turn_shards import TurnRecord, is_named

PLAYERS = 12  # clips that the page offers to listen to
CONTEXT_TURNS = 4  # that a generated turn hears before it
CONVERSED = (  # metrics of conversations that the report has of the model's turns and of the real ones
    "pitch_spread", "level_spread", "rate", "pause_share", "pitch_contour", "prosody_distance", "emotional_coherence",
    "dnsmos", "distill_mos",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the figures depend on besides data and weights."""

    max_clips: int = 24  # held-out clips that are reconstructed and listened to
    max_replies: int = 8  # held-out turns that the model speaks
    codebooks: int | None = None  # that it speaks with; None: all
    temperature: float = Sampling.temperature  # of the codes it draws; 0: always the likeliest
    asr: str = "bundled"
    seed: int = 0  # of the choice of clips, of sampling and of the bootstrap

    def __post_init__(self) -> None:
        for name in ("max_clips", "max_replies"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        self.sampling()

    def sampling(self) -> Sampling:
        """How the model speaks. ValueError for what cannot work."""
        return Sampling(codebooks=self.codebooks, temperature=self.temperature)


def plain(figures: dict[str, dict[str, Figure]]) -> dict[str, dict[str, dict]]:
    """Figures as values for JSON."""
    return {
        metric: {system: dataclasses.asdict(figure) for system, figure in systems.items()}
        for metric, systems in figures.items()
    }


# ---- tokenizer -------------------------------------------------------------------------------------------------------

Clip = tuple[TurnRecord, np.ndarray]


def conversation_of(turn: TurnRecord) -> str:
    """The unit of the bootstrap."""
    return f"{turn.source}/{turn.conv_key}"


def depths(tokenizer: AudioTokenizer) -> list[int]:
    """Prefixes of the codebooks that the depth curve measures; the semantic stack and the whole are among them."""
    K, S = tokenizer.config.n_codebooks, tokenizer.config.n_semantic
    return sorted({k for k in (1, 4, S, S + 1, S + 6, K) if k <= K})


def evaluate_tokenizer(
    clips: list[Clip],
    more_clips: list[Clip],
    tokenizer: AudioTokenizer,
    tools: Tools,
    settings: Settings,
    audio: Path | None,
) -> dict:
    """Everything that needs no speech model. Writes the audio of the first clips to `audio`, if given."""
    begin = time.perf_counter()
    K, S = tokenizer.config.n_codebooks, tokenizer.config.n_semantic
    tally, by_depth = Tally(), Tally()
    waves: list[dict[str, np.ndarray]] = []
    rows: list[dict] = []
    for index, (turn, samples) in enumerate(tqdm(clips, desc="reconstructing", unit="clip")):
        copies = tokenizer.copies(samples, depths(tokenizer))
        waves.append({ORIGINAL: samples, FULL: copies[K], SEMANTIC: copies[S]})
        for k, copy in copies.items():
            for metric, measure in tools.paired.items():
                by_depth.add(metric, str(k), conversation_of(turn), measure, samples, copy)
        if "distill_mos" not in tools.missing:
            for system, wave in waves[-1].items():
                tally.add("distill_mos", system, conversation_of(turn), distill_mos, wave)
        row = {"id": turn.utt_id, "speaker": turn.speaker_id, "style": turn.style, "text": turn.text}
        row["language"] = turn.lang
        rows.append({**row, "seconds": len(samples) / SAMPLE_RATE})
        if audio is not None and index < PLAYERS:
            rows[-1]["audio"] = save_audio(audio, f"clip-{index:02d}", waves[-1])
    conversations = [conversation_of(turn) for turn, _ in clips]
    if tools.recognizer is not None:
        listen(tools.recognizer, tally, conversations, rows, waves)
    same_speaker = None
    if tools.encoder is not None:
        same_speaker = compare_speakers(tools, tally, conversations, [turn.speaker_id for turn, _ in clips], waves)
    curve = plain(by_depth.figures(settings.seed))
    copies = {metric: {FULL: figure[str(K)], SEMANTIC: figure[str(S)]} for metric, figure in curve.items()}
    return {
        "codebooks": K,
        "semantic_codebooks": S,
        "bits_per_second": tokenizer.config.bits_per_second(),
        "figures": {**copies, **plain(tally.figures(settings.seed))},
        "same_speaker": same_speaker,
        "depth": curve,
        "use": codebook_use(encode_clips(more_clips, tokenizer), tokenizer.config.codebook_size),
        "clips": rows,
        "seconds": time.perf_counter() - begin,
    }


def listen(
    recognizer: Recognizer, tally: Tally, conversations: list[str], rows: list[dict], waves: list[dict[str, np.ndarray]]
) -> None:
    """Word and character errors of every system of every clip; transcripts go into `rows`."""
    for conversation, row, systems in zip(conversations, tqdm(rows, desc="listening", unit="clip"), waves, strict=True):
        try:
            require_english(row["language"])
            row["transcripts"] = {system: recognizer.transcribe(wave) for system, wave in systems.items()}
            errors = {system: count_errors(row["text"], heard) for system, heard in row["transcripts"].items()}
        except NotMeasurable as reason:
            for system in systems:
                tally.exclude_errors(system, str(reason))
                if system != ORIGINAL and ORIGINAL in systems:
                    tally.excluded["wer_change", system][str(reason)] += 1
            continue
        row["wer"] = {system: counts.wrong / counts.words for system, counts in errors.items()}
        for system, counts in errors.items():
            tally.add_errors(system, conversation, counts)
            if system != ORIGINAL and ORIGINAL in errors:
                change = counts.wrong - errors[ORIGINAL].wrong
                tally.items["wer_change", system].append(Item(conversation, change, counts.words))


def compare_speakers(
    tools: Tools, tally: Tally, conversations: list[str], speakers: list[str], waves: list[dict[str, np.ndarray]]
) -> float | None:
    """Each copy against its original, and the two baselines that the number is read between.

    Speakers without a name may be many, and are no one's other clips. Returns the median cosine of two originals of a
    speaker; None if no speaker has two.
    """
    voices = [
        {system: tools.embed(wave) for system, wave in systems.items()}
        for systems in tqdm(waves, desc="comparing speakers", unit="clip")
    ]
    originals = [(speaker, v[ORIGINAL]) for speaker, v in zip(speakers, voices, strict=True)]
    named = [j for j, speaker in enumerate(speakers) if is_named(speaker)]
    for i, (own, conversation) in enumerate(zip(voices, conversations, strict=True)):
        rest = [originals[j] for j in named if j != i] if i in named else []
        same = [voice for speaker, voice in rest if speaker == speakers[i]]
        other = [voice for speaker, voice in rest if speaker != speakers[i]]
        pairs = {
            f"{FULL} to its original": (FULL, [own[ORIGINAL]]),
            f"{FULL} to the speaker's other clips": (FULL, same),
            f"{SEMANTIC} to its original": (SEMANTIC, [own[ORIGINAL]]),
            "baseline: original to the speaker's other clips": (ORIGINAL, same),
            "baseline: original to other speakers": (ORIGINAL, other),
        }
        for name, (system, others) in pairs.items():
            tally.add("speaker_similarity", name, conversation, mean_cosine, own[system], others)
    heard = [originals[j] for j in named if not isinstance(originals[j][1], NotMeasurable)]
    cosines = [float(a @ b) for (one, a), (other, b) in itertools.combinations(heard, 2) if one == other]
    return float(np.median(cosines)) if cosines else None


@torch.inference_mode()
def encode_clips(clips: list[Clip], tokenizer: AudioTokenizer) -> list[Coded]:
    """Clips with their codes, for counts of codes and for the gates."""
    coded = []
    for turn, samples in tqdm(clips, desc="encoding", unit="clip"):
        codes = tokenizer.encode(torch.from_numpy(np.ascontiguousarray(samples))[None])[0].cpu().numpy()  # (T, K)
        coded.append(Coded(conversation_of(turn), turn.speaker_id, turn.text, samples, codes, turn.lang))
    return coded


# ---- speech model ----------------------------------------------------------------------------------------------------


def held_out_losses(
    model: CSM, dataset: ConversationDataset, limit: int, device: torch.device, seed: int
) -> list[Figure]:
    """K figures, nats per code of codebook 0..K-1, over up to `limit` documents, interval over conversations."""
    samples = dataset.samples()
    samples = random.Random(seed).sample(samples, min(limit, len(samples)))
    items: list[list[Item]] = [[] for _ in range(model.config.n_codebooks)]
    for sample in tqdm(samples, desc="held-out losses", unit="document"):
        batch = dataset.collate([[sample]], seeds=None)
        depth_rows = pick_depth_rows(batch.targets, 1.0, torch.Generator())
        with torch.inference_mode():
            found = batch_losses(model, batch, depth_rows, device)
        targets = count_targets(batch, depth_rows)
        sums, counts = ([float(terms.codebook0), *terms.depth.tolist()] for terms in (found, targets))
        if not np.isfinite(sums).all():
            raise ValueError(f"the model's loss is not finite ({sums[0]} for codebook 0); its weights are broken")
        name = conversation_of(dataset.conversations[sample.conversation].turns[0])
        for own, nats, count in zip(items, sums, counts, strict=True):
            own.append(Item(name, nats, count))
    return [dataclasses.replace(bootstrap(own, seed=seed), n=int(sum(i.weight for i in own))) for own in items]


def choose_replies(conversations: list[Conversation], limit: int, seed: int) -> list[tuple[Conversation, int]]:
    """Turns to speak, spread over the conversations: those whose speaker was heard in the turns before, if any."""
    queues = []
    for conversation in random.Random(seed).sample(conversations, len(conversations)):  # else one source comes first
        speakers = conversation.speakers
        heard = [i for i in range(len(speakers)) if speakers[i] in speakers[max(0, i - CONTEXT_TURNS) : i]]
        random.Random(f"{seed}-{conversation.conv_id}").shuffle(heard)
        queues.append([(conversation, i) for i in heard or range(len(speakers))])
    return list(itertools.islice(spread(queues), limit))


def speak(
    model: CSM | InferenceModel,
    tokenizer: AudioTokenizer,
    dataset: ConversationDataset,
    conversation: Conversation,
    index: int,
    sampling: Sampling,
    seed: int,
) -> Reply:
    """The model's version of one turn, after the real turns before it."""
    turns = list(zip(conversation.speakers, conversation.turns, strict=True))
    before = turns[max(0, index - CONTEXT_TURNS) : index]
    context = [(speaker, turn.text, dataset.cache.codes[turn.utt_id]) for speaker, turn in before]
    speaker, turn = turns[index]
    return speak_after(model, tokenizer, dataset.text_tokenizer, context, speaker, turn.text, sampling, seed)


def evaluate_model(
    model: CSM, tokenizer: AudioTokenizer, dataset: ConversationDataset, tools: Tools, settings: Settings, audio: Path
) -> dict:
    """Losses, and what the model says when it runs freely, beside the real turns through the same tokenizer."""
    begin = time.perf_counter()
    device = next(model.parameters()).device
    tokenizer = tokenizer.to(device)
    losses = held_out_losses(model, dataset, settings.max_clips, device, settings.seed)
    choices = choose_replies(dataset.conversations, settings.max_replies, settings.seed)
    inference = InferenceModel(model)
    tally, waves, rows = Tally(), [], []
    voices: list[dict[str, np.ndarray]] = []  # what each reply is compared with
    for number, (conversation, index) in enumerate(tqdm(choices, desc="speaking", unit="turn")):
        turn, speaker = conversation.turns[index], conversation.speakers[index]
        sampling = dataclasses.replace(settings.sampling(), max_seconds=run_away_after(turn))
        reply = speak(inference, tokenizer, dataset, conversation, index, sampling, settings.seed + number)
        before = range(max(0, index - CONTEXT_TURNS), index)
        codes = {i: dataset.cache.codes[conversation.turns[i].utt_id] for i in (*before, index)}
        own = hear_codes(tokenizer, [codes[i] for i in before if conversation.speakers[i] == speaker])
        others = hear_codes(tokenizer, [codes[i] for i in before if conversation.speakers[i] != speaker])
        real = hear_codes(tokenizer, [codes[index][:, : settings.codebooks]])
        waves.append({GENERATED: reply.samples, REAL: real})
        voices.append({"own": own, "others": others})
        time_reply(tally, GENERATED, conversation_of(turn), reply)
        row = {"id": turn.utt_id, "speaker": turn.speaker_id, "text": turn.text, "seconds": reply.duration}
        row["language"] = turn.lang
        paths = save_audio(audio, f"reply-{number:02d}", {**waves[-1], "prompt, the speaker's turns before": own})
        rows.append({**row, "ended": reply.ended, "audio": paths})
    conversations = [conversation_of(conversation.turns[0]) for conversation, _ in choices]
    if tools.recognizer is not None:
        listen(tools.recognizer, tally, conversations, rows, waves)
    if tools.encoder is not None:
        compare_replies(tools, tally, conversations, waves, voices)
    hear_conversations(tally, choices, waves)
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "codes": model.config.codebook_size,
        "losses": [dataclasses.asdict(figure) for figure in losses],
        "figures": plain(tally.figures(settings.seed)),
        "replies": rows,
        "device": device.type,
        "seconds": time.perf_counter() - begin,
    }


def conversation_metrics_missing() -> dict[str, str]:
    """Metrics of `CONVERSED` that cannot be had here, and what to install."""
    try:
        missing = packages_missing()
    except MissingRequirement as reason:
        return dict.fromkeys(CONVERSED, str(reason))
    return {metric: missing[metric] for metric in CONVERSED if metric in missing}


def hear_conversations(
    tally: Tally, choices: Sequence[tuple[Conversation, int]], waves: Sequence[dict[str, np.ndarray]]
) -> None:
    """`CONVERSED` of the generated and of the real turns, conversation by conversation."""
    missing = conversation_metrics_missing()
    turns: dict[str, dict[str, Turns]] = {GENERATED: {}, REAL: {}}  # system -> conversation -> its chosen turns
    order = sorted(range(len(choices)), key=lambda i: choices[i][1])
    for system, found in turns.items():
        for conversation, index, samples in ((*choices[i], waves[i][system]) for i in order):
            turn = conversation.turns[index]
            found.setdefault(conversation_of(turn), []).append(Turn(turn.speaker_id, turn.text, samples, None))
    wanted = [metric for metric in CONVERSED if metric not in missing]
    human = Human.of(turns[REAL]) if wanted else Human({}, {})
    for name in tqdm(turns[REAL], desc="prosody", unit="conversation", disable=not wanted):
        for system, found in turns.items():
            heard = Heard(name, found[name], turns[REAL][name], human, Ears())
            for metric in wanted:
                heard.left_out.clear()
                if tally.add(metric, system, name, MEASURES[metric], heard):
                    without = {LEFT_OUT + reason: turns for reason, turns in heard.left_out.items()}
                    tally.excluded[metric, system].update(without)


def compare_replies(
    tools: Tools,
    tally: Tally,
    conversations: list[str],
    waves: list[dict[str, np.ndarray]],
    voices: list[dict[str, np.ndarray]],
) -> None:
    """Generated and real turns against what the speaker, and the other one, said before; all through the tokenizer."""
    for conversation, systems, prompts in zip(conversations, waves, voices, strict=True):
        own, others = tools.embed(prompts["own"]), tools.embed(prompts["others"])
        spoken = {system: tools.embed(wave) for system, wave in systems.items()}
        pairs = {
            f"{GENERATED} to its speaker's turns before": (GENERATED, own),
            f"{GENERATED} to the other speaker's turns before": (GENERATED, others),
            "baseline: real turn to its speaker's turns before": (REAL, own),
            "baseline: real turn to the other speaker's turns before": (REAL, others),
        }
        for name, (system, voice) in pairs.items():
            tally.add("speaker_similarity", name, conversation, mean_cosine, spoken[system], [voice])


def steps_of(checkpoint: Path) -> int | None:
    """How long the run in this folder trained, if it says so."""
    logged = read_metrics(checkpoint)
    return logged[-1]["step"] + 1 if logged else None
