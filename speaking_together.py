"""Several conversations that speak or listen at once: one pass of each stage for all that wait.

Most of a frame's time goes into moving weights, which N conversations share: those of the depth decoder, and those of
the backbone, where each attends its own past. A conversation says what it would alone, but for rounding.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Generator, Hashable, Iterator

import numpy as np
import torch
from torch import Tensor

from generation import Conversation, Unread, Wanted

Happened = tuple[Hashable, np.ndarray | str | Exception | None]


class Together:
    """Turns under way, spoken or heard, of conversations with one `InferenceModel`; others may join at any time."""

    def __init__(self) -> None:
        self.talks: dict[Hashable, Conversation] = {}
        self.steps: dict = {}
        self.waiting: dict[Hashable, Wanted] = {}
        self.unread: dict[Hashable, Unread] = {}
        self.states: dict[Hashable, Tensor] = {}  # (1, D) of those whose rows have been read in this round

    def begin(self, name: Hashable, talk: Conversation, steps: Generator) -> None:
        """Let a conversation take its next turn, `steps` or `listening` of it. ValueError: it takes one already, or is
        of another model."""
        if any(other is talk for other in self.talks.values()) or name in self.talks:
            raise ValueError(f"{name!r} has the word already")
        if any(other.speaker.inference is not talk.speaker.inference for other in self.talks.values()):
            raise ValueError(f"{name!r} is a conversation with another InferenceModel")
        self.talks[name], self.steps[name] = talk, steps

    def stop(self, name: Hashable) -> None:
        """Interrupt a turn; what was said is kept, what was to be heard is not. Nothing for who has no turn."""
        self.waiting.pop(name, None)
        self.unread.pop(name, None)
        self.talks.pop(name, None)
        state = self.states.pop(name, None)
        if (steps := self.steps.pop(name, None)) is not None:
            if state is not None:  # else the row would be read once more
                with contextlib.suppress(StopIteration):
                    steps.send(state)
            steps.close()

    def round(self, resting: Collection[Hashable] = ()) -> Iterator[Happened]:
        """One pass for all but the `resting`: yields (name, samples) that are new, of those that are done (name, None),
        or (name, text) if they listened. An error, (name, error), ends the turn it is of, or all that shared a pass.
        """
        names = [name for name in self.steps if name not in resting]
        asked = {name: self.waiting.pop(name) for name in names if name in self.waiting}
        codes = yield from self._shared(self._draw, asked)
        for name in names:
            if name not in self.unread:  # who writes waits for a state again
                yield from self._advance(name, codes.get(name))
        unread = {name: self.unread.pop(name) for name in names if name in self.unread}
        yield from self._shared(self._read, unread)
        while self.states:
            name = next(iter(self.states))
            yield from self._advance(name, self.states.pop(name))

    def _advance(self, name: Hashable, sent: Tensor | None) -> Iterator[Happened]:
        """Let one go on, with what it has waited for, until it waits again or is done."""
        try:
            while name in self.steps:  # else who read what was yielded has stopped it
                found = self.steps[name].send(sent)
                sent = None
                if isinstance(found, Wanted):
                    self.waiting[name] = found
                    return
                if isinstance(found, Unread):
                    self.unread[name] = found
                    return
                yield name, found
        except StopIteration as end:
            self.stop(name)
            yield name, end.value
        except Exception as error:
            self.stop(name)
            yield name, error

    def _shared(
        self, take: Callable[[dict], dict | None], asked: dict[Hashable, Wanted | Unread]
    ) -> Generator[Happened, None, dict]:
        """What a pass gives those who asked for it; one that fails ends their turns: they were none."""
        try:
            return take(asked) or {}
        except Exception as error:
            for name in asked:
                if (steps := self.steps.get(name)) is not None:
                    own = RuntimeError(f"{type(error).__name__}: {error}")  # two turns must not raise the same
                    with contextlib.suppress(Exception):
                        steps.throw(own)
                    self.stop(name)
                    yield name, own
            return {}

    def _read(self, unread: dict[Hashable, Unread]) -> None:
        if unread:
            inference = self.talks[next(iter(unread))].speaker.inference
            with torch.inference_mode():
                states = inference.hidden_of_several(*zip(*unread.values(), strict=True))  # (N, 1, D)
            self.states = dict(zip(unread, states, strict=True))

    def _draw(self, asked: dict[Hashable, Wanted]) -> dict[Hashable, Tensor]:
        """The codes that are asked for: together those that begin and end with the same codebook."""
        groups: dict[tuple[int, int], list[Hashable]] = {}
        for name, wanted in asked.items():
            groups.setdefault((wanted.codes.size(1), wanted.stop), []).append(name)
        drawn = {}
        for (known, stop), names in groups.items():
            wanted = [asked[name] for name in names]
            sizes = [len(each.codes) for each in wanted]
            codes = torch.cat([each.codes for each in wanted])
            if known < stop:
                speakers = [self.talks[name].speaker for name in names]

                def choose(logits: Tensor, speakers=speakers, sizes=sizes) -> Tensor:
                    parts = zip(speakers, logits.split(sizes), strict=True)
                    return torch.cat([speaker.choose(part) for speaker, part in parts])

                hidden = torch.cat([each.hidden for each in wanted])
                with torch.inference_mode():
                    codes = speakers[0].inference.depth.continue_frames(hidden, codes, stop, choose)
            drawn |= dict(zip(names, codes.split(sizes), strict=True))
        return drawn

    def __len__(self) -> int:
        return len(self.steps)
