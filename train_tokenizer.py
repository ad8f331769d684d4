"""Train the speech codec on collected audio: a continuous autoencoder first, then with its quantisers.

    python train_tokenizer.py --data data --out runs/tokenizer

Stage A learns without quantisers; then every codebook is fitted by k-means, level by level; stage B trains all with
the rate falling to zero. Stopping at any moment (Ctrl-C, kill -9) loses at most the steps since the last state file;
the same command goes on, and ends with the same weights as a run that was never stopped.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from audio import FRAME_SAMPLES, SAMPLE_RATE, write_wav
from checkpointing import load_newest_state, random_state, restore_random_state, save_state, write_atomically
from codec_batches import Crops, Depths, SemanticBatch, Utterances, draw_depths, draw_prefixes
from codec_losses import SpectralDistance
from command_line import EXIT_CODES_HELP, EXIT_DONE, StopSignals, add_config_flags, only_run_in, run
from dataset_pipeline import load_clips
from muon import Muon
from residual_quantizer import codebook_use
from run_folder import RunLog, plot_metrics, read_settings, refuse_other_settings
from rvq_tokenizer import PRESETS, RVQTokenizer, save_tokenizer
from semantic_supervision import SemanticHeads

RESULTS = "results.json"  # written last: its presence means the run is complete
MIN_SECONDS = 30  # of training audio
FREE = ("eval_every", "save_every", "threads")  # settings that may change between a run and its continuation
MAX_HELD_OUT = 64  # clips for the final measurement
N_SHOWN = 3  # clips for pictures and listening
FIT_VECTORS = 8  # per code, for k-means


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    preset: str = "cpu"
    max_steps: int = 1000
    stage_a: float = 0.3
    batch_size: int = 8
    crop_frames: int = 12
    lr: float = 2e-3
    warmup: int = 50
    ema_decay: float = 0.998
    ctc_weight: float = 0.0
    speaker_weight: float = 0.1
    content_gradient: float = 1.0
    eval_every: int = 200
    save_every: int = 250
    precision: str = "auto"
    threads: int = 0
    seed: int = 0

    def __post_init__(self):
        if self.preset not in PRESETS:
            raise ValueError(f"preset={self.preset} is not one of {', '.join(PRESETS)}")
        if self.precision not in ("auto", "fp32", "bf16"):
            raise ValueError(f"precision={self.precision} is not one of auto, fp32, bf16")
        if not 0 <= self.stage_a < 1 or not 0 <= self.ema_decay < 1:
            raise ValueError(f"stage_a={self.stage_a} and ema_decay={self.ema_decay} must lie in [0, 1)")
        for name in ("max_steps", "batch_size", "lr", "eval_every", "save_every"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)} must be positive")
        for name in ("ctc_weight", "speaker_weight", "content_gradient"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")
        if self.threads < 0:
            raise ValueError(f"threads={self.threads} must not be negative")
        if self.crop_frames < 4:
            raise ValueError(f"crop_frames={self.crop_frames} must be at least 4")

    @property
    def first_quantised_step(self) -> int:
        return int(self.stage_a * self.max_steps)


HELP = {
    "preset": f"size of the codec: {', '.join(PRESETS)}",
    "max_steps": "optimizer steps; the default takes about 10 minutes on 2 idle CPU cores",
    "stage_a": "share of the steps without quantisers",
    "batch_size": "crops per step",
    "crop_frames": "codec frames per crop, 80 ms each",
    "lr": "highest learning rate",
    "warmup": "steps until the learning rate is reached",
    "ema_decay": "of the weight average that is evaluated and exported",
    "ctc_weight": "of the characters that the semantic codebooks must tell, every second step; 0 = not asked",
    "speaker_weight": "of the speaker that the semantic codebooks must not tell; used with ctc_weight",
    "content_gradient": "the reconstruction's gradient into the content branch is multiplied by it",
    "eval_every": "steps between evaluations on held-out clips",
    "save_every": "steps between state files",
    "precision": "fp32, bf16, or auto: the faster one, measured once at the start",
    "threads": "CPU threads, or 0: one or all cores, whichever is faster, measured once at the start",
    "seed": "of the weights, the crops and the depths",
}


def lr_at(step: int, c: TrainConfig) -> float:
    """Linear warmup, constant through stage A, then cosine to zero. A pure function of the step."""
    if step < c.warmup:
        return c.lr * (step + 1) / c.warmup
    progress = max(0, step - c.first_quantised_step) / max(1, c.max_steps - c.first_quantised_step)
    return c.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


@dataclass
class Run:
    """What one training run holds; `state` and `restore` are its checkpoint."""

    config: TrainConfig
    crops: Crops
    held_out: list[Tensor]  # each (1, N)
    model: RVQTokenizer
    average: RVQTokenizer  # moving average of the weights; its codebooks are copied when it is used
    optimizers: tuple[torch.optim.Optimizer, ...]
    distance: SpectralDistance
    device: torch.device
    utterances: Utterances | None = None  # what the heads learn from; None: no semantic supervision
    heads: SemanticHeads | None = None
    step: int = 0

    def state(self) -> dict:
        return {
            "model": self.model.state_dict(),
            "heads": {} if self.heads is None else self.heads.state_dict(),
            "average": dict(self.average.named_parameters()),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "random": random_state(),
        }

    def restore(self, state: dict) -> None:
        self.model.load_state_dict(state["model"])
        if self.heads is not None:
            self.heads.load_state_dict(state["heads"])
        self.average.load_state_dict(state["average"], strict=False)
        for optimizer, content in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(content)
        restore_random_state(state["random"])
        self.step = state["step"]

    @torch.no_grad()
    def update_average(self) -> None:
        """Decay grows from 0.1 so that the average forgets the random start."""
        decay = min(self.config.ema_decay, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(list(self.average.parameters()), list(self.model.parameters()), 1 - decay)

    def averaged(self) -> RVQTokenizer:
        """The model to evaluate and export: averaged weights with the present codebooks."""
        for own, buffer in zip(self.average.buffers(), self.model.buffers(), strict=True):
            own.copy_(buffer)
        return self.average.eval()


def build_run(
    config: TrainConfig,
    crops: Crops,
    held_out: list[Tensor],
    device: torch.device,
    utterances: Utterances | None = None,
) -> Run:
    torch.manual_seed(config.seed)
    model = RVQTokenizer(PRESETS[config.preset]).to(device).train()
    average = copy.deepcopy(model).requires_grad_(False)
    held_out = [clip.to(device) for clip in held_out]
    heads = None
    if config.ctc_weight:
        if utterances is None or not utterances.items:
            raise ValueError("ctc_weight: no training clip has a text that fits its length; collect some, or give 0")
        shape = (model.config.codebook_dim, len(utterances.alphabet), len(utterances.speakers))
        heads = SemanticHeads(*shape).to(device)
    optimizers = make_optimizers(model, config, heads)
    distance = SpectralDistance().to(device)
    return Run(config, crops, held_out, model, average, optimizers, distance, device, utterances, heads)


def make_optimizers(
    model: RVQTokenizer, c: TrainConfig, heads: SemanticHeads | None
) -> tuple[torch.optim.Optimizer, ...]:
    """Muon for the matrices between hidden layers, AdamW for all else (first and last layers, norms, convolutions).

    After 250 steps of the continuous autoencoder Muon is where AdamW alone is after 2,000; a step costs 2.5 times as
    much. Call it again when the precision has been chosen.
    """
    matrices = {
        name: p
        for name, p in model.named_parameters()
        if p.ndim == 2 and not name.endswith(("head.weight", "lift.weight"))
    }
    others = [p for name, p in model.named_parameters() if name not in matrices]
    others += [] if heads is None else heads.parameters()
    dtype = torch.bfloat16 if c.precision == "bf16" else torch.float32
    return (
        torch.optim.AdamW(others, lr=c.lr, betas=(0.8, 0.99), weight_decay=1e-3, fused=True),
        Muon(matrices.values(), lr=2 * c.lr, weight_decay=1e-3, dtype=dtype),
    )


def loss_terms(run: Run, wave: Tensor, depths: Depths, quantised: bool) -> dict[str, Tensor]:
    """Weighted loss and its parts. The last 30 ms are left out: there the decoder lacks the frames to come."""
    with torch.autocast(run.device.type, torch.bfloat16, enabled=run.config.precision == "bf16"):
        if quantised:
            estimate, _, commitment = run.model(wave, *depths, run.config.content_gradient)
        else:
            estimate = run.model.autoencode(wave, depths.acoustic, run.config.content_gradient)
            commitment = wave.new_zeros(())
    end = wave.size(1) - run.model.decoder_stream(1).delay_samples
    mel, magnitude = run.distance(estimate[:, :end], wave[:, :end])
    # magnitudes of speech are about 0.01: at this weight the strong harmonics count as much as the logarithms, which
    # see all bands alike; with a weight of 2, STOI was 4 points lower after 250 steps
    loss = 4 * mel + 800 * magnitude + 0.25 * commitment
    return {"loss": loss, "mel": mel, "magnitude": magnitude, "commitment": commitment}


def semantic_terms(run: Run, quantised: bool) -> dict[str, Tensor]:
    """What the heads read from the content latents of whole utterances; the first codebooks must do for some.

    The reversed speaker gradient grows with the steps: words first.
    """
    c, model = run.config, run.model
    batch = SemanticBatch(*(x.to(run.device) for x in run.utterances.batch(c.seed, run.step, c.batch_size)))
    with torch.autocast(run.device.type, torch.bfloat16, enabled=c.precision == "bf16"):
        latents = model.latents(batch.wave)[0]
        if quantised:
            prefixes = draw_prefixes(c.seed, run.step, c.batch_size, model.config.n_semantic)
            latents = model.semantic(latents, prefixes.to(run.device)).latents
        reversal = c.speaker_weight * run.step / c.max_steps
        characters, speaker = run.heads(latents.float(), batch, reversal)
    return {"loss": c.ctc_weight * characters + speaker, "characters": characters, "speaker": speaker}


def train_step(run: Run) -> dict[str, float]:
    """One optimizer step. FloatingPointError before the update if the gradient is not finite."""
    c, step = run.config, run.step
    for optimizer, factor in zip(run.optimizers, (1, 2), strict=True):  # Muon bears twice the rate of AdamW
        for group in optimizer.param_groups:
            group["lr"] = factor * lr_at(step, c)
    wave = run.crops.batch(c.seed, step, c.batch_size, c.crop_frames * FRAME_SAMPLES).to(run.device)
    shape = run.model.config
    depths = draw_depths(c.seed, step, c.batch_size, shape.n_semantic, shape.n_acoustic_codebooks)
    depths = Depths(*(depth.to(run.device) for depth in depths))
    terms = loss_terms(run, wave, depths, step >= c.first_quantised_step)
    terms["loss"].backward()
    if run.heads is not None and step % 2 == 0:
        semantic = semantic_terms(run, step >= c.first_quantised_step)
        semantic.pop("loss").backward()
        terms |= semantic
    norm = nn.utils.clip_grad_norm_(run.model.parameters(), 5.0)
    if not torch.isfinite(norm):
        raise FloatingPointError(f"step {step}: gradient norm is {norm.item()}; stopped before the update")
    for optimizer in run.optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    run.update_average()
    scalars = {f"train/{name}": term.item() for name, term in terms.items()}
    return {**scalars, "train/grad_norm": norm.item(), "train/lr": lr_at(step, c)}


@torch.no_grad()
def fit_codebooks(run: Run) -> None:
    """k-means of all levels on latents of random crops; a function of the weights and the seed."""
    c, shape = run.config, run.model.config
    tokens = c.batch_size * c.crop_frames
    n_batches = math.ceil(FIT_VECTORS * shape.codebook_size / tokens)
    latents = []
    for index in range(n_batches):
        wave = run.crops.batch(c.seed + 1, index, c.batch_size, c.crop_frames * FRAME_SAMPLES).to(run.device)
        latents.append(run.model.latents(wave))
    generator = torch.Generator().manual_seed(c.seed)
    for quantiser, branch in zip((run.model.semantic, run.model.acoustic), zip(*latents, strict=True), strict=True):
        quantiser.fit(torch.cat(branch).flatten(0, 1), tokens, generator)


def fastest(run: Run) -> tuple[str, int]:
    """Precision and CPU threads, by timing a step with each combination that the flags leave open.

    bf16 must save at least a tenth. Two threads can be slower than one where other programs are busy. Leaves weights
    and the random state alone; the threads in use are the best ones afterwards.
    """
    c = run.config
    most = torch.get_num_threads()
    threads_open = [c.threads] if c.threads else sorted({1, most}) if run.device.type == "cpu" else [most]
    precisions_open = ["fp32", "bf16"] if c.precision == "auto" else [c.precision]
    wave = run.crops.batch(c.seed, 0, c.batch_size, c.crop_frames * FRAME_SAMPLES).to(run.device)
    depths = Depths(*torch.ones(2, c.batch_size, dtype=torch.int64, device=run.device))
    cost = {}
    for precision in precisions_open if len(threads_open) * len(precisions_open) > 1 else ():
        trial = dataclasses.replace(run, config=dataclasses.replace(c, precision=precision))
        for threads in threads_open:
            torch.set_num_threads(threads)
            seconds = [time_step(trial, wave, depths) for _ in range(3)]  # the first one pays for allocations
            cost[precision, threads] = min(seconds) * (1 / 0.9 if precision == "bf16" else 1)
    precision, threads = min(cost, key=cost.get) if cost else (precisions_open[0], threads_open[0])
    torch.set_num_threads(threads)
    return precision, threads


def time_step(run: Run, wave: Tensor, depths: Depths) -> float:
    """Seconds of one forward and backward pass without quantisers; gradients are dropped."""
    begin = time.perf_counter()
    loss_terms(run, wave, depths, quantised=False)["loss"].backward()
    if run.device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - begin
    run.model.zero_grad(set_to_none=True)
    return seconds


@torch.no_grad()
def evaluate(run: Run, clips: list[Tensor]) -> tuple[dict[str, float], Tensor, list[Tensor]]:
    """Held-out scalars, all codes (M, K) and the reconstructions of `clips`, each (1, N)."""
    model, quantised = run.averaged(), run.step > run.config.first_quantised_step
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
    all_codes = torch.cat(codes).cpu()
    scalars = {f"held_out/{name}": sums[name] / sums["seconds"] for name in ("mel", "mel_semantic")}
    if quantised:
        usage, perplexity = codebook_use(all_codes, model.config.codebook_size)
        scalars |= {"held_out/usage": usage.mean().item(), "held_out/perplexity": perplexity.mean().item()}
    return scalars, all_codes, waves


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
        log.tensorboard.add_figure(f"held_out/{index}", figure, run.step)  # closes the figure
        log.tensorboard.add_audio(f"held_out/{index}", pair[1][0].cpu().clamp(-1, 1), run.step, SAMPLE_RATE)
        if run.step <= run.config.eval_every:
            log.tensorboard.add_audio(f"held_out/{index}_original", pair[0][0].cpu(), 0, SAMPLE_RATE)


def train(run: Run, log: RunLog, save: Callable[[], None], stop: StopSignals) -> None:
    """Steps from `run.step` to the last one; returns early, saved, when a signal came."""
    c = run.config
    shown = run.held_out[:N_SHOWN]
    bar = tqdm(total=c.max_steps, initial=run.step, desc="tokenizer", unit="step", dynamic_ncols=True)
    with contextlib.closing(bar):
        while run.step < c.max_steps and stop.received is None:
            run.model.train()
            if run.step == c.first_quantised_step:
                bar.set_postfix_str("fitting codebooks")
                fit_codebooks(run)
            record = train_step(run)
            step = run.step
            run.step += 1
            if run.step % c.eval_every == 0 or run.step == c.max_steps:
                scalars, _, waves = evaluate(run, shown)
                record |= scalars
                show(run, log, shown, waves)
            log.scalars(step, record)
            bar.update()
            bar.set_postfix_str(f"mel {record['train/mel']:.3f}", refresh=False)
            if run.step % c.save_every == 0 or run.step == c.max_steps or stop.received is not None:
                save()


def finish(run: Run, out: Path) -> None:
    """Export the averaged weights, measure them on held-out clips, write samples and the results."""
    scalars, codes, waves = evaluate(run, run.held_out[:MAX_HELD_OUT])
    usage, perplexity = codebook_use(codes, run.model.config.codebook_size)
    save_tokenizer(run.averaged(), out)
    samples = out / "samples"
    samples.mkdir(exist_ok=True)
    semantic = run.model.config.n_semantic
    for index, (clip, wave) in enumerate(zip(run.held_out[:N_SHOWN], waves, strict=False)):
        content = run.averaged().decode(run.averaged().encode(clip)[..., :semantic])
        for name, samples_of in (("original", clip), ("reconstruction", wave), ("semantic_only", content)):
            write_wav(samples / f"{index}_{name}.wav", samples_of[0, : clip.size(1)].cpu().numpy())
    panels = {"loss": ["train/loss"], "log10-mel distance": ["train/mel", "held_out/mel", "held_out/mel_semantic"]}
    plot_metrics(out, panels, out / "losses.png")
    results = {
        "step": run.step,
        **scalars,
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


def load_audio(data: Path, seed: int) -> tuple[Crops, list[Tensor], Utterances]:
    """Training crops, held-out clips and training utterances. ValueError if there is too little."""
    remedy = f"collect more: python collect_data.py --sources synthetic --target_hours 0.5 --out {data}"
    transcribed = [(turn.speaker_id, turn.text, samples) for turn, samples in load_clips(data, "train", seed=seed)]
    clips = [samples for _, _, samples in transcribed]
    seconds = sum(map(len, clips)) / SAMPLE_RATE
    if seconds < MIN_SECONDS:
        raise ValueError(f"{data} holds {seconds:.0f} s of training audio, {MIN_SECONDS} s are needed; {remedy}")
    chosen = load_clips(data, "val", limit=MAX_HELD_OUT, seed=seed)
    held_out = [torch.from_numpy(samples)[None] for _, samples in chosen if len(samples) >= SAMPLE_RATE // 2]
    if not held_out:
        raise ValueError(f"{data} holds no held-out (val) clip of half a second or more; {remedy}")
    return Crops(clips), held_out, Utterances(transcribed)


def pick_device(name: str) -> torch.device:
    """ValueError if CUDA is asked for and not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device {name} asked for, but this torch sees no CUDA; use --device cpu")
    return torch.device(name)


def run_in(out: Path, data: Path, config: TrainConfig, device: torch.device) -> int:
    """Start, resume or skip the run in `out`; the exit code."""
    config = as_measured(config, read_settings(out))
    refuse_other_settings(out, {k: v for k, v in dataclasses.asdict(config).items() if k not in FREE})
    if (out / RESULTS).is_file():
        print(f"{out} holds a tokenizer trained for all {config.max_steps} steps; nothing to do")
        report(out)
        return EXIT_DONE
    crops, held_out, utterances = load_audio(data, config.seed)
    run = build_run(config, crops, held_out, device, utterances)
    precision, threads = fastest(run)
    run.config = dataclasses.replace(config, precision=precision, threads=threads)
    run.optimizers = make_optimizers(run.model, run.config, run.heads)
    state = load_newest_state(out)
    if state is not None:
        run.restore(state)
    size = sum(parameter.numel() for parameter in run.model.parameters()) / 1e6
    print(
        f"{size:.1f}M parameters, {crops.seconds / 60:.1f} min of audio, {run.config.precision}, "
        f"{threads} thread(s), {device}, from step {run.step} of {config.max_steps}"
    )
    log = RunLog(out, dataclasses.asdict(run.config), run.step)
    with contextlib.closing(log), StopSignals() as stop:
        train(run, log, lambda: save_state(out, run.step, run.state()), stop)
    if stop.received is not None:
        print(f"stopped at step {run.step} of {config.max_steps}, saved; the same command goes on")
        return stop.exit_code
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
    with only_run_in(out):
        return run_in(out, data, TrainConfig(**args), pick_device(device))


if __name__ == "__main__":
    raise SystemExit(run(main))
