"""The training loop: resume == uninterrupted, accumulation == big batch, faults, the minimal script end to end."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import full_config, tiny_config, write_tiny_data

import demo
import train_minimal
import training
from architecture import CSM, Terms, load_model, pick_depth_rows
from checkpointing import load_newest_state, load_state, state_files
from command_line import EXIT_BUSY, EXIT_DONE, EXIT_INPUT, EXIT_SIGINT, EXIT_SIGTERM, FolderBusy, only_run_in, run
from dataset_pipeline import ConversationDataset, Mixture
from frames import IGNORE, Rows
from model_sizes import CSMConfig
from run_folder import read_metrics
from rvq_tokenizer import load_tokenizer
from text_tokenizer import ByteTokenizer
from token_cache import TokenCache
from training import evaluate_losses, gradient_step, make_optimizer, micro_batch, train, weighted_mean, with_other_text
from training_config import TrainConfig, lr_at, mixture, term_weights

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
SHORT = {"max_steps": 6, "batch_rows": 1, "row_positions": 160, "warmup": 2, "save_every": 2, "eval_every": 3}
SHORT |= {"guidance_weight": 1.0}
FULL = full_config(text_per_chunk=10)


@pytest.fixture(scope="session")
def datasets_for(shared_data, tokenizer):
    """Train and val data for a config, the train data in the mixture of `TrainConfig`."""
    cache = TokenCache(shared_data, tokenizer)

    def make(config: CSMConfig, row_positions: int = SHORT["row_positions"]) -> list[ConversationDataset]:
        shared = cache, ByteTokenizer(), config.layout, row_positions
        shown = mixture(TrainConfig(**SHORT), config)
        return [
            ConversationDataset(shared_data, split, *shared, own) for split, own in (("train", shown), ("val", None))
        ]

    return make


@pytest.fixture(scope="session")
def datasets(datasets_for):
    return datasets_for(tiny_config())


def new_model(config: CSMConfig | None = None) -> CSM:
    torch.manual_seed(0)
    return CSM(config or tiny_config())


def train_in(folder, datasets, config: CSMConfig | None = None, **changes) -> CSM:
    model = new_model(config)
    assert train(model, *datasets, TrainConfig(**{**SHORT, **changes}), folder, {}, CPU) == EXIT_DONE
    return model


def assert_same_weights(one: CSM, other: CSM) -> None:
    for (name, ours), theirs in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name


@pytest.mark.parametrize("config", [tiny_config(), FULL], ids=["plain", "full"])
def test_resumed_run_equals_uninterrupted_run(tmp_path, datasets_for, monkeypatch, config):
    datasets = datasets_for(config)
    whole = train_in(tmp_path / "whole", datasets, config)

    real, calls = training.gradient_step, []

    def killed_in_step_5(*args):
        calls.append(1)
        if len(calls) == 5:
            raise SystemExit("killed")
        return real(*args)

    monkeypatch.setattr(training, "gradient_step", killed_in_step_5)
    with pytest.raises(SystemExit):
        train(new_model(config), *datasets, TrainConfig(**SHORT), tmp_path / "cut", {}, CPU)
    monkeypatch.undo()
    assert load_newest_state(tmp_path / "cut")["step"] == 4

    torch.manual_seed(99)  # a new process starts elsewhere
    resumed = train_in(tmp_path / "cut", datasets, config)
    assert_same_weights(whole, resumed)
    assert_same_weights(load_model(tmp_path / "whole"), load_model(tmp_path / "cut"))
    logs = [read_metrics(tmp_path / name) for name in ("whole", "cut")]
    for records in logs:
        for record in records:
            del record["train/frames_per_s"], record["train/memory_gib"]
    assert logs[0] == logs[1]
    assert [record["step"] for record in logs[1]] == list(range(6))


def test_a_torn_state_is_passed_over_with_a_warning(tmp_path, datasets):
    whole = train_in(tmp_path / "whole", datasets)
    train_in(tmp_path / "cut", datasets)
    (tmp_path / "cut" / "model.safetensors").unlink()
    newest = state_files(tmp_path / "cut")[-1]
    newest.write_bytes(newest.read_bytes()[:1000])
    with pytest.warns(UserWarning, match=r"state-00000006.pt is damaged .* using the one before it"):
        resumed = train_in(tmp_path / "cut", datasets)
    assert_same_weights(whole, resumed)


def test_a_finished_run_is_left_alone(tmp_path, datasets):
    train_in(tmp_path, datasets)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    train_in(tmp_path, datasets)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()} == before


def test_another_config_does_not_resume_a_run(tmp_path, datasets):
    train_in(tmp_path, datasets)
    with pytest.raises(ValueError, match=r"was started with train.lr=0.001, now it is 0.1; .*another --out"):
        train(new_model(), *datasets, TrainConfig(**SHORT, lr=0.1), tmp_path, {}, CPU)
    assert train(new_model(), *datasets, TrainConfig(**{**SHORT, "save_every": 5}), tmp_path, {}, CPU) == EXIT_DONE


def stacked(batches: list[Rows]) -> Rows:
    """Batches as one, padded on the right."""
    L = max(batch.tokens.size(1) for batch in batches)
    fill = Rows(0, False, IGNORE, 0, -1, -1, -1, 0.0, float("nan"))
    columns = []
    for parts, value in zip(zip(*batches, strict=True), fill, strict=True):
        padded = [torch.cat((x, x.new_full((len(x), L - x.size(1), *x.shape[2:]), value)), dim=1) for x in parts]
        columns.append(torch.cat(padded))
    return Rows(*columns)


@pytest.mark.parametrize("config", [tiny_config(), FULL], ids=["plain", "full"])
def test_accumulation_equals_one_big_batch(datasets_for, config):
    train_data = datasets_for(config)[0]
    c = TrainConfig(**SHORT, depth_share=1.0)
    micro = [micro_batch(train_data, index, c) for index in range(2)]
    assert micro[0][0].documents.shape != micro[1][0].documents.shape or len(micro[0][1]) != len(micro[1][1])
    batch = stacked([each.rows for each in micro])
    picked = pick_depth_rows(batch.targets, 1.0, torch.Generator())
    models, results = [], []
    for parts in (micro, [(batch, picked)]):
        models.append(new_model(config))
        with torch.no_grad():
            for name, parameter in models[-1].named_parameters():
                if name.endswith("gate"):
                    parameter.fill_(0.7)
        results.append(gradient_step(models[-1], torch.optim.SGD(models[-1].parameters(), lr=0.1), parts, c, CPU))
    for ours, theirs in zip(*(Terms(*sums) for sums, _, _ in results), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-5)
    for ours, theirs in zip(*(counts for _, counts, _ in results), strict=True):
        assert torch.equal(ours, theirs)
    if config.has_memory:
        assert all((total > 0).all() for total in results[0][0])  # every term takes part
    torch.testing.assert_close(results[0][2], results[1][2])
    for ours, theirs in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-4)


def test_training_lowers_the_held_out_loss(tmp_path, datasets):
    before = evaluate_losses(new_model(), datasets[1])
    model = train_in(tmp_path, datasets, max_steps=40, lr=3e-3, save_every=40)
    after = evaluate_losses(model, datasets[1])
    assert after["loss"] < before["loss"] - 0.3
    assert len(after["depth"]) == 3
    assert after["loss"] == pytest.approx(after["c0"] + sum(after["depth"]) / 3)
    assert after["text"] is None
    assert (tmp_path / "losses.png").stat().st_size > 5000


def test_training_of_the_full_model_lowers_speech_and_text_loss_and_logs_every_term(tmp_path, datasets_for):
    datasets = datasets_for(FULL)
    before = evaluate_losses(new_model(FULL), datasets[1])
    model = train_in(tmp_path, datasets, FULL, max_steps=40, lr=3e-3, save_every=40, guidance_steps=20)
    after = evaluate_losses(model, datasets[1])
    assert after["loss"] < before["loss"] - 0.3
    assert after["text"] < before["text"] - 1
    records = read_metrics(tmp_path)
    assert all(record["train/text"] > 0 for record in records)
    assert sum("train/memory" in record for record in records) > 30  # none where no turn follows another
    guided = [record["step"] for record in records if "train/guidance" in record]
    assert set(guided) <= set(range(20)) and len(guided) > 15
    assert records[-1]["val/text"] == pytest.approx(evaluate_losses(model, datasets[1], max_rows=2)["text"])
    opened = [name for name, p in model.named_parameters() if name.endswith("gate") and p.abs().max() > 0]
    assert len(opened) == 2 * 3 + 2


def test_a_batch_of_the_mixture_without_audio_is_learnt_too(shared_data, tokenizer):
    cache, c = TokenCache(shared_data, tokenizer), TrainConfig(**SHORT)
    silent = ConversationDataset(shared_data, "train", cache, ByteTokenizer(), FULL.layout, 160, Mixture(text_only=1.0))
    model = new_model(FULL)
    sums, counts, norm = gradient_step(model, make_optimizer(model, c), [micro_batch(silent, 0, c)], c, CPU)
    assert counts.codebook0 == 0 and sums.codebook0 == 0 and not sums.depth.any()
    assert sums.text > 0 and norm > 0


def test_the_loss_weighs_means_over_targets_and_counts_the_depth_codebooks_once():
    sums = Terms(*map(torch.tensor, (6.0, [2.0, 4.0, 9.0], 10.0, 8.0, 0.0)))
    counts = Terms(*map(torch.tensor, (3, [1, 2, 3], 5, 2, 0)))
    assert weighted_mean(sums, counts, Terms(1.0, 1.0, 0.5, 0.25, 0.1)).item() == pytest.approx(2 + 7 / 3 + 1 + 1 + 0)
    assert weighted_mean(sums, counts, Terms(0.0, 0.0, 1.0, 0.0, 0.0)).item() == 2


def test_attention_guidance_fades_and_terms_without_a_use_weigh_nothing():
    c = TrainConfig(guidance_weight=2.0, guidance_steps=100, text_weight=0.3, memory_weight=0.2)
    assert [term_weights(step, c, FULL).guidance for step in (0, 25, 99, 100, 500)] == pytest.approx(
        [2, 1.5, 0.02, 0, 0]
    )
    assert term_weights(0, c, FULL)._replace(depth=None) == Terms(1.0, None, 0.3, 2.0, 0.2)
    assert term_weights(0, c, tiny_config())._replace(depth=None) == Terms(1.0, None, 0.0, 0.0, 0.0)


def test_semantic_and_acoustic_codebooks_weigh_as_one_each():
    model = full_config(n_codebooks=6, n_semantic=3)
    depth = term_weights(0, TrainConfig(semantic_weight=0.5, acoustic_weight=3.0), model).depth
    assert depth.tolist() == pytest.approx([0.25, 0.25, 1, 1, 1])
    assert term_weights(0, TrainConfig(), tiny_config(n_codebooks=5)).depth.tolist() == [0.25] * 4
    sums = Terms(*map(torch.tensor, (6.0, [2.0, 4.0, 1.0, 2.0, 3.0], 0.0, 0.0, 0.0)))
    counts = Terms(*map(torch.tensor, (3, [2, 2, 1, 1, 1], 0, 0, 0)))
    assert weighted_mean(sums, counts, Terms(1.0, depth, 1.0, 1.0, 1.0)).item() == pytest.approx(2 + 0.75 + 6)


def test_the_depth_decoder_learns_semantic_codebooks_of_other_frames_than_those_it_learns_whole(datasets):
    shares = {"depth_share": 0.25, "semantic_share": 0.5}
    micro = micro_batch(datasets[0], 3, TrainConfig(**{**SHORT, **shares}))
    whole, semantic = set(micro.depth_rows.tolist()), set(micro.semantic_rows.tolist())
    every = pick_depth_rows(micro.rows.targets, 1.0, torch.Generator())
    assert not whole & semantic and whole | semantic <= set(every.tolist())
    assert len(whole) == pytest.approx(0.25 * len(every), abs=2)
    assert len(semantic) == pytest.approx(0.5 * len(every), abs=2)
    alone = micro_batch(datasets[0], 3, TrainConfig(**{**SHORT, "depth_share": 0.25}))
    assert torch.equal(alone.depth_rows, micro.depth_rows) and alone.semantic_rows is None


def test_wrong_text_leaves_audio_layout_and_speakers_and_is_worth_nothing_to_a_model_that_does_not_read(datasets):
    rows = datasets[1].collate([datasets[1].plan(seed=0, epoch=0)[0]], seeds=None)
    end = datasets[1].text_tokenizer.eos
    other = with_other_text(rows, end)
    is_text = rows.mask[..., -1]
    ends = is_text & (rows.tokens[..., -1] == end)
    assert ends.sum() > 1 and torch.equal(other.tokens[..., -1] == end, rows.tokens[..., -1] == end)
    named = is_text & (F.pad(rows.targets[:, :-1, -1], (1, 0), value=IGNORE) == IGNORE)
    assert named.any() and torch.equal(other.tokens[named], rows.tokens[named])
    assert torch.equal(other.tokens[..., :-1], rows.tokens[..., :-1])
    assert (other.tokens[..., -1] != rows.tokens[..., -1])[is_text & ~named].float().mean() > 0.8
    torch.testing.assert_close(
        other.tokens[..., -1][is_text].sort().values, rows.tokens[..., -1][is_text].sort().values
    )
    model = new_model()
    assert abs(evaluate_losses(model, datasets[1])["text_gain"]) > 1e-5
    with torch.no_grad():
        model.text_embedding.weight.zero_()
    assert evaluate_losses(model, datasets[1])["text_gain"] == pytest.approx(0, abs=1e-6)


def test_a_model_is_shown_only_what_it_has_a_use_for():
    shares = {"no_context": 0.1, "joint": 0.2, "listen": 0.3, "text_only": 0.4, "evict": 0.5, "one_speaker": 0.6}
    c = TrainConfig(**shares)
    assert mixture(c, FULL) == Mixture(**shares)
    assert mixture(c, tiny_config()) == Mixture(no_context=0.1, one_speaker=0.6)
    assert mixture(c, tiny_config(text_head=True)) == Mixture(**{**shares, "evict": 0.0})
    assert mixture(c, tiny_config(prosodic_heads=1)) == Mixture(no_context=0.1, evict=0.5, one_speaker=0.6)


def test_half_lives_learn_ten_times_faster_and_decay_with_embeddings_norms_and_gates_never(
    tmp_path, datasets_for, monkeypatch
):
    model = new_model(FULL)
    groups = make_optimizer(model, TrainConfig(weight_decay=0.1)).param_groups
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    found = {id(p): (group["weight_decay"], group["lr_scale"]) for group in groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        plain = parameter.ndim < 2 or "embedding" in name
        expected = (0.0, 10.0) if name.endswith("log_half_life") else (0.0, 1.0) if plain else (0.1, 1.0)
        assert found[id(parameter)] == expected, name
    applied, real = [], training.gradient_step

    def noted(model, optimizer, *args):
        applied.append(sorted(group["lr"] for group in optimizer.param_groups))
        return real(model, optimizer, *args)

    monkeypatch.setattr(training, "gradient_step", noted)
    train_in(tmp_path, datasets_for(FULL), FULL, max_steps=2)
    assert applied == [pytest.approx([5e-4, 5e-4, 5e-3]), pytest.approx([1e-3, 1e-3, 1e-2])]


def test_a_gradient_that_is_not_finite_stops_before_the_update(datasets):
    model = new_model()
    with torch.no_grad():
        model.projection.weight[0, 0] = float("inf")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config = TrainConfig(**SHORT)
    with pytest.raises(FloatingPointError, match="stopped before the update"):
        gradient_step(model, make_optimizer(model, config), [micro_batch(datasets[0], 0, config)], config, CPU)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_the_rate_warms_up_and_falls_to_its_minimum():
    config = TrainConfig(max_steps=100, warmup=10, lr=1.0, min_lr=0.1)
    rates = [lr_at(step, config) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[9] == pytest.approx(1.0)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert lr_at(100, config) == pytest.approx(0.1)


@pytest.mark.parametrize("name", ["max_steps", "grad_accum", "lr", "depth_share", "guidance_steps"])
def test_impossible_training_is_refused(name):
    with pytest.raises(ValueError, match=f"{name}=0 must be"):
        TrainConfig(**{name: 0})


@pytest.mark.parametrize("name", ["text_weight", "guidance_weight", "memory_weight", "joint", "evict", "one_speaker"])
def test_negative_weights_and_shares_are_refused(name):
    with pytest.raises(ValueError, match=f"{name}=-0.5 must be"):
        TrainConfig(**{name: -0.5})


@pytest.fixture
def minimal_flags(tmp_path, tokenizer_folder):
    data = write_tiny_data(tmp_path / "data")
    out = tmp_path / "run"
    return ["--data", str(data), "--tokenizer", str(tokenizer_folder), "--out", str(out), "--max_steps", "3"]


def test_the_minimal_script_trains_resumes_and_is_heard(tmp_path, minimal_flags, tokenizer_folder, capsys):
    assert run(train_minimal.main, minimal_flags) == EXIT_DONE
    out = tmp_path / "run"
    text = capsys.readouterr().out
    assert "loss " in text
    assert "val loss" in text
    assert {"model.safetensors", "config.json", "metrics.jsonl", "losses.png", "settings.json"} <= {
        path.name for path in out.iterdir()
    }
    assert list((out / "tensorboard").iterdir())
    assert run(train_minimal.main, minimal_flags) == EXIT_DONE
    assert "done already" in capsys.readouterr().out

    flags = ["--checkpoint", str(out), "--tokenizer", str(tokenizer_folder), "--out", str(tmp_path / "demo")]
    assert run(demo.main, ["--mode", "test", *flags, "--min_seconds", "0.3", "--max_seconds", "0.8"]) == EXIT_DONE
    text = capsys.readouterr().out
    assert "trained for 3 steps, so its voice babbles" in text
    summary = json.loads((tmp_path / "demo" / "summary.json").read_text())
    rows = [row for group in summary["conversations"] for row in group["turns"]]
    assert len(rows) == 7
    for row in rows:
        assert row["file"] is None or Path(row["file"]).stat().st_size == 44 + 2 * round(24_000 * row["seconds"])


LONG_RUN = {**SHORT, "max_steps": 200, "save_every": 3}


def train_long(data: str, tokenizer: str, out: str) -> int:
    """A run long enough to be interrupted, for a process of its own."""
    cache, text = TokenCache(Path(data), load_tokenizer(Path(tokenizer))), ByteTokenizer()
    dataset = ConversationDataset(Path(data), "train", cache, text, tiny_config().layout, 160)
    return train(new_model(), dataset, None, TrainConfig(**LONG_RUN), Path(out), {}, CPU)


def test_kill_and_terminate_lose_nothing(tmp_path, shared_data, tokenizer_folder):
    arguments = [str(shared_data), str(tokenizer_folder)]
    assert train_long(*arguments, str(tmp_path / "whole")) == EXIT_DONE
    code = "import sys, test_training; sys.exit(test_training.train_long(*sys.argv[1:]))"
    command = [sys.executable, "-c", code, *arguments, str(tmp_path / "cut")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    expected = (
        (signal.SIGKILL, 20, -signal.SIGKILL),
        (signal.SIGTERM, 50, EXIT_SIGTERM),
        (signal.SIGINT, 80, EXIT_SIGINT),
    )
    for number, step, exit_code in expected:
        process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while len(read_metrics(tmp_path / "cut")) <= step:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(number)
        assert process.wait(60) == exit_code
        saved = load_newest_state(tmp_path / "cut")["step"]
        logged = len(read_metrics(tmp_path / "cut"))
        assert saved == logged if number != signal.SIGKILL else saved > logged - 2 * LONG_RUN["save_every"]
    assert train_long(*arguments, str(tmp_path / "cut")) == EXIT_DONE
    assert_same_weights(load_model(tmp_path / "whole"), load_model(tmp_path / "cut"))


def test_a_second_run_in_the_same_folder_is_refused(tmp_path, minimal_flags, capsys):
    with only_run_in(tmp_path / "run"):
        assert run(train_minimal.main, minimal_flags) == EXIT_BUSY
        assert "another run works in" in capsys.readouterr().err
        with pytest.raises(FolderBusy), only_run_in(tmp_path / "run"):
            pass


def test_missing_inputs_are_one_line_each(tmp_path, minimal_flags, capsys):
    data, tokenizer = minimal_flags[1], minimal_flags[3]
    for flags, said in (
        (["--data", str(tmp_path / "no"), "--tokenizer", tokenizer], "no collected data in"),
        (["--data", data, "--tokenizer", str(tmp_path / "no")], "no rvq_tokenizer at"),
        (["--data", data, "--tokenizer", tokenizer, "--max_steps", "0"], "max_steps=0 must be at least 1"),
    ):
        assert run(train_minimal.main, [*flags, "--out", str(tmp_path / "run")]) == EXIT_INPUT
        error = capsys.readouterr().err
        assert said in error
        assert "Traceback" not in error
    nothing = ["--mode", "test", "--checkpoint", str(tmp_path / "no"), "--out", str(tmp_path / "demo")]
    assert run(demo.main, nothing) == EXIT_INPUT
    assert "no csm at" in capsys.readouterr().err


def test_a_state_of_another_format_is_refused(tmp_path):
    path = tmp_path / "state-00000001.pt"
    torch.save({"format": 99, "step": 1}, path)
    with pytest.raises(ValueError, match="has format 99, this code reads 1"):
        load_state(path)
