"""The trainer's script: from scratch and from weights, resumed, measured by ear; what it refuses and how."""

import json
import shutil
import sys

import pytest
import torch
from conftest import full_config, tiny_config, tiny_tokenizer

import demo
import train
import training_start
import transformer
from architecture import CSM, load_model, save_model
from checkpointing import state_files
from command_line import EXIT_DONE, EXIT_INPUT, EXIT_MISSING, EXIT_STORAGE, run
from generation import SPEAKING, read_speaking
from model_sizes import PRESETS
from run_folder import describe_environment, read_metrics
from rvq_tokenizer import save_tokenizer
from text_tokenizer import ByteTokenizer
from training import Best
from training_config import RECIPES, TrainConfig

SHORT = {"max_steps": 4, "batch_rows": 2, "row_positions": 160, "warmup": 2, "save_every": 2, "eval_every": 2}
SHORT |= {"eval_rows": 1, "precision": "fp32", "device": "cpu", "drop_frames": 0.2, "dropout": 0.1}


@pytest.fixture
def flags(tmp_path, shared_data, tokenizer_folder):
    """A function of changes: the command line of a short run in `tmp_path`/run."""

    def make(**changes) -> list[str]:
        values = {"data": shared_data, "tokenizer": tokenizer_folder, "out": tmp_path / "run", **SHORT, **changes}
        return [word for name, value in values.items() for word in (f"--{name}", str(value))]

    return make


@pytest.fixture
def checkpoint(tmp_path, tokenizer):
    """A function of changes to its config: the folder of a tiny model of ours."""

    def make(**changes):
        torch.manual_seed(0)
        save_model(CSM(tiny_config(audio_tokenizer=tokenizer.fingerprint(), **changes)), tmp_path / "begin")
        return tmp_path / "begin"

    return make


def weights(folder) -> dict[str, torch.Tensor]:
    return load_model(folder).state_dict()


def test_a_run_from_scratch_leaves_everything_and_is_not_run_twice(tmp_path, flags, capsys, tokenizer_folder):
    assert run(train.main, flags(speak_every=3, speak_texts=2)) == EXIT_DONE
    out = tmp_path / "run"
    said = capsys.readouterr().out
    assert "nano: " in said and "word error rate of free speech: " in said and "nats held out" in said
    names = {path.name for path in out.iterdir()}
    assert {"model.safetensors", "config.json", "best", "losses.png", "metrics.jsonl", "settings.json"} <= names
    records = read_metrics(out)
    assert [record["step"] for record in records] == [0, 1, 2, 3]
    assert [record["step"] for record in records if "spoken/wer" in record] == [2, 3]
    kinds = {name.split("/")[0] for name in records[3]}
    assert {"gates", "half_lives", "codebooks_train", "codebooks_val", "spoken"} <= kinds
    best = json.loads((out / "best" / "best.json").read_text())
    heard = {record["step"] + 1: record["spoken/wer"] for record in records if "spoken/wer" in record}
    assert list(best["values"]) == ["spoken/wer", "val/loss"]
    assert best["values"]["spoken/wer"] == min(heard.values()) == heard[best["step"]]
    events = b"".join(path.read_bytes() for path in (out / "tensorboard").iterdir())
    assert all(name in events for name in (b"attention/3", b"speech", b"gates/memory", b"train/memory_gib"))

    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file() and path.name != ".lock"}
    assert run(train.main, flags(speak_every=3, speak_texts=2)) == EXIT_DONE
    assert {path: path.stat().st_mtime_ns for path in before} == before
    said = ["--checkpoint", str(out / "best"), "--tokenizer", str(tokenizer_folder), "--out", str(tmp_path / "demo")]
    assert run(demo.main, ["--mode", "test", *said, "--min_seconds", "0.3", "--max_seconds", "0.4"]) == EXIT_DONE


def test_a_stopped_run_goes_on_to_the_same_weights(tmp_path, flags, checkpoint):
    begin = checkpoint()
    assert run(train.main, flags(init_from=begin, out=tmp_path / "whole")) == EXIT_DONE
    assert run(train.main, flags(init_from=begin)) == EXIT_DONE
    out = tmp_path / "run"
    (out / "model.safetensors").unlink()
    state_files(out)[-1].unlink()
    shutil.rmtree(out / "best")
    assert run(train.main, flags(init_from=begin, save_every=1, keep_last=1)) == EXIT_DONE
    assert [path.name for path in state_files(out)] == ["state-00000004.pt"]
    ours, theirs = weights(tmp_path / "whole"), weights(out)
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_weights_trained_further_are_spoken_with_as_their_source_and_the_tokenizer_is_named(
    tmp_path, flags, checkpoint, tokenizer_folder, capsys
):
    begin = checkpoint()
    (begin / SPEAKING).write_text('{"sampling": {"codebooks": 2, "temperature": 0.0}, "notes": "It reads numbers."}')
    assert run(train.main, flags(init_from=begin)) == EXIT_DONE
    out = tmp_path / "run"
    for folder in (out, out / "best"):
        assert read_speaking(folder) == ({"codebooks": 2, "temperature": 0.0}, "", ())
    command = f"python demo.py --checkpoint {out} --tokenizer {tokenizer_folder}\n"
    assert command in capsys.readouterr().out
    train.report(out, train.parse_flags([]).tokenizer)
    assert f"python demo.py --checkpoint {out}\n" in capsys.readouterr().out


def test_what_is_added_learns_first_and_the_rest_after_it(tmp_path, flags, checkpoint):
    begin = checkpoint()
    before = weights(begin)
    added = {"init_from": begin, "cross_attention_every": 1, "semantic_heads": 1, "lr": 0.01, "warmup": 0}
    assert run(train.main, flags(**added, added_steps=4)) == EXIT_DONE
    after = weights(tmp_path / "run")
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    gates = [name for name in after if name.endswith("gate")]
    assert len(gates) == 7 and all(after[name].abs().max() > 0 for name in gates)
    assert run(train.main, flags(**added, added_steps=2, out=tmp_path / "both")) == EXIT_DONE
    after = weights(tmp_path / "both")
    assert all(not torch.equal(tensor, after[name]) for name, tensor in before.items() if tensor.ndim > 1)


def test_lora_changes_the_matrices_of_the_blocks_only_and_is_exported_merged(tmp_path, flags, checkpoint):
    begin = checkpoint()
    assert run(train.main, flags(init_from=begin, lora_rank=2, lr=0.01)) == EXIT_DONE
    before, after = weights(begin), weights(tmp_path / "run")
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert changed == {name for name in before if ".blocks." in name and name.endswith("proj.weight")}
    assert {torch.linalg.matrix_rank(after[name] - before[name], rtol=1e-3).item() for name in changed} == {2}
    assert run(train.main, flags(init_from=begin, lora_rank=2, lr=0.01)) == EXIT_DONE  # and resumes


def test_training_without_memory_for_activations_learns_the_same(tmp_path, flags, checkpoint, monkeypatch):
    """Dropout is drawn again as it was."""
    begin, calls, real = checkpoint(), [], transformer.checkpoint
    monkeypatch.setattr(transformer, "checkpoint", lambda *args, **options: calls.append(1) or real(*args, **options))
    for recompute in ("recompute", "no-recompute"):
        assert run(train.main, [*flags(init_from=begin, out=tmp_path / recompute), f"--{recompute}"]) == EXIT_DONE
        assert len(calls) == 4 * 4  # steps and blocks
    ours, theirs = (weights(tmp_path / name) for name in ("recompute", "no-recompute"))
    assert all(torch.allclose(tensor, theirs[name], atol=1e-6) for name, tensor in ours.items())


def test_weights_that_explode_stop_the_run_and_name_the_conversations(tmp_path, flags, checkpoint, capsys):
    begin = checkpoint()
    for factor, reason in ((float("inf"), "the gradient norm is nan"), (1e3, "twice that of guessing")):
        model = load_model(begin)
        with torch.no_grad():
            model.codebook0_head.weight.mul_(factor)
        save_model(model, tmp_path / "broken")
        assert run(train.main, flags(init_from=tmp_path / "broken", out=tmp_path / f"broken{factor}")) == EXIT_INPUT
        line = capsys.readouterr().err.strip().splitlines()[-1]
        assert line.startswith("error: step 0: ") and reason in line
        assert "stopped before the update" in line and "the batch held talk" in line
        assert not state_files(tmp_path / f"broken{factor}")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"max_steps": 0}, "max_steps=0 must be at least 1"),
        ({"row_positions": 4000}, "row_positions=4000 must be at most the model's max_positions=2048"),
        ({"row_positions": 20}, "a row has 20; raise --row_positions"),
        ({"lora_rank": 4}, "--lora_rank changes weights that exist; give them by --init_from"),
        ({"added_steps": 3}, "added_steps=3 needs --init_from with something added to it"),
        ({"lr": "inf"}, "lr=inf must be above 0 and finite"),
        ({"lr": "nan"}, "lr=nan must be above 0 and finite"),
        ({"seed": -1}, "seed=-1 must be at least 0"),
        ({"threads": -1}, "threads=-1 must be 0 or more"),
        ({"lr": 1e-3, "min_lr": 1e-2}, "min_lr=0.01 must be at most lr=0.001"),
        ({"text_weight": "inf"}, "text_weight=inf must be 0 or more, and finite"),
        ({"device": "gpu"}, "device 'gpu' cannot be used here; give auto, cpu or cuda"),
        ({"precision": "int8"}, "precision=int8 is not one of auto, fp32, bf16"),
        ({"parallel": "pipeline"}, "parallel=pipeline is not one of ddp, fsdp"),
        ({"drop_frames": 1.0}, "drop_frames=1.0 must be at least 0 and less than 1"),
        ({"acoustic_delay": -1}, "acoustic_delay=-1 must be at least 0"),
        ({"init_from": "nowhere"}, "no weights at nowhere"),
        ({"data": "nowhere"}, "nowhere"),
        ({"tokenizer": "nowhere"}, "no rvq_tokenizer at nowhere"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(flags, capsys, changes, reason):
    assert run(train.main, flags(**changes)) == EXIT_INPUT
    lines = capsys.readouterr().err.strip().splitlines()
    assert reason in lines[-1] and sum(line.startswith("error: ") for line in lines) == 1


def test_weights_are_not_trained_in_their_own_folder_nor_on_more_text_ids_than_they_know(
    tmp_path, flags, checkpoint, capsys, monkeypatch
):
    begin = checkpoint()
    assert run(train.main, flags(init_from=begin, out=begin)) == EXIT_INPUT
    assert "--init_from and --out are both" in capsys.readouterr().err
    monkeypatch.setattr(ByteTokenizer, "vocab_size", 300)
    assert run(train.main, flags(init_from=begin)) == EXIT_INPUT
    assert "knows 258 text ids, the tokenizer bytes has 300" in capsys.readouterr().err
    assert run(train.main, flags(max_steps=1, out=tmp_path / "scratch")) == EXIT_DONE
    assert load_model(tmp_path / "scratch").config.text_vocab_size == 300


def test_an_unknown_flag_is_named(flags, capsys):
    with pytest.raises(SystemExit) as stopped:
        train.main([*flags(), "--learning_rate", "1"])
    assert stopped.value.code == EXIT_INPUT and "--learning_rate" in capsys.readouterr().err


def test_a_tokenizer_of_other_codes_or_weights_is_refused(tmp_path, flags, checkpoint, capsys):
    begin = checkpoint()
    assert run(train.main, flags(init_from=begin, max_steps=1)) == EXIT_DONE
    save_tokenizer(tiny_tokenizer(seed=1), tmp_path / "other")
    assert run(train.main, flags(init_from=begin, max_steps=1, tokenizer=tmp_path / "other")) == EXIT_INPUT
    assert "audio_tokenizer" in capsys.readouterr().err
    save_model(CSM(tiny_config(codebook_size=32)), tmp_path / "wider")
    assert run(train.main, flags(init_from=tmp_path / "wider", out=tmp_path / "third")) == EXIT_INPUT
    assert "has codebook_size=32, the tokenizer" in capsys.readouterr().err


def test_too_large_a_training_is_refused_with_the_sizes_that_fit(flags, monkeypatch, capsys):
    monkeypatch.setattr(training_start, "free_memory", lambda device: 2**30)
    assert run(train.main, flags(model_size="medium", batch_rows=1)) == EXIT_INPUT
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "GiB and 1.0 GiB are free; with these rows there is room for nano;" in line


def test_a_disk_without_room_for_the_states_is_refused_before_the_first_step(tmp_path, flags, monkeypatch, capsys):
    usage = shutil.disk_usage(tmp_path)._replace(free=10**6)
    monkeypatch.setattr(training_start.shutil, "disk_usage", lambda folder: usage)
    assert run(train.main, flags()) == EXIT_STORAGE
    assert "GiB are needed): No space left on device; free some space" in capsys.readouterr().err
    assert not read_metrics(tmp_path / "run")


def test_a_missing_recogniser_or_logger_is_said(flags, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "faster_whisper", None)
    assert run(train.main, flags(speak_every=2)) == EXIT_MISSING
    assert "faster_whisper not installed" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert run(train.main, flags(wandb="project")) == EXIT_MISSING
    assert "--wandb needs: pip install wandb" in capsys.readouterr().err


def test_every_recipe_is_a_config_and_a_flag_beats_it():
    for size in PRESETS:
        args = train.parse_flags(["--model_size", size, "--precision", "fp32", "--lr", "0.5"])
        c = train.settings_of(args, torch.device("cpu"), train.Ranks())
        assert (c.lr, c.min_lr) == (0.5, 0.05) and c.max_steps == RECIPES[size]["max_steps"]
    fine = train.parse_flags(["--init_from", "x", "--precision", "fp32"])
    assert train.settings_of(fine, torch.device("cpu"), train.Ranks()).lr == 2e-5


def test_memory_is_estimated_by_what_learns_and_by_how_it_is_shared():
    c = TrainConfig(batch_rows=4)
    config = full_config()
    alone = training_start.needed_memory(config, c, 1)
    assert training_start.needed_memory(config, c, 2) < alone
    sharing = TrainConfig(batch_rows=4, parallel="fsdp")
    assert training_start.needed_memory(config, sharing, 2) < training_start.needed_memory(config, c, 2)
    assert training_start.needed_memory(config, c, 1, trained=0) < alone
    deep = PRESETS["nano"]
    frugal = TrainConfig(batch_rows=4, recompute=True)
    assert training_start.needed_memory(deep, frugal, 1) < 0.6 * training_start.needed_memory(deep, c, 1)


def test_the_memory_of_a_container_counts_without_its_cache_of_files(tmp_path, monkeypatch):
    (tmp_path / "limit").write_text("1000000\n")
    (tmp_path / "taken").write_text("700000\n")
    (tmp_path / "memory.stat").write_text("anon 100000\ncache 600000\n")
    monkeypatch.setattr(training_start, "CGROUPS", {tmp_path: ("limit", "taken", "cache")})
    if training_start.free_memory(torch.device("cpu")) is not None:  # a system that says how much is free
        assert training_start.free_memory(torch.device("cpu")) == 900_000
    (tmp_path / "limit").write_text("max\n")
    free = training_start.free_memory(torch.device("cpu"))
    assert free is None or 2**20 < free < 2**50


def test_the_log_names_the_commit_or_says_unknown_without_git(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert describe_environment()["commit"] == "unknown"


def test_best_is_by_ear_then_by_loss_and_starts_anew_when_judged_otherwise(tmp_path):
    by_ear, by_loss = TrainConfig(speak_every=2), TrainConfig()
    save_model(CSM(tiny_config()), tmp_path / "best")
    best = Best(tmp_path, by_ear)
    best.keep(2, {"spoken/wer": 1.0, "val/loss": 6.0})
    assert best.is_beaten({"spoken/wer": 1.0, "val/loss": 5.0}) and not best.is_beaten({"spoken/wer": 1.0})
    assert best.is_beaten({"spoken/wer": 0.9, "val/loss": 7.0})
    assert not Best(tmp_path, by_ear, 2).is_beaten({"spoken/wer": 1.1, "val/loss": 5.0})
    assert Best(tmp_path, by_loss, 2).is_beaten({"val/loss": 100.0})
    assert Best(tmp_path, by_ear, 1).is_beaten({"spoken/wer": 1.1, "val/loss": 5.0})  # of a course that is not taken
