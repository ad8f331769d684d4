"""Train the speech codec on collected audio: continuous, then with its quantisers, then its decoder alone.

    python train_tokenizer.py --data data --out runs/tokenizer
    torchrun --nproc_per_node 4 train_tokenizer.py --preset gpu --stage_c 0.5 --adversarial 1 --discriminators full
    python train_tokenizer.py --init_from pretrained/nano/tokenizer --keep_codes --adversarial 1 --out runs/decoder
    python train_tokenizer.py --init_from runs/tokenizer --keep_codes --spoken_by runs/nano --out runs/decoder

The stages are described in `codec_training.py`. Stopping at any moment (Ctrl-C, kill -9) loses at most the steps since
the last state file; the same command goes on, and ends with the same weights as a run that was never stopped.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from architecture import load_model
from audio import FRAME_SAMPLES, SAMPLE_RATE, to_pcm16, write_wav
from audio_tokenizer import fingerprint
from checkpointing import load_newest_state, save_state, write_atomically
from codec_batches import Coded, CodedCrops, Crops, Utterances
from codec_training import (
    CONTINUOUS,
    HELP,
    Run,
    TrainConfig,
    build_run,
    fastest,
    fit_codebooks,
    make_optimizers,
    train_step,
)
from command_line import (
    EXIT_CODES_HELP,
    EXIT_DONE,
    EXIT_SIGTERM,
    StopSignals,
    add_config_flags,
    first_line,
    only_run_in,
    run,
)
from conversations import each_clip, load_clips
from dataset_pipeline import as_read_by
from generation import check_tokenizer
from inference_model import InferenceModel
from phone_alignments import Clip, align_clips
from ranks import Ranks, join_ranks, pick_device, warn_of_slow_bf16
from residual_quantizer import codebook_use
from run_folder import RunLog, plot_metrics, read_settings, refuse_other_settings
from rvq_tokenizer import load_tokenizer, save_tokenizer
from semantic_teacher import teacher_features
from spoken_codes import guessed_turns, voices_beside
from turn_shards import TurnRecord, data_digest, ledgers

RESULTS = "results.json"  # written last: its presence means the run is complete
MIN_SECONDS = 30  # of training audio
FREE = ("eval_every", "save_every", "threads")  # settings that may change between a run and its continuation
MAX_HELD_OUT = 64  # clips for the final measurement
N_SHOWN = 3  # clips for pictures and listening


@torch.no_grad()
def evaluate(run: Run, clips: list[Tensor]) -> tuple[dict[str, float], Tensor, list[Tensor]]:
    """Held-out scalars, all codes (M, K) and the reconstructions of `clips`, each (1, N)."""
    model, quantised = run.averaged(), run.config.stage(run.step - 1) != CONTINUOUS
    codes, waves, sums = [], [], {"mel": 0.0, "mel_semantic": 0.0, "seconds": 0.0}
    for clip in clips:
        code = model.encode(clip)  # (1, T, K)
        length = clip.size(1)
        padded = nn.functional.pad(clip, (0, -length % FRAME_SAMPLES))
        if quantised:
            wave, content = model.decode(code), model.decode(code[..., : model.config.n_semantic])
        else:
            wave, content = (model.autoencode(padded, torch.tensor([depth], device=clip.device)) for depth in (1, 0))
        sums["mel"] += length * run.distance(wave[:, :length], clip).mel.item()
        sums["mel_semantic"] += length * run.distance(content[:, :length], clip).mel.item()
        sums["seconds"] += length
        codes.append(code[0])
        waves.append(wave[:, :length])
    scalars = {f"held_out/{name}": sums[name] / sums["seconds"] for name in ("mel", "mel_semantic")}
    return scalars, torch.cat(codes).cpu(), waves


def show(run: Run, log: RunLog, originals: list[Tensor], waves: list[Tensor]) -> None:
    """Spectrogram pictures and audio of the fixed clips to TensorBoard."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    for index, pair in enumerate(zip(originals, waves, strict=True)):
        figure, axes = plt.subplots(2, 1, figsize=(10, 6), sharex=True)
        for axis, wave, title in zip(axes, pair, ("original", f"reconstruction, step {run.step}"), strict=True):
            axis.specgram(wave[0].cpu().numpy() + 1e-6, NFFT=960, Fs=SAMPLE_RATE, noverlap=720, vmin=-140, vmax=-40)
            axis.set(title=title, ylabel="Hz")
        axes[1].set(xlabel="seconds")
        step = run.step - 1  # that of the scalars
        log.tensorboard.add_figure(f"held_out/{index}", figure, step)  # closes the figure
        log.tensorboard.add_audio(f"held_out/{index}", pair[1][0].cpu().clamp(-1, 1), step, SAMPLE_RATE)
        if run.step <= run.config.eval_every:
            log.tensorboard.add_audio(f"held_out/{index}_original", pair[0][0].cpu(), 0, SAMPLE_RATE)


def train(run: Run, log: RunLog | None, save: Callable[[], None], stop: StopSignals) -> bool:
    """Steps from `run.step` to the last one; whether a signal came, in any process, and was answered by saving."""
    c = run.config
    shown = run.held_out[:N_SHOWN]
    silent = not run.ranks.first
    bar = tqdm(total=c.max_steps, initial=run.step, desc="tokenizer", unit="step", dynamic_ncols=True, disable=silent)
    stopped = False
    with contextlib.closing(bar):
        while run.step < c.max_steps and not stopped:
            run.model.train()
            if run.step == c.first_quantised_step and not c.init_from:
                bar.set_postfix_str("fitting codebooks")
                fit_codebooks(run)
            record = train_step(run)
            step = run.step
            run.step += 1
            if log is not None:
                if run.step % c.eval_every == 0 or run.step == c.max_steps:
                    scalars, _, waves = evaluate(run, shown)
                    record |= scalars
                    show(run, log, shown, waves)
                log.scalars(step, record)
            bar.update()
            bar.set_postfix_str(f"mel {record['train/mel']:.3f}", refresh=False)
            stopped = run.ranks.any(stop.received is not None)
            if run.step % c.save_every == 0 or run.step == c.max_steps or stopped:
                save()
    return stopped


def finish(run: Run, out: Path) -> None:
    """Export the averaged weights, measure them on held-out clips, write samples and the results."""
    scalars, codes, waves = evaluate(run, run.held_out[:MAX_HELD_OUT])
    usage, perplexity = codebook_use(codes, run.model.config.codebook_size)
    model = run.averaged()
    save_tokenizer(model, out)
    samples = out / "samples"
    samples.mkdir(exist_ok=True)
    semantic = model.config.n_semantic
    for index, (clip, wave) in enumerate(zip(run.held_out[:N_SHOWN], waves, strict=False)):
        content = model.decode(model.encode(clip)[..., :semantic])
        for name, samples_of in (("original", clip), ("reconstruction", wave), ("semantic_only", content)):
            write_wav(samples / f"{index}_{name}.wav", samples_of[0, : clip.size(1)].cpu().numpy())
    panels = {"loss": ["train/loss"], "log10-mel distance": ["train/mel", "held_out/mel", "held_out/mel_semantic"]}
    plot_metrics(out, panels, out / "losses.png")
    results = {
        "step": run.step,
        **scalars,
        "held_out/usage": usage.mean().item(),
        "held_out/perplexity": perplexity.mean().item(),
        "held_out/clips": len(waves),
        "held_out/tokens": len(codes),
        "held_out/usage_per_codebook": [round(value, 4) for value in usage.tolist()],
        "held_out/perplexity_per_codebook": [round(value, 2) for value in perplexity.tolist()],
    }
    write_atomically(out / RESULTS, (json.dumps(results, indent=2) + "\n").encode())


def report(out: Path) -> None:
    """The figures of a finished run, one line each."""
    results = json.loads((out / RESULTS).read_text(encoding="utf-8"))
    usage, perplexity = (results[f"held_out/{name}_per_codebook"] for name in ("usage", "perplexity"))
    mel, content = results["held_out/mel"], results["held_out/mel_semantic"]
    print(f"held-out log10-mel distance {mel:.4f}; semantic codebooks alone {content:.4f}")
    print(
        f"codebooks over {results['held_out/tokens']} held-out frames: usage mean {np.mean(usage):.2f}, "
        f"least {min(usage):.2f}; perplexity mean {np.mean(perplexity):.0f}, least {min(perplexity):.0f}"
    )
    print(f"tokenizer in {out}, samples to hear in {out / 'samples'}, TensorBoard log in {out / 'tensorboard'}")


class Audio(NamedTuple):
    """What is taken from a data folder."""

    crops: Crops  # for training
    held_out: list[Tensor]  # (1, N) each
    utterances: Utterances  # for training
    own: list[tuple[TurnRecord, np.ndarray]]  # the training turns, and their samples (N,) int16


def load_audio(data: Path, seed: int) -> Audio:
    """What is trained on and what is held out.

    ValueError if there is too little.
    """
    remedy = f"collect more: python collect_data.py --sources synthetic --target_hours 0.5 --out {data}"
    own = [(turn, to_pcm16(samples)) for turn, samples in each_clip(data, "train")]  # never the whole as floats
    turns, clips = zip(*own, strict=True)
    seconds = sum(map(len, clips)) / SAMPLE_RATE
    if seconds < MIN_SECONDS:
        raise ValueError(f"{data} holds {seconds:.0f} s of training audio, {MIN_SECONDS} s are needed; {remedy}")
    chosen = load_clips(data, "val", limit=MAX_HELD_OUT, seed=seed)
    held_out = [torch.from_numpy(samples)[None] for _, samples in chosen if len(samples) >= SAMPLE_RATE // 2]
    if not held_out:
        raise ValueError(f"{data} holds no held-out (val) clip of half a second or more; {remedy}")
    transcribed = [(turn.speaker_id, turn.text, clip) for turn, clip in zip(turns, clips, strict=True)]
    return Audio(Crops(clips), held_out, Utterances(transcribed), own)


def align(audio: Audio, folder: Path) -> str:
    """Let the utterances know which phone is spoken when; 16 hexadecimal digits that stand for all they were told."""
    utterances, own = audio.utterances, [audio.own[item.clip] for item in audio.utterances.items]
    utterances.add_phones(align_clips([Clip(turn.utt_id, turn.lang, turn.text, pcm) for turn, pcm in own], folder))
    told = b"".join(item.phones.tobytes() for item in utterances.items)
    return hashlib.sha256(" ".join(utterances.phones).encode() + told).hexdigest()[:16]


def speak_along(config: TrainConfig, data: Path, audio: Audio, device: torch.device) -> tuple[CodedCrops, str]:
    """Crops of the training turns with the codes that a speech model guesses of them; its fingerprint.

    ValueError: not a model of these codes.
    """
    tokenizer, model = load_tokenizer(config.init_from, device), load_model(Path(config.spoken_by), device)
    check_tokenizer(model.config, tokenizer)
    dataset = as_read_by(model.config, data, "train", tokenizer)
    guesses, beside = guessed_turns(InferenceModel(model), dataset), voices_beside(tokenizer, dataset)
    clips = [Coded(samples, guesses[turn.utt_id], beside[turn.utt_id]) for turn, samples in audio.own]
    return CodedCrops(clips, config.crop_frames), fingerprint(model.config, model)


def run_in(out: Path, data: Path, config: TrainConfig, device: torch.device, ranks: Ranks) -> int:
    """Start, resume or skip the run in `out`; the exit code."""
    previous = read_settings(out)
    if previous is None and config.precision == "bf16" and ranks.first:
        warn_of_slow_bf16(device)
    config = as_measured(config, previous)
    fixed = {k: v for k, v in dataclasses.asdict(config).items() if k not in FREE}
    if (out / RESULTS).is_file():
        refuse_other_settings(out, {k: v for k, v in fixed.items() if k in (previous or {})})
        if ranks.first:
            print(f"{out} holds a tokenizer trained for all {config.max_steps} steps; nothing to do")
            if ledgers(data) and (previous or {}).get("data") not in (None, data_digest(data)):
                print(f"note: it was trained on other data than {data} holds now; for these give another --out")
            report(out)
        return EXIT_DONE
    audio, spoken = load_audio(data, config.seed), None
    utterances = audio.utterances
    learnt_from = {"data": data_digest(data)}
    refuse_other_settings(out, {**fixed, **learnt_from})
    if config.teacher and utterances.items:
        clips = [item.pcm for item in utterances.items]
        told = ranks.first_then_others(lambda: teacher_features(clips, data / "teacher", config.teacher, device))
        utterances.add_features(told)
    if config.phone_weight and utterances.items:
        learnt_from["phones"] = ranks.first_then_others(lambda: align(audio, data / "phones"))
        refuse_other_settings(out, learnt_from)
    if config.spoken_by:
        spoken, told = ranks.first_then_others(lambda: speak_along(config, data, audio, device))
        learnt_from["speech_model"] = told
        refuse_other_settings(out, learnt_from)
    run = build_run(config, audio.crops, audio.held_out, device, utterances, ranks, spoken)
    precision, threads = fastest(run)
    run.config = dataclasses.replace(config, precision=precision, threads=threads)
    run.optimizers = make_optimizers(run.model, run.config, run.heads)
    state = load_newest_state(out)
    if state is not None:
        try:
            run.restore(state)
        except (RuntimeError, KeyError) as error:
            what = f"holds the state of another version ({first_line(error)}); give another --out"
            raise ValueError(f"{out} {what}") from error
    if not ranks.first:
        with StopSignals() as stop:
            stopped = train(run, None, lambda: None, stop)
        stopped = stopped and run.step < config.max_steps
        return (stop.exit_code or EXIT_SIGTERM) if stopped else EXIT_DONE  # the signal may be another process's
    size = sum(parameter.numel() for parameter in run.model.parameters()) / 1e6
    print(
        f"{size:.1f}M parameters, {audio.crops.seconds / 60:.1f} min of audio, {run.config.precision}, "
        f"{ranks.n} process(es) of {threads} thread(s), {device}, from step {run.step} of {config.max_steps}"
    )
    log = RunLog(out, {**dataclasses.asdict(run.config), **learnt_from}, run.step, device)
    with contextlib.closing(log), StopSignals() as stop:
        stopped = train(run, log, lambda: save_state(out, run.step, run.state()), stop)
    if stopped and run.step < config.max_steps:
        print(f"stopped at step {run.step} of {config.max_steps}, saved; the same command goes on")
        return stop.exit_code or EXIT_SIGTERM
    finish(run, out)
    report(out)
    return EXIT_DONE


def as_measured(config: TrainConfig, previous: dict | None) -> TrainConfig:
    """What the flags leave to measurement, as it was measured when the run in this folder began."""
    if previous and config.precision == "auto":
        config = dataclasses.replace(config, precision=previous.get("precision", "auto"))
    if previous and config.threads == 0:
        config = dataclasses.replace(config, threads=previous.get("threads", 0))
    return config


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Train the speech tokenizer (codec).", epilog=EXIT_CODES_HELP)
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder of collect_data.py (default: data)")
    parser.add_argument("--out", type=Path, default=Path("runs/tokenizer"), help="(default: runs/tokenizer)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    add_config_flags(parser, TrainConfig, HELP)
    args = vars(parser.parse_args(argv))
    data, out, device = (args.pop(name) for name in ("data", "out", "device"))
    config = TrainConfig(**args)
    if config.init_from and Path(config.init_from).resolve() == out.resolve():
        raise ValueError(f"--init_from and --out are both {out}; give another --out")
    with join_ranks(pick_device(device)) as (ranks, own_device), contextlib.ExitStack() as held:
        if ranks.first:
            held.enter_context(only_run_in(out))
        return run_in(out, data, config, own_device, ranks)


if __name__ == "__main__":
    raise SystemExit(run(main))
