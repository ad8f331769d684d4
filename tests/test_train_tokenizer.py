"""The tokenizer's training: exact resume, stages, refusals, what it leaves behind."""

import dataclasses
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import full_model, tiny_tokenizer, voice, write_tiny_data

import codec_training
import train_tokenizer
from architecture import load_model, save_model
from audio import FRAME_SAMPLES, read_audio, to_pcm16
from checkpointing import load_newest_state, load_state, save_state, state_files
from codec_batches import Coded, CodedCrops, Crops, Depths, Utterances, draw_depths
from codec_training import (
    CONTINUOUS,
    DECODER,
    QUANTISED,
    TrainConfig,
    build_run,
    fastest,
    heard_terms,
    lr_at,
    train_step,
)
from command_line import EXIT_BUSY, EXIT_DONE, EXIT_INPUT, EXIT_SIGINT, EXIT_SIGTERM, EXIT_STORAGE, only_run_in, run
from conversations import each_clip, load_clips
from dataset_pipeline import as_read_by
from inference_model import InferenceModel
from phone_alignments import Interval, file_name, write_phones
from run_folder import read_metrics, read_settings
from rvq_tokenizer import PRESETS, load_tokenizer, save_tokenizer
from speech_metrics import log_mel_distance
from spoken_codes import guessed_turns
from train_tokenizer import main
from turn_shards import read_turns

STEPS = 8
FLAGS = {"preset": "debug", "max_steps": STEPS, "stage_a": 0.4, "stage_c": 0.0, "batch_size": 2, "crop_frames": 6}
FLAGS |= {"save_every": 2, "eval_every": 100, "precision": "fp32", "warmup": 2, "threads": 1}
ROOT = Path(train_tokenizer.__file__).parent


def arguments(data: Path, out: Path, **changes) -> list[str]:
    flags = {"data": data, "out": out, **FLAGS, **changes}
    return [
        text
        for name, value in flags.items()
        for text in ((f"--{name}", str(value)) if value is not True else (f"--{name}",))
    ]


def weights(out: Path) -> bytes:
    return (out / "model.safetensors").read_bytes()


@pytest.fixture(autouse=True, scope="module")
def one_picture():
    """One clip to show instead of three: drawing takes longer than the tiny runs themselves."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_tokenizer, "N_SHOWN", 1)
        yield


@pytest.fixture(scope="module")
def whole(one_picture, shared_data, tmp_path_factory) -> Path:
    """A run of 8 steps that nothing interrupted."""
    out = tmp_path_factory.mktemp("whole") / "tokenizer"
    assert run(main, arguments(shared_data, out)) == EXIT_DONE
    return out


def signal_at(monkeypatch, step: int, number: int) -> None:
    """The process signals itself while it does this step."""
    original = train_tokenizer.train_step

    def step_with_signal(trained):
        if trained.step == step:
            os.kill(os.getpid(), number)
        return original(trained)

    monkeypatch.setattr(train_tokenizer, "train_step", step_with_signal)


# resume


@pytest.mark.parametrize(
    ("step", "number", "code"), [(1, signal.SIGINT, EXIT_SIGINT), (4, signal.SIGTERM, EXIT_SIGTERM)]
)
def test_stopped_run_goes_on_to_the_same_weights(whole, shared_data, tmp_path, monkeypatch, step, number, code):
    with monkeypatch.context() as patch:
        signal_at(patch, step, number)
        assert run(main, arguments(shared_data, tmp_path)) == code
    assert load_newest_state(tmp_path)["step"] == step + 1 and not (tmp_path / "model.safetensors").exists()
    assert run(main, arguments(shared_data, tmp_path)) == EXIT_DONE
    assert weights(tmp_path) == weights(whole)
    assert [record["step"] for record in read_metrics(tmp_path)] == list(range(STEPS))


def test_run_killed_without_warning_goes_on_to_the_same_weights(whole, shared_data, tmp_path):
    command = [sys.executable, str(ROOT / "train_tokenizer.py"), *arguments(shared_data, tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.time() + 120
    while len(read_metrics(tmp_path)) < 3 and time.time() < deadline and process.poll() is None:
        time.sleep(0.002)
    process.kill()
    process.wait()
    assert len(read_metrics(tmp_path)) >= 3
    assert run(main, arguments(shared_data, tmp_path)) == EXIT_DONE
    assert weights(tmp_path) == weights(whole)


def test_torn_newest_state_costs_only_the_steps_since_the_one_before(whole, shared_data, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        signal_at(patch, 5, signal.SIGINT)
        run(main, arguments(shared_data, tmp_path))
    newest = state_files(tmp_path)[-1]
    newest.write_bytes(newest.read_bytes()[:1000])
    with pytest.warns(UserWarning, match="damaged"):
        assert run(main, arguments(shared_data, tmp_path)) == EXIT_DONE
    assert weights(tmp_path) == weights(whole)


def test_run_killed_after_its_last_step_exports_the_same_weights(whole, shared_data, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(train_tokenizer, "finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert run(main, arguments(shared_data, tmp_path)) == EXIT_SIGINT
    assert not (tmp_path / "results.json").exists()
    assert run(main, arguments(shared_data, tmp_path)) == EXIT_DONE
    assert weights(tmp_path) == weights(whole)


def test_finished_run_is_skipped_with_its_figures(whole, shared_data, capsys):
    before = (whole / "model.safetensors").stat().st_mtime_ns
    assert run(main, arguments(shared_data, whole)) == EXIT_DONE
    printed = capsys.readouterr().out
    assert "nothing to do" in printed and "held-out log10-mel distance" in printed
    assert (whole / "model.safetensors").stat().st_mtime_ns == before


def test_precision_measured_at_the_start_is_kept_on_resume(shared_data, tmp_path, monkeypatch):
    bf16_is_faster = {("fp32", 1): 1.0, ("bf16", 1): 0.5}
    monkeypatch.setattr(codec_training, "time_step", lambda trial, *_: bf16_is_faster[trial.config.precision, 1])
    with monkeypatch.context() as patch:
        signal_at(patch, 1, signal.SIGINT)
        run(main, arguments(shared_data, tmp_path, precision="auto"))
    monkeypatch.setattr(codec_training, "time_step", lambda *_: pytest.fail("measured again"))
    assert run(main, arguments(shared_data, tmp_path, precision="auto", max_steps=STEPS)) == EXIT_DONE
    assert read_settings(tmp_path)["precision"] == "bf16"


def test_measuring_leaves_weights_and_chance_alone(shared_data):
    trained = build_run(TrainConfig(preset="debug", batch_size=2, crop_frames=6), crops(), [], torch.device("cpu"))
    before, chance = [p.clone() for p in trained.model.parameters()], torch.get_rng_state()
    precision, threads = fastest(trained)
    assert precision in ("fp32", "bf16") and threads == torch.get_num_threads()
    assert all(torch.equal(a, b) for a, b in zip(before, trained.model.parameters(), strict=True))
    assert all(p.grad is None for p in trained.model.parameters()) and torch.equal(chance, torch.get_rng_state())


@pytest.mark.parametrize(("saved", "expected"), [(0.05, "fp32"), (0.2, "bf16")])
def test_bf16_is_taken_only_if_it_saves_a_tenth(monkeypatch, saved, expected):
    cost = {"fp32": 1.0, "bf16": 1.0 - saved}
    monkeypatch.setattr(codec_training, "time_step", lambda trial, *_: cost[trial.config.precision])
    trained = build_run(TrainConfig(preset="debug", threads=1), crops(), [], torch.device("cpu"))
    assert fastest(trained) == (expected, 1)


# parts


def crops(seconds: float = 4.0) -> Crops:
    random = np.random.default_rng(0)
    return Crops([0.1 * random.standard_normal(int(24_000 * seconds)).astype(np.float32) for _ in range(3)])


def test_batches_are_a_function_of_seed_and_step():
    data = crops()
    first = data.batch(0, 5, 4, 9600)
    assert first.shape == (4, 9600) and first.dtype == torch.float32
    data.batch(0, 6, 4, 9600)
    assert torch.equal(first, data.batch(0, 5, 4, 9600))
    assert not torch.equal(first, data.batch(0, 6, 4, 9600)) and not torch.equal(first, data.batch(1, 5, 4, 9600))


def test_whole_clips_come_once_and_in_another_order():
    data = Crops([np.full(length, 0.1, dtype=np.float32) for length in (1, FRAME_SAMPLES, 3 * FRAME_SAMPLES + 5)])
    frames = sorted(wave.size(1) // FRAME_SAMPLES for wave in data.whole(0, 100))
    assert frames == [1, 1, 4]
    assert sum(1 for _ in data.whole(0, 1)) == 1 and not list(data.whole(0, 0))
    assert len({tuple(wave.size(1) for wave in data.whole(seed, 100)) for seed in range(9)}) > 1


def test_clip_shorter_than_a_crop_is_padded_with_silence():
    wave = crops(seconds=0.1).batch(0, 0, 2, 9600)
    assert wave[:, :2400].abs().mean() > 0.01 and wave[:, 2400:].abs().max() == 0


def test_coded_crops_hold_the_codes_of_their_moments_and_another_clip_of_the_speaker():
    def clip(n_frames: int, first: int, beside: list[float]) -> Coded:
        marks = np.arange(first, first + n_frames)  # every frame holds its own number
        statistics = np.array(beside, dtype=np.float32)[:, None]
        return Coded(marks.repeat(FRAME_SAMPLES).astype(np.int16)[:-7], np.stack([marks, marks], axis=1), statistics)

    data = CodedCrops([clip(12, 100, [1.0, 2.0]), clip(4, 200, []), clip(3, 300, [3.0])], 4)
    assert len(data.clips) == 2 and data.statistics.flatten().tolist() == [1.0, 2.0]
    wave, codes, beside = data.batch(0, 5, 200)
    again = data.batch(0, 5, 200)
    assert all(
        torch.equal(a, b)
        for a, b in zip((wave, codes, beside.nan_to_num()), (*again[:2], again[2].nan_to_num()), strict=True)
    )
    assert torch.equal((wave.view(200, 4, FRAME_SAMPLES)[:, :, 0] * 32768).long(), codes[:, :, 0])
    alone = codes[:, 0, 0] == 200
    assert 0 < alone.sum() < 100 and beside[alone].isnan().all()
    told = beside[~alone].flatten()
    assert 0.8 < (~told.isnan()).float().mean() < 1 and set(told[~told.isnan()].tolist()) == {1.0, 2.0}
    with pytest.raises(ValueError, match="3 frames of codes do not fit a clip of 7680 samples"):
        CodedCrops([Coded(np.zeros(4 * FRAME_SAMPLES, np.int16), np.zeros((3, 2), int), np.zeros((0, 1)))], 4)


def test_depths_keep_a_semantic_codebook_and_cover_the_hierarchy():
    depths = draw_depths(0, 0, 4000, 10, 22)
    assert ((depths.semantic == 10) | (depths.acoustic == 0)).all()  # a prefix of all codebooks
    share = torch.bincount(depths.acoustic, minlength=23) / 4000
    assert share[0] == pytest.approx(0.25, abs=0.02) and share[22] == pytest.approx(0.6, abs=0.03)
    assert share[1] == pytest.approx(0.15 * np.log(2) / np.log(23), abs=0.02) and (share[2:22] > 0).all()
    share = torch.bincount(depths.semantic, minlength=11) / 4000
    assert share[1] == pytest.approx(0.10 * np.log(2) / np.log(11), abs=0.02) and (share[1:] > 0).all()


def test_rate_warms_up_stays_through_stage_a_and_falls_to_zero():
    c = TrainConfig(max_steps=100, stage_a=0.3, stage_c=0.0, warmup=10, lr=1e-3)
    assert lr_at(0, c) == pytest.approx(1e-4) and lr_at(9, c) == lr_at(29, c) == pytest.approx(1e-3)
    falling = [lr_at(step, c) for step in range(30, 101)]
    assert falling == sorted(falling, reverse=True) and falling[-1] == pytest.approx(0, abs=1e-9)


def test_loss_falls_in_both_stages():
    config = TrainConfig(preset="debug", max_steps=80, stage_a=0.5, stage_c=0.0, batch_size=2, lr=4e-3, crop_frames=6)
    config = dataclasses.replace(config, precision="fp32", warmup=5, hearing=0.0)
    clips = [voice(4.0, pitch, rate=24_000) for pitch in (110, 150, 220)]
    trained = build_run(config, Crops(clips), [], torch.device("cpu"))
    losses = []
    for step in range(80):
        if step == config.first_quantised_step:
            codec_training.fit_codebooks(trained)
        losses.append(train_step(trained)["train/mel"])
        trained.step += 1
    assert np.mean(losses[30:40]) < 0.8 * np.mean(losses[:5])
    assert np.mean(losses[70:]) < 0.95 * np.mean(losses[40:50])


def test_rates_of_encoder_and_decoder_end_with_their_last_stage():
    c = TrainConfig(max_steps=100, stage_a=0.2, stage_c=0.5, warmup=10, lr=1e-3)
    assert [c.stage(step) for step in (0, 19, 20, 49, 50, 99)] == [CONTINUOUS] * 2 + [QUANTISED] * 2 + [DECODER] * 2
    assert lr_at(20, c) == lr_at(50, c, decoder=True) == pytest.approx(1e-3)
    assert lr_at(35, c) == lr_at(75, c, decoder=True) == pytest.approx(5e-4)
    assert lr_at(50, c) == lr_at(80, c) == lr_at(100, c, decoder=True) == pytest.approx(0, abs=1e-9)


def test_of_a_pause_and_of_few_codebooks_nothing_heard_is_asked():
    trained = build_run(TrainConfig(preset="debug"), crops(), [], torch.device("cpu"))
    wave = torch.from_numpy(voice(1.0, 120, rate=24_000)).float().expand(3, -1) * torch.tensor([[1.0], [1.0], [0.01]])
    estimate = (wave + 0.002 * torch.randn(wave.shape, generator=torch.Generator().manual_seed(0))).requires_grad_()
    n_acoustic = trained.model.config.n_acoustic_codebooks
    depths = Depths(torch.full((3,), 2), torch.tensor([n_acoustic, 0, n_acoustic]))
    heard_terms(trained, estimate, wave, depths)["loss"].backward()
    assert [row.norm().item() > 0 for row in estimate.grad] == [True, False, False]


@pytest.mark.parametrize("adversarial", [0.0, 0.5])
def test_codes_are_final_when_the_last_stage_begins(adversarial):
    config = TrainConfig(preset="debug", max_steps=10, stage_a=0.3, stage_c=0.4, adversarial=adversarial, lr=1e-2)
    config = dataclasses.replace(config, batch_size=2, crop_frames=6, precision="fp32", warmup=2)
    trained = build_run(config, crops(), [], torch.device("cpu"))
    wave, codes, waves = trained.crops.batch(3, 0, 2, 9600), [], []
    judges = {name: p.clone() for name, p in trained.discriminators.named_parameters()} if adversarial else {}
    for trained.step in range(10):
        if trained.step == config.first_quantised_step:
            codec_training.fit_codebooks(trained)
        trained.model.train()
        record = train_step(trained)
        model = trained.averaged()
        codes.append(model.encode(wave))
        waves.append(model.decode(codes[-1]))
    assert not torch.equal(codes[5], codes[6])  # the codebooks settle
    assert torch.equal(codes[6], codes[7]) and torch.equal(codes[6], codes[9])
    for level in (*model.semantic.levels, *model.acoustic.levels):  # who begins with these weights can move them
        assert level._codebook.cluster_size.sum() == pytest.approx(config.batch_size * config.crop_frames)
    assert not torch.allclose(waves[6], waves[9], atol=1e-5)
    if adversarial:
        assert record["train/telling"] > 0 and record["train/fooling"] > 0
        assert all(not torch.equal(judges[name], p) for name, p in trained.discriminators.named_parameters())


def codes_of(folder: Path, data: Path) -> torch.Tensor:
    clips = load_clips(data, "val", limit=2)
    return torch.cat([load_tokenizer(folder).encode(torch.from_numpy(samples)[None])[0] for _, samples in clips])


def test_decoder_trained_further_keeps_the_codes_and_comes_nearer_to_the_audio(
    whole, shared_data, tmp_path, monkeypatch
):
    out = tmp_path / "decoder"
    further = arguments(shared_data, out, init_from=whole, keep_codes=True, max_steps=30, lr=0.003)
    with monkeypatch.context() as patch:
        signal_at(patch, 6, signal.SIGINT)
        assert run(main, further) == EXIT_SIGINT
    assert run(main, further) == EXIT_DONE
    before, after = load_tokenizer(whole), load_tokenizer(out)
    assert after.fingerprint() == before.fingerprint()
    assert torch.equal(codes_of(out, shared_data), codes_of(whole, shared_data))
    mel = [json.loads((folder / "results.json").read_text())["held_out/mel"] for folder in (whole, out)]
    assert mel[1] < 0.95 * mel[0]
    at_once = arguments(shared_data, tmp_path / "at_once", init_from=whole, keep_codes=True, max_steps=30, lr=0.003)
    assert run(main, at_once) == EXIT_DONE
    assert weights(tmp_path / "at_once") == weights(out)


def test_decoder_trained_further_leaves_a_rounded_tokenizer_its_fingerprint(whole, shared_data, tmp_path):
    rounded = load_tokenizer(whole)
    with torch.no_grad():
        for parameter in rounded.encoder.parameters():
            parameter.view(-1)[0] = -0.0  # what half precision makes of the smallest numbers
    save_tokenizer(rounded, tmp_path / "rounded")
    further = {"init_from": tmp_path / "rounded", "keep_codes": True, "max_steps": 3}
    assert run(main, arguments(shared_data, tmp_path / "out", **further)) == EXIT_DONE
    assert load_tokenizer(tmp_path / "out").fingerprint() == rounded.fingerprint()


def speaker_of(tokenizer: Path, folder: Path, seed: int = 0) -> Path:
    """A speech model of random weights that knows the codes of a tokenizer of this script."""
    model = full_model(seed, n_codebooks=32, n_semantic=10, audio_tokenizer=load_tokenizer(tokenizer).fingerprint())
    save_model(model, folder)
    return folder


def test_decoder_learns_to_speak_what_a_speech_model_guesses(whole, shared_data, tmp_path, monkeypatch):
    model = speaker_of(whole, tmp_path / "model")
    further = {"init_from": whole, "keep_codes": True, "max_steps": 100, "lr": 0.01, "hearing": 0, "save_every": 50}
    told = {**further, "spoken_by": model, "spoken_share": 1}
    with monkeypatch.context() as patch:
        signal_at(patch, 6, signal.SIGINT)
        assert run(main, arguments(shared_data, tmp_path / "told", **told)) == EXIT_SIGINT
    assert run(main, arguments(shared_data, tmp_path / "told", **told)) == EXIT_DONE
    assert run(main, arguments(shared_data, tmp_path / "at_once", **told)) == EXIT_DONE
    assert weights(tmp_path / "told") == weights(tmp_path / "at_once")
    assert run(main, arguments(shared_data, tmp_path / "untold", **further)) == EXIT_DONE
    tokenizers = {name: load_tokenizer(tmp_path / name) for name in ("told", "untold")}
    assert len({tokenizer.fingerprint() for tokenizer in (*tokenizers.values(), load_tokenizer(whole))}) == 1

    speech = load_model(model)
    guesses = guessed_turns(InferenceModel(speech), as_read_by(speech.config, shared_data, "val", tokenizers["told"]))
    distance = dict.fromkeys(tokenizers, 0.0)
    for turn, samples in each_clip(shared_data, "val"):
        codes = torch.from_numpy(guesses[turn.utt_id].astype(np.int64))[None]
        for name, tokenizer in tokenizers.items():
            distance[name] += log_mel_distance(samples, tokenizer.decode(codes)[0, : len(samples)].numpy())
    assert distance["told"] < 0.9 * distance["untold"]


def test_a_decoder_that_is_told_who_speaks_says_the_same_codes_in_that_voice(whole):
    flags = {"init_from": str(whole), "keep_codes": True, "spoken_by": "a model", "spoken_share": 1, "voiced": True}
    flags |= {"batch_size": 4, "crop_frames": 6, "hearing": 0, "lr": 0.02, "warmup": 2, "precision": "fp32"}
    config = TrainConfig(preset="debug", max_steps=250, **flags)
    waves = [voice(2.0, pitch, rate=24_000) for pitch in (110, 330)]
    codes = np.arange(25 * 10).reshape(25, 10) % 16
    width = load_tokenizer(whole).config.codebook_dim * 4
    voices = [np.full((1, width), level, dtype=np.float32) for level in (-1, 1)]
    clips = [Coded(to_pcm16(wave), codes, beside) for wave, beside in zip(waves, voices, strict=True)]
    trained = build_run(config, crops(), [], torch.device("cpu"), spoken=CodedCrops(clips, config.crop_frames))
    while trained.step < config.max_steps:
        train_step(trained)
        trained.step += 1
    tokenizer = trained.averaged()
    with torch.no_grad():
        shown = [tokenizer.voice(torch.from_numpy(beside)) for beside in voices]
    heard = [tokenizer.decode(torch.from_numpy(codes)[None], each)[0].numpy() for each in shown]
    for own, other in ((0, 1), (1, 0)):
        near, far = (log_mel_distance(waves[own], heard[each][: len(waves[own])]) for each in (own, other))
        assert near < 0.5 * far


def test_the_speech_model_that_is_spoken_for_must_know_the_codes_and_stay(whole, shared_data, tmp_path, capsys):
    model = speaker_of(whole, tmp_path / "model")
    flags = {"init_from": whole, "spoken_by": model, "max_steps": 4, "out": tmp_path / "out"}
    assert run(main, arguments(shared_data, **flags)) == EXIT_INPUT
    assert "give keep_codes too" in capsys.readouterr().err
    flags["keep_codes"] = True
    other = tmp_path / "other"
    save_tokenizer(tiny_tokenizer(), other)
    for changes, message in (
        ({"spoken_by": tmp_path / "nowhere"}, "is missing"),
        ({"init_from": other}, "the tokenizer has n_codebooks=4, the model 32"),
        ({"spoken_share": 1.5}, "spoken_share=1.5 must lie in [0, 1]"),
        ({"crop_frames": 50}, "no clip lasts 50 frames"),
    ):
        assert run(main, arguments(shared_data, **{**flags, **changes})) == EXIT_INPUT
        error = capsys.readouterr().err
        assert message in error.splitlines()[-1] and error.count("error:") == 1
    with pytest.MonkeyPatch.context() as patch:
        signal_at(patch, 1, signal.SIGINT)
        assert run(main, arguments(shared_data, **flags)) == EXIT_SIGINT
    speaker_of(whole, model, seed=1)
    assert run(main, arguments(shared_data, **flags)) == EXIT_INPUT
    assert "was started with speech_model=" in capsys.readouterr().err


def test_tokenizer_trained_further_begins_with_its_weights_and_codebooks(whole, shared_data, tmp_path):
    first = arguments(shared_data, tmp_path, init_from=whole, preset="cpu", max_steps=1, lr=1e-9, warmup=0)
    assert run(main, first) == EXIT_DONE  # the size is that of the weights
    equal = (codes_of(tmp_path, shared_data) == codes_of(whole, shared_data)).float().mean(dim=0)
    assert equal[0] > 0.9 and equal[-1] < 1  # one step of the codebooks' averages; no k-means anew
    assert read_metrics(tmp_path)[0]["train/commitment"] > 0  # with quantisers from the first step on


def test_what_cannot_be_trained_further_is_refused_in_one_line(whole, shared_data, tmp_path, capsys):
    for changes, message in (
        ({"voiced": True}, "give spoken_by too"),
        ({"keep_codes": True}, "keep_codes trains the decoder of an init_from"),
        ({"keep_codes": True, "init_from": whole, "ctc_weight": 1}, "ctc_weight must be 0"),
        ({"init_from": tmp_path / "nowhere"}, "is missing"),
        ({"init_from": "kyutai/mimi"}, "Mimi, which is not trained here"),
        ({"init_from": whole, "out": whole}, "--init_from and --out are both"),
    ):
        assert run(main, arguments(shared_data, **{"out": tmp_path / "out", **changes})) == EXIT_INPUT
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1


def test_stopped_run_with_discriminators_goes_on_to_the_same_weights(whole, shared_data, tmp_path, monkeypatch):
    through, cut = tmp_path / "through", tmp_path / "cut"
    flags = {"stage_c": 0.4, "adversarial": 0.5, "warped": 0.5}
    assert run(main, arguments(shared_data, through, **flags)) == EXIT_DONE
    with monkeypatch.context() as patch:
        signal_at(patch, 6, signal.SIGTERM)
        assert run(main, arguments(shared_data, cut, **flags)) == EXIT_SIGTERM
    assert run(main, arguments(shared_data, cut, **flags)) == EXIT_DONE
    assert weights(cut) == weights(through) != weights(whole)


SUPERVISED = {"ctc_weight": 1.0, "content_gradient": 0.1, "warped": 1.0, "alike_weight": 1.0, "phone_weight": 0.5}


@pytest.fixture
def aligned_data(shared_data, tmp_path) -> Path:
    """The data with alignments of two phones."""
    data = tmp_path / "aligned"
    shutil.copytree(shared_data, data)
    (data / "phones").mkdir()
    for turn in read_turns(data, with_audio=False):
        half = turn.duration_s / 2
        phones = [Interval(0, half, "AA"), Interval(half, turn.duration_s, "B")]
        write_phones(data / "phones" / file_name(turn.utt_id), phones, turn.duration_s)
    return data


def test_stopped_run_with_semantic_supervision_goes_on_to_the_same_weights(whole, aligned_data, tmp_path, monkeypatch):
    through, cut, without = tmp_path / "through", tmp_path / "cut", tmp_path / "without"
    assert run(main, arguments(aligned_data, through, **SUPERVISED)) == EXIT_DONE
    with monkeypatch.context() as patch:
        signal_at(patch, 4, signal.SIGTERM)
        assert run(main, arguments(aligned_data, cut, **SUPERVISED)) == EXIT_SIGTERM
    assert run(main, arguments(aligned_data, cut, **SUPERVISED)) == EXIT_DONE
    assert weights(cut) == weights(through) != weights(whole)
    assert run(main, arguments(aligned_data, without, **{**SUPERVISED, "phone_weight": 0.0})) == EXIT_DONE
    assert weights(without) != weights(cut)
    for told in ("train/characters", "train/phones"):
        values = [record[told] for record in read_metrics(cut) if told in record]
        assert len(values) == STEPS and np.isfinite(values).all() and min(values) > 0


def test_a_run_goes_on_with_the_phones_it_began_with_or_not_at_all(aligned_data, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        signal_at(patch, 4, signal.SIGTERM)
        assert run(main, arguments(aligned_data, tmp_path / "out", **SUPERVISED)) == EXIT_SIGTERM
    turn = load_clips(aligned_data, "train", seed=0)[0][0]
    write_phones(aligned_data / "phones" / file_name(turn.utt_id), [Interval(0, 0.3, "B")], turn.duration_s)
    assert run(main, arguments(aligned_data, tmp_path / "out", **SUPERVISED)) == EXIT_INPUT
    assert "was started with phones=" in capsys.readouterr().err


def test_semantic_supervision_without_texts_is_refused():
    config = TrainConfig(preset="debug", ctc_weight=1.0)
    for utterances in (None, Utterances([("s", "far too long a text", voice(0.4, 110, rate=24_000))])):
        with pytest.raises(ValueError, match="no training clip has a text that fits its length"):
            build_run(config, crops(), [], torch.device("cpu"), utterances)


def test_gradient_that_is_not_finite_stops_before_the_update():
    config = TrainConfig(preset="debug", batch_size=2, crop_frames=6, precision="fp32")
    trained = build_run(config, crops(), [], torch.device("cpu"))
    with torch.no_grad():
        trained.model.semantic_out.weight[0, 0] = torch.nan
    before = trained.model.decoder.head.weight.clone()
    with pytest.raises(FloatingPointError, match="step 0: gradient norm is nan"):
        train_step(trained)
    assert torch.equal(before, trained.model.decoder.head.weight)


def test_weight_average_follows_the_weights_and_takes_their_codebooks():
    config = TrainConfig(preset="debug", batch_size=2, crop_frames=6, precision="fp32", max_steps=9)
    config = dataclasses.replace(config, stage_a=0.0, stage_c=0.0)
    trained = build_run(config, crops(), [], torch.device("cpu"))
    first = trained.model.decoder.head.weight.clone()
    for _ in range(3):
        train_step(trained)
        trained.step += 1
    average, last = trained.averaged().decoder.head.weight, trained.model.decoder.head.weight
    assert 0 < (average - last).norm() < (first - last).norm()
    assert torch.equal(trained.averaged().semantic.levels[0].codebook, trained.model.semantic.levels[0].codebook)


@pytest.mark.parametrize(
    "change",
    [
        {"preset": "huge"},
        {"precision": "fp8"},
        {"stage_a": 1.0},
        {"max_steps": 0},
        {"crop_frames": 3, "hearing": 0.0},
        {"crop_frames": 5},
        {"alike_weight": 1.0, "warped": 1.0},
        {"discriminators": "huge"},
        {"teacher": "nobody", "ctc_weight": 1.0},
        {"phone_weight": 1.0},
        {"stage_a": 0.6, "stage_c": 0.4},
        {"adversarial": 1.0, "stage_c": 0.0},
        {"warped": -0.1},
    ],
)
def test_config_refuses_impossible_values(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        TrainConfig(**change)


# what a run leaves


def test_finished_run_leaves_a_tokenizer_and_samples(whole):
    tokenizer = load_tokenizer(whole)
    assert tokenizer.config == PRESETS["debug"]
    wave, _ = read_audio(whole / "samples" / "0_original.wav")
    for name in ("reconstruction", "semantic_only"):
        samples, _ = read_audio(whole / "samples" / f"0_{name}.wav")
        assert len(samples) == len(wave) and np.abs(samples).max() > 0
    assert (whole / "losses.png").read_bytes().startswith(b"\x89PNG")
    codes = tokenizer.encode(torch.from_numpy(wave)[None])
    assert codes.shape == (1, -(-len(wave) // FRAME_SAMPLES), 32)


def test_results_hold_the_figures_of_the_exported_weights(whole):
    results = json.loads((whole / "results.json").read_text())
    assert results["step"] == STEPS and results["held_out/tokens"] > 0 and results["held_out/mel"] > 0
    assert len(results["held_out/usage_per_codebook"]) == len(results["held_out/perplexity_per_codebook"]) == 32
    assert all(1 <= value <= 16 for value in results["held_out/perplexity_per_codebook"])


def test_tensorboard_has_scalars_pictures_and_audio(whole):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = EventAccumulator(str(whole / "tensorboard"))
    log.Reload()
    tags = log.Tags()
    assert {"train/loss", "train/mel", "held_out/mel", "held_out/mel_semantic"} <= set(tags["scalars"])
    assert "held_out/0" in tags["images"]
    assert {"held_out/0", "held_out/0_original"} <= set(tags["audio"])
    assert len(log.Scalars("train/loss")) == STEPS
    for shown in (log.Scalars("held_out/mel"), log.Images("held_out/0"), log.Audio("held_out/0")):
        assert [event.step for event in shown] == [STEPS - 1]  # a run resumed at STEPS would drop later ones


def test_states_hold_plain_values_and_only_the_last_two_stay(whole):
    paths = state_files(whole)
    assert len(paths) <= 2 and load_state(paths[-1])["step"] == STEPS


def test_audio_is_held_once_as_16_bit_samples_and_one_clip_at_a_time_as_floats(shared_data, monkeypatch):
    floats, most = [], 0

    def watched(*args):
        nonlocal most
        for turn, samples in each_clip(*args):
            floats.append(weakref.ref(samples))
            most = max(most, sum(each() is not None for each in floats))
            yield turn, samples

    monkeypatch.setattr(train_tokenizer, "each_clip", watched)
    crops, _, utterances, turns = train_tokenizer.load_audio(shared_data, 0)
    assert len(crops.clips) == len(turns) == len(floats) > 5 and most <= 2
    assert utterances.items and all(item.pcm is crops.clips[item.clip] for item in utterances.items)


# refusals


def test_other_settings_in_the_same_folder_are_refused(whole, shared_data, capsys):
    assert run(main, arguments(shared_data, whole, lr=0.5)) == EXIT_INPUT
    error = capsys.readouterr().err
    assert "started with lr=" in error and error.count("\n") == 1


def test_other_data_for_a_stopped_run_are_refused(shared_data, tmp_path, monkeypatch, capsys):
    other, out = tmp_path / "other", tmp_path / "run"
    write_tiny_data(other, n_conversations=28)
    with monkeypatch.context() as patch:
        signal_at(patch, 1, signal.SIGINT)
        run(main, arguments(shared_data, out))
    assert run(main, arguments(other, out)) == EXIT_INPUT
    assert "was started with data=" in capsys.readouterr().err
    assert run(main, arguments(shared_data, out)) == EXIT_DONE


def test_run_of_an_older_version_is_shown_when_finished_and_refused_when_not(
    whole, shared_data, tmp_path, monkeypatch, capsys
):
    finished, stopped = tmp_path / "finished", tmp_path / "stopped"
    shutil.copytree(whole, finished)
    with monkeypatch.context() as patch:
        signal_at(patch, 1, signal.SIGINT)
        run(main, arguments(shared_data, stopped))
    for out in (finished, stopped):
        settings = json.loads((out / "settings.json").read_text())
        del settings["hearing"]
        (out / "settings.json").write_text(json.dumps(settings))
    assert run(main, arguments(shared_data, finished)) == EXIT_DONE
    assert "nothing to do" in capsys.readouterr().out
    assert run(main, arguments(shared_data, stopped)) == EXIT_INPUT
    error = capsys.readouterr().err
    assert "by a version that did not know hearing" in error and error.count("\n") == 1


def test_state_of_other_tensors_is_refused_in_one_line(shared_data, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        signal_at(patch, 1, signal.SIGINT)
        run(main, arguments(shared_data, tmp_path))
    capsys.readouterr()
    state = load_newest_state(tmp_path)
    state["model"] = {f"old.{name}": value for name, value in state["model"].items()}
    save_state(tmp_path, state["step"], {name: value for name, value in state.items() if name != "step"})
    assert run(main, arguments(shared_data, tmp_path)) == EXIT_INPUT
    assert "holds the state of another version" in capsys.readouterr().err


def test_settings_of_saving_and_evaluating_may_change(whole, shared_data):
    assert run(main, arguments(shared_data, whole, save_every=3, eval_every=7)) == EXIT_DONE


def test_too_little_audio_is_refused_in_one_line(tmp_path, capsys):
    data = write_tiny_data(tmp_path / "data", n_conversations=6)
    assert run(main, arguments(data, tmp_path / "out")) == EXIT_INPUT
    error = capsys.readouterr().err
    assert "s of training audio, 30 s are needed" in error and "collect_data.py" in error and error.count("\n") == 1


def test_missing_data_is_refused_in_one_line(tmp_path, capsys):
    assert run(main, arguments(tmp_path / "nothing", tmp_path / "out")) == EXIT_INPUT
    error = capsys.readouterr().err
    assert "collect_data.py" in error and error.count("\n") == 1


def test_second_run_in_the_same_folder_is_refused(shared_data, tmp_path, capsys):
    with only_run_in(tmp_path):
        assert run(main, arguments(shared_data, tmp_path)) == EXIT_BUSY
    assert "another run" in capsys.readouterr().err


def test_full_disk_ends_in_one_line_and_the_run_goes_on_later(whole, shared_data, tmp_path, monkeypatch, capsys):
    def full(folder, step, state):
        raise OSError(errno.ENOSPC, "no space", str(folder))

    with monkeypatch.context() as patch:
        patch.setattr(train_tokenizer, "save_state", full)
        assert run(main, arguments(shared_data, tmp_path)) == EXIT_STORAGE
    assert "free some space" in capsys.readouterr().err
    assert run(main, arguments(shared_data, tmp_path)) == EXIT_DONE
    assert weights(tmp_path) == weights(whole)


def test_help_names_every_flag_and_the_exit_codes(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    printed = capsys.readouterr().out
    assert stop.value.code == 0 and "exit codes" in printed
    for name in ("data", "out", "threads", "device", *TrainConfig.__dataclass_fields__):
        assert f"--{name}" in printed
