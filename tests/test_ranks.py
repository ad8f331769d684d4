"""Several processes: shares, means, agreement; the tokenizer's training on two processes against one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import dataset_pipeline
import ranks
from codec_batches import Crops
from codec_training import TrainConfig, build_run
from command_line import EXIT_DONE
from ranks import Ranks, join_ranks
from run_folder import read_metrics

ROOT = Path(__file__).resolve().parent.parent
FLAGS = {"preset": "debug", "max_steps": 6, "stage_a": 0.34, "stage_c": 0.34, "batch_size": 4, "crop_frames": 6}
FLAGS |= {"eval_every": 100, "precision": "fp32", "warmup": 2, "threads": 1, "device": "cpu", "lr": 1e-3}
FLAGS |= {"ctc_weight": 1.0, "content_gradient": 0.1, "warped": 1.0, "alike_weight": 1.0, "adversarial": 0.5}
EXCHANGES = """
import os, torch
from ranks import join_ranks
with join_ranks(torch.device("cpu")) as (ranks, device):
    assert ranks.n == 2 and ranks.rank == int(os.environ["RANK"])
    a, b, c = (torch.zeros(2, requires_grad=True) for _ in range(3))
    a.grad = torch.tensor([1.0, 2.0]) * (1 + ranks.rank)
    if ranks.rank == 1:
        b.grad = torch.tensor([4.0, 0.0])
    ranks.average_gradients([a, b, c])
    assert a.grad.tolist() == [1.5, 3.0] and b.grad.tolist() == [2.0, 0.0] and c.grad.tolist() == [0.0, 0.0]
    assert ranks.mean(torch.tensor(float(ranks.rank))).item() == 0.5
    assert ranks.any(ranks.rank == 1) and not ranks.any(False)
    assert ranks.from_first({"rank": ranks.rank}) == {"rank": 0}
    own = torch.full((2,), float(ranks.rank))
    ranks.copy_from_first([own])
    assert own.tolist() == [0.0, 0.0]
    assert ranks.share_of(6) == slice(3 * ranks.rank, 3 * ranks.rank + 3)
"""


WITHOUT_DEAD_CODES = """
import codec_training, residual_quantizer, sys
residual_quantizer.ResidualQuantizer.DEAD = 0
codec_training.SETTLE_VECTORS = 0
import train_tokenizer
sys.exit(train_tokenizer.run(train_tokenizer.main))
"""
SAME_CODEBOOKS = """
import hashlib, numpy as np, torch
from codec_batches import Crops, Utterances
from codec_training import TrainConfig, build_run, fit_codebooks, train_step
from ranks import join_ranks
from residual_quantizer import ResidualQuantizer
ResidualQuantizer.DEAD = 0.9
random = np.random.default_rng(0)
crops = Crops([0.1 * random.standard_normal(48_000).astype(np.float32) for _ in range(4)])
spoken = [("ab"[i % 2], "ab" * (i + 1), clip) for i, clip in enumerate(np.split(random.standard_normal(240_000), 5))]
spoken = Utterances([(s, t, 0.1 * clip[: 6_000 * len(t)].astype(np.float32)) for s, t, clip in spoken])
config = TrainConfig(
    preset="debug", max_steps=6, stage_a=0, stage_c=0, batch_size=4, crop_frames=6, precision="fp32", threads=1,
    ctc_weight=1.0,
)
with join_ranks(torch.device("cpu")) as (ranks, device):
    run = build_run(config, crops, [], device, spoken, ranks)
    fit_codebooks(run)
    fitted = run.model.acoustic.levels[0].codebook.clone()
    for run.step in range(4):
        train_step(run)
    state = b"".join(t.numpy().tobytes() for t in run.model.state_dict().values())
    assert ranks.from_first(hashlib.sha256(state).hexdigest()) == hashlib.sha256(state).hexdigest()
    assert (fitted - run.model.acoustic.levels[0].codebook).abs().max() > 1e-3
"""


def torchrun(*command: str, n: int = 2, timeout: int = 240) -> subprocess.CompletedProcess:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [*launcher, *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout
    )


def train_on(n: int, data: Path, out: Path, script: Path = ROOT / "train_tokenizer.py", **changes):
    flags = {"data": data, "out": out, **FLAGS, **changes}
    words = [text for name, value in flags.items() for text in (f"--{name}", str(value))]
    return torchrun(str(script), *words, n=n)


def tolerance(step: int) -> float:
    """The first gradient is exact; the first steps of Adam follow its signs, also those of nearly zero."""
    return 1e-4 if step == 0 else 0.1


def is_near(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """As a whole; single elements may follow another sign."""
    ours, theirs = ours.float(), theirs.float()
    return bool((ours - theirs).norm() <= 0.03 * theirs.norm() + 3e-3)


def test_alone_nothing_is_exchanged():
    with join_ranks(torch.device("cpu")) as (ranks, device):
        assert ranks == Ranks(0, 1) and ranks.first and device.type == "cpu"
        value = torch.ones(2)
        assert ranks.mean(value) is value and ranks.any(True) and not ranks.any(False)
        assert ranks.share_of(5) == slice(0, 5)


def test_a_batch_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="batch_size=5 must be a multiple of the 2 processes"):
        Ranks(0, 2).share_of(5)


def test_half_a_batch_that_does_not_divide_is_refused_before_the_first_step():
    config = TrainConfig(preset="debug", batch_size=6, ctc_weight=1.0)
    with pytest.raises(ValueError, match=r"half of batch_size.*=3 must be a multiple of the 2 processes"):
        build_run(config, Crops([]), [], torch.device("cpu"), ranks=Ranks(0, 2))


def test_two_processes_exchange(tmp_path):
    script = tmp_path / "exchanges.py"
    script.write_text(EXCHANGES)
    done = torchrun(str(script))
    assert done.returncode == 0, done.stderr[-2000:]


def test_two_processes_train_the_tokenizer_that_one_trains(shared_data, tmp_path):
    """With characters, speakers and discriminators; the same codebooks and weights.

    Stage A has its own test: k-means turns differences of a last bit into other codebooks, at the beginning of stage B
    and of stage C. So do dead codes, which are drawn anew from other vectors where there are more processes.
    """
    script = tmp_path / "train.py"
    script.write_text(WITHOUT_DEAD_CODES)
    logs = []
    for n in (1, 2):
        done = train_on(n, shared_data, tmp_path / str(n), script, stage_a=0)
        assert done.returncode == 0, done.stderr[-3000:]
        assert f"{n} process(es)" in done.stdout and done.stdout.count("tokenizer in") == 1
        logs.append(read_metrics(tmp_path / str(n)))
    for one, two in zip(*logs, strict=True):
        assert two == pytest.approx(one, rel=tolerance(one["step"]), abs=1e-5), one["step"]
    ours, theirs = (load_file(tmp_path / n / "model.safetensors") for n in ("1", "2"))
    for name, tensor in ours.items():
        deep = ".levels." in name and ".levels.0." not in name  # what they code is as small as the differences
        assert deep or is_near(theirs[name], tensor), name


def test_processes_keep_the_same_codebooks_when_dead_codes_are_drawn_anew(tmp_path):
    script = tmp_path / "codebooks.py"
    script.write_text(SAME_CODEBOOKS)
    done = torchrun(str(script))
    assert done.returncode == 0, done.stderr[-3000:]


def test_two_processes_learn_the_continuous_codec_of_one_and_go_on_as_one(shared_data, tmp_path):
    """Stage A; and the state of a run says nothing of the number of processes."""
    for n in (1, 2):
        done = train_on(n, shared_data, tmp_path / str(n), save_every=2)
        assert done.returncode == 0, done.stderr[-3000:]
    ours, theirs = (read_metrics(tmp_path / n)[:2] for n in ("1", "2"))
    assert len(ours) == 2 and ours[0]["train/characters"] > 0
    for one, two in zip(ours, theirs, strict=True):
        assert two == pytest.approx(one, rel=tolerance(one["step"]), abs=1e-6)
    out = tmp_path / "2"
    whole = load_file(out / "model.safetensors")
    for name in ("results.json", "model.safetensors", "state-00000006.pt"):
        (out / name).unlink()
    done = train_on(1, shared_data, out, save_every=2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "from step 4 of 6" in done.stdout
    for name, tensor in load_file(out / "model.safetensors").items():
        final = ".levels." in name  # the codebooks of the last stage
        assert torch.equal(tensor, whole[name]) if final else is_near(tensor, whole[name]), name


def test_a_failing_process_ends_all_with_the_reason(shared_data, tmp_path):
    done = train_on(2, shared_data, tmp_path, batch_size=3)
    assert done.returncode != 0 and "must be a multiple of the 2 processes" in done.stderr


@pytest.mark.parametrize("name", ["meta", "xpu", "gpu", "cuda:99"])
def test_a_device_that_is_not_there_is_refused_before_anything_is_loaded(name):
    with pytest.raises(ValueError, match=f"device '?{name}"):
        ranks.pick_device(name)


@pytest.mark.parametrize("name", ["auto", "cuda", "cuda:0"])
def test_a_process_without_a_gpu_of_its_own_is_told_how_many_there_are(name, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("LOCAL_RANK", "7")
    with pytest.raises(ValueError, match=r"process 7 of this machine has no GPU, there are 4; .* --nproc_per_node 4"):
        ranks.pick_device(name)


def test_cuda_is_the_gpu_of_the_process_also_where_tokens_are_made(monkeypatch, tmp_path):
    devices, zeros = [], torch.zeros(1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch, "zeros", lambda *given, **named: zeros)
    monkeypatch.setattr(dataset_pipeline, "load_tokenizer", lambda folder, device: devices.append(device))
    monkeypatch.setattr(dataset_pipeline, "tokenise", lambda data, tokenizer, device, *part: devices.append(device))
    for name in ("cuda", "auto"):
        assert dataset_pipeline.main(["--tokenizer", "any", "--device", name, "--shard", "1/2"]) == EXIT_DONE
    assert devices == [torch.device("cuda:1")] * 4
    assert ranks.pick_device("cpu").type == "cpu"


def test_who_asks_for_bf16_where_it_is_slower_is_told_so(monkeypatch, capsys):
    assert 0 < ranks.bf16_speed(torch.device("cpu")) < float("inf")
    for speed in (0.2, 1.5):
        monkeypatch.setattr(ranks, "bf16_speed", lambda device, speed=speed: speed)
        ranks.warn_of_slow_bf16(torch.device("cpu"))
        assert ("5.0 times as long" in capsys.readouterr().out) == (speed < 1)
