"""The training benchmark: both sides learn the same, sides that do not are refused, every side is reported."""

import importlib
import json
import sys

import pytest
import torch
from conftest import full_config
from torch.utils.flop_counter import FlopCounterMode

from architecture import parameter_table
from command_line import EXIT_DONE, EXIT_INPUT, run
from frames import IGNORE
from model_sizes import PRESETS
from transformer import TransformerConfig

benchmark = importlib.import_module("benchmarks.training")
STACK = TransformerConfig(n_layers=2, d_model=32, n_heads=4, n_kv_heads=2, d_ff=48, rope_scale=32)


@pytest.fixture
def flags(monkeypatch, shared_data, tokenizer_folder):
    monkeypatch.setitem(PRESETS, "nano", full_config(backbone=STACK, max_positions=2048))
    where = ["--data", str(shared_data), "--tokenizer", str(tokenizer_folder)]
    return [*where, "--row_positions", "250", "--depth_share", "0.25", "--rounds", "1", "--steps", "1"]


@pytest.fixture
def args(flags):
    return benchmark.parse_flags(flags)


def test_both_sides_learn_the_same_step_by_step(args):
    sides, apart = benchmark.make_sides(benchmark.read_work(args), args)
    assert apart < 1e-5
    ours = [sides["ours"].step(0, "fp32") for _ in range(4)]
    theirs = [sides[name].step(0, "fp32") for name in [*benchmark.REFERENCES] * 2]  # they share one model
    assert ours == pytest.approx(theirs, rel=1e-5)
    assert ours == sorted(ours, reverse=True)


def test_every_document_becomes_an_item_and_no_frame_is_lost(args):
    work = benchmark.read_work(args)["ours"]
    rows, depth_rows = work.batches[0]
    items = benchmark.padded_items(rows, depth_rows)
    assert len(items.tokens) == sum(int(ids.max()) + 1 for ids in rows.documents) > len(rows.tokens)
    assert int((items.labels[..., 0] != IGNORE).sum()) == benchmark.useful_frames(rows)
    learnt = items.labels[..., 1:] != IGNORE
    assert int(learnt.all(dim=-1).sum()) == int(learnt.any(dim=-1).sum()) == len(depth_rows)
    frames = items.labels[..., 0] != IGNORE
    assert torch.equal(items.labels[frames][:, 0], items.tokens[frames][:, 0])
    assert bool(items.audio[frames].all()) and not bool(items.audio[~items.attention].any())


def later(items):
    return items._replace(labels=items.labels.roll(1, dims=1))


def every_frame(items):
    labels = items.tokens[..., :-1].masked_fill(items.labels[..., :1] == IGNORE, IGNORE)
    return items._replace(labels=labels)


def one_document(items):
    return items._replace(positions=torch.arange(items.tokens.size(1)).expand_as(items.audio))


@pytest.mark.parametrize(
    ("name", "change"),
    [("transformers", later), ("transformers", every_frame), ("transformers, packed", one_document)],
)
def test_sides_that_learn_something_else_are_refused(args, monkeypatch, name, change):
    right = benchmark.REFERENCES[name]
    monkeypatch.setitem(benchmark.REFERENCES, name, lambda *batch: change(right(*batch)))
    with pytest.raises(ValueError, match=f"ours .*, {name} .* do not learn the same"):
        benchmark.make_sides(benchmark.read_work(args), args)


def test_the_last_line_holds_every_side_and_the_ratios(flags, capsys):
    assert benchmark.main([*flags, "--peak_tflops", "1", "--json"]) == EXIT_DONE
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert list(found["sides"]) == ["ours", "transformers", "transformers, packed", "ours, with additions"]
    for by in found["sides"].values():
        assert list(by) == ["fp32", "bf16"]
        assert all(figures["frames_per_s"]["median"] > 0 for figures in by.values())
    ours, theirs, _, more = (by["fp32"] for by in found["sides"].values())
    assert ours["loss_first"] == pytest.approx(theirs["loss_first"], rel=1e-5)
    assert ours["positions_used"] > theirs["positions_used"]
    rates = [figures["frames_per_s"]["median"] for figures in (ours, theirs)]
    ratios = found["ratios"]["transformers"]
    assert ratios["fp32"]["median"] == pytest.approx(rates[0] / rates[1])
    best = max(figures["frames_per_s"]["median"] for figures in found["sides"]["ours"].values())
    assert ratios["best / fp32"]["median"] == pytest.approx(best / rates[1])
    assert ours["mfu"] / theirs["mfu"] == pytest.approx(rates[0] / rates[1])
    assert more["mfu"] is None


def test_the_flops_are_those_that_torch_counts_in_a_step(args):
    work = benchmark.read_work(args)
    sides, _ = benchmark.make_sides(work, args)
    with FlopCounterMode(display=False) as counter:
        sides["ours"].step(0, "fp32")
    rows, depth_rows = work["ours"].batches[0]
    same = rows.documents[:, :, None] == rows.documents[:, None, :]
    pairs = int((same & (rows.documents >= 0)[:, None]).sum()) + 4**2 * len(depth_rows)
    attention = 6 * 2 * 32 * pairs  # which the counter leaves out on a CPU; all stacks have 2 layers of width 32
    padding = 1 - sides["ours"].used
    expected = benchmark.flops_per_frame(work["ours"]) * sides["ours"].frames[0] - attention
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.005 + padding)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="processes do not tell their peak memory there")
def test_the_memory_of_one_side_is_at_least_that_of_its_weights_gradients_and_optimizer(args):
    args.model_size, args.batch_rows = "micro", 1
    n = parameter_table(benchmark.read_work(args)["ours"].config)["total"]
    peaks = benchmark.peaks_alone(args, ["ours"], ["fp32"])
    assert 16 * n < peaks["ours", "fp32"] < 32 * n


def test_an_unknown_precision_is_named(flags, capsys):
    assert run(benchmark.main, [*flags, "--precision", "fp32,fp16"]) == EXIT_INPUT
    assert "precision=fp32,fp16 must be one or several of fp32,bf16" in capsys.readouterr().err
