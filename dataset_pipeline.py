"""From collected turns to training batches: splits, conversations, loudness, token cache, packing.

A batch is a pure function of (data, seed, step), so a resumed run needs no loader state. Letters: B rows of a batch,
L positions of a row, K codebooks.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import io
import json
import math
import random
import zipfile
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import filelock
import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from audio import FRAME_RATE, SAMPLE_RATE, read_audio
from audio_tokenizer import AudioTokenizer
from checkpointing import write_atomically
from command_line import EXIT_CODES_HELP, EXIT_DONE, run
from frames import IGNORE, Clock, FrameLayout, Rows, Turn, concatenate
from prosody import prosody_features
from text_tokenizer import TextTokenizer, encode_turn, prompt_length
from turn_shards import LedgerEntry, TurnRecord, read_ledger, read_turns

SPLITS = ("train", "val", "test")
VOICE_SETS = ("common_voice",)  # sources whose conversations are sentences without connection
TARGET_LUFS = -23.0  # EBU R 128
PEAK_DBFS = -1.0
TOKEN_SCHEMA = 2


def split_of(split_group: str, seed: int = 0) -> str:
    """'train', 'val' or 'test' (80 / 10 / 10 %) by a hash, so that later collections never move a group."""
    share = int(hashlib.sha1(f"{seed}:{split_group}".encode()).hexdigest()[:8], 16) / 16**8
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
    return [
        (dataclasses.replace(turn, audio=None), read_audio(turn.audio)[0] * np.float32(gains[turn.utt_id]))
        for turn in read_turns(data_dir, with_audio=True)
        if turn.utt_id in chosen
    ]


class TokenCache:
    """Codes and prosody of every turn, made once per tokenizer: one `.npz` per shard in `data/tokens/<fingerprint>/`.

    A kill loses at most the shard under way. Codes are 16-bit: 100 hours at 32 codebooks take 288 MB.
    """

    def __init__(self, data_dir: Path, tokenizer: AudioTokenizer, device: torch.device | str = "cpu"):
        recipe = f"{tokenizer.fingerprint()} {SAMPLE_RATE} soxr-HQ {TARGET_LUFS} {PEAK_DBFS} {TOKEN_SCHEMA}"
        self.folder = data_dir / "tokens" / hashlib.sha256(recipe.encode()).hexdigest()[:16]
        self.folder.mkdir(parents=True, exist_ok=True)
        self.codes: dict[str, np.ndarray] = {}  # utt_id -> (T, K) uint16
        self.prosody: dict[str, np.ndarray] = {}  # utt_id -> (F,) float32, see `prosody_features`
        entries = [entry for entry in read_ledger(data_dir) if entry.path is not None]
        content = " ".join([recipe, *(entry.sha256 for entry in entries)])
        self.fingerprint = hashlib.sha256(content.encode()).hexdigest()[:16]  # of recipe and data
        with filelock.FileLock(self.folder / ".lock"):  # a second process waits and finds the work done
            missing = [entry for entry in entries if not self._file(entry).is_file()]
            gains = loudness_gains(read_turns(data_dir, with_audio=False)) if missing else {}
            for entry in tqdm(missing, desc="tokenising", unit="shard", disable=not missing):
                self._make(data_dir, entry, tokenizer, gains, device)
        for entry in entries:
            self._load(entry)

    def _file(self, entry: LedgerEntry) -> Path:
        return self.folder / f"{entry.source}-{entry.number:05d}-{entry.sha256[:12]}.npz"

    def _make(
        self, data_dir: Path, entry: LedgerEntry, tokenizer: AudioTokenizer, gains: dict[str, float], device: object
    ) -> None:
        ids, codes, prosody = [], [], []
        for turn in read_turns(data_dir, True, [entry]):
            samples = read_audio(turn.audio)[0] * np.float32(gains[turn.utt_id])
            with torch.inference_mode():
                coded = tokenizer.encode(torch.from_numpy(samples)[None].to(device))[0]  # (T, K)
            ids.append(turn.utt_id)
            codes.append(coded.cpu().numpy().astype(np.uint16))
            prosody.append(prosody_features(samples, len(turn.text)).numpy())
        content = io.BytesIO()
        lengths = [len(c) for c in codes]
        np.savez(content, ids=np.array(ids), lengths=lengths, codes=np.concatenate(codes), prosody=np.stack(prosody))
        write_atomically(self._file(entry), content.getvalue())

    def _load(self, entry: LedgerEntry) -> None:
        try:
            with np.load(self._file(entry), allow_pickle=False) as content:
                parts = np.split(content["codes"], np.cumsum(content["lengths"])[:-1])
                self.codes.update(zip(content["ids"].tolist(), parts, strict=True))
                self.prosody.update(zip(content["ids"].tolist(), content["prosody"], strict=True))
        except (ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile) as error:
            path = self._file(entry)
            raise ValueError(f"token file {path} is damaged ({error}); delete it, it will be made again") from error


@dataclass(frozen=True)
class Conversation:
    """Turns in their order, with small local speaker numbers by first appearance."""

    conv_id: str
    split: str
    structure: str  # dialogue: several speakers; monologue: one; voice_set: one, in sentences without connection
    source: str
    turns: tuple[TurnRecord, ...]
    speakers: tuple[int, ...]  # one per turn


def build_conversations(turns: Iterable[TurnRecord]) -> list[Conversation]:
    """Group by `conv_key`, order by `turn_index`. ValueError if one conversation would land in two splits."""
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
    return conversations


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


class Sample(NamedTuple):
    """A run of turns of one conversation that is learnt as one document."""

    conversation: int
    start: int
    stop: int
    rows: int


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """How turns and conversations are shown in training; shares of them. ValueError for those that cannot work."""

    no_context: float = 0.0  # conversations learnt as single turns
    joint: float = 0.0  # turns with text and audio in chunks
    listen: float = 0.0  # turns with audio, then text
    text_only: float = 0.0  # turns without their audio
    evict: float = 0.0  # documents whose first turns leave the context at a random turn, for the memory
    one_speaker: float = 0.0  # documents with targets in one speaker's turns only

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            if not 0 <= getattr(self, f.name) <= 1:
                raise ValueError(f"{f.name}={getattr(self, f.name)} must be between 0 and 1")
        if self.joint + self.listen + self.text_only > 1:
            raise ValueError(
                f"joint={self.joint}, listen={self.listen}, text_only={self.text_only}: more than 1 in all"
            )


class ConversationDataset:
    """Conversations of one split as ids, cut into samples and packed into rows of `row_positions`.

    Every turn is heard once per epoch. A share of the conversations is cut into single turns, so that the model also
    learns to start without context; the others are cut only where they outgrow a row, never inside a turn. What the
    `mixture` draws is drawn anew for every batch.
    """

    def __init__(
        self,
        data_dir: Path,
        split: str,
        cache: TokenCache,
        text_tokenizer: TextTokenizer,
        layout: FrameLayout,
        row_positions: int,
        mixture: Mixture | None = None,
    ):
        self.layout, self.row_positions, self.mixture = layout, row_positions, mixture or Mixture()
        self.text_tokenizer, self.cache = text_tokenizer, cache
        turns = read_turns(data_dir, with_audio=False)
        self.conversations = [c for c in build_conversations(turns) if c.split == split]
        self.lengths = [[self._length(c, i) for i in range(len(c.turns))] for c in self.conversations]
        for conversation, lengths in zip(self.conversations, self.lengths, strict=True):
            if max(lengths) > row_positions:
                turn = conversation.turns[lengths.index(max(lengths))]
                raise ValueError(
                    f"turn {turn.utt_id} needs {max(lengths)} positions, a row has {row_positions}; "
                    "raise --row_positions or collect shorter turns"
                )
        self._plans: dict[tuple[int, int], list[list[Sample]]] = {}  # the newest two
        self._plan_sizes: dict[tuple[int, int], int] = {}

    def __len__(self) -> int:
        return len(self.conversations)

    def _length(self, conversation: Conversation, index: int) -> int:
        turn, longest_tag = conversation.turns[index], max(conversation.speakers)  # numbers are exchanged in training
        n_text = len(encode_turn(self.text_tokenizer, longest_tag, turn.text))
        return self.layout.turn_length(n_text, len(self.cache.codes[turn.utt_id]))

    def plan(self, seed: int, epoch: int) -> list[list[Sample]]:
        """The packed rows of an epoch, in the order they are learnt; the same for the same arguments."""
        if (seed, epoch) not in self._plans:
            order = random.Random(f"{seed}-{epoch}")
            samples = [s for index in range(len(self.conversations)) for s in self._cut(index, order)]
            order.shuffle(samples)
            self._plans = dict([*self._plans.items()][-1:])
            self._plans[seed, epoch] = pack(samples, self.row_positions)
            self._plan_sizes[seed, epoch] = len(self._plans[seed, epoch])
        return self._plans[seed, epoch]

    def _plan_size(self, seed: int, epoch: int) -> int:
        return self._plan_sizes.get((seed, epoch)) or len(self.plan(seed, epoch))

    def _cut(self, index: int, order: random.Random) -> list[Sample]:
        lengths = self.lengths[index]
        if order.random() < self.mixture.no_context:
            return [Sample(index, i, i + 1, rows) for i, rows in enumerate(lengths)]
        samples, start = [], 0
        for stop in range(1, len(lengths) + 1):
            if stop == len(lengths) or sum(lengths[start : stop + 1]) > self.row_positions:
                samples.append(Sample(index, start, stop, sum(lengths[start:stop])))
                start = stop
        return samples

    def batch(self, step: int, rows_per_batch: int, seed: int) -> Rows:
        """The batch of a step (from 0): the next `rows_per_batch` packed rows, over epoch after epoch."""
        epoch, index, rows = 0, step * rows_per_batch, []
        while len(rows) < rows_per_batch:
            size = self._plan_size(seed, epoch)
            if index < size:
                rows.append(self.plan(seed, epoch)[index])
                index += 1
            else:
                index -= size
                epoch += 1
        return self.collate(rows, seed=f"{seed}-{step}")

    def collate(self, rows: list[list[Sample]], seed: str | None) -> Rows:
        """Rows of samples -> padded tensors (B, L, ...).

        With a seed, local speaker numbers are permuted in every sample and the mixture is drawn; else every turn is in
        speak order, with all of its context.
        """
        order = random.Random(seed) if seed is not None else None
        packed = [in_one_row([self._document(sample, order) for sample in row]) for row in rows]
        L = max(len(row.tokens) for row in packed)
        fill = Rows(0, False, IGNORE, 0, -1, -1, -1, 0.0, math.nan)  # of padding
        columns = zip(*packed, strict=True)
        return Rows(*(torch.stack([_padded(x, L, f) for x in column]) for column, f in zip(columns, fill, strict=True)))

    def _document(self, sample: Sample, order: random.Random | None) -> Rows:
        conversation = self.conversations[sample.conversation]
        numbers = list(range(max(conversation.speakers) + 1))
        cut, only = None, None
        if order is not None:
            order.shuffle(numbers)
            if order.random() < self.mixture.evict and sample.stop - sample.start > 1:
                cut = order.randrange(sample.start + 1, sample.stop)
            if order.random() < self.mixture.one_speaker:
                only = order.choice(conversation.speakers[sample.start : sample.stop])
        parts, clock = [], Clock()
        for index in range(sample.start, sample.stop):
            clock.position = 0 if index == cut else clock.position
            turn = self._turn(conversation, index, numbers[conversation.speakers[index]], order)
            turn = turn._replace(learn=only in (None, conversation.speakers[index]))
            rows = self.layout.turn_rows(turn, clock)
            parts.append(
                rows._replace(documents=torch.full_like(rows.documents, int(cut is not None and index >= cut)))
            )
        return concatenate(parts)

    def _turn(self, conversation: Conversation, index: int, speaker: int, order: random.Random | None) -> Turn:
        record = conversation.turns[index]
        text_ids = encode_turn(self.text_tokenizer, speaker, record.text)
        codes = torch.from_numpy(self.cache.codes[record.utt_id].astype(np.int64))
        n_prompt = prompt_length(self.text_tokenizer, speaker, text_ids)
        gap = 0.0
        if index and record.start_s is not None and conversation.turns[index - 1].end_s is not None:
            gap = (record.start_s - conversation.turns[index - 1].end_s) * FRAME_RATE
        prosody = torch.from_numpy(self.cache.prosody[record.utt_id])
        turn = Turn(text_ids, codes, n_prompt, "speak", gap, prosody)
        if order is None:
            return turn
        draw, m = order.random(), self.mixture
        if draw < m.text_only:
            return turn._replace(codes=None, prosody=None)
        if draw < m.text_only + m.listen:
            return turn._replace(order="listen")
        return turn._replace(order="joint" if draw < m.text_only + m.listen + m.joint else "speak")


def in_one_row(documents: list[Rows]) -> Rows:
    """Sequences one after the other, their documents, conversations and turns numbered through."""
    parts, n_documents, n_turns = [], 0, 0
    for conversation, rows in enumerate(documents):
        parts.append(
            rows._replace(
                documents=rows.documents + n_documents,
                conversations=rows.conversations + conversation,
                turns=rows.turns + n_turns,
            )
        )
        n_documents, n_turns = int(parts[-1].documents.max()) + 1, int(parts[-1].turns.max()) + 1
    return concatenate(parts)


def _padded(x: Tensor, length: int, value: float) -> Tensor:
    """(T, ...) -> (length, ...)."""
    return torch.cat((x, x.new_full((length - len(x), *x.shape[1:]), value)))


def pack(samples: list[Sample], row_positions: int, open_rows: int = 64) -> list[list[Sample]]:
    """Put each sample into the first of the newest `open_rows` rows of at most `row_positions` that it fits in."""
    rows: list[list[Sample]] = []
    room: list[int] = []
    for sample in samples:
        recent = range(max(0, len(rows) - open_rows), len(rows))
        index = next((i for i in recent if sample.rows <= room[i]), None)
        if index is None:
            index = len(rows)
            rows.append([])
            room.append(row_positions)
        rows[index].append(sample)
        room[index] -= sample.rows
    return rows


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Build the conversations of a data folder and print what each split holds.", epilog=EXIT_CODES_HELP
    )
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder of collect_data.py (default: data)")
    args = parser.parse_args(argv)
    write_conversations(args.data)
    print(f"{'split':8}{'conversations':>15}{'turns':>8}{'speakers':>10}{'minutes':>9}")
    conversations = build_conversations(read_turns(args.data, with_audio=False))
    for split in SPLITS:
        turns = [turn for c in conversations if c.split == split for turn in c.turns]
        n = sum(c.split == split for c in conversations)
        minutes = sum(turn.duration_s for turn in turns) / 60
        print(f"{split:8}{n:>15}{len(turns):>8}{len({turn.speaker_id for turn in turns}):>10}{minutes:>9.1f}")
    return EXIT_DONE


if __name__ == "__main__":
    raise SystemExit(run(main))
