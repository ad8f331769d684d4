"""Speaking, replying and listening: prompt, sampling, the KV-cached loops of both stages, the state of a conversation.

The codec is passed in; nothing here reads or writes files. Letters: N frames, K codebooks, S semantic ones, A codes
with special ones, C acoustic delay, D backbone width.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from architecture import CSM, CSMCache
from audio import FRAME_RATE, SAMPLE_RATE
from audio_tokenizer import AudioTokenizer
from checkpointing import write_atomically
from conversational_memory import MemoryState
from frames import N_PROSODY, Clock, Rows, Turn
from inference_model import InferenceModel
from model_sizes import CSMConfig
from prosody import prosody_features
from text_tokenizer import TextTokenizer, clean_text, encode_turn, prompt_length, turn_prompt, turn_text

COLDEST = 1e-3  # temperature that is told from 0: logits divided by less overflow
SPEAKING = "speaking.json"  # beside the weights of a voice
VOICES = "voices"  # beside them: a clip of each voice in each style, as collected data
SHIPPED = Path("pretrained/nano")  # the voice of this repository, with its tokenizer


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How codes and text are drawn; csm-1b's defaults for codes. ValueError for values that cannot work."""

    temperature: float = 0.9  # of codes in both stages; 0 = always the likeliest
    top_k: int = 50
    min_p: float = 0.0  # codes less likely than this share of the likeliest are not drawn (arXiv 2407.01082)
    text_temperature: float = 0.7
    text_top_k: int = 50
    max_seconds: float = 10.0  # a turn that has not ended by then is cut
    min_seconds: float = 0.0  # no end of turn before; not for csm-1b, whose end is an ordinary frame
    max_text_ids: int = 200  # a text that has not ended by then is cut
    codebooks: int | None = None  # only the first so many are drawn, heard and fed back; None = all of the model's
    one_sentence: bool = False  # every sentence of a text is a turn of its own: all that the model has learnt

    def __post_init__(self) -> None:
        for name in ("temperature", "text_temperature"):
            if getattr(self, name) != 0 and not COLDEST <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)} must be 0, for the likeliest, or {COLDEST} or more")
        for name in ("top_k", "text_top_k", "max_text_ids", "codebooks"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p={self.min_p} must lie between 0 and 1")
        if not 1 / FRAME_RATE <= self.max_seconds < math.inf:
            raise ValueError(f"max_seconds={self.max_seconds} must be finite and at least a frame, {1 / FRAME_RATE} s")
        if not 0 <= self.min_seconds <= self.max_seconds:
            raise ValueError(f"min_seconds={self.min_seconds} must lie between 0 and max_seconds={self.max_seconds}")

    @property
    def max_frames(self) -> int:
        return int(self.max_seconds * FRAME_RATE)

    @property
    def min_frames(self) -> int:
        return math.ceil(self.min_seconds * FRAME_RATE)


class Speaking(NamedTuple):
    """What `export_voice.py` wrote beside the weights of a voice."""

    sampling: dict  # fields of `Sampling` that it is best spoken with
    notes: str  # what it can, for who speaks with it
    voices: Sequence[str] = ()  # names of clips in `VOICES` that speakers 0, 1, ... sound like unless told otherwise


def read_speaking(folder: Path | str) -> Speaking:
    """How a voice is best spoken with; nothing where nothing says so. ValueError: the file is of another kind."""
    path = Path(folder) / SPEAKING
    if not path.is_file():
        return Speaking({}, "")
    try:
        found = Speaking(**json.loads(path.read_text(encoding="utf-8")))
        Sampling(**found.sampling)
        if isinstance(found.voices, str) or not all(isinstance(name, str) for name in found.voices):
            raise ValueError(f"voices={found.voices!r} is no list of names")
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} does not say how to speak: {error}") from error
    return found._replace(voices=tuple(found.voices))


def write_speaking(folder: Path, speaking: Speaking) -> None:
    write_atomically(folder / SPEAKING, (json.dumps(speaking._asdict(), indent=2) + "\n").encode())


class Reply(NamedTuple):
    """One spoken turn."""

    samples: np.ndarray  # (N,) float32 at 24 kHz
    codes: Tensor  # (T, K) int64, or (T, `Sampling.codebooks`)
    text: str  # what was to be said, given or written by the model
    ended: bool  # False: cut at `max_seconds`
    seconds_to_first_audio: float  # wall time from the request to the first decoded frame; nan when there is none
    seconds: float  # wall time for the whole turn

    @property
    def duration(self) -> float:
        """Seconds of audio."""
        return len(self.samples) / SAMPLE_RATE

    @property
    def real_time_factor(self) -> float:
        """Compute time over audio time, lower is better; nan for an empty turn."""
        return self.seconds / self.duration if len(self.samples) else float("nan")


def draw(logits: Tensor, temperature: float, top_k: int, generator: torch.Generator, min_p: float = 0.0) -> Tensor:
    """(N, A) logits -> (N,) codes; `min_p` is of the probabilities at that temperature."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    values, index = logits.float().topk(min(top_k, logits.size(-1)), dim=-1)  # (N, k)
    likely = (values / temperature).softmax(dim=-1)
    if min_p:
        likely = likely * (likely >= min_p * likely[:, :1])  # topk sorts
    waits = torch.empty_like(likely).exponential_(generator=generator)
    choice = (likely / waits).argmax(dim=-1, keepdim=True)  # (N, 1), that of torch.multinomial in a third of its time
    return index.gather(1, choice).squeeze(1)


class Wanted(NamedTuple):
    """What a conversation under way waits for: codes of N frames, from the depth decoder; none if they are known."""

    hidden: Tensor  # (N, D) backbone states
    codes: Tensor  # (N, k) their first codes
    stop: int  # the first codebook that is not wanted


class Unread(NamedTuple):
    """What a conversation under way waits for: the backbone's state behind a row that says what was drawn last."""

    rows: Rows  # one, as a batch of one, on the model's device
    cache: CSMCache


class Speaker:
    """Draws frames in the two stages of section "Conversational Speech Model" of Sesame's article.

    Stage 1: codebook 0 from the backbone, the semantic codebooks from the depth decoder, frame after frame. Stage 2:
    the acoustic codebooks, from the same decoder, for up to C frames at once.
    """

    def __init__(self, model: CSM | InferenceModel, sampling: Sampling, generator: torch.Generator):
        self.inference = model if isinstance(model, InferenceModel) else InferenceModel(model)
        self.model, self.sampling, self.generator = self.inference.model, sampling, generator
        K = self.model.config.n_codebooks
        self.n_codebooks = sampling.codebooks or K
        if self.n_codebooks > K:
            raise ValueError(f"codebooks={sampling.codebooks} must be at most the model's {K}")

    def first_codes(self, hidden: Tensor, may_end: bool = True) -> Tensor:
        """(N, D) backbone states -> (N, k) first codes of the next frame: S of them, or all without a delay.

        Only codebook 0 may take a special code, and only that of the end of turn, if the turn `may_end`; the other
        codes of such a frame are 0.
        """
        return self.continue_frames(*self.begin_frame(hidden, may_end))

    @torch.inference_mode()
    def begin_frame(self, hidden: Tensor, may_end: bool = True) -> Wanted:
        """(N, D) backbone states -> codebook 0 of the next frame, and what stage 1 wants to follow.

        Where all N end the turn nothing more is wanted, unless the end is only known by the other codes.
        """
        c = self.model.config
        allowed = c.codebook_size if c.zero_end_of_turn or not may_end else c.layout.end_of_turn + 1
        logits = self.model.codebook0_head(hidden)[:, :allowed]
        if bool(logits.isnan().any()):
            raise ValueError(
                "the model's logits are no numbers: its weights are damaged, or overflow in this precision"
            )
        code = self.choose(logits)[:, None]
        stop = min(c.n_semantic, self.n_codebooks) if c.acoustic_delay else self.n_codebooks
        if not c.zero_end_of_turn and bool((code == c.layout.end_of_turn).all()):
            code = F.pad(code, (0, stop - 1))
        return Wanted(hidden, code, stop)

    @torch.inference_mode()
    def continue_frames(self, hidden: Tensor, codes: Tensor, stop: int) -> Tensor:
        """(N, D) backbone states, (N, k) first codes -> (N, stop): codes k..stop-1 from the depth decoder."""
        if codes.size(1) == stop:
            return codes
        return self.inference.depth.continue_frames(hidden, codes, stop, self.choose)

    def choose(self, logits: Tensor) -> Tensor:
        s = self.sampling
        return draw(logits, s.temperature, s.top_k, self.generator, s.min_p)


def check_tokenizer(config: CSMConfig, tokenizer: AudioTokenizer) -> None:
    """ValueError unless the model's codes are this tokenizer's."""
    for name in ("n_codebooks", "codebook_size"):
        theirs, ours = getattr(tokenizer.config, name), getattr(config, name)
        if theirs != ours:
            raise ValueError(f"the tokenizer has {name}={theirs}, the model {ours}; use the one it was trained with")
    if config.audio_tokenizer and config.audio_tokenizer != tokenizer.fingerprint():
        raise ValueError(
            "the model was trained on codes of another tokenizer; give the folder of that one, or train the model anew"
        )


class KeptTurn(NamedTuple):
    """A turn in the window, and where the conversation stood before it."""

    turn: Turn
    clock: Clock
    memory: MemoryState | None
    voice_of: int | None = None  # the speaker whose voice it shows: it is pinned; None: it may leave the window


class Conversation:
    """A conversation that a model takes part in; the KV cache of earlier turns is kept from turn to turn.

    When a new turn would not fit the model's positions, whole oldest turns leave the context, with a warning; a model
    with a memory keeps what it wrote down of them. Pinned turns, which show a voice, stay. Up to `acoustic_batch`
    frames share a pass of the second stage, by default as many as the model's acoustic delay allows, but no more than
    were spoken before, so that the first come early. Several conversations may share an `InferenceModel`.
    """

    def __init__(
        self,
        model: CSM | InferenceModel,
        tokenizer: AudioTokenizer,
        text_tokenizer: TextTokenizer,
        *,
        sampling: Sampling | None = None,
        seed: int = 0,
        acoustic_batch: int | None = None,
    ):
        shared = model if isinstance(model, InferenceModel) else None
        if shared is None or shared.tokenizer is not tokenizer:  # its fingerprint takes longer than all the rest here
            check_tokenizer(model.config, tokenizer)
        if shared is not None:
            shared.tokenizer = tokenizer
        most = max(1, model.config.acoustic_delay)
        if acoustic_batch is not None and not 1 <= acoustic_batch <= most:
            raise ValueError(f"acoustic_batch={acoustic_batch} must lie between 1 and the model's {most}")
        self.model = model.model if isinstance(model, InferenceModel) else model
        self.tokenizer, self.text_tokenizer = tokenizer, text_tokenizer
        self.layout = model.config.layout
        self.sampling = sampling or Sampling()
        self.device = next(self.model.parameters()).device
        self.speaker = Speaker(model, self.sampling, torch.Generator(self.device).manual_seed(seed))
        self.acoustic_batch = acoustic_batch or (most if self.speaker.n_codebooks > model.config.n_semantic else 1)
        self.cache = CSMCache(self.model)
        self.clock = Clock()
        self.kept: list[KeptTurn] = []
        self.under_way = False  # a turn has been begun and not ended
        self.to_stand: tuple[Clock, MemoryState | None] | None = None  # at the end of a `restore` under way

    @property
    def turns(self) -> list[Turn]:
        """The turns in the window, oldest first."""
        return [kept.turn for kept in self.kept]

    @property
    def voices(self) -> dict[int, Turn]:
        """The pinned turn of each speaker that has one."""
        return {kept.voice_of: kept.turn for kept in self.kept if kept.voice_of is not None}

    def add_turn(
        self,
        speaker: int,
        text: str,
        *,
        samples: np.ndarray | None = None,
        codes: Tensor | None = None,
        gap_seconds: float = 0.0,
        pinned: bool = False,
    ) -> None:
        """Add what somebody said, as (N,) samples at 24 kHz or (T, K) codes. ValueError when it cannot fit at all.

        A pinned turn shows the speaker's voice: it stays in the window until another of that speaker is pinned.
        """
        codes, samples = self._heard(samples, codes)
        text = clean_text(text)
        ids = encode_turn(self.text_tokenizer, speaker, text)
        prosody = self._prosody(samples, len(text))
        turn = Turn(
            ids, codes, prompt_length(self.text_tokenizer, speaker, ids), "speak", gap_seconds * FRAME_RATE, prosody
        )
        self._make_room(self.layout.turn_length(len(ids), len(codes)), speaker if pinned else None)
        before = self.standing()
        with self._whole_or_none(before):
            self._read(self.layout.turn_rows(turn, self.clock))
            self._keep(turn, before, speaker if pinned else None)

    def has_spoken(self, speaker: int) -> bool:
        """Whether a turn of the speaker is in the window."""
        return any(self._turns_of(speaker))

    def _turns_of(self, speaker: int) -> Iterator[Turn]:
        prompt = turn_prompt(self.text_tokenizer, speaker)
        return (turn for turn in self.turns if turn.text_ids[: len(prompt)] == prompt)

    def shown_voice(self, speaker: int) -> Tensor | None:
        """What the tokenizer's decoder is told of who says semantic codes alone: by the pinned turn, or else the oldest
        in the window, that was heard with all codebooks. None: there is none, or the decoder cannot be told."""
        if self.speaker.n_codebooks > self.model.config.n_semantic:
            return None  # the acoustic codes have it
        pinned = [self.voices[speaker]] if speaker in self.voices else []
        for turn in (*pinned, *self._turns_of(speaker)):
            if turn.codes is not None and turn.codes.size(1) == self.layout.n_codebooks:
                return self.tokenizer.voice_of(turn.codes.to(self.device))
        return None

    def pinned_rows(self, but: int | None = None) -> int:
        """Rows of the window that show voices, without that of one speaker."""
        pinned = [kept.turn for kept in self.kept if kept.voice_of not in (None, but)]
        return sum(self.layout.turn_length(len(turn.text_ids), len(turn.codes)) for turn in pinned)

    def unpin(self, speaker: int) -> None:
        """Let the turn that shows a speaker's voice leave the window as any other does."""
        self.kept = [kept._replace(voice_of=None) if kept.voice_of == speaker else kept for kept in self.kept]

    def listen(
        self, speaker: int, *, samples: np.ndarray | None = None, codes: Tensor | None = None, gap_seconds: float = 0.0
    ) -> str:
        """Hear a turn and write down what was said. ValueError for a model without a text head."""
        try:
            next(self._alone(self.listening(speaker, samples=samples, codes=codes, gap_seconds=gap_seconds)))
        except StopIteration as end:  # it yields nothing
            return end.value

    def listening(
        self, speaker: int, *, samples: np.ndarray | None = None, codes: Tensor | None = None, gap_seconds: float = 0.0
    ) -> Generator[Unread, Tensor | None, str]:
        """`listen` for who lets several share their passes, as `steps`. A turn whose hearing is broken off was none."""
        self._need_text_head("listen")
        codes, samples = self._heard(samples, codes)
        prompt = turn_prompt(self.text_tokenizer, speaker)
        self._make_room(self.layout.turn_length(len(prompt) + self.sampling.max_text_ids, len(codes)))
        before = self.standing()
        turn = Turn(list(prompt), codes, len(prompt), "listen", gap_seconds * FRAME_RATE)
        with self._whole_or_none(before):
            hidden = self._read(self.layout.turn_rows(turn, self.clock, ends=False))
            while turn.text_ids[-1] != self.text_tokenizer.eos:
                hidden = yield Unread(self._write_id(turn, hidden), self.cache)
            self.layout.end_turn(turn, self.clock)
            text = turn_text(self.text_tokenizer, speaker, turn.text_ids)
            self._keep(turn._replace(prosody=self._prosody(samples, len(text))), before)
        return text

    def stream(self, speaker: int, text: str | None, gap_seconds: float = 0.0) -> Iterator[np.ndarray]:
        """Say `text` as `speaker`, or what the model writes itself if it is None: yields samples as they are decoded.

        Text given, it is read whole, then spoken; else text and voice come in turns. The chunks together are the turn.
        It joins the conversation when it ends, when it is cut at `max_seconds`, or when the caller stops reading;
        `turns[-1]` holds it and `ended` says whether the model ended it. A turn that an error breaks off was none.
        """
        yield from self._alone(self.steps(speaker, text, gap_seconds))

    def steps(
        self, speaker: int, text: str | None, gap_seconds: float = 0.0
    ) -> Generator[Wanted | Unread | np.ndarray, Tensor | None, None]:
        """`stream` for who lets several share their passes. Also yields what is wanted of the depth decoder, and is
        sent (N, stop) codes then, and each frame's row that the backbone is to read, and is sent its state (1, D)."""
        if text is None:
            self._need_text_head("reply")
            ids = prompt = turn_prompt(self.text_tokenizer, speaker)
        else:
            ids = encode_turn(self.text_tokenizer, speaker, clean_text(text))
            prompt = ids[: prompt_length(self.text_tokenizer, speaker, ids)]
        n_text = len(ids) if text is not None else len(prompt) + self.sampling.max_text_ids
        self._make_room(self.layout.turn_length(n_text, self.sampling.max_frames))
        before = self.standing()
        order = "speak" if text is not None else "joint"
        turn = Turn(list(ids), None, len(prompt), order, gap_seconds * FRAME_RATE)
        with self._whole_or_none(before):
            self.clock.begin_turn(turn.gap)
            self.ended, frames = False, _Frames(self, speaker)
            with contextlib.suppress(GeneratorExit):  # the caller has stopped reading
                yield from self._spoken(turn, frames)
            if (wanted := frames.wanted(all_of_them=True)) is not None:
                frames.finish(self.speaker.continue_frames(*wanted))
            self._close(turn, speaker, frames, before)

    def _spoken(self, turn: Turn, frames: _Frames) -> Generator[Wanted | Unread | np.ndarray, Tensor | None, None]:
        """`steps` of a turn of which nothing has been read, up to its end or `max_frames`."""
        hidden = self._read(self.layout.text_rows(turn.text_ids, turn.n_prompt, self.clock))
        while not self.ended and len(frames.first) < self.sampling.max_frames:
            if len(frames.first) % self.layout.frames_per_chunk == 0:
                for _ in range(self.layout.text_per_chunk):
                    if turn.text_ids[-1] != self.text_tokenizer.eos:
                        frames.unread = self._write_id(turn, hidden)
                        hidden = yield Unread(frames.unread, self.cache)
                        frames.unread = None
            written = turn.text_ids[-1] == self.text_tokenizer.eos
            may_end = written and len(frames.first) >= self.sampling.min_frames
            self.ended = not frames.begin(hidden, (yield self.speaker.begin_frame(hidden, may_end)))
            if (wanted := frames.wanted(all_of_them=self.ended)) is not None:
                samples = frames.finish((yield wanted))
                if len(samples):
                    yield samples
            if not self.ended:
                frames.unread = self._on_device(self.layout.audio_row(frames.codes(), self.clock))
                frames.n_placed = len(frames.first)
                hidden = yield Unread(frames.unread, self.cache)
                frames.unread = None
        if (wanted := frames.wanted(all_of_them=True)) is not None:
            samples = frames.finish((yield wanted))
            if len(samples):
                yield samples
        samples = frames.flush()
        if len(samples):
            yield samples

    def speak(
        self,
        speaker: int,
        text: str | None,
        gap_seconds: float = 0.0,
        hear: Callable[[np.ndarray], bool] | None = None,
    ) -> Reply:
        """`stream`, returned as a whole. An immediate end gives empty audio and a warning.

        `hear` is given each chunk as it comes, its time not counted; the speaker is interrupted once it returns False.
        """
        start = time.perf_counter()
        first, chunks = float("nan"), []
        with contextlib.closing(self.stream(speaker, text, gap_seconds)) as stream:
            for samples in stream:
                first = time.perf_counter() - start if not chunks else first
                chunks.append(samples)
                pause = time.perf_counter()
                if hear is not None and not hear(samples):
                    break
                start += time.perf_counter() - pause
        turn = self.turns[-1]
        said = turn_text(self.text_tokenizer, speaker, turn.text_ids)
        if not chunks:
            warnings.warn(f"the model ended the turn {said!r} at once, there is no audio", stacklevel=2)
        samples = np.concatenate(chunks) if chunks else np.zeros(0, dtype=np.float32)
        return Reply(samples, turn.codes, said, self.ended, first, time.perf_counter() - start)

    def reply(self, speaker: int, gap_seconds: float = 0.0) -> Reply:
        """Answer as `speaker` with text and voice of the model's own. ValueError for a model without a text head."""
        return self.speak(speaker, None, gap_seconds)

    def restore(self, kept: Sequence[KeptTurn], clock: Clock, memory: MemoryState | None) -> None:
        """Stand where a conversation stood whose window held the turns `kept`; they are read anew, each with the memory
        as it was before it. The random draws stay those of this one. What breaks it off loses none: the next turn makes
        up for it."""
        placed, rows, position = [], [], 0
        for turn in kept:
            own = turn.clock.copy()
            own.position = position
            placed.append(turn._replace(clock=own.copy()))
            rows.append(self.layout.turn_rows(turn.turn, own))
            position = own.position
        self.kept, self.clock = placed, clock.copy()
        self.clock.position = position
        self.to_stand = (self.clock.copy(), memory)
        self.cache.forget_context()
        for turn, own_rows in zip(placed, rows, strict=True):
            self._recall(turn.memory)
            self._read(own_rows)
        self._recall(memory)
        self.to_stand = None

    def standing(self) -> tuple[Clock, MemoryState | None]:
        """When the next turn begins, and what the memory holds."""
        if self.to_stand is not None:
            return self.to_stand
        return self.clock.copy(), None if self.cache.memory is None else self.cache.memory.state

    @contextlib.contextmanager
    def _whole_or_none(self, before: tuple[Clock, MemoryState | None]) -> Iterator[None]:
        """Whatever breaks off what is within, also Ctrl-C, the conversation stands where it did before: half a turn in
        the cache would be part of all that follows."""
        self.under_way = True
        try:
            yield
        except BaseException:
            self.restore(self.kept, *before)
            raise
        finally:
            self.under_way = False

    def _alone(
        self, steps: Generator[Wanted | Unread | np.ndarray, Tensor | None, str | None]
    ) -> Generator[np.ndarray, None, str | None]:
        """What `steps` yield, but for what they wait for, which they are given for this conversation alone."""
        sent = None
        with contextlib.closing(steps):
            while True:
                try:
                    found = steps.send(sent)
                except StopIteration as end:
                    return end.value
                sent = None
                if isinstance(found, Wanted | Unread):
                    try:
                        sent = self._done(found)
                    except BaseException as error:
                        steps.throw(error)  # closed instead, they would read the same row twice
                else:
                    yield found

    def _need_text_head(self, verb: str) -> None:
        if not self.model.config.text_head:
            raise ValueError(f"the model cannot {verb}: it was trained with text_head=False")

    def _heard(self, samples: np.ndarray | None, codes: Tensor | None) -> tuple[Tensor, np.ndarray | None]:
        """Codes of a turn given either way, and its samples where the memory needs them."""
        if (samples is None) == (codes is None):
            raise ValueError("give a turn either samples or codes")
        if codes is not None:
            self.layout.check_codes(codes)
        with torch.inference_mode():
            if codes is None:
                samples = np.ascontiguousarray(samples, dtype=np.float32)
                codes = self.tokenizer.encode(torch.from_numpy(samples)[None].to(self.device))[0].cpu()
            elif self.cache.memory is not None and len(codes):
                samples = self.tokenizer.decode(codes[None].to(self.device))[0].cpu().numpy()
        return codes, samples

    def _prosody(self, samples: np.ndarray | None, n_characters: int) -> Tensor:
        if self.cache.memory is None or samples is None:
            return torch.full((N_PROSODY,), torch.nan)
        return prosody_features(samples, n_characters)

    @torch.inference_mode()
    def _write_id(self, turn: Turn, hidden: Tensor) -> Rows:
        """Draw the next text id of a turn under way; its row. The last of `max_text_ids` is the end of the text."""
        s, first = self.sampling, len(turn.text_ids)
        logits = self.model.text_logits(hidden)
        logits[:, self.text_tokenizer.bos] = -torch.inf
        choice = int(draw(logits, s.text_temperature, s.text_top_k, self.speaker.generator))
        turn.text_ids.append(choice if first - turn.n_prompt < s.max_text_ids - 1 else self.text_tokenizer.eos)
        return self._on_device(self.layout.text_rows(turn.text_ids[-1:], turn.n_prompt, self.clock, first))

    def _done(self, asked: Wanted | Unread) -> Tensor:
        """What a turn under way waits for."""
        return self.speaker.continue_frames(*asked) if isinstance(asked, Wanted) else self._states(*asked)

    def _close(self, turn: Turn, speaker: int, frames: _Frames, before: tuple) -> None:
        """Read the rows that end a turn and let it join the conversation."""
        codes = frames.codes()
        if frames.unread is not None:  # the caller has stopped before it was
            self._states(frames.unread, self.cache)
        if len(codes) > frames.n_placed:
            self._read(self.layout.audio_row(codes, self.clock))
        self._read(self.layout.end_rows(codes, self.clock))
        heard = np.concatenate(frames.decoded) if frames.decoded else np.zeros(0, dtype=np.float32)
        n_characters = len(turn_text(self.text_tokenizer, speaker, turn.text_ids))
        turn = turn._replace(codes=codes, prosody=self._prosody(heard, n_characters))
        self.layout.end_turn(turn, self.clock)
        self._keep(turn, before)

    @torch.inference_mode()
    def _keep(self, turn: Turn, before: tuple[Clock, MemoryState | None], voice_of: int | None = None) -> None:
        self.model.end_turn(self.cache, turn.prosody[None].to(self.device))
        if voice_of is not None:
            self.unpin(voice_of)
        self.kept.append(KeptTurn(turn, *before, voice_of))

    def _read(self, rows: Rows) -> Tensor:
        """Run rows through the backbone behind what the cache holds; (1, D) state of the last one."""
        return self._states(self._on_device(rows), self.cache)

    def _on_device(self, rows: Rows) -> Rows:
        return rows.batch().to(self.device)

    @torch.inference_mode()
    def _states(self, rows: Rows, cache: CSMCache) -> Tensor:
        """(1, T) rows -> (1, D) of the last one."""
        return self.speaker.inference.hidden(rows, cache)[:, -1]

    def _make_room(self, needed: int, voice_of: int | None = None) -> None:
        """Drop whole oldest turns until `needed` more rows fit, and read the rest anew if any was dropped.

        Then more of them, but not the newest, until half of what pinned turns leave is free: the rest is read anew once
        in many turns. The pinned turn of `voice_of`, who is to have another, goes as any other.
        """
        if self.under_way:
            raise ValueError("a turn of this conversation is under way: read it to its end, or close() it, first")
        if self.to_stand is not None:
            self.restore(self.kept, *self.to_stand)
        limit, used = self.model.config.max_positions, self.clock.position
        lengths = [self.layout.turn_length(len(turn.text_ids), len(turn.codes)) for turn in self.turns]
        pinned = self.pinned_rows(but=voice_of)
        if needed + pinned > limit:
            beside = f" beside {pinned} rows of voices" if pinned else ""
            raise ValueError(
                f"a turn of {needed} rows (its text and {FRAME_RATE} a second of audio, of what is to be spoken up to "
                f"max_seconds={self.sampling.max_seconds}) does not fit the model's {limit} positions{beside}; "
                "shorten it"
            )
        if used + needed <= limit:
            return
        stay: list[KeptTurn] = []
        for n, kept in zip(lengths, self.kept, strict=True):
            more = 2 * used > limit + pinned and kept is not self.kept[-1]
            if kept.voice_of in (None, voice_of) and (more or used + needed > limit):
                used -= n
            else:
                stay.append(kept)
        dropped = len(self.kept) - len(stay)
        warnings.warn(f"{dropped} oldest turns left the context of {limit} positions", stacklevel=3)
        self.restore(stay, *self.standing())

    def _recall(self, state: MemoryState | None) -> None:
        """Let the next turn be read with this memory, if the model has one."""
        if self.cache.memory is not None:
            self.cache.memory.state, self.cache.memory.turn = state, None


class _Frames:
    """The frames of a turn being spoken: stage 1 now, stage 2 and the decoder when a batch is full."""

    def __init__(self, conversation: Conversation, speaker: int):
        self.c = conversation
        self.decoder = conversation.tokenizer.decoder_stream(1, conversation.shown_voice(speaker))
        self.lead_in = self.decoder.delay_samples
        self.first: list[Tensor] = []  # (k,) codes of stage 1, of every frame
        self.states: list[Tensor] = []  # (1, D) of those that wait for stage 2
        self.whole: list[Tensor] = []  # (K,)
        self.decoded: list[np.ndarray] = []
        self.n_placed = 0  # frames that have a row
        self.unread: Rows | None = None  # the row that the backbone has not read yet

    def begin(self, hidden: Tensor, codes: Tensor) -> bool:
        """(1, D) state and (1, k) codes of stage 1 of the next frame; False if it is the end of the turn."""
        whole = F.pad(codes[0], (0, self.c.layout.n_codebooks - codes.size(1)))
        if bool(self.c.layout.is_end_of_turn(whole)):
            return False
        self.first.append(codes[0])
        self.states.append(hidden)
        return True

    def codes(self) -> Tensor:
        """(n, K) of all frames; the acoustic codes of those that wait are 0 and not read before they are known."""
        K = self.c.speaker.n_codebooks
        waiting = [F.pad(codes, (0, K - len(codes))) for codes in self.first[len(self.whole) :]]
        codes = [*self.whole, *waiting]
        return torch.stack(codes).cpu() if codes else torch.empty(0, K, dtype=torch.int64)

    def wanted(self, all_of_them: bool) -> Wanted | None:
        """Stage 2 of the frames that wait, if they fill a batch; the first batches are small, to be heard early."""
        waiting, batch = len(self.states), min(self.c.acoustic_batch, max(1, len(self.whole)))
        if waiting == 0 or (not all_of_them and waiting < batch):
            return None
        return Wanted(torch.cat(self.states), torch.stack(self.first[-waiting:]), self.c.speaker.n_codebooks)

    @torch.inference_mode()
    def finish(self, codes: Tensor) -> np.ndarray:
        """(N, K) codes of the frames that waited; the samples that are new."""
        self.whole += list(codes)
        self.states = []
        samples = self.decoder.push(codes[None])[0].cpu().numpy()
        self.decoded.append(samples[self.lead_in :])
        self.lead_in = max(0, self.lead_in - len(samples))
        return self.decoded[-1]

    @torch.inference_mode()
    def flush(self) -> np.ndarray:
        """What the decoder has kept of the turn's end."""
        if not self.whole:
            return np.zeros(0, dtype=np.float32)
        self.decoded.append(self.decoder.flush()[0].cpu().numpy())
        return self.decoded[-1]
