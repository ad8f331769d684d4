"""Talking with a model in a terminal: lines that are spoken, commands for voices, files and draws.

Reads any text stream and writes plain lines, so that it can be piped; plays what is spoken where a sound device and the
package sounddevice are.
"""

from __future__ import annotations

import contextlib
import itertools
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from audio import SAMPLE_RATE, at_loudness, read_audio, write_wav
from command_line import EXIT_DONE, EXIT_SIGTERM, MissingRequirement, StopSignals, describe, exit_code_of
from conversation_state import load_conversation, load_notes, save_conversation
from conversations import choose_clip, read_chosen
from generation import VOICES, Conversation, Reply
from spoken_conversations import Engine, speak_whole
from text_tokenizer import turn_text
from turn_shards import TurnRecord, ledgers, read_turns

HELP = """\
  TEXT                 the current speaker says it; "1: TEXT" makes speaker 1 the current one
  /reply [N]           speaker N (the next one) answers with words and voice of the model's own
  /listen FILE [TEXT]  the current speaker said this; without TEXT the model writes it down
  /record SECONDS      the same from the microphone
  /voice               lists the voices of the collected data and their styles
  /voice NAME [STYLE]  the current speaker is to sound like a clip of that voice
  /voice FILE TEXT     ... or like this file, in which TEXT is said
  /style STYLE         the current speaker's voice, from a clip in that style
  /seed N              begin the random draws anew; the same seed says the same
  /reset               forget all turns but the voices
  /save FILE, /load FILE   the whole conversation
  /help, /quit         (Ctrl-C while somebody speaks: interrupts him, what was said is kept)"""
BARS = " ▁▂▃▄▅▆▇█"
WIDTH = 60  # characters of a waveform


def waveform(samples: np.ndarray) -> str:
    """(N,) samples -> their loudness over time, one character for each of `WIDTH` equal parts."""
    if not len(samples):
        return ""
    parts = np.array_split(samples, min(WIDTH, len(samples)))
    level = np.array([np.sqrt(np.mean(part**2)) for part in parts])
    steps = level / max(1e-4, level.max()) * (len(BARS) - 1)
    return "".join(BARS[round(step)] for step in steps.tolist())


def sound_device(kind: str):
    """The package sounddevice, or None where it, its library or a device of the kind, input or output, is missing."""
    try:
        import sounddevice

        sounddevice.query_devices(kind=kind)
    except Exception:  # PortAudioError is no kind of OSError, and importing may raise it already
        return None
    return sounddevice


class Chat:
    """A conversation under way, and who speaks next."""

    def __init__(self, engine: Engine, out: Path, data: Path, play: bool, say: Callable[[str], None] = print):
        self.engine, self.out, self.data, self.say = engine, out, data, say
        self.seed, self.speaker = engine.voice.seed, 0
        numbers = (path.name.partition("-")[0] for path in out.glob("*-speaker-*.wav"))
        self.number = max((int(number) for number in numbers if number.isdecimal()), default=0)
        self.voices: dict[int, str] = {}  # speaker -> name; their clips are the pinned turns of `talk`
        self.device = sound_device("output") if play else None
        self.records: dict[Path, list[TurnRecord]] | None = None  # of collected data, read when they are asked for
        self.exit_code = EXIT_DONE
        self.talk = engine.conversation(self.seed)
        if play and self.device is None:
            say("no sound device (or no package sounddevice): replies are written to files only")

    def begin_anew(self) -> Conversation:
        """A conversation in which only the voices of this one were heard."""
        talk = self.engine.conversation(self.seed)
        for speaker, turn in self.talk.voices.items():
            text = turn_text(self.engine.text_tokenizer, speaker, turn.text_ids)
            talk.add_turn(speaker, text, codes=turn.codes, pinned=True)
        return talk

    def run(self, lines: Iterator[str]) -> int:
        """Take line after line until they end or one says /quit; what a user can mend is said in one line."""
        for line in lines:
            if line.strip() == "/quit":
                break
            try:
                with warnings.catch_warnings(record=True) as notices:
                    warnings.simplefilter("always")
                    self.take(line.strip())
            except KeyboardInterrupt:
                self.say("stopped")
            except Exception as error:
                if exit_code_of(error) is None:
                    raise
                self.say(f"error: {describe(error)}")
            for notice in notices:
                self.say(f"note: {notice.message}")
            if self.exit_code != EXIT_DONE:
                break
        return self.exit_code

    def take(self, line: str) -> None:
        """One line."""
        if named := re.match(r"(\d{1,2}): +", line):  # not 10:30
            self.speaker, line = int(named[1]), line[named.end() :]
        if not line.startswith("/"):
            if line:
                self.speak(self.speaker, line)
            return
        name, _, rest = line[1:].partition(" ")
        command = getattr(self, f"do_{name}", None)
        if command is None:
            raise ValueError(f"unknown command /{name}; /help lists them")
        command(rest.strip())

    def speak(self, speaker: int, text: str | None) -> None:
        """Say it, playing each chunk as it comes; Ctrl-C interrupts the speaker, not the program."""
        self.introduce(speaker)
        with StopSignals() as stop, self.player() as play:

            def hear(samples: np.ndarray) -> bool:
                play(samples)
                return stop.received is None

            reply = speak_whole(self.talk, speaker, text, self.engine.voice.raw_text, hear=hear)
        self.number += 1
        path = self.out / f"{self.number:03d}-speaker-{speaker}.wav"
        if len(reply.samples):
            write_wav(path, reply.samples)
        self.show(speaker, reply, path, stop.received is not None)
        self.exit_code = EXIT_SIGTERM if stop.exit_code == EXIT_SIGTERM else self.exit_code

    def show(self, speaker: int, reply: Reply, path: Path, interrupted: bool) -> None:
        """What was said and how fast."""
        self.say(f"speaker {speaker}: {reply.text}")
        if not len(reply.samples):
            return
        end = "interrupted" if interrupted else "" if reply.ended else "cut at --max_seconds"
        times = f"{reply.duration:.1f} s, first audio {1000 * reply.seconds_to_first_audio:.0f} ms, "
        times += f"real-time factor {reply.real_time_factor:.2f}"
        self.say(f"  {waveform(reply.samples)}")
        self.say("  " + ", ".join(part for part in (times, end, str(path)) if part))

    @contextlib.contextmanager
    def player(self) -> Iterator[Callable[[np.ndarray], None]]:
        """Where chunks go to be heard."""
        form = {"samplerate": SAMPLE_RATE, "channels": 1, "dtype": "float32"}
        with contextlib.ExitStack() as stack:
            stream = self.sounding(lambda: stack.enter_context(self.device.OutputStream(**form)))
            yield lambda samples: self.sounding(lambda: stream.write(np.ascontiguousarray(samples[:, None])))

    def sounding(self, do: Callable):
        """Do something with the sound device; one that fails is left alone from then on, and the chat goes on."""
        if self.device is None:
            return None
        try:
            return do()
        except self.device.PortAudioError as error:
            self.device = None
            self.say(f"the sound device does not play ({error}): replies are written to files only")

    # ---- commands ----------------------------------------------------------------------------------------------------

    def do_help(self, rest: str) -> None:
        self.say(HELP)

    def do_reply(self, rest: str) -> None:
        self.speak(whole_number(rest, "/reply") if rest else (self.speaker + 1) % 2, None)

    def do_listen(self, rest: str) -> None:
        file, text = file_and_text(rest, "/listen FILE [TEXT]")
        self.hear(read_audio(file)[0], text)

    def do_record(self, rest: str) -> None:
        if (device := sound_device("input")) is None:
            raise MissingRequirement("there is no microphone, or no package: pip install sounddevice")
        try:
            seconds = float(rest)
        except ValueError:
            seconds = 0.0
        if not 0.1 <= seconds <= 60:
            raise ValueError(f"/record {rest}: expected seconds from 0.1 to 60, as /record 5")
        try:
            samples = device.rec(round(seconds * SAMPLE_RATE), samplerate=SAMPLE_RATE, channels=1, dtype="float32")
            device.wait()
        except device.PortAudioError as error:
            raise MissingRequirement(f"the microphone does not record ({error})") from error
        self.hear(samples[:, 0], None)

    def hear(self, samples: np.ndarray, text: str | None) -> None:
        """Take in what the current speaker said, brought to the level that models know."""
        samples = at_loudness(samples)
        if text is None:
            text = self.talk.listen(self.speaker, samples=samples)
        else:
            self.talk.add_turn(self.speaker, text, samples=samples)
        self.say(f"speaker {self.speaker} (heard, {len(samples) / SAMPLE_RATE:.1f} s): {text}")

    def do_voice(self, rest: str) -> None:
        if not rest:
            self.list_voices()
        elif Path(split_file(rest)[0]).is_file():
            file, text = file_and_text(rest, "/voice FILE TEXT")
            if text is None:
                raise ValueError(f"/voice {file} needs what is said in it: /voice FILE TEXT")
            self.use_voice(file, at_loudness(read_audio(file)[0]), text)
        else:
            name, style = split_file(rest)
            self.use_voice(*self.find_voice(name, style or None))

    def do_style(self, rest: str) -> None:
        self.introduce(self.speaker)
        if self.speaker not in self.voices or not rest:
            raise ValueError("/style STYLE needs a voice of the collected data first: /voice NAME")
        self.use_voice(*self.find_voice(self.voices[self.speaker], rest))

    def do_seed(self, rest: str) -> None:
        self.seed = whole_number(rest, "/seed")
        self.talk.speaker.generator.manual_seed(self.seed)

    def do_reset(self, rest: str) -> None:
        self.talk = self.begin_anew()
        self.say(f"a new conversation; voices: {', '.join(self.voices.values()) or 'none'}")

    def do_save(self, rest: str) -> None:
        notes = {"speaker": self.speaker, "seed": self.seed, "voices": self.voices}
        save_conversation(self.talk, needed(rest, "/save FILE"), notes)
        self.say(f"{len(self.talk.turns)} turns in {rest}")

    def do_load(self, rest: str) -> None:
        path = needed(rest, "/load FILE")
        parts = self.engine.model, self.engine.tokenizer, self.engine.text_tokenizer
        talk = load_conversation(path, *parts, sampling=self.engine.voice.sampling)
        notes = {"speaker": self.speaker, "seed": self.seed, "voices": {}} | load_notes(path)
        try:
            voices = {int(speaker): str(name) for speaker, name in notes["voices"].items()}
            self.speaker, self.seed = int(notes["speaker"]), int(notes["seed"])
        except (AttributeError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is damaged (notes of the chat: {error})") from error
        self.talk, self.voices = talk, voices
        self.say(f"{len(self.talk.turns)} turns from {rest}")

    # ---- voices ------------------------------------------------------------------------------------------------------

    def introduce(self, speaker: int) -> None:
        """Let a speaker who has said nothing yet sound as the checkpoint has it, if it has a voice for him."""
        if (name := self.engine.introduce(self.talk, speaker)) is not None:
            self.voices[speaker] = name
            self.say(f"speaker {speaker} sounds like {name}; /voice lists others")

    def use_voice(self, name: str, samples: np.ndarray, text: str) -> None:
        """Let the current speaker sound like a clip from now on."""
        self.talk.add_turn(self.speaker, text, samples=samples, pinned=True)
        self.voices[self.speaker] = name
        self.say(f"speaker {self.speaker} sounds like {name}: {text}")

    def collected(self) -> dict[Path, list[TurnRecord]]:
        """All turns of the collected data, and of the clips beside the weights, without their bytes."""
        if self.records is None:
            own = Path(self.engine.voice.checkpoint) / VOICES
            folders = [folder for folder in (self.data, own) if ledgers(folder)] or [self.data]
            self.records = {folder: list(read_turns(folder, with_audio=False)) for folder in folders}
        return self.records

    def list_voices(self) -> None:
        styles: dict[str, set[str]] = {}
        for record in itertools.chain(*self.collected().values()):
            styles.setdefault(record.speaker_id, set()).add(record.style or "no style")
        for name, found in sorted(styles.items()):
            self.say(f"  {name}: {', '.join(sorted(found))}")

    def find_voice(self, name: str, style: str | None) -> tuple[str, np.ndarray, str]:
        """A clip of a collected voice: its whole name, samples and text."""
        problems = []
        for folder, turns in self.collected().items():
            try:
                chosen = choose_clip(turns, name, style)
            except ValueError as error:
                problems.append(error)
                continue
            (samples,) = read_chosen(folder, turns, [chosen])
            return chosen.speaker_id, samples, chosen.text
        raise ValueError(f"{problems[-1]}; /voice lists the voices, or give a file")


def whole_number(text: str, command: str) -> int:
    if not text.isdigit() or int(text) >= 2**32:
        raise ValueError(f"{command} {text}: expected a whole number of 0 or more")
    return int(text)


def needed(text: str, usage: str) -> Path:
    if not text:
        raise ValueError(f"expected {usage}")
    return Path(text)


def split_file(text: str) -> tuple[str, str]:
    """A file's name, in quotes if it holds spaces, and the rest of the line."""
    if text[:1] in ("'", '"') and text[0] in text[1:]:
        name, _, rest = text[1:].partition(text[0])
    else:
        name, _, rest = text.partition(" ")
    return name, rest.strip()


def file_and_text(text: str, usage: str) -> tuple[str, str | None]:
    name, rest = split_file(text)
    if not name:
        raise ValueError(f"expected {usage}")
    return name, rest or None
