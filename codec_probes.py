"""What the codes of a tokenizer tell of the words and of the speaker: small probes, the same for every part of them.

Clips are split by conversation (`split_group`), so the probes are fitted and measured on the same speakers in other
conversations. Held-out speakers that the fitted clips lack are left out of the speaker probe and counted.

Letters: B batch, T frames, K codebooks, V codes per codebook, U characters, C clips.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchaudio.functional import edit_distance
from tqdm import tqdm

from codec_batches import SPREAD, can_be_aligned, character_ids, letters_of
from speech_metrics import (
    Figure,
    Item,
    bootstrap,
    code_histograms,
)
from spoken_text import has_digits
from turn_shards import is_named

PROBE_STEPS = 800
PROBE_BATCH = 6  # small batches and many steps get further in the same time
PROBE_WIDTH = 96
PROBE_LR = 1e-2
RIDGE = 0.1  # of the speaker probe, in units of the mean squared length of its inputs


@dataclass(frozen=True, kw_only=True)
class Gate:
    """One row of the table. Without a threshold it is only reported; without a value `note` says why."""

    name: str
    value: float | None
    sense: str = ""  # ">=" or "<="
    threshold: float | None = None
    low: float | None = None  # 95 % interval over conversations
    high: float | None = None
    n: int  # of what `how` says
    how: str
    note: str = ""

    @property
    def passed(self) -> bool | None:
        """None: not measured, or only reported."""
        if self.value is None or self.threshold is None:
            return None
        return self.value >= self.threshold if self.sense == ">=" else self.value <= self.threshold

    @property
    def verdict(self) -> str:
        if self.value is None:
            return "not measured"
        return {True: "passed", False: "FAILED", None: "reported"}[self.passed]


class Coded(NamedTuple):
    """A clip and its codes."""

    conversation: str
    speaker: str
    text: str
    samples: np.ndarray  # (N,)
    codes: np.ndarray  # (T, K)
    language: str = "en"


def from_figure(name: str, figure: Figure, how: str, sense: str = "", threshold: float | None = None) -> Gate:
    """A gate on a figure; a figure without a value gives the reasons that it counted."""
    reasons = ", ".join(f"{count} clips: {reason}" for reason, count in figure.excluded.items())
    note = f"left out, {reasons}" if reasons else ""
    if figure.value is None:
        note = f"not measured: {reasons or 'no clip'}"
    interval = {"low": figure.low, "high": figure.high}
    return Gate(
        name=name, value=figure.value, sense=sense, threshold=threshold, **interval, n=figure.n, how=how, note=note
    )


def needs(name: str, reason: str, how: str, sense: str = "", threshold: float | None = None) -> Gate:
    """A gate whose package is missing."""
    note = f"not measured: needs {reason.replace(' not installed', '')}"
    return Gate(name=name, value=None, sense=sense, threshold=threshold, n=0, how=how, note=note)


def look_up(clips: Sequence[Coded], tables: list[Tensor], books: slice) -> list[Tensor]:
    """(T, D) of each clip: the vectors of its codes, summed over the codebooks of one stack."""
    chosen = list(enumerate(tables))[books]
    return [sum(table[torch.from_numpy(clip.codes[:, k])] for k, table in chosen) for clip in clips]


class CharacterProbe(nn.Module):
    """Characters from the frames of one stack: 4 sub-frames a frame, convolutions, CTC."""

    def __init__(self, dim: int, n_characters: int):
        super().__init__()
        self.lift = nn.Sequential(nn.Linear(dim, PROBE_WIDTH), nn.LayerNorm(PROBE_WIDTH))
        self.spread = nn.Linear(PROBE_WIDTH, SPREAD * PROBE_WIDTH)
        self.mix = nn.Sequential(
            nn.GELU(),
            nn.Dropout(0.1),
            nn.Conv1d(PROBE_WIDTH, PROBE_WIDTH, 5, padding=2),
            nn.GELU(),
            nn.Dropout(0.1),
            nn.Conv1d(PROBE_WIDTH, PROBE_WIDTH, 5, padding=2),
            nn.GELU(),
        )
        self.head = nn.Linear(PROBE_WIDTH, n_characters + 1)

    def forward(self, frames: Tensor, live: Tensor) -> Tensor:
        """(B, T, D), (B, T) frames that are not padding -> (B, SPREAD * T, characters + blank) log-probabilities."""
        fine = (
            self.spread(self.lift(frames) * live[..., None]).unflatten(2, (SPREAD, -1)).flatten(1, 2)
        )  # (B, SPREAD * T, width)
        fine = self.mix(fine.transpose(1, 2)).transpose(1, 2)
        return self.head(fine).log_softmax(dim=-1)


def fit_character_probe(
    frames: list[Tensor], characters: list[np.ndarray], n_characters: int, seed: int
) -> CharacterProbe:
    """`PROBE_STEPS` steps of AdamW on random clips; a function of its arguments alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        probe = CharacterProbe(frames[0].size(1), n_characters)
        optimizer = torch.optim.AdamW(probe.parameters(), lr=PROBE_LR, betas=(0.9, 0.98))
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PROBE_LR, PROBE_STEPS + 1, pct_start=0.1)
        random = np.random.default_rng(seed)
        for _ in tqdm(range(PROBE_STEPS), desc="fitting a character probe", unit="step"):
            chosen = random.integers(len(frames), size=PROBE_BATCH)
            padded = nn.utils.rnn.pad_sequence([frames[i] for i in chosen], batch_first=True)  # (B, T, D)
            n_frames = torch.tensor([len(frames[i]) for i in chosen])
            live = torch.arange(padded.size(1)) < n_frames[:, None]  # (B, T)
            targets = torch.from_numpy(np.concatenate([characters[i] for i in chosen]))
            lengths = torch.tensor([len(characters[i]) for i in chosen])
            log_probabilities = probe(padded, live).transpose(0, 1)  # (SPREAD * T, B, characters + blank)
            nats = F.ctc_loss(log_probabilities, targets, SPREAD * n_frames, lengths, reduction="sum")
            optimizer.zero_grad(set_to_none=True)
            (nats / lengths.sum()).backward()
            nn.utils.clip_grad_norm_(probe.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    return probe.eval()


@torch.inference_mode()
def read_characters(probe: CharacterProbe, frames: Tensor) -> list[int]:
    """(T, D) -> the best path: repeats merged, blanks dropped."""
    best = probe(frames[None], torch.ones(1, len(frames), dtype=torch.bool))[0].argmax(dim=-1)  # (SPREAD * T,)
    return [i for i in torch.unique_consecutive(best).tolist() if i]


def character_gates(
    fit: Sequence[Coded], held_out: Sequence[Coded], n_semantic: int, tables: list[Tensor], seed: int
) -> list[Gate]:
    """The same probe on the semantic and on the acoustic codes: where the words are."""
    alphabet = letters_of(clip.text for clip in (*fit, *held_out))
    told = [[clip for clip in clips if not has_digits(clip.text)] for clips in (fit, held_out)]
    spelt, asked_all = ([(clip, character_ids(clip.text, alphabet)) for clip in clips] for clips in told)
    learnt = [(clip, ids) for clip, ids in spelt if can_be_aligned(ids, len(clip.codes))]
    asked = [(clip, ids) for clip, ids in asked_all if len(ids)]
    names = ("CER of the probe, semantic", "CER of the probe, acoustic", "CER of the probe, semantic less acoustic")
    how = f"{PROBE_STEPS} steps on {len(learnt)} clips, greedy CTC; n: held-out clips"
    bound = {"sense": "<=", "threshold": -0.15}
    if not learnt or not asked:
        note = "not measured: no clip with a text that fits its frames, and no digits"
        return [Gate(name=names[2], value=None, **bound, n=0, how=how, note=note)]
    errors = []  # of each stack, one per clip
    for books in (slice(0, n_semantic), slice(n_semantic, None)):
        frames, new = (look_up([clip for clip, _ in pairs], tables, books) for pairs in (learnt, asked))
        spread, mean = torch.std_mean(torch.cat(frames), dim=0)  # (D,)
        frames, new = ([(x - mean) / spread.clamp(min=1e-6) for x in part] for part in (frames, new))
        probe = fit_character_probe(frames, [ids for _, ids in learnt], len(alphabet), seed)
        errors.append([edit_distance(ids, read_characters(probe, x)) for (_, ids), x in zip(asked, new, strict=True)])
    units = [(clip.conversation, len(ids)) for clip, ids in asked]
    figures = paired_figures(units, *errors, seed)
    note = "neither probe reads: too few clips" if min(figures[0].value, figures[1].value) > 0.9 else ""
    gates = [from_figure(names[0], figures[0], how), from_figure(names[1], figures[1], how)]
    return [*gates, dataclasses.replace(from_figure(names[2], figures[2], f"{how}, paired", **bound), note=note)]


def paired_figures(
    units: Sequence[tuple[str, int]], semantic: Sequence[float], acoustic: Sequence[float], seed: int
) -> tuple[Figure, Figure, Figure]:
    """(conversation, weight) of each clip and what was counted in both stacks -> both rates and their difference."""
    rows = list(zip(units, semantic, acoustic, strict=True))
    return (
        bootstrap([Item(name, s, weight) for (name, weight), s, _ in rows], seed=seed),
        bootstrap([Item(name, a, weight) for (name, weight), _, a in rows], seed=seed),
        bootstrap([Item(name, s - a, weight) for (name, weight), s, a in rows], seed=seed),
    )


def pooled(clips: Sequence[Coded], books: slice, n_codes: int) -> Tensor:
    """(C, K * V) square roots of the shares of every code, of length 1 for any number of codebooks."""
    counts = np.stack([code_histograms(clip.codes[:, books], n_codes).ravel() for clip in clips])
    shares = torch.from_numpy(counts).double()
    return (shares / shares.sum(dim=1, keepdim=True)).sqrt()


def predict_speakers(fit: Tensor, speakers: Tensor, held_out: Tensor) -> Tensor:
    """(C, D), (C,) numbers, (C', D) -> (C',): ridge regression on one-hot speakers, the largest output.

    Solved among the C clips, which are fewer than the D inputs.
    """
    centre = fit.mean(dim=0)
    fit, held_out = fit - centre, held_out - centre
    targets = F.one_hot(speakers).double()  # (C, speakers)
    base = targets.mean(dim=0)
    gram = fit @ fit.T  # (C, C)
    strength = RIDGE * gram.diagonal().mean().clamp(min=1e-12)
    weights = torch.linalg.solve(gram + strength * torch.eye(len(gram), dtype=gram.dtype), targets - base)
    return (held_out @ fit.T @ weights + base).argmax(dim=1)


def speaker_gates(
    fit: Sequence[Coded], held_out: Sequence[Coded], n_semantic: int, n_codes: int, seed: int
) -> list[Gate]:
    """The same linear probe on mean-pooled semantic and acoustic codes: where the voice is."""
    speakers = sorted({clip.speaker for clip in fit if is_named(clip.speaker)})
    fit = [clip for clip in fit if clip.speaker in speakers]
    known = [clip for clip in held_out if clip.speaker in speakers]
    names = ("speaker probe, semantic", "speaker probe, acoustic", "speaker probe, semantic less acoustic")
    how = f"accuracy of a linear probe of {len(speakers)} speakers, fitted on {len(fit)} clips; n: held-out clips"
    bound = {"sense": "<=", "threshold": -0.2}
    if len({clip.speaker for clip in known}) < 2:
        note = "not measured: fewer than 2 speakers are in both the fitted and the held-out clips"
        return [Gate(name=names[2], value=None, **bound, n=0, how=how, note=note)]
    labels, truth = (torch.tensor([speakers.index(clip.speaker) for clip in clips]) for clips in (fit, known))
    correct = []
    for books in (slice(0, n_semantic), slice(n_semantic, None)):
        inputs = pooled(fit, books, n_codes), pooled(known, books, n_codes)
        correct.append((predict_speakers(inputs[0], labels, inputs[1]) == truth).double().tolist())
    figures = paired_figures([(clip.conversation, 1) for clip in known], *correct, seed)
    most = float((truth == labels.mode().values).double().mean())
    how = f"{how}; always the most frequent speaker: {most:.2f}"
    left_out = len(held_out) - len(known)
    note = f"{left_out} clips of speakers that are not among the fitted ones are left out" if left_out else ""
    gates = [from_figure(names[0], figures[0], how), from_figure(names[1], figures[1], how)]
    return [*gates, dataclasses.replace(from_figure(names[2], figures[2], f"{how}, paired", **bound), note=note)]
