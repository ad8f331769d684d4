"""From conversations and their tokens to training batches: context, packing, mixture.

A batch is a pure function of (data, seed, step), so a resumed run needs no loader state. Letters: B rows of a batch,
L positions of a row, K codebooks.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import itertools
import math
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from audio import FRAME_RATE
from audio_tokenizer import AudioTokenizer
from checkpointing import write_atomically
from command_line import EXIT_CODES_HELP, EXIT_DONE, PART_HELP, default_part, part, run
from conversations import (
    SPLITS,
    Conversation,
    build_conversations,
    speakers_in_several_splits,
    write_conversations,
)
from frames import IGNORE, Clock, FrameLayout, Rows, Turn, concatenate
from model_sizes import CSMConfig
from ranks import pick_device
from rvq_tokenizer import load_tokenizer
from text_tokenizer import TextTokenizer, encode_turn, load_text_tokenizer, prompt_length
from token_cache import TokenCache, tokenise
from turn_shards import read_turns

OPEN = 64  # samples among which a row looks for one that fits
ROOM = 0.03  # of a row that may stay empty rather than be filled with a part of a sample


class Sample(NamedTuple):
    """A run of turns of one conversation that is one document."""

    conversation: int
    start: int
    first: int  # turns before this one are context, learnt elsewhere
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

    Every turn is learnt once per epoch. A share of the conversations is cut into single turns, so that the model also
    learns to start without context; the others are cut where they outgrow a row or fill one up, never inside a turn,
    and go on with the newest of their turns as context, up to a quarter of a row. What the `mixture` draws is drawn
    anew for every batch.
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
        turns = read_turns(data_dir, False, cache.entries)  # what has come in since has no tokens yet
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
            samples = self.samples(order)
            order.shuffle(samples)
            self._plans = dict([*self._plans.items()][-1:])
            self._plans[seed, epoch] = pack(samples, self.row_positions, self._split)
            self._plan_sizes[seed, epoch] = len(self._plans[seed, epoch])
        return self._plans[seed, epoch]

    def _plan_size(self, seed: int, epoch: int) -> int:
        return self._plan_sizes.get((seed, epoch)) or len(self.plan(seed, epoch))

    def samples(self, order: random.Random | None = None) -> list[Sample]:
        """All conversations, cut where they outgrow a row; a share of them into single turns, drawn from `order`."""
        return [sample for index in range(len(self.conversations)) for sample in self._cut(index, order)]

    def _cut(self, index: int, order: random.Random | None) -> list[Sample]:
        lengths = self.lengths[index]
        if order is not None and order.random() < self.mixture.no_context:
            return [Sample(index, i, i, i + 1, rows) for i, rows in enumerate(lengths)]
        samples = [self._with_context(index, 0, len(lengths))]
        while samples[-1].rows > self.row_positions:
            samples[-1:] = self._split(samples[-1], self.row_positions)
        return samples

    def _with_context(self, index: int, first: int, stop: int) -> Sample:
        """Turns `first` to `stop`, after as many whole turns before them as a quarter of a row holds."""
        lengths, start = self.lengths[index], first
        room = min(self.row_positions // 4, self.row_positions - lengths[first])
        while start and lengths[start - 1] <= room:
            start -= 1
            room -= lengths[start]
        return Sample(index, start, first, stop, sum(lengths[start:stop]))

    def _split(self, sample: Sample, room: int) -> tuple[Sample, Sample] | None:
        """As many turns as `room` positions hold, and the others after some context; None if not one turn fits."""
        lengths = self.lengths[sample.conversation]
        rows = list(itertools.accumulate(lengths[sample.start : sample.stop]))
        stop = sample.start + sum(end <= room for end in rows)
        if not sample.first < stop < sample.stop:
            return None
        begun = sample._replace(stop=stop, rows=rows[stop - sample.start - 1])
        return begun, self._with_context(sample.conversation, stop, sample.stop)

    def batch(self, step: int, rows_per_batch: int, seed: int, part: slice = slice(None)) -> Rows:
        """The batch of a step (from 0): the next `rows_per_batch` packed rows, over epoch after epoch; `part` of them.

        All processes of a run take as many steps, whatever the data: each makes its own part of every batch.
        """
        rows = self._rows(step, rows_per_batch, seed)
        seeds = [f"{seed}-{step}-{place}" for place in range(rows_per_batch)]
        return self.collate(rows[part], seeds[part])

    def names(self, step: int, rows_per_batch: int, seed: int) -> list[str]:
        """The conversations of a step's batch and which of their turns, to look at them."""
        return [
            f"{self.conversations[sample.conversation].conv_id}[{sample.start}:{sample.stop}]"
            for row in self._rows(step, rows_per_batch, seed)
            for sample in row
        ]

    def _rows(self, step: int, rows_per_batch: int, seed: int) -> list[list[Sample]]:
        if not self.conversations:
            raise ValueError("this split holds no conversations; collect more with collect_data.py")
        epoch, index, rows = 0, step * rows_per_batch, []
        while len(rows) < rows_per_batch:
            size = self._plan_size(seed, epoch)
            if index < size:
                rows.append(self.plan(seed, epoch)[index])
                index += 1
            else:
                index -= size
                epoch += 1
        return rows

    def collate(self, rows: list[list[Sample]], seeds: list[str] | None) -> Rows:
        """Rows of samples -> padded tensors (B, L, ...).

        With a seed for each row, local speaker numbers are permuted in every sample and the mixture is drawn; else
        every turn is in speak order, with all of its context.
        """
        orders = [None] * len(rows) if seeds is None else [random.Random(seed) for seed in seeds]
        packed = [
            in_one_row([self._document(sample, order) for sample in row])
            for row, order in zip(rows, orders, strict=True)
        ]
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
                only = order.choice(conversation.speakers[sample.first : sample.stop])
        parts, clock = [], Clock()
        for index in range(sample.start, sample.stop):
            clock.position = 0 if index == cut else clock.position
            turn = self._turn(conversation, index, numbers[conversation.speakers[index]], order)
            learnt = index >= sample.first and only in (None, conversation.speakers[index])
            turn = turn._replace(learn=learnt)
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


def as_read_by(config: CSMConfig, data_dir: Path, split: str, tokenizer: AudioTokenizer) -> ConversationDataset:
    """The conversations of a split as a model reads them whose codes are this tokenizer's."""
    texts, cache = load_text_tokenizer(config.text_tokenizer), TokenCache(data_dir, tokenizer)
    return ConversationDataset(data_dir, split, cache, texts, config.layout, config.max_positions)


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


def pack(
    samples: list[Sample], row_positions: int, split: Callable[[Sample, int], tuple[Sample, Sample] | None]
) -> list[list[Sample]]:
    """Rows of at most `row_positions`, filled one after the other with the first of the next samples that fits.

    Where none fits and more than a little room is left, the first one that can be is split; what is left of it waits
    for a later row.
    """
    waiting, rows = deque(samples), []
    while waiting:
        row, room = [], row_positions
        while (place := next((i for i in range(min(OPEN, len(waiting))) if waiting[i].rows <= room), None)) is not None:
            room -= waiting[place].rows
            row.append(waiting[place])
            del waiting[place]
        if room > ROOM * row_positions:
            parted = ((i, split(waiting[i], room)) for i in range(min(OPEN, len(waiting))))
            if found := next(((i, parts) for i, parts in parted if parts), None):
                row.append(found[1][0])
                del waiting[found[0]]
                waiting.insert(OPEN, found[1][1])
        rows.append(row)
    return rows


def summarise(data_dir: Path) -> None:
    """A table of the splits, and `summary.png`: what the turns and conversations of every source are like."""
    conversations = build_conversations(read_turns(data_dir, with_audio=False))
    print(f"{'split':8}{'conversations':>15}{'turns':>8}{'speakers':>10}{'minutes':>9}")
    for split in SPLITS:
        turns = [turn for c in conversations if c.split == split for turn in c.turns]
        n = sum(c.split == split for c in conversations)
        minutes = sum(turn.duration_s for turn in turns) / 60
        print(f"{split:8}{n:>15}{len(turns):>8}{len({turn.speaker_id for turn in turns}):>10}{minutes:>9.1f}")
    for source, speakers in sorted(speakers_in_several_splits(conversations).items()):
        print(f"{source}: {len(speakers)} speaker(s) in more than one split: held-out scenes are new, not all voices")
    draw_summary(conversations, data_dir / "summary.png")
    print(f"picture in {data_dir / 'summary.png'}")


def draw_summary(conversations: list[Conversation], path: Path) -> None:
    """Histograms by source, in hours of speech or conversations."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(11, 7))
    of_turns = {"seconds of a turn": "duration_s", "characters per second": "chars_per_s", "LUFS of a turn": "lufs"}
    sources = sorted({c.source for c in conversations})
    for source in sources:
        own = [c for c in conversations if c.source == source]
        turns = [turn for c in own for turn in c.turns]
        hours = [turn.duration_s / 3600 for turn in turns]
        for axis, (title, field) in zip(axes.flat, of_turns.items(), strict=False):
            values = [getattr(turn, field) for turn in turns]
            finite = [(v, h) for v, h in zip(values, hours, strict=True) if v is not None and math.isfinite(v)]
            values, weights = zip(*finite, strict=True) if finite else ((), ())
            axis.hist(values, bins=40, weights=weights, histtype="step", label=source)
            axis.set(xlabel=title, ylabel="hours")
        axes.flat[3].hist([min(20, len(c.turns)) for c in own], bins=range(1, 22), histtype="step", label=source)
    axes.flat[3].set(xlabel="turns of a conversation (20: or more)", ylabel="conversations", yscale="log")
    axes.flat[0].legend()
    figure.tight_layout()
    content = io.BytesIO()
    figure.savefig(content, format="png")
    plt.close(figure)
    write_atomically(path, content.getvalue())


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Build the conversations of a data folder, print and draw what it holds, make its tokens.",
        epilog=EXIT_CODES_HELP,
    )
    add = parser.add_argument
    add("--data", type=Path, default=Path("data"), help="folder of collect_data.py (default: data)")
    add("--tokenizer", metavar="DIR", help="make the tokens of this tokenizer, or of kyutai/mimi (default: none)")
    add("--device", default="cpu", help="of the tokenizer: auto, cpu or cuda (default: cpu)")
    add("--shard", type=part, default=default_part(), metavar="I/N", help=PART_HELP)
    args = parser.parse_args(argv)
    if args.tokenizer:
        (index, of), device = args.shard, pick_device(args.device)
        made = tokenise(args.data, load_tokenizer(args.tokenizer, device), device, index, of)
        print(f"tokens of {made} shard(s) made" + (f" by part {index} of {of}" if of > 1 else ""))
    if args.shard[0] == 0:
        write_conversations(args.data)
        summarise(args.data)
    return EXIT_DONE


if __name__ == "__main__":
    raise SystemExit(run(main))
