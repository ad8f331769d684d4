"""From collected turns to conversations: splits, grouping, loudness.

Knows nothing of tokens or batches.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
import random
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from audio import PEAK_DBFS, TARGET_LUFS, read_audio
from checkpointing import write_atomically
from turn_shards import TurnRecord, composed, read_turns

SPLITS = ("train", "val", "test")
VOICE_SETS = ("common_voice",)  # sources whose conversations are sentences without connection
PSEUDO = 0.2  # share of the voice sets of the training split that are joined into pseudo-dialogues

CLIP_SECONDS = 5.0  # of a clip that shows a voice, if there is one


def share_of(name: str) -> float:
    """A number in [0, 1) that is the same for a name for ever, and evenly spread over names."""
    return int(hashlib.sha1(name.encode()).hexdigest()[:8], 16) / 16**8


def split_of(split_group: str, seed: int = 0) -> str:
    """'train', 'val' or 'test' (80 / 10 / 10 %) by a hash, so that later collections never move a group."""
    share = share_of(f"{seed}:{split_group}")
    return "train" if share < 0.8 else "val" if share < 0.9 else "test"


def loudness_gains(turns: Iterable[TurnRecord]) -> dict[str, float]:
    """utt_id -> factor to -23 LUFS. One factor per conversation and speaker: a whisper stays softer than a shout."""
    groups: dict[tuple[str, str], list[TurnRecord]] = defaultdict(list)
    for turn in turns:
        groups[turn.conv_key, turn.speaker_id].append(turn)
    gains = {}
    for group in groups.values():
        audible = [turn for turn in group if turn.lufs is not None and math.isfinite(turn.lufs)]
        measured = [(turn.lufs, turn.duration_s) for turn in audible]
        seconds = sum(duration for _, duration in measured)
        power = sum(duration * 10 ** (lufs / 10) for lufs, duration in measured)
        gain_db = TARGET_LUFS - 10 * math.log10(power / seconds) if power else 0.0
        gain_db = min(gain_db, PEAK_DBFS - max(turn.peak_dbfs for turn in group))
        gains.update({turn.utt_id: 10 ** (gain_db / 20) for turn in group})
    return gains


def load_clips(
    data_dir: Path, split: str, limit: int | None = None, seed: int = 0
) -> list[tuple[TurnRecord, np.ndarray]]:
    """All of `each_clip`."""
    return list(each_clip(data_dir, split, limit, seed))


def each_clip(
    data_dir: Path, split: str, limit: int | None = None, seed: int = 0
) -> Iterator[tuple[TurnRecord, np.ndarray]]:
    """Turns of a split without their bytes, and their samples (N,) at 24 kHz, loudness-normalised.

    `limit` takes that many at random, the same ones for the same seed. ValueError if the split is empty.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; choose one of {', '.join(SPLITS)}")
    metadata = [turn for turn in read_turns(data_dir, with_audio=False) if split_of(turn.split_group) == split]
    if not metadata:
        raise ValueError(f"{data_dir} has no turns in split {split!r}; collect more with collect_data.py")
    gains = loudness_gains(metadata)
    chosen = set(gains)
    if limit is not None and limit < len(metadata):
        chosen = set(random.Random(seed).sample(sorted(chosen), limit))
    return read_clips(data_dir, {utt_id: gains[utt_id] for utt_id in chosen})


def read_clips(data_dir: Path, gains: dict[str, float]) -> Iterator[tuple[TurnRecord, np.ndarray]]:
    """The turns named in `gains`, without their bytes, and their samples (N,) at 24 kHz times that gain."""
    return (
        (dataclasses.replace(turn, audio=None), read_audio(turn.audio)[0] * np.float32(gains[turn.utt_id]))
        for turn in read_turns(data_dir, with_audio=True)
        if turn.utt_id in gains
    )


def read_chosen(data_dir: Path, turns: Iterable[TurnRecord], chosen: Iterable[TurnRecord]) -> list[np.ndarray]:
    """Samples (N,) at 24 kHz, loudness-normalised, of some of all `turns` of a collection, in their order."""
    gains, chosen = loudness_gains(turns), list(chosen)
    clips = read_clips(data_dir, {turn.utt_id: gains[turn.utt_id] for turn in chosen})
    found = {turn.utt_id: samples for turn, samples in clips}
    return [found[turn.utt_id] for turn in chosen]


def choose_clip(turns: list[TurnRecord], name: str, style: str | None = None) -> TurnRecord:
    """A turn to show a voice by, of about `CLIP_SECONDS`; in no named style a neutral one, if there is any.

    `name` is a speaker's, with or without the source before the colon. ValueError: no such voice, or none of its turns
    in the style.
    """
    speakers = [composed(turn.speaker_id) for turn in turns]
    own = [t for t, s in zip(turns, speakers, strict=True) if composed(name) in (s, s.split(":")[-1])]
    if not own:
        raise ValueError(f"the collected data holds no voice {name!r}")
    fitting = [turn for turn in own if style == turn.style]
    if style is None:
        fitting = fitting or [turn for turn in own if turn.style == "neutral"] or own
    if not fitting:
        styles = sorted({turn.style or "no style" for turn in own})
        raise ValueError(f"{own[0].speaker_id} has no clip in the style {style!r}, but in: {', '.join(styles)}")
    return min(fitting, key=lambda turn: abs(turn.duration_s - CLIP_SECONDS))


@dataclass(frozen=True)
class Conversation:
    """Turns in their order, with small local speaker numbers by first appearance."""

    conv_id: str
    split: str
    structure: str  # dialogue: several speakers; monologue: one; voice_set: one, in sentences without connection;
    # pseudo: two voice sets in turn, in the training split only
    source: str
    turns: tuple[TurnRecord, ...]
    speakers: tuple[int, ...]  # one per turn


def build_conversations(turns: Iterable[TurnRecord], pseudo: bool = True) -> list[Conversation]:
    """Group by `conv_key`, order by `turn_index`; with `pseudo`, some voice sets are joined in pairs.

    ValueError if one conversation would land in two splits.
    """
    groups: dict[tuple[str, str], list[TurnRecord]] = defaultdict(list)
    for turn in turns:
        groups[turn.source, turn.conv_key].append(turn)
    conversations = []
    for (source, key), members in sorted(groups.items()):
        members.sort(key=lambda turn: turn.turn_index)
        splits = {split_of(turn.split_group) for turn in members}
        if len(splits) > 1:
            raise ValueError(f"conversation {key} has turns in the splits {sorted(splits)}; give it one split_group")
        local: dict[str, int] = {}
        speakers = tuple(local.setdefault(turn.speaker_id, len(local)) for turn in members)
        structure = "dialogue" if len(local) > 1 else "voice_set" if source in VOICE_SETS else "monologue"
        conversations.append(Conversation(key, splits.pop(), structure, source, tuple(members), speakers))
    return join_voice_sets(conversations) if pseudo else conversations


def join_voice_sets(conversations: list[Conversation]) -> list[Conversation]:
    """A fifth of the voice sets of the training split, in pairs of two voices of one language and sex that take turns.

    Where a corpus holds no conversations, this is all that shows a change of speaker. What they say has no connection,
    so the structure is marked, and held-out splits have none of it.
    """
    joined, kept, lonely = [], [], {}
    for one in sorted(conversations, key=lambda c: share_of(c.conv_id)):
        drawn = share_of(one.conv_id) < PSEUDO
        if not (drawn and one.structure == "voice_set" and one.split == "train"):
            kept.append(one)
            continue
        kind = one.source, one.turns[0].lang, one.turns[0].speaker_sex
        other = lonely.pop(kind, None)
        if other is None or other.turns[0].speaker_id == one.turns[0].speaker_id:
            kept += [other] if other else []
            lonely[kind] = one
            continue
        pairs = itertools.zip_longest(zip(one.turns, itertools.repeat(0)), zip(other.turns, itertools.repeat(1)))
        taken = [turn for pair in pairs for turn in pair if turn is not None]
        turns, speakers = zip(*taken, strict=True)
        joined.append(Conversation(f"{one.conv_id}+{other.conv_id}", one.split, "pseudo", one.source, turns, speakers))
    return sorted(kept + joined + list(lonely.values()), key=lambda c: (c.source, c.conv_id))


def speakers_in_several_splits(conversations: Iterable[Conversation]) -> dict[str, set[str]]:
    """source -> its speakers that are heard in more than one split, where scenes were parted and not voices."""
    heard: dict[tuple[str, str], set[str]] = defaultdict(set)
    for conversation in conversations:
        for turn in conversation.turns:
            heard[conversation.source, turn.speaker_id].add(conversation.split)
    found: dict[str, set[str]] = defaultdict(set)
    for (source, speaker), splits in heard.items():
        if len(splits) > 1:
            found[source].add(speaker)
    return dict(found)


def write_conversations(data_dir: Path) -> dict[str, int]:
    """Write `conversations/{train,val,test}.jsonl`, references to turns; returns conversations per split."""
    conversations = build_conversations(read_turns(data_dir, with_audio=False))
    (data_dir / "conversations").mkdir(exist_ok=True)
    counts = {}
    for split in SPLITS:
        own = [conversation for conversation in conversations if conversation.split == split]
        lines = [json.dumps(_conversation_row(conversation), ensure_ascii=False) + "\n" for conversation in own]
        write_atomically(data_dir / "conversations" / f"{split}.jsonl", "".join(lines).encode())
        counts[split] = len(own)
    return counts


def _conversation_row(conversation: Conversation) -> dict:
    turns, previous_end = [], None
    for turn, speaker in zip(conversation.turns, conversation.speakers, strict=True):
        known = turn.start_s is not None and previous_end is not None
        gap = round(turn.start_s - previous_end, 3) if known else None
        turns.append({"utt_id": turn.utt_id, "speaker": speaker, "gap_s": gap})
        previous_end = turn.end_s
    return {
        "conv_id": conversation.conv_id,
        "split": conversation.split,
        "structure": conversation.structure,
        "source": conversation.source,
        "lang": conversation.turns[0].lang,
        "turns": turns,
        "duration_s": round(sum(turn.duration_s for turn in conversation.turns), 3),
        "licenses": sorted({turn.license for turn in conversation.turns}),
    }
