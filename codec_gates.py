"""Gates of a tokenizer: figures on held-out clips, each with a threshold and how it was measured.

What a speech model needs of its codes: all of them in use, good sound, words in the semantic codebooks, the voice in
the acoustic ones, streams that equal the whole, speed. Works on any `AudioTokenizer`. What is measured on sound and
text comes from `held_out_evaluation.py`; the probes, the swap, the streams and the stop-watch are here.

Clips are split by conversation (`split_group`), so the probes are fitted and measured on the same speakers in other
conversations, on the clips of the splits train and val + test. Held-out speakers that the fitted clips lack are left
out of the speaker probe and counted.

Letters: B batch, N samples, T frames, K codebooks, V codes per codebook, U characters, C clips.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from audio import FRAME_SAMPLES, SAMPLE_RATE
from audio_tokenizer import AudioTokenizer
from codec_probes import Coded, Gate, character_gates, from_figure, needs, speaker_gates
from evaluation_report import FULL, ORIGINAL, SEMANTIC, plot_depth, plot_use
from rvq_tokenizer import RVQTokenizer
from speech_metrics import (
    FRAMES_PER_CODE,
    METRICS,
    Figure,
    NotMeasurable,
    Recognizer,
    SpeakerEncoder,
    Tally,
    bootstrap,
    code_histograms,
    count_errors,
    perplexity_figures,
    require_english,
)

ENOUGH_FRAMES = 20_000  # at least: below, and below `FRAMES_PER_CODE`, usage and perplexity come out too low
STREAMED_CLIPS = 8
TIMED_FRAMES = 300  # 24 s
WARM_UP = 10  # frames before the stop-watch counts
NOT_FINITE = 1e9  # what a sample that is not finite differs by


# ---- use of the codebooks --------------------------------------------------------------------------------------------


def codebook_use(clips: Sequence[Coded], n_codes: int) -> dict:
    """Usage and perplexity of every codebook over the frames of `clips`."""
    counts: dict[str, np.ndarray] = {}  # conversation -> (K, V)
    for clip in clips:
        counts[clip.conversation] = counts.get(clip.conversation, 0) + code_histograms(clip.codes, n_codes)
    total = sum(counts.values())
    return {
        "codes": n_codes,
        "frames": int(total[0].sum()),
        "conversations": len(counts),
        "usage": (total > 0).mean(axis=1).tolist(),
        "perplexity": [dataclasses.asdict(figure) for figure in perplexity_figures(counts)],
    }


def use_gates(use: dict) -> list[Gate]:
    """The worst codebook decides."""
    enough = max(ENOUGH_FRAMES, FRAMES_PER_CODE * use["codes"])
    few = f"too few: {use['frames']} frames, below {enough} both come out too low"
    note = few if use["frames"] < enough else ""
    worst = int(np.argmin(use["usage"]))
    ratios = [figure["value"] for figure in use["perplexity"]]
    flattest = int(np.argmin(ratios))
    how = f"smallest of {len(ratios)} codebooks, here codebook %d; n: held-out frames"
    usage = {"sense": ">=", "threshold": 0.8, "n": use["frames"], "how": how % worst, "note": note}
    evenness = {"sense": ">=", "threshold": 0.3, "n": use["frames"], "how": how % flattest, "note": note}
    interval = {"low": use["perplexity"][flattest]["low"], "high": use["perplexity"][flattest]["high"]}
    return [
        Gate(name="codebook usage", value=use["usage"][worst], **usage),
        Gate(name="perplexity / V", value=ratios[flattest], **interval, **evenness),
    ]


# ---- sound and words -------------------------------------------------------------------------------------------------


def sound_gates(part: dict, missing: dict[str, str]) -> list[Gate]:
    """From the figures of `held_out_evaluation.evaluate_tokenizer`; `missing` says what a metric lacks."""
    figures = {
        metric: {system: Figure(**figure) for system, figure in systems.items()}
        for metric, systems in part["figures"].items()
    }
    rows = [
        ("log_mel_l1", "", None, "log10-mel distance"),
        ("pesq_wb", ">=", 2.6, "PESQ wide band"),
        ("stoi", ">=", 0.93, "STOI"),
    ]
    gates = []
    for metric, sense, threshold, name in rows:
        how = f"all {part['codebooks']} codebooks against the original, mean; n: clips ({METRICS[metric].source})"
        if metric in missing:
            gates.append(needs(name, missing[metric], how, sense, threshold))
        else:
            gates.append(from_figure(name, figures[metric][FULL], how, sense, threshold))
    gates += [*monotone_gate(part), *word_gates(figures, part["semantic_codebooks"], missing)]
    return [*gates, speaker_gate(figures, part["same_speaker"], missing)]


def monotone_gate(part: dict) -> list[Gate]:
    """Every step along the depth curve lowers the log-mel distance."""
    curve = {int(k): figure["value"] for k, figure in part["depth"]["log_mel_l1"].items()}
    how = f"largest rise of the mean distance along k = {', '.join(map(str, curve))}; n: clips"
    name, bound = "depth curve, log10-mel", {"sense": "<=", "threshold": 0.0}
    if None in curve.values():
        return [Gate(name=name, value=None, **bound, n=0, how=how, note="not measured: no clip long enough")]
    values = list(curve.values())
    rise = max(after - before for before, after in itertools.pairwise(values))
    n = min(figure["n"] for figure in part["depth"]["log_mel_l1"].values())
    return [Gate(name=name, value=rise, **bound, n=n, how=how)]


def speaker_gate(figures: dict[str, dict[str, Figure]], same_speaker: float | None, missing: dict[str, str]) -> Gate:
    """A copy should be nearer to its original than two originals of a speaker are to each other."""
    name = "similarity of copies to originals"
    how = "cosine of speaker embeddings, mean; wanted: median of two originals of a speaker; n: clips"
    if "speaker_similarity" in missing:
        return needs(name, missing["speaker_similarity"], how, ">=")
    found = figures.get("speaker_similarity", {}).get(f"{FULL} to its original", bootstrap([]))
    return from_figure(name, found, how, ">=", same_speaker)


def word_gates(figures: dict[str, dict[str, Figure]], n_semantic: int, missing: dict[str, str]) -> list[Gate]:
    """What a recogniser hears in the originals, in the copies and in the semantic codebooks alone."""
    how = "recogniser's transcript against the text; n: clips"
    names = ("WER, originals", "WER, all codebooks", "WER, copies less originals", "WER, semantic codebooks alone")
    if "wer" in missing:
        return [needs(name, missing["wer"], how) for name in names]
    wer = figures.get("wer", {})
    none = bootstrap([])
    full, alone = wer.get(FULL, none), wer.get(SEMANTIC, none)
    change = figures.get("wer_change", {}).get(FULL, none)
    limit = None if full.value is None else max(1.5 * full.value, 0.03)  # where nothing is heard wrong, not nothing
    return [
        from_figure(names[0], wer.get(ORIGINAL, none), how),
        from_figure(names[1], full, how),
        from_figure(names[2], change, f"{how}, paired", "<=", 0.03),
        from_figure(names[3], alone, f"{how}; codebooks 0 to {n_semantic - 1}; 1.5 x all codebooks", "<=", limit),
    ]


# ---- swap ------------------------------------------------------------------------------------------------------------


def choose_donor(clip: Coded, others: Sequence[Coded]) -> Coded | None:
    """The shortest clip of another speaker that is not shorter than this one, so that no word of it is cut off."""
    fitting = [o for o in others if o.speaker != clip.speaker and len(o.codes) >= len(clip.codes)]
    return min(fitting, key=lambda other: len(other.codes), default=None)


@torch.inference_mode()
def swap(tokenizer: AudioTokenizer, words: Coded, voice: Coded) -> np.ndarray:
    """(N,) of the semantic codes of one clip and the acoustic codes of another, as long as the shorter."""
    S, T = tokenizer.config.n_semantic, min(len(words.codes), len(voice.codes))
    codes = np.concatenate([words.codes[:T, :S], voice.codes[:T, S:]], axis=1)  # (T, K)
    return tokenizer.decode(torch.from_numpy(codes)[None])[0].cpu().numpy()


def swap_gates(
    clips: Sequence[Coded],
    others: Sequence[Coded],
    tokenizer: AudioTokenizer,
    recognizer: Recognizer | None,
    encoder: SpeakerEncoder | None,
    missing: dict[str, str],
    seed: int,
) -> list[Gate]:
    """The words should stay with the semantic codes and the voice go with the acoustic ones. Reported only."""
    names = ("swap, WER to the text of A", "swap, voice to A", "swap, voice to B")
    how = "semantic codes of A, acoustic codes of B, another speaker's, cut to the length of A; n: clips A"
    metrics = dict(zip(names, ("wer", "speaker_similarity", "speaker_similarity"), strict=True))
    pairs = [(clip, donor) for clip in clips if (donor := choose_donor(clip, others)) is not None]
    tally, wanted = Tally(), recognizer is not None or encoder is not None
    for a, b in tqdm(pairs if wanted else [], desc="swapping voices", unit="clip"):
        wave = swap(tokenizer, a, b)
        if recognizer is not None:
            try:
                require_english(a.language)
                tally.add_errors("swap", a.conversation, count_errors(a.text, recognizer.transcribe(wave)))
            except NotMeasurable as reason:
                tally.excluded["wer", "swap"][str(reason)] += 1
        if encoder is not None:
            for name, clip in zip(names[1:], (a, b), strict=True):
                tally.add("speaker_similarity", name, a.conversation, similarity, encoder, wave, clip.samples)
    figures, none = tally.figures(seed), bootstrap([])
    gates = [needs(name, missing[metric], how) for name, metric in metrics.items() if metric in missing]
    if recognizer is not None:
        gates.append(from_figure(names[0], figures.get("wer", {}).get("swap", none), how))
    if encoder is not None:
        cosines = figures.get("speaker_similarity", {})
        gates += [from_figure(name, cosines.get(name, none), f"cosine to the original; {how}") for name in names[1:]]
    return gates


def similarity(encoder: SpeakerEncoder, wave: np.ndarray, other: np.ndarray) -> float:
    return float(encoder.embed(wave) @ encoder.embed(other))


# ---- streams and speed -----------------------------------------------------------------------------------------------


def streamed_codes(tokenizer: AudioTokenizer, wave: Tensor, random: np.random.Generator) -> Tensor:
    """(1, N) -> (1, T, K), the samples in pieces of random lengths up to three frames."""
    stream, parts, begin = tokenizer.encoder_stream(1), [], 0
    while begin < wave.size(1):
        end = begin + int(random.integers(1, 3 * FRAME_SAMPLES))
        parts.append(stream.push(wave[:, begin:end]))
        begin = end
    return torch.cat([*parts, stream.flush()], dim=1)


def streamed_wave(tokenizer: AudioTokenizer, codes: Tensor, random: np.random.Generator) -> Tensor:
    """(1, T, K) -> (1, T * FRAME_SAMPLES), the codes in pieces of one to three frames."""
    stream, parts, begin = tokenizer.decoder_stream(1), [], 0
    while begin < codes.size(1):
        end = begin + int(random.integers(1, 4))
        parts.append(stream.push(codes[:, begin:end]))
        begin = end
    return torch.cat([*parts, stream.flush()], dim=1)[:, stream.delay_samples :]


def same_share(ours: Tensor, theirs: Tensor) -> float:
    """Share of equal codes of (1, T, K) and (1, T', K); frames that only one has are unequal."""
    T = min(ours.size(1), theirs.size(1))
    return float((ours[:, :T] == theirs[:, :T]).sum() / max(ours.numel(), theirs.numel()))


def largest_difference(ours: Tensor, theirs: Tensor) -> float:
    """Of (1, N) and (1, N'), the shorter continued with silence."""
    N = max(ours.size(1), theirs.size(1))
    ours, theirs = (F.pad(wave, (0, N - wave.size(1))) for wave in (ours, theirs))
    return float((ours - theirs).abs().nan_to_num(nan=NOT_FINITE, posinf=NOT_FINITE).max())


@torch.inference_mode()
def stream_gates(clips: Sequence[Coded], tokenizer: AudioTokenizer, seed: int) -> list[Gate]:
    """What comes in pieces equals what comes whole."""
    random = np.random.default_rng(seed)
    equal, again, difference = [], [], []
    for clip in tqdm(clips[:STREAMED_CLIPS], desc="comparing streams", unit="clip"):
        wave = torch.from_numpy(np.ascontiguousarray(clip.samples))[None]
        codes = torch.from_numpy(clip.codes)[None]
        equal.append(same_share(streamed_codes(tokenizer, wave, random).cpu(), codes))
        again.append(same_share(tokenizer.encode(wave).cpu(), codes))
        difference.append(largest_difference(streamed_wave(tokenizer, codes, random), tokenizer.decode(codes)))
    how = "share of equal codes, {}; n: clips"
    exact = {"sense": ">=", "threshold": 1.0, "n": len(equal)}
    pieces = "in random pieces of up to 3 frames"
    return [
        Gate(name="streamed codes", value=min(equal), **exact, how=how.format(f"encoded {pieces}")),
        Gate(
            name="streamed wave",
            value=max(difference),
            sense="<=",
            threshold=1e-4,
            n=len(difference),
            how=f"largest difference of a sample, decoded {pieces}; n: clips",
        ),
        Gate(name="encoded twice", value=min(again), **exact, how=how.format("encoded once more")),
    ]


@torch.inference_mode()
def round_trip_gates(clips: Sequence[Coded], tokenizer: AudioTokenizer) -> list[Gate]:
    """The decoder is trained on sums of the chosen codes' vectors; codes looked up again give the same sound.

    Only where the latents can be had without their codes.
    """
    if not isinstance(tokenizer, RVQTokenizer):
        return []
    differences, shape = [], tokenizer.config
    for clip in tqdm(clips[:STREAMED_CLIPS], desc="codes there and back", unit="clip"):
        wave = torch.from_numpy(np.ascontiguousarray(clip.samples))[None].to(tokenizer.device)
        wave = F.pad(wave, (0, -wave.size(1) % FRAME_SAMPLES))
        content, acoustic = tokenizer.latents(wave)
        codes = torch.cat([tokenizer.semantic.encode(content), tokenizer.acoustic.encode(acoustic)], dim=2)
        depths = (torch.tensor([n], device=wave.device) for n in (shape.n_semantic, shape.n_acoustic_codebooks))
        differences.append(largest_difference(tokenizer.decode(codes), tokenizer.decode_frozen(wave, *depths)))
    how = "largest difference of a sample, decoded from codes and from the latents after quantisation; n: clips"
    bound = {"sense": "<=", "threshold": 1e-4, "n": len(differences), "how": how}
    return [Gate(name="codes there and back", value=max(differences), **bound)]


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@torch.inference_mode()
def frame_seconds(tokenizer: AudioTokenizer, wave: Tensor) -> np.ndarray:
    """(1, N) -> (T, 2) seconds that each whole frame takes to be encoded, and to be decoded again, in streams."""
    encoder, decoder, seconds = tokenizer.encoder_stream(1), tokenizer.decoder_stream(1), []
    for piece in wave[:, : wave.size(1) // FRAME_SAMPLES * FRAME_SAMPLES].split(FRAME_SAMPLES, dim=1):
        begin = time.perf_counter()
        codes = encoder.push(piece)
        between = time.perf_counter()
        decoder.push(codes)
        seconds.append((between - begin, time.perf_counter() - between))
    return np.array(seconds)


@torch.inference_mode()
def decode_seconds(tokenizer: AudioTokenizer, clips: Sequence[Coded]) -> float:
    """Seconds per second of audio, median over the clips; the first one is decoded once before."""
    factors = []
    for clip in (clips[0], *clips):
        codes = torch.from_numpy(clip.codes)[None]
        begin = time.perf_counter()
        tokenizer.decode(codes)
        factors.append((time.perf_counter() - begin) * SAMPLE_RATE / (len(clip.codes) * FRAME_SAMPLES))
    return float(np.median(factors[1:]))


def speed_gates(clips: Sequence[Coded], tokenizer: AudioTokenizer) -> list[Gate]:
    """Real-time factors at one thread; other programs on the machine raise them."""
    wave = np.concatenate([clip.samples for clip in clips])[: (WARM_UP + TIMED_FRAMES) * FRAME_SAMPLES]
    frame = FRAME_SAMPLES / SAMPLE_RATE
    with one_thread():
        seconds = frame_seconds(tokenizer, torch.from_numpy(wave)[None])
        offline = decode_seconds(tokenizer, clips)
    both = (seconds[WARM_UP:] if len(seconds) > WARM_UP else seconds) / frame  # (T, 2)
    timed, (encoder, decoder) = both.sum(axis=1), np.percentile(both, 95, axis=0)
    how = f"one thread, a frame of {1000 * frame:.0f} ms encoded and decoded in streams, 95th percentile"
    how += f" (the encoder's {encoder:.3f}, the decoder's {decoder:.3f}), median {np.median(timed):.3f}; n: frames"
    whole = "one thread, decoding whole clips, seconds per second, median; n: clips"
    speed = {"value": float(np.percentile(timed, 95)), "n": len(timed), "how": how}
    return [
        Gate(name="real-time factor, streamed", sense="<=", threshold=0.1, **speed),
        Gate(name="real-time factor, decoder", value=offline, sense="<=", threshold=0.02, n=len(clips), how=whole),
    ]


# ---- all -------------------------------------------------------------------------------------------------------------


def check_gates(
    part: dict,
    fit: Sequence[Coded],
    held_out: Sequence[Coded],
    clips: Sequence[Coded],
    tokenizer: AudioTokenizer,
    recognizer: Recognizer | None,
    encoder: SpeakerEncoder | None,
    missing: dict[str, str],
    seed: int,
) -> list[Gate]:
    """Every gate. `part`: what `evaluate_tokenizer` found on `clips`, which are among `held_out`, with its `use`."""
    S, V = tokenizer.config.n_semantic, tokenizer.config.codebook_size
    return [
        *use_gates(part["use"]),
        *sound_gates(part, missing),
        *character_gates(fit, held_out, S, tokenizer.code_vectors(), seed),
        *speaker_gates(fit, held_out, S, V, seed),
        *swap_gates(clips, held_out, tokenizer, recognizer, encoder, missing, seed),
        *stream_gates(clips, tokenizer, seed),
        *round_trip_gates(clips, tokenizer),
        *speed_gates(clips, tokenizer),
    ]


def as_values(gates: Sequence[Gate]) -> list[dict]:
    """For JSON."""
    return [{**dataclasses.asdict(gate), "passed": gate.passed, "verdict": gate.verdict} for gate in gates]


def print_gates(gates: Sequence[Gate], part: dict) -> None:
    """The table, then the depth curve."""
    heads = ("gate", "value", "threshold", "result", "n")
    print(f"{heads[0]:38} {heads[1]:>26} {heads[2]:>10} {heads[3]:12} {heads[4]:>6}  how")
    for gate in gates:
        interval = "" if gate.low is None else f" ({gate.low:.3f} to {gate.high:.3f})"
        value = "" if gate.value is None else f"{brief(gate.value)}{interval}"
        bound = "" if gate.threshold is None else f"{gate.sense} {brief(gate.threshold)}"
        print(f"{gate.name:38} {value:>26} {bound:>10} {gate.verdict:12} {gate.n:>6}  {gate.how}")
        if gate.note:
            print(f"{'':38} {gate.note}")
    for metric, curve in part["depth"].items():
        steps = [f"{k}: {'-' if f['value'] is None else brief(f['value'])}" for k, f in curve.items()]
        print(f"{METRICS[metric].title} by codebooks decoded  {'  '.join(steps)}")


def brief(value: float) -> str:
    """Three decimals, more where they would all be zero."""
    return f"{value:.3f}" if value == 0 or abs(value) >= 0.0005 else f"{value:.0e}"


def draw_gates(part: dict, out: Path) -> list[str]:
    """The depth curve and the use of the codebooks as pictures in `out`; their names."""
    plot_depth(part, out / "gates-depth.png")
    plot_use(part, out / "gates-use.png")
    return ["gates-depth.png", "gates-use.png"]
