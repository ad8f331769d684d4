"""Codes and prosody of every collected turn, made once per tokenizer and mapped from disk.

    data/tokens/<fingerprint>/codes-000.bin     frames of K codes one after the other, uint16, little-endian
    data/tokens/<fingerprint>/index-000.jsonl   a line per shard: where its turns lie; the only truth

Both files only grow; codes are on disk before their line is, so a kill loses at most the shard under way. Several
processes, also on several machines, each write a pair of their own; all pairs are read as one cache. 100 hours at 32
codebooks take 288 MB. Letters: T frames, K codebooks, F features.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import filelock
import numpy as np
import torch
from tqdm import tqdm

from audio import PEAK_DBFS, SAMPLE_RATE, TARGET_LUFS, read_audio
from audio_tokenizer import AudioTokenizer
from conversations import loudness_gains
from prosody import prosody_features
from turn_shards import LedgerEntry, cut_torn_line, read_turns, refuse_damaged, whole_shards

TOKEN_SCHEMA = 3
CODE = np.dtype("<u2")


class TokenCache:
    """What there is for the turns of a data folder; made on first use. ValueError: the cache on disk is damaged."""

    def __init__(self, data_dir: Path, tokenizer: AudioTokenizer, device: torch.device | str = "cpu"):
        self.entries = whole_shards(data_dir)
        folder = cache_folder(data_dir, tokenizer)
        tokenise(data_dir, tokenizer, device, entries=self.entries)
        content = " ".join([folder.name, *(entry.sha256 for entry in self.entries)])
        self.fingerprint = hashlib.sha256(content.encode()).hexdigest()[:16]  # of recipe and data
        wanted = {entry.sha256 for entry in self.entries}
        self.codes: dict[str, np.ndarray] = {}  # utt_id -> (T, K) uint16, a view of the mapped file
        self.prosody: dict[str, np.ndarray] = {}  # utt_id -> (F,) float32, see `prosody_features`
        for index in sorted(folder.glob("index-*.jsonl")):
            self._map(index, wanted)

    def _map(self, index: Path, wanted: set[str]) -> None:
        path = codes_beside(index)
        lines = [line for line in read_index(index) if line["shard"] in wanted]
        if not lines:
            return
        K = lines[0]["codebooks"]
        size = path.stat().st_size if path.is_file() else 0
        needed = max(line["first"] + sum(line["lengths"]) for line in lines) * K * CODE.itemsize
        if size < needed:
            raise ValueError(f"{path} is damaged: {size} bytes, {needed} expected; delete it and {index.name}")
        codes = np.memmap(path, CODE, "r", shape=(needed // (K * CODE.itemsize), K))  # a torn end is not looked at
        for line in lines:
            ends = line["first"] + np.cumsum(line["lengths"])
            for utt_id, end, length, prosody in zip(line["ids"], ends, line["lengths"], line["prosody"], strict=True):
                self.codes[utt_id] = np.asarray(codes[end - length : end])
                self.prosody[utt_id] = np.array(prosody, dtype=np.float32)


def cache_folder(data_dir: Path, tokenizer: AudioTokenizer) -> Path:
    """Named by all that decides the codes: a tokenizer of other weights has a folder of its own."""
    recipe = f"{tokenizer.fingerprint()} {SAMPLE_RATE} soxr-HQ {TARGET_LUFS} {PEAK_DBFS} {TOKEN_SCHEMA}"
    folder = data_dir / "tokens" / hashlib.sha256(recipe.encode()).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def codes_beside(index: Path) -> Path:
    return index.with_name(index.name.replace("index-", "codes-")).with_suffix(".bin")


def read_index(index: Path) -> list[dict]:
    """All whole lines. ValueError: one is damaged."""
    lines = []
    for content in index.read_bytes().split(b"\n")[:-1]:
        try:
            line = json.loads(content)
            if len({len(line[name]) for name in ("ids", "lengths", "prosody")}) > 1 or line["codebooks"] < 1:
                raise ValueError("a line that does not fit itself")
            lines.append({**line, "first": int(line["first"]), "shard": str(line["shard"])})
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{index} is damaged ({error!r}); delete it, it will be made again") from error
    return lines


def tokenise(
    data_dir: Path,
    tokenizer: AudioTokenizer,
    device: torch.device | str = "cpu",
    part: int = 0,
    of: int = 1,
    entries: list[LedgerEntry] | None = None,
) -> int:
    """Make what is missing of the shards (or of some `entries`) that fall to this part; the number of shards made.

    A second process that wants the same part waits, and finds the work done.
    """
    entries = whole_shards(data_dir) if entries is None else entries
    folder = cache_folder(data_dir, tokenizer)
    index = folder / f"index-{part:03d}.jsonl"
    with filelock.FileLock(index.with_suffix(".lock")):
        cut_torn_line(index)
        lines = {path: read_index(path) for path in folder.glob("index-*.jsonl")}
        there = {line["shard"] for listed in lines.values() for line in listed}
        own = [entry for entry in entries if int(entry.sha256[:8], 16) % of == part]
        missing = [entry for entry in own if entry.sha256 not in there]
        gains = loudness_gains(read_turns(data_dir, False, entries)) if missing else {}
        first = max((line["first"] + sum(line["lengths"]) for line in lines.get(index, ())), default=0)
        for entry in tqdm(missing, desc="tokenising", unit="shard", dynamic_ncols=True, disable=not missing):
            first += append_shard(index, first, data_dir, entry, tokenizer, gains, device)
    return len(missing)


@torch.inference_mode()
def append_shard(
    index: Path,
    first: int,
    data_dir: Path,
    entry: LedgerEntry,
    tokenizer: AudioTokenizer,
    gains: dict[str, float],
    device: torch.device | str,
) -> int:
    """Codes first, from frame `first`, then the line that says where they are; the number of frames added.

    All is on disk when this returns.
    """
    refuse_damaged(data_dir, entry)
    ids, codes, prosody = [], [], []
    for turn in read_turns(data_dir, True, [entry]):
        samples = read_audio(turn.audio)[0] * np.float32(gains[turn.utt_id])
        codes.append(tokenizer.encode(torch.from_numpy(samples)[None].to(device))[0].cpu().numpy().astype(CODE))
        prosody.append(prosody_features(samples, len(turn.text)).tolist())
        ids.append(turn.utt_id)
    K = codes[0].shape[1]
    line = {"shard": entry.sha256, "codebooks": K, "first": first, "ids": ids}
    line |= {"lengths": [len(c) for c in codes], "prosody": prosody}
    append(codes_beside(index), first * K * CODE.itemsize, np.concatenate(codes).tobytes())
    append(index, index.stat().st_size if index.is_file() else 0, (json.dumps(line) + "\n").encode())
    return sum(line["lengths"])


def append(path: Path, place: int, content: bytes) -> None:
    """Write at `place`, over what an interrupted run left behind it, to the disk. ValueError: the file ends before."""
    if (size := path.stat().st_size if path.is_file() else 0) < place:
        raise ValueError(f"{path} is damaged: {size} bytes, {place} expected; delete {path.parent}, it is made again")
    with open(path, "r+b" if path.is_file() else "w+b") as file:
        file.seek(place)
        file.write(content)
        file.truncate()
        file.flush()
        os.fsync(file.fileno())
