"""Two processes against one: DDP and FSDP take the steps of one process, and each goes on where another stopped."""

import shutil

import pytest
import torch
from conftest import full_config
from safetensors.torch import load_file
from test_ranks import is_near, tolerance, torchrun

import train
from architecture import CSM, save_model
from checkpointing import load_state, state_files
from command_line import EXIT_DONE, only_run_in, run
from parallel import distribute, restore, training_state
from ranks import Ranks
from run_folder import read_metrics
from training import begin
from training_config import TrainConfig

FLAGS = {"max_steps": 4, "batch_rows": 2, "row_positions": 160, "warmup": 2, "save_every": 1, "keep_last": 9}
FLAGS |= {"eval_every": 2, "eval_rows": 1, "precision": "fp32", "device": "cpu", "threads": 1, "grad_accum": 2}
FLAGS |= {"dropout": 0.0, "drop_frames": 0.2, "replace_codes": 0.1, "shallow": 0.3, "lr": 1e-3, "guidance_steps": 3}
FLAGS |= {"semantic_share": 0.3, "guidance_weight": 1.0}


@pytest.fixture(scope="module")
def command(tmp_path_factory, shared_data, tokenizer, tokenizer_folder):
    """A function of `out` and changes: the command line of a run of a small model with every addition."""
    torch.manual_seed(0)
    begin_with = tmp_path_factory.mktemp("begin")
    save_model(CSM(full_config(audio_tokenizer=tokenizer.fingerprint())), begin_with)
    fixed = {"data": shared_data, "tokenizer": tokenizer_folder, "init_from": begin_with, **FLAGS}

    def make(out, **changes) -> list[str]:
        return [word for name, value in {**fixed, "out": out, **changes}.items() for word in (f"--{name}", str(value))]

    return make


@pytest.fixture(scope="module")
def alone(tmp_path_factory, command):
    """The folder of a run of one process."""
    out = tmp_path_factory.mktemp("runs") / "alone"
    assert run(train.main, command(out)) == EXIT_DONE
    return out


def goes_on_from(source, step: int, folder) -> None:
    """`folder` is a run that was stopped after a step of the one in `source`."""
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("model.safetensors", "best", ".lock"))
    for path in state_files(folder):
        if load_state(path)["step"] > step:
            path.unlink()


def assert_same_run(ours, theirs) -> None:
    for one, other in zip(read_metrics(ours), read_metrics(theirs), strict=True):
        for name in ("train/frames_per_s", "train/memory_gib"):
            del one[name], other[name]
        assert other == pytest.approx(one, rel=tolerance(one["step"]), abs=1e-4), one["step"]
    tensors = load_file(theirs / "model.safetensors")
    for name, tensor in load_file(ours / "model.safetensors").items():
        assert is_near(tensors[name], tensor), name


@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_two_processes_train_the_model_that_one_trains(tmp_path, command, alone, way):
    done = torchrun("train.py", *command(tmp_path / way, parallel=way))
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"on 2 x cpu ({way})" in done.stdout and done.stdout.count("weights ") == 1
    assert_same_run(alone, tmp_path / way)
    states = [load_state(state_files(folder)[0]) for folder in (alone, tmp_path / way)]
    for part in ("model", "moments"):
        assert states[0][part].keys() == states[1][part].keys()
    for name, tensor in states[0]["model"].items():
        assert is_near(states[1]["model"][name], tensor), name

    goes_on_from(tmp_path / way, 2, tmp_path / "on_one")
    assert run(train.main, command(tmp_path / "on_one")) == EXIT_DONE
    assert_same_run(tmp_path / way, tmp_path / "on_one")


def test_what_one_process_began_two_with_shards_end(tmp_path, command, alone):
    goes_on_from(alone, 2, tmp_path / "run")
    done = torchrun("train.py", *command(tmp_path / "run", parallel="fsdp"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same_run(alone, tmp_path / "run")
    assert [record["step"] for record in read_metrics(tmp_path / "run")] == [0, 1, 2, 3]


def test_one_process_that_fails_ends_all_with_the_reason(tmp_path, command):
    """The first one, which alone takes the folder, while the other waits for it."""
    with only_run_in(tmp_path):
        done = torchrun("train.py", *command(tmp_path), timeout=120)
    assert done.returncode != 0 and "error: another run works in" in done.stderr


def test_a_batch_that_the_processes_cannot_share_is_refused(tmp_path, command):
    done = torchrun("train.py", *command(tmp_path, batch_rows=3), timeout=120)
    assert done.returncode != 0 and "error: batch_rows=3 must be a multiple of the 2 processes" in done.stderr


SHARDED = """
import sys, torch
sys.path[:0] = ["tests"]
from conftest import full_config
from architecture import CSM
from frames import Rows, Turn
from parallel import training_state
from ranks import join_ranks
from training import begin, batch_losses, gradient_step, pick_depth_rows
from training_config import TrainConfig
config = full_config()
torch.manual_seed(0)
with join_ranks(torch.device("cpu")) as (ranks, device):
    c = TrainConfig(batch_rows=2, parallel="fsdp")
    run = begin(CSM(config), c, device, ranks, frozenset())
    codes = torch.randint(0, 16, (9, 4)) if ranks.first else None  # the other has no audio, so no pools either
    rows = Rows(*(x[None] for x in config.layout.turn_rows(Turn([1, 65, 66, 2], codes))))
    for step in range(2):
        micro = [(rows, pick_depth_rows(rows.targets, 1.0, torch.Generator()))]
        _, counts, norm = gradient_step(run.model, run.optimizer, micro, c, device, step, ranks, run.loss)
        assert counts.text == 6 and counts.codebook0 == 10 and norm > 0
    with torch.no_grad():
        batch_losses(run.model, *micro[0], device)
    state = training_state(run.model, run.optimizer, ranks)
    names = [name for name, _ in run.model.named_parameters()]
    assert list(state["moments"]) == names and list(state["model"]) == (names if ranks.first else [])
    assert all(moments["step"] == 2 for moments in state["moments"].values() if moments)
"""


def test_shards_need_no_audio_in_every_process_and_are_saved_whole_after_an_evaluation(tmp_path):
    script = tmp_path / "sharded.py"
    script.write_text(SHARDED)
    done = torchrun(str(script))
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_state_that_does_not_fit_is_refused_by_its_first_tensor():
    torch.manual_seed(0)
    one = begin(CSM(full_config()), TrainConfig(), torch.device("cpu"), Ranks(), frozenset())
    state = training_state(one.model, one.optimizer, Ranks())
    other = begin(CSM(full_config(codebook_size=32)), TrainConfig(), torch.device("cpu"), Ranks(), frozenset())
    with pytest.raises(ValueError, match=r"here: depth_heads has shape \(3, 32, 17\), expected \(3, 32, 33\)"):
        restore(other.model, other.optimizer, state, Ranks(), "here")
    with pytest.raises(ValueError, match="here: moments depth_heads is missing"):
        restore(one.model, one.optimizer, {**state, "moments": {}}, Ranks(), "here")
    with pytest.raises(ValueError, match="here: the state has no moments"):
        restore(one.model, one.optimizer, {"model": state["model"]}, Ranks(), "here")
    with pytest.raises(ValueError, match="parallel=threads is not one of ddp, fsdp"):
        distribute(one.model, [], "threads", Ranks(), torch.device("cpu"))
