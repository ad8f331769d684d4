"""Training of the speech codec: what one run holds, its losses in three stages, one step.

Stage A: a continuous autoencoder. Stage B: all codebooks, after k-means, level by level. Stage C: the encoder and the
codebooks are frozen, so the codes are final, and the decoder alone goes on, at half the cost of a step, towards what a
listener would notice and, if asked, against discriminators (the schedule of AudioDec, arXiv 2305.16608, 3.2, and
MagiCodec, arXiv 2506.00385, 3.3).

Everything is a function of settings, data and step: batches, depths and random draws need no state of their own, and
N processes take the steps of one, but for the vectors that replace dead codes. Letters: B batch, N samples, T frames,
K codebooks.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import time
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from audio import FRAME_SAMPLES
from codec_batches import (
    CodedCrops,
    Crops,
    Depths,
    SemanticBatch,
    Utterances,
    draw_depths,
    draw_disguises,
    draw_prefixes,
)
from codec_discriminators import DISCRIMINATORS, Discriminators, fooling_loss, telling_loss
from codec_losses import SpectralDistance
from hearing_losses import MIN_SAMPLES, Hearing
from mimi_tokenizer import is_mimi
from muon import Muon
from ranks import Ranks
from rvq_tokenizer import DELAY_SAMPLES, PRESETS, Disguise, RVQTokenizer, load_tokenizer
from semantic_supervision import SemanticHeads, disagreement
from semantic_teacher import TEACHERS

APPRENTICESHIP = 4  # warmups in which the discriminators' weight grows
HEADS_FACTOR = 2  # of the heads' learning rate: what reads the codes should not lag behind them
FIT_VECTORS = 8  # per code, for k-means
SETTLE_VECTORS = 64  # the same, when the codes become final
DISTURBANCE, UNLIKE = 3.0, 80.0  # weights of what would be heard, beside the spectral distances
PAUSE = 1e-4  # mean square of a crop, -40 dB of full scale: no speech in it
BY_DEPTH = ("known_depth", "depth_gain")  # tables by acoustic depth: matrices in shape only
CONTINUOUS, QUANTISED, DECODER = "continuous", "quantised", "decoder"


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    preset: str = "cpu"
    init_from: str = ""
    keep_codes: bool = False
    spoken_by: str = ""
    spoken_share: float = 0.5
    voiced: bool = False
    max_steps: int = 1000
    stage_a: float = 0.2
    stage_c: float = 0.4
    batch_size: int = 16
    crop_frames: int = 12
    lr: float = 2e-3
    warmup: int = 50
    ema_decay: float = 0.998
    ctc_weight: float = 0.0
    speaker_weight: float = 0.1
    alike_weight: float = 0.0
    teacher: str = ""
    teacher_weight: float = 1.0
    phone_weight: float = 0.0
    content_gradient: float = 1.0
    warped: float = 0.0
    hearing: float = 1.0
    adversarial: float = 0.0
    discriminators: str = "light"
    eval_every: int = 200
    save_every: int = 250
    precision: str = "auto"
    threads: int = 0
    seed: int = 0

    def __post_init__(self):
        if self.preset not in PRESETS:
            raise ValueError(f"preset={self.preset} is not one of {', '.join(PRESETS)}")
        if self.discriminators not in DISCRIMINATORS:
            raise ValueError(f"discriminators={self.discriminators} is not one of {', '.join(DISCRIMINATORS)}")
        if self.teacher and (self.teacher not in TEACHERS or not self.ctc_weight):
            needed = f"must be one of {', '.join(TEACHERS)}, and needs a ctc_weight above 0"
            raise ValueError(f"teacher={self.teacher} {needed}")
        if self.phone_weight and not self.ctc_weight:
            raise ValueError(f"phone_weight={self.phone_weight} needs a ctc_weight above 0")
        if self.alike_weight and not (self.ctc_weight and self.warped):
            raise ValueError(f"alike_weight={self.alike_weight} needs a ctc_weight and a warped above 0")
        if self.precision not in ("auto", "fp32", "bf16"):
            raise ValueError(f"precision={self.precision} is not one of auto, fp32, bf16")
        for name in ("stage_a", "stage_c", "ema_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must lie in [0, 1)")
        for name in ("warped", "spoken_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} must lie in [0, 1]")
        if self.stage_a + self.stage_c >= 1 and not self.init_from:
            raise ValueError(f"stage_a={self.stage_a} and stage_c={self.stage_c} leave nothing to stage B")
        for name in ("max_steps", "batch_size", "lr", "eval_every", "save_every"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)} must be positive")
        weights = (
            "ctc_weight",
            "speaker_weight",
            "alike_weight",
            "teacher_weight",
            "phone_weight",
            "hearing",
            "adversarial",
        )
        for name in (*weights, "content_gradient", "threads"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed={self.seed} must lie in [0, 2**32)")
        if self.init_from and is_mimi(self.init_from):
            raise ValueError(
                f"init_from={self.init_from} is Mimi, which is not trained here; give a folder of this script"
            )
        if self.keep_codes and (not self.init_from or self.ctc_weight):
            raise ValueError(
                "keep_codes trains the decoder of an init_from, whose codes are made: ctc_weight must be 0"
            )
        if self.spoken_by and not self.keep_codes:
            raise ValueError("spoken_by is for the decoder of codes that a speech model knows: give keep_codes too")
        if self.voiced and not self.spoken_by:
            raise ValueError("voiced tells the decoder who says what a speech model guesses: give spoken_by too")
        if self.adversarial and not (self.stage_c or self.keep_codes):
            raise ValueError(f"adversarial={self.adversarial} needs a stage_c above 0")
        heard = math.ceil((MIN_SAMPLES + DELAY_SAMPLES) / FRAME_SAMPLES)
        least = heard if self.hearing and (self.stage_c or self.keep_codes) else 4
        if self.crop_frames < least:
            raise ValueError(f"crop_frames={self.crop_frames} must be at least {least} (4 without hearing)")

    @property
    def first_quantised_step(self) -> int:
        return 0 if self.init_from else int(self.stage_a * self.max_steps)

    @property
    def first_decoder_step(self) -> int:
        return 0 if self.keep_codes else self.max_steps - int(self.stage_c * self.max_steps)

    def stage(self, step: int) -> str:
        if step < self.first_quantised_step:
            return CONTINUOUS
        return QUANTISED if step < self.first_decoder_step else DECODER


HELP = {
    "preset": f"size of the codec: {', '.join(PRESETS)}; with init_from that of its weights",
    "init_from": "folder of a tokenizer of this script to begin with; no stage without quantisers",
    "keep_codes": "train the decoder of init_from alone: speech models go on understanding its codes",
    "spoken_by": "folder of a speech model whose guesses of the codes the decoder learns to speak; needs keep_codes",
    "spoken_share": "share of the crops whose codes are guesses of spoken_by",
    "voiced": "the decoder is told who speaks by another clip of the conversation; needs spoken_by",
    "max_steps": "optimizer steps; the default takes about 10 minutes on 2 idle CPU cores",
    "stage_a": "share of the steps without quantisers, at the start",
    "stage_c": "share of the steps for the decoder alone, at the end, with final codes",
    "batch_size": "crops per step, of all processes together",
    "crop_frames": "codec frames per crop, 80 ms each",
    "lr": "highest learning rate",
    "warmup": "steps until the learning rate is reached",
    "ema_decay": "of the weight average that is evaluated and exported",
    "ctc_weight": "of the characters that the semantic codebooks must tell; 0 = not asked",
    "speaker_weight": "of the speaker that the semantic codebooks must not tell; used with ctc_weight",
    "alike_weight": "of what two disguises of an utterance must have in common; needs ctc_weight and warped",
    "teacher": f"model whose features the semantic codebooks must tell: {', '.join(TEACHERS)}; needs ctc_weight",
    "teacher_weight": "of 1 - cosine to the teacher's features",
    "phone_weight": "of the phones that the semantic codebooks must tell, aligned in DATA/phones; needs ctc_weight",
    "content_gradient": "factor of the reconstruction's gradient into the content branch",
    "warped": "share of the crops whose content branch hears another voice: frequencies moved, bands louder or softer",
    "hearing": "of what a listener would notice (PESQ, STOI), beside the spectral distances, in stage C; 0 = none",
    "adversarial": "size of the discriminators' gradient beside the spectral losses' in stage C; 0 = none",
    "discriminators": f"size of the discriminators: {', '.join(DISCRIMINATORS)}",
    "eval_every": "steps between evaluations on held-out clips",
    "save_every": "steps between state files",
    "precision": "fp32, bf16, or auto: the faster one, measured once at the start",
    "threads": "CPU threads, or 0: one or all cores, whichever is faster, measured once at the start",
    "seed": "of the weights, the crops and the depths",
}


def lr_at(step: int, c: TrainConfig, decoder: bool = False) -> float:
    """Linear warmup, constant, then cosine to zero: over stage B, for the decoder over the stage that is its last."""
    if step < c.warmup:
        return c.lr * (step + 1) / c.warmup
    begin, end = c.first_quantised_step, c.first_decoder_step
    if decoder and end < c.max_steps:
        begin, end = end, c.max_steps
    progress = (step - begin) / max(1, end - begin)
    return c.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, max(0.0, progress))))


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
    hearing: Hearing
    device: torch.device
    utterances: Utterances | None = None  # what the heads learn from; None: no semantic supervision
    spoken: CodedCrops | None = None  # with what a speech model would say; None: the tokenizer's own codes alone
    heads: SemanticHeads | None = None
    discriminators: Discriminators | None = None
    teller: torch.optim.Optimizer | None = None  # of the discriminators
    ranks: Ranks = field(default_factory=Ranks)
    step: int = 0

    def parts(self) -> dict[str, nn.Module | torch.optim.Optimizer]:
        """Everything with a state, by name."""
        parts = {"model": self.model, "heads": self.heads}
        parts |= {"discriminators": self.discriminators, "teller": self.teller}
        parts |= {f"optimizer{i}": optimizer for i, optimizer in enumerate(self.optimizers)}
        return {name: part for name, part in parts.items() if part is not None}

    def state(self) -> dict:
        state = {name: part.state_dict() for name, part in self.parts().items()}
        return {**state, "average": dict(self.average.named_parameters())}

    def restore(self, state: dict) -> None:
        for name, part in self.parts().items():
            part.load_state_dict(state[name])
        self.average.load_state_dict(state["average"], strict=False)
        self.step = state["step"]
        if self.step > self.config.first_decoder_step:
            self.freeze_codes()

    @torch.no_grad()
    def update_average(self) -> None:
        """Decay grows from 0.1 so that the average forgets the random start.

        What is frozen stays as it is, to the last bit: a mean of equal numbers can turn -0 to 0, another fingerprint.
        """
        decay = min(self.config.ema_decay, (1 + self.step) / (10 + self.step))
        pairs = zip(self.average.parameters(), self.model.parameters(), strict=True)
        means, learning = zip(*((mean, own) for mean, own in pairs if own.requires_grad), strict=True)
        torch._foreach_lerp_(means, learning, 1 - decay)

    def averaged(self) -> RVQTokenizer:
        """The model to evaluate and export: averaged weights with the present codebooks."""
        for own, buffer in zip(self.average.buffers(), self.model.buffers(), strict=True):
            own.copy_(buffer)
        return self.average.eval()

    @torch.no_grad()
    def begin_decoder_stage(self) -> None:
        """The averaged encoder becomes the encoder, for good: from here on every clip keeps its codes."""
        self.model.encoder.load_state_dict(self.average.encoder.state_dict())
        if not self.config.keep_codes:
            settle_codebooks(self)
        self.freeze_codes()

    def freeze_codes(self) -> None:
        """The encoder, the codebooks and what read them take no gradient; their optimizer steps pass them over."""
        for part in (self.model.encoder, self.model.semantic, self.model.acoustic, self.heads):
            if part is not None:
                part.requires_grad_(False)


def build_run(
    config: TrainConfig,
    crops: Crops,
    held_out: list[Tensor],
    device: torch.device,
    utterances: Utterances | None = None,
    ranks: Ranks | None = None,
    spoken: CodedCrops | None = None,
) -> Run:
    """ValueError: semantic supervision asked for without texts, or a batch that the processes cannot share;
    FileNotFoundError: there are no weights to begin with."""
    ranks = ranks or Ranks()
    ranks.share_of(config.batch_size)
    if config.ctc_weight:
        ranks.share_of(utterances_per_step(config.batch_size), "half of batch_size, the utterances of ctc_weight")
    torch.manual_seed(config.seed)
    begun = load_tokenizer(config.init_from) if config.init_from else None
    told = config.voiced or (begun is not None and begun.voice is not None)
    model = RVQTokenizer(begun.config if begun else PRESETS[config.preset], voiced=told)
    if begun:
        model.load_state_dict(begun.state_dict(), strict=not config.voiced)
    if config.voiced and begun.voice is None:
        model.voice.fit(spoken.statistics)
    model = model.to(device).train()
    average = copy.deepcopy(model).requires_grad_(False)
    heads = discriminators = teller = None
    if config.ctc_weight:
        if utterances is None or not utterances.items:
            raise ValueError(
                "ctc_weight: no training clip has a text that fits its length, and no digits; collect some, or give 0"
            )
        sizes = (len(utterances.alphabet), len(utterances.speakers), utterances.feature_width, len(utterances.phones))
        heads = SemanticHeads(model.config.codebook_dim, *sizes).to(device)
    if config.adversarial:
        discriminators = Discriminators(DISCRIMINATORS[config.discriminators]).to(device)
        teller = torch.optim.AdamW(discriminators.parameters(), lr=config.lr, betas=(0.8, 0.99), weight_decay=1e-3)
    return Run(
        config,
        crops,
        [clip.to(device) for clip in held_out],
        model,
        average,
        make_optimizers(model, config, heads),
        SpectralDistance().to(device),
        Hearing().to(device),
        device,
        utterances,
        spoken,
        heads,
        discriminators,
        teller,
        ranks,
    )


def make_optimizers(
    model: RVQTokenizer, c: TrainConfig, heads: SemanticHeads | None
) -> tuple[torch.optim.Optimizer, ...]:
    """Muon for the matrices between hidden layers, AdamW for all else (first and last layers, norms, convolutions).

    Each has a group for the decoder's side and one for the rest, whose rates end at different steps. After 250 steps
    of the continuous autoencoder Muon is where AdamW alone is after 2,000. A matrix is orthogonalised every second step
    only: after 200 steps the log-mel distance was 0.237 instead of 0.234, and a step took 0.79 s instead of 0.85. Call
    it again when the precision has been chosen.
    """
    groups = {(side, muon): [] for side in (True, False) for muon in (True, False)}
    for name, p in model.named_parameters():
        muon = p.ndim == 2 and not name.endswith(("head.weight", "lift.weight", *BY_DEPTH))
        groups[name.startswith(("decoder.", "voice.", "semantic_out.", "acoustic_out.", *BY_DEPTH)), muon].append(p)
    dtype = torch.bfloat16 if c.precision == "bf16" else torch.float32
    others, matrices = (
        [{"params": groups[side, muon], "decoder": side, "factor": 1} for side in (True, False)]
        for muon in (False, True)
    )
    if heads is not None:
        others.append({"params": list(heads.parameters()), "decoder": False, "factor": HEADS_FACTOR})
    return (
        torch.optim.AdamW(others, lr=c.lr, betas=(0.8, 0.99), weight_decay=1e-3, fused=True),
        Muon(matrices, lr=2 * c.lr, weight_decay=1e-3, every=2, dtype=dtype),  # bears twice the rate of AdamW
    )


# ---- losses ----------------------------------------------------------------------------------------------------------


def reconstruct(
    run: Run,
    wave: Tensor,
    depths: Depths,
    stage: str,
    disguise: Disguise | None = None,
    *guessed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(B, N) -> the reconstruction without its last 30 ms, where the decoder lacks the frames to come; commitment.

    `guessed` are the last arguments of `RVQTokenizer.decode_frozen`, whose stage is the only one that knows them.
    """
    share, commitment = run.config.content_gradient, wave.new_zeros(())
    with torch.autocast(run.device.type, torch.bfloat16, enabled=run.config.precision == "bf16"):
        if stage == CONTINUOUS:
            estimate = run.model.autoencode(wave, depths.acoustic, share, disguise)
        elif stage == QUANTISED:
            estimate, _, commitment = run.model(wave, *depths, share, disguise)
        else:
            estimate = run.model.decode_frozen(wave, *depths, *guessed)
    return estimate[:, : wave.size(1) - run.model.delay_samples], commitment


def spectral_terms(run: Run, estimate: Tensor, wave: Tensor) -> dict[str, Tensor]:
    """Weighted loss and its parts."""
    distance = run.distance(estimate, wave[:, : estimate.size(1)])
    # magnitudes of speech are about 0.01: at this weight the strong harmonics count as much as the logarithms, which
    # see all bands alike; with a weight of 2, STOI was 4 points lower after 250 steps
    return {"loss": 4 * distance.mel + 800 * distance.magnitude + 15 * distance.loudness, **distance._asdict()}


def heard_terms(run: Run, estimate: Tensor, wave: Tensor, depths: Depths) -> dict[str, Tensor]:
    """What a listener would notice where all codebooks are kept.

    Asked of the semantic codebooks alone, a reconstruction that cannot be near is made worse: their word errors rose
    from 1.4 to 2.2 times those of all codebooks. Asked for from the start, it led to codes with less of the speaker.
    Nor is it asked of pauses: brought to the level of speech, a crop of silence has a gradient many times as long.
    """
    heard = run.hearing(estimate, wave[:, : estimate.size(1)])
    whole = depths.acoustic == run.model.config.n_acoustic_codebooks
    asked = whole & (wave.square().mean(dim=1) > PAUSE)
    disturbance, unlike = ((part * asked).mean() for part in heard)
    loss = run.config.hearing * (DISTURBANCE * disturbance + UNLIKE * unlike)
    return {"loss": loss, "disturbance": disturbance, "unlike": unlike}


def utterances_per_step(batch_size: int) -> int:
    """Of all processes together, that the semantic heads read: half as many as crops."""
    return max(1, batch_size // 2)


def semantic_terms(run: Run, stage: str) -> dict[str, Tensor]:
    """What the heads read from the content latents of whole utterances; the first codebooks must do for some.

    At every step; the weight of the speaker grows with the steps until the codes are final: words first.
    """
    c, model = run.config, run.model
    n = utterances_per_step(c.batch_size)
    mine = run.ranks.share_of(n)
    batch = SemanticBatch(*(x.to(run.device) for x in run.utterances.batch(c.seed, run.step, n, mine)))
    alike = batch.wave.new_zeros(())
    with torch.autocast(run.device.type, torch.bfloat16, enabled=c.precision == "bf16"):
        latents = model.encoder.content_alone(batch.wave, disguise_of(run, n))
        if c.alike_weight and c.warped:
            other = model.encoder.content_alone(batch.wave, disguise_of(run, n, which=1))
            alike = disagreement(latents.float(), other.float(), batch.live(latents.size(1)))
        if stage == QUANTISED:
            prefixes = draw_prefixes(c.seed, run.step, n, model.config.n_semantic)[mine]
            latents = model.semantic(latents, prefixes.to(run.device), batch.live(latents.size(1))).latents
        nats = run.heads(latents.float(), batch)
    hidden = c.speaker_weight * run.step / c.first_decoder_step
    loss = c.ctc_weight * nats.characters + nats.speaker + hidden * nats.confusion + c.teacher_weight * nats.teacher
    loss = loss + c.phone_weight * nats.phones
    return {"loss": loss + c.alike_weight * alike, **nats._asdict(), "alike": alike}


def adversarial_terms(run: Run, estimate: Tensor, wave: Tensor) -> dict[str, Tensor]:
    """A step of the discriminators on a part of the same crops, then what they want of the decoder."""
    samples = min(DISCRIMINATORS[run.config.discriminators].samples, estimate.size(1))
    start = int(torch.randint(estimate.size(1) - samples + 1, ()))
    real, estimate = (audio[:, start : start + samples] for audio in (wave, estimate))
    level = real.square().mean(dim=1, keepdim=True).clamp(min=PAUSE).sqrt()  # the level of speech tells them little
    real, estimate = real / level, estimate / level
    with torch.autocast(run.device.type, torch.bfloat16, enabled=run.config.precision == "bf16"):
        telling = telling_loss(run.discriminators(real), run.discriminators(estimate.detach()))
    telling.backward()
    run.ranks.average_gradients(run.discriminators.parameters())
    nn.utils.clip_grad_norm_(run.discriminators.parameters(), 1.0)
    run.teller.step()
    run.discriminators.requires_grad_(False)
    with torch.autocast(run.device.type, torch.bfloat16, enabled=run.config.precision == "bf16"):
        with torch.no_grad():
            wanted = run.discriminators(real)
        fooling = fooling_loss(wanted, run.discriminators(estimate), run.ranks.mean)
    run.discriminators.requires_grad_(True)
    run.teller.zero_grad(set_to_none=True)
    return {"loss": fooling, "fooling": fooling, "telling": telling}


def backward_balanced(run: Run, estimate: Tensor, spectral: Tensor, adversarial: Tensor) -> None:
    """Backward of both losses; on the waveform the adversarial gradient is `adversarial` times as long as the other.

    The balancer of EnCodec (arXiv 2210.13438, 3.4) for two losses, without its moving averages. It grows from nothing
    while the discriminators learn what to look for: what they say at first, made as long as that, ruins the decoder.
    """
    c = run.config
    share = c.adversarial * min(1.0, (run.step - c.first_decoder_step) / (APPRENTICESHIP * max(1, c.warmup)))
    ours, theirs = (torch.autograd.grad(loss, estimate, retain_graph=True)[0] for loss in (spectral, adversarial))
    norms = run.ranks.mean(torch.stack([ours.square().sum(), theirs.square().sum()])).sqrt()
    estimate.backward(ours + share * norms[0] / norms[1].clamp(min=1e-12) * theirs)


# ---- steps -----------------------------------------------------------------------------------------------------------


def train_step(run: Run) -> dict[str, float]:
    """One optimizer step. FloatingPointError before the update if the gradient is not finite."""
    c, step = run.config, run.step
    stage, mine = c.stage(step), run.ranks.share_of(c.batch_size)
    if step == c.first_decoder_step:
        run.begin_decoder_stage()
    torch.manual_seed(1_000_003 * c.seed + step)  # dead codes are drawn anew: the same ones after a resume
    set_rates(run)
    wave = run.crops.batch(c.seed, step, c.batch_size, c.crop_frames * FRAME_SAMPLES)[mine].to(run.device)
    shape = run.model.config
    depths = draw_depths(c.seed, step, c.batch_size, shape.n_semantic, shape.n_acoustic_codebooks)
    depths, guessed = Depths(*(depth[mine].to(run.device) for depth in depths)), ()
    if run.spoken is not None:
        wave, depths, *guessed = speak_some(run, wave, depths)
    estimate, commitment = reconstruct(run, wave, depths, stage, disguise_of(run, c.batch_size), *guessed)
    terms = {**spectral_terms(run, estimate, wave), "commitment": commitment}
    if stage == DECODER and c.hearing:
        heard = heard_terms(run, estimate, wave, depths)
        terms["loss"] = terms["loss"] + heard.pop("loss")
        terms |= heard
    if stage == DECODER and run.discriminators is not None:
        fooled = adversarial_terms(run, estimate, wave)
        backward_balanced(run, estimate, terms["loss"], fooled.pop("loss"))
        terms |= fooled
    else:
        (terms["loss"] + 0.25 * commitment).backward()
    if run.heads is not None and stage != DECODER:
        semantic = semantic_terms(run, stage)
        semantic.pop("loss").backward()
        terms |= semantic
    return {**update(run, terms), "train/lr": lr_at(step, c, decoder=True)}


def speak_some(run: Run, wave: Tensor, depths: Depths) -> tuple[Tensor, Depths, Tensor, Tensor | None]:
    """Some of this process's crops become those with codes that a speech model guessed. These codes, -1 for the others,
    and what the decoder is told of who says them, if it is.

    Guesses are of the semantic codebooks: no acoustic ones are heard with them.
    """
    c = run.config
    mine = run.ranks.share_of(c.batch_size)
    said, codes, beside = (part[mine].to(run.device) for part in run.spoken.batch(c.seed, run.step, c.batch_size))
    spoken = (torch.arange(c.batch_size) < c.spoken_share * c.batch_size)[mine].to(run.device)  # (B,)
    wave = torch.where(spoken[:, None], said, wave)
    depths = depths._replace(acoustic=depths.acoustic.masked_fill(spoken, 0))
    told = beside.masked_fill(~spoken[:, None], torch.nan) if c.voiced else None
    return wave, depths, codes.masked_fill(~spoken[:, None, None], -1), told


def disguise_of(run: Run, batch_size: int, which: int = 0) -> Disguise | None:
    """What the content branch hears of each of this process's samples: another voice."""
    c = run.config
    if not c.warped:
        return None
    return draw_disguises(c.seed, run.step, batch_size, c.warped, which).part(
        run.ranks.share_of(batch_size), run.device
    )


def set_rates(run: Run) -> None:
    for optimizer, factor in zip(run.optimizers, (1, 2), strict=True):  # Muon bears twice the rate of AdamW
        for group in optimizer.param_groups:
            group["lr"] = factor * group["factor"] * lr_at(run.step, run.config, group["decoder"])
    for group in run.teller.param_groups if run.teller is not None else ():
        group["lr"] = run.config.lr / 2


def update(run: Run, terms: dict[str, Tensor]) -> dict[str, float]:
    """The step along the gradients of all processes; the scalars to log."""
    learning = [p for group in run.optimizers for g in group.param_groups for p in g["params"] if p.requires_grad]
    run.ranks.average_gradients(learning)
    norm = nn.utils.clip_grad_norm_([p for p in run.model.parameters() if p.requires_grad], 5.0)
    if not torch.isfinite(norm):
        raise FloatingPointError(f"step {run.step}: gradient norm is {norm.item()}; stopped before the update")
    for optimizer in run.optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    run.update_average()
    values = run.ranks.mean(torch.stack([term.detach().float() for term in terms.values()])).tolist()
    scalars = {f"train/{name}": value for name, value in zip(terms, values, strict=True)}
    return {**scalars, "train/grad_norm": norm.item()}


@torch.no_grad()
def fit_codebooks(run: Run) -> None:
    """k-means of all levels on latents of random crops; a function of the weights and the seed."""
    c, shape = run.config, run.model.config
    n_batches = math.ceil(FIT_VECTORS * shape.codebook_size / (c.batch_size * c.crop_frames))
    latents = []
    for index in range(n_batches):
        wave = run.crops.batch(c.seed + 1, index, c.batch_size, c.crop_frames * FRAME_SAMPLES).to(run.device)
        latents.append(run.model.latents(wave))
    fit_to(run, latents, anew=True)


@torch.no_grad()
def settle_codebooks(run: Run) -> None:
    """The codebooks move to the final encoder and to whole clips in their own voice, which are what they will code.

    Until here they followed another encoder at every step, disguised voices and crops without what came before: on
    held-out clips a quarter of the first codebook was left unused. Too little audio: they stay as they are.
    """
    c, model = run.config, run.model
    wanted = SETTLE_VECTORS * model.config.codebook_size
    latents = [model.latents(wave.to(run.device)) for wave in run.crops.whole(c.seed, wanted)]
    if sum(content.size(1) for content, _ in latents) >= FIT_VECTORS * model.config.codebook_size:
        fit_to(run, latents, anew=False)


def fit_to(run: Run, latents: list[tuple[Tensor, Tensor]], anew: bool) -> None:
    """Both quantisers, to content and acoustic latents (B, T, D); the same in all processes. The codes weigh as if a
    step's crops had made them, so that later steps, of this run or of one from its tokenizer, can move them."""
    batch_tokens = run.config.batch_size * run.config.crop_frames
    generator = torch.Generator().manual_seed(run.config.seed)
    for quantiser, branch in zip((run.model.semantic, run.model.acoustic), zip(*latents, strict=True), strict=True):
        vectors = torch.cat([part.flatten(0, 1) for part in branch])
        quantiser.fit(vectors, batch_tokens, generator, anew=anew)
        run.ranks.copy_from_first(quantiser.buffers())


def fastest(run: Run) -> tuple[str, int]:
    """Precision and CPU threads, by timing a step with each combination that the flags leave open.

    bf16 must save at least a tenth. Two threads can be slower than one where other programs are busy. Leaves weights
    and the random state alone; the threads in use are the best ones afterwards.
    """
    c = run.config
    most = torch.get_num_threads()
    threads_open = [c.threads] if c.threads else sorted({1, most}) if run.device.type == "cpu" else [most]
    precisions_open = ["fp32", "bf16"] if c.precision == "auto" else [c.precision]
    wave = run.crops.batch(c.seed, 0, c.batch_size // run.ranks.n, c.crop_frames * FRAME_SAMPLES).to(run.device)
    depths = Depths(*torch.ones(2, len(wave), dtype=torch.int64, device=run.device))
    cost = {}
    for precision in precisions_open if len(threads_open) * len(precisions_open) > 1 else ():
        trial = dataclasses.replace(run, config=dataclasses.replace(c, precision=precision))
        for threads in threads_open:
            torch.set_num_threads(threads)
            seconds = [time_step(trial, wave, depths) for _ in range(3)]  # the first one pays for allocations
            cost[precision, threads] = min(seconds) * (1 / 0.9 if precision == "bf16" else 1)
    best = min(cost, key=cost.get) if cost else (precisions_open[0], threads_open[0])
    precision, threads = run.ranks.from_first(best)
    torch.set_num_threads(threads)
    return precision, threads


def time_step(run: Run, wave: Tensor, depths: Depths) -> float:
    """Seconds of one forward and backward pass without quantisers; gradients are dropped."""
    begin = time.perf_counter()
    estimate, _ = reconstruct(run, wave, depths, CONTINUOUS)
    spectral_terms(run, estimate, wave)["loss"].backward()
    if run.device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - begin
    run.model.zero_grad(set_to_none=True)
    return seconds
