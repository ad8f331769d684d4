"""Which phone is spoken when: an optional target of the semantic codebooks, from Praat TextGrids beside the data.

A clip has `<its id, with - for what a file name may not hold>.TextGrid`, whose interval tier "phones" names them. Where
there is none, pocketsphinx aligns the text with the sound (English, words of CMUdict) and leaves one there. So the
files of another aligner, for example of the Montreal Forced Aligner, count before its own. Letters: N samples.
"""

from __future__ import annotations

import importlib.util
import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from audio import SAMPLE_RATE, resample, to_pcm16
from command_line import MissingRequirement
from spoken_text import has_digits

TIER = "phones"
SILENCES = ("", "SIL", "sil", "sp", "spn", "+SPN+", "+NSN+")  # what aligners call what is no phone
RATE = 16_000  # Hz, of pocketsphinx's acoustic model
STEP_S = 0.01  # its frames


class Interval(NamedTuple):
    begin_s: float
    end_s: float
    phone: str  # without the digit of its stress; "" is silence


class Clip(NamedTuple):
    utt_id: str
    lang: str  # BCP-47
    text: str
    pcm: np.ndarray  # (N,) int16 at 24 kHz


def tokens_of(text: str) -> list[str]:
    return re.findall(r"(?:[^\W\d_]|')+", text.lower().replace("\u2019", "'"))


def hear(decoder: Any, pcm: bytes) -> None:
    """Let a pocketsphinx decoder go through all of an utterance, 16-bit samples at `RATE`."""
    decoder.start_utt()
    decoder.process_raw(pcm, full_utt=True)
    decoder.end_utt()


def file_name(utt_id: str) -> str:
    return re.sub(r"[^\w.-]", "-", utt_id) + ".TextGrid"


def named(label: str) -> str:
    return "" if label.strip() in SILENCES else label.strip().rstrip("012")


def read_phones(path: Path) -> list[Interval]:
    """The intervals of a TextGrid. ValueError: not one, or without a tier of phones."""
    from praatio import textgrid
    from praatio.utilities.errors import PraatioException

    try:
        grid = textgrid.openTextgrid(str(path), includeEmptyIntervals=True, reportingMode="silence")
        entries = grid.getTier(TIER).entries if TIER in grid.tierNames else None
    except (PraatioException, ValueError, IndexError, KeyError) as error:  # a torn file ends in any of them
        raise ValueError(f"{path} is no whole TextGrid; delete it, or write it anew") from error
    if not entries or not hasattr(entries[0], "end"):
        raise ValueError(f'{path} has no intervals in a tier "{TIER}"')
    return [Interval(entry.start, entry.end, named(entry.label)) for entry in entries]


def write_phones(path: Path, intervals: Sequence[Interval], seconds: float) -> None:
    from praatio import textgrid

    grid = textgrid.Textgrid()
    grid.addTier(textgrid.IntervalTier(TIER, list(intervals), 0, seconds))
    partial = path.with_suffix(".partial")
    grid.save(str(partial), format="long_textgrid", includeBlankSpaces=True)
    os.replace(partial, path)


class Aligner:
    """Words of a text and their phones, placed in time by pocketsphinx; about 0.07 s per second of speech."""

    def __init__(self):
        import pocketsphinx

        self.decoder = pocketsphinx.Decoder(lm=None, bestpath=False, loglevel="FATAL")

    def align(self, clip: Clip) -> list[Interval] | str:
        """Intervals, or why there are none."""
        words = tokens_of(clip.text)
        if not clip.lang.startswith("en") or has_digits(clip.text):
            return "not English in letters"
        if not words or any(self.decoder.lookup_word(word) is None for word in words):
            return "with a word the dictionary lacks"
        pcm = to_pcm16(resample(clip.pcm / np.float32(32768), SAMPLE_RATE, RATE)).astype("<i2").tobytes()
        try:
            self.decoder.set_align_text(" ".join(words))
            hear(self.decoder, pcm)
            self.decoder.set_alignment()  # of phones, within the words found
            hear(self.decoder, pcm)
            phones = [
                (phone.start, phone.start + phone.duration, phone.name)
                for phone in self.decoder.get_alignment().phones()
            ]
        except (RuntimeError, AttributeError):  # how it says that the words are not to be found in the sound
            return "whose text is not what is heard"
        return [Interval(begin * STEP_S, end * STEP_S, named(name)) for begin, end, name in phones]


def align_clips(clips: Sequence[Clip], folder: Path) -> list[list[Interval]]:
    """The intervals of every clip, from `folder` where they are, else made and left there; none where none can be made.

    Says how many have none, and why. ValueError: all. MissingRequirement: no package for it.
    """
    missing = [clip for clip in clips if not (folder / file_name(clip.utt_id)).is_file()]
    for package in ("praatio", "pocketsphinx") if missing else ("praatio",):
        if importlib.util.find_spec(package) is None:
            raise MissingRequirement(f"phones need {package}: python setup_environment.py --extras eval")
    folder.mkdir(parents=True, exist_ok=True)
    aligner, found, without = Aligner() if missing else None, [], Counter()
    for clip in tqdm(clips, desc="aligning phones", unit="clip"):
        path = folder / file_name(clip.utt_id)
        if not path.is_file():
            intervals = aligner.align(clip)
            if isinstance(intervals, str):
                without[intervals] += 1
                found.append([])
                continue
            write_phones(path, intervals, len(clip.pcm) / SAMPLE_RATE)
        found.append(read_phones(path))  # also what was just written: a run that goes on must be told the same
    reasons = ", ".join(f"{n} {reason}" for reason, n in without.most_common())
    if without.total() == len(clips):
        raise ValueError(f"no clip has phones ({reasons or 'no clips'}); put TextGrids into {folder}")
    if without:
        print(f"phones of {len(clips) - without.total()} of {len(clips)} clips; without: {reasons}")
    return found
