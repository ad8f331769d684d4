"""Model sizes: parameters, configs that cannot work, and costs against what torch really counts and keeps."""

import dataclasses
import json

import pytest
import torch
from conftest import full_config, full_model, tiny_config, tiny_model
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import architecture
from architecture import CSM, CSMCache, parameter_table, pick_depth_rows
from command_line import EXIT_DONE, EXIT_INPUT, run
from frames import Rows, Turn
from generation import Sampling, Speaker
from inference_model import InferenceModel
from model_sizes import PRESETS, WITHOUT_ADDITIONS, CSMConfig, frame_cost, inference_memory, preset, training_memory
from native_stack import NativeStack, compilers
from transformer import KVCache, TransformerConfig


def table_of(name: str) -> dict[str, int]:
    return parameter_table(PRESETS[name])


def test_csm_1b_has_the_parameters_of_the_published_model_and_no_others():
    table = table_of("csm-1b")
    assert table["total"] == 1_552_791_552
    assert "cross_attention" not in table and "memory" not in table


def test_nano_has_10_to_15_million_parameters_beside_its_embedding_tables():
    table = table_of("nano")
    assert 10e6 <= table["total"] - table["text_embedding"] - table["audio_embedding"] <= 15.5e6


def test_micro_has_about_a_hundred_million_parameters():
    assert 80e6 <= table_of("micro")["total"] <= 130e6


@pytest.mark.parametrize(("name", "backbone", "depth"), [("tiny", 0.97e9, 0.11e9), ("small", 2.8e9, 0.25e9)])
def test_the_larger_sizes_have_the_published_dimensions(name, backbone, depth):
    table = table_of(name)
    assert table["backbone"] == pytest.approx(backbone, rel=0.02)
    assert table["depth"] == pytest.approx(depth, rel=0.02)


def test_medium_has_the_published_dimensions():
    table = table_of("medium")
    assert 6.9e9 <= table["backbone"] <= 8e9  # Llama 3.1 8B without its two tables
    assert table["depth"] == pytest.approx(306e6, rel=0.01)


@pytest.mark.parametrize("name", PRESETS)
def test_the_parts_of_a_size_add_up_and_its_additions_are_all_that_it_adds(name):
    table = table_of(name)
    assert sum(count for part, count in table.items() if part != "total") == table["total"]
    plain = parameter_table(preset(name, **WITHOUT_ADDITIONS))
    added = table.get("cross_attention", 0) + table.get("memory", 0)
    assert plain["total"] + added == table["total"]


def test_unknown_sizes_are_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown model size 'huge'; choose one of nano, .*csm-1b"):
        preset("huge")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"n_semantic": 5}, "n_semantic=5 must be at most n_codebooks=4"),
        ({"n_semantic": 0}, "n_semantic=0 must be at least 1"),
        ({"acoustic_delay": -1}, "acoustic_delay=-1 must be at least 0"),
        ({"acoustic_delay": 2, "zero_end_of_turn": True}, "acoustic_delay=2 must be 0 with zero_end_of_turn"),
        ({"acoustic_delay": 2, "n_semantic": 4}, "acoustic_delay=2 must be 0: n_semantic=4 leaves no acoustic codes"),
        ({"cross_attention_every": 3}, "cross_attention_every=3 exceeds the 2 layers"),
        ({"cross_attention_every": -1}, "cross_attention_every=-1 must be at least 0"),
        ({"frames_per_chunk": 6}, "frames_per_chunk=6 must be a multiple of 4"),
        ({"frames_per_chunk": 0}, "frames_per_chunk=0 must be at least 1"),
        ({"text_per_chunk": 0}, "text_per_chunk=0 must be at least 1"),
        ({"frames_per_text_id": 0.0}, "frames_per_text_id=0.0 must be above 0"),
        ({"semantic_heads": -1}, "semantic_heads=-1 must be at least 0"),
        ({"prosodic_heads": -2}, "prosodic_heads=-2 must be at least 0"),
        ({"memory_key": 0}, "memory_key=0 must be at least 1"),
        ({"memory_value": 0}, "memory_value=0 must be at least 1"),
        ({"n_codebooks": 1}, "n_codebooks=1 must be at least 2"),
        ({"codebook_size": 1}, "codebook_size=1 must be at least 2"),
        ({"n_special_codes": 0}, "n_special_codes=0 must be at least 1"),
    ],
    ids=str,
)
def test_a_config_that_cannot_work_is_refused_with_field_and_value(changes, said):
    with pytest.raises(ValueError, match=f"^{said}"):
        tiny_config(**changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"n_semantic": 4},
        {"acoustic_delay": 8},
        {"cross_attention_every": 2},
        {"prosodic_heads": 1},
        {"zero_end_of_turn": True, "n_special_codes": 0},
    ],
    ids=str,
)
def test_configs_at_the_edge_of_what_works_are_taken(changes):
    CSM(tiny_config(**changes))


@pytest.mark.parametrize("name", PRESETS)
def test_a_config_survives_being_written_as_plain_values(name):
    config = PRESETS[name]
    again = CSMConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert again.layout == config.layout


def test_unknown_and_missing_fields_are_refused():
    values = full_config().to_dict()
    with pytest.raises(ValueError, match="n_speakers"):
        CSMConfig.from_dict({**values, "n_speakers": 2})
    with pytest.raises(ValueError, match="n_experts"):
        CSMConfig.from_dict({**values, "depth": {**values["depth"], "n_experts": 2}})
    for missing in ("backbone", "depth"):
        with pytest.raises(ValueError, match=missing):
            CSMConfig.from_dict({name: value for name, value in values.items() if name != missing})


def test_cross_attention_follows_every_nth_layer_and_the_memory_sits_half_way_up():
    assert [PRESETS[name].cross_layers for name in ("nano", "csm-1b")] == [[3, 7], []]
    assert [PRESETS[name].memory_layer for name in ("nano", "micro", "medium")] == [3, 5, 15]
    stack = TransformerConfig(n_layers=1, d_model=32, n_heads=4, n_kv_heads=2, d_ff=48)
    assert full_config(backbone=stack).memory_layer == 0


def test_the_layout_of_a_config_has_the_fields_of_the_config():
    config = full_config(frames_per_text_id=2.5)
    for f in dataclasses.fields(config.layout):
        assert getattr(config.layout, f.name) == getattr(config, f.name)


@pytest.mark.parametrize(
    ("config", "passes"),
    [
        (PRESETS["csm-1b"], 31),
        (PRESETS["nano"], 14.5),
        (preset("nano", acoustic_delay=1), 31),
        (preset("nano", acoustic_delay=0), 31),
        (preset("nano", n_semantic=1, acoustic_delay=31), 1),
    ],
    ids=["csm-1b", "S=10 C=4", "C=1", "C=0", "S=1 C=31"],
)
def test_passes_of_the_depth_decoder_per_frame(config, passes):
    assert (config.n_codebooks, frame_cost(config).depth_passes) == (32, passes)


def test_a_frame_of_csm_1b_reads_every_weight_of_the_depth_decoder_31_times():
    config, table = PRESETS["csm-1b"], table_of("csm-1b")
    heads = table["codebook0_head"] + table["depth_heads"]
    cache = 2 * 16 * 8 * 64 * 2048
    expected = table["backbone"] + heads + cache + 31 * table["depth"] + table["projection"]
    assert frame_cost(config).bytes_moved == pytest.approx(4 * expected, rel=1e-3)
    assert frame_cost(config, bytes_per_weight=2).bytes_moved == frame_cost(config).bytes_moved / 2


def full_context(config: CSMConfig, batch: int = 1, n_positions: int | None = None) -> Rows:
    """A batch of turns of audio that fill all positions but three of text."""
    n = (n_positions or config.max_positions) - 3 - config.layout.closing_rows
    codes = torch.randint(0, config.codebook_size, (n, config.n_codebooks), generator=torch.Generator().manual_seed(0))
    rows = config.layout.turn_rows(Turn([1, 2, 3], codes, 3))
    return Rows(*(torch.stack([column] * batch) for column in rows))


@pytest.mark.parametrize("width", [32, 64])
@pytest.mark.parametrize("additions", [{}, {"n_semantic": 2, "acoustic_delay": 3}], ids=["csm-1b", "two stages"])
def test_the_arithmetic_of_a_frame_is_what_torch_counts(width, additions):
    stack = TransformerConfig(n_layers=2, d_model=width, n_heads=4, n_kv_heads=2, d_ff=3 * width)
    config = tiny_config(backbone=stack, depth=stack, n_codebooks=8, codebook_size=64, **additions)
    model = CSM(config).eval()
    speaker, cache, C = (
        Speaker(InferenceModel(model, compiled=False), Sampling(temperature=0), torch.Generator()),
        CSMCache(model),
        max(1, config.acoustic_delay),
    )
    rows = full_context(config)
    counted = 0.0
    with torch.inference_mode(), sdpa_kernel(SDPBackend.MATH):  # attention as matrix products, which are counted
        model.hidden(Rows(*(column[:, :-1] for column in rows)), cache=cache)
        with FlopCounterMode(display=False) as one_frame:
            hidden = model.hidden(Rows(*(column[:, -1:] for column in rows)), cache=cache)[:, -1]
            speaker.first_codes(hidden, may_end=False)
        counted += one_frame.get_total_flops()
        if config.acoustic_delay:
            with FlopCounterMode(display=False) as frames:
                speaker.continue_frames(hidden.expand(C, -1), torch.zeros(C, 2, dtype=torch.int64), 8)
            counted += frames.get_total_flops() / C
    assert frame_cost(config).flops == pytest.approx(counted, rel=0.1)


def bytes_kept(model: CSM, rows: Rows, depth_rows: torch.Tensor) -> int:
    """Bytes of the storages that autograd keeps of the loss, without weights and inputs."""
    given = (*model.parameters(), *model.buffers(), *rows)
    known, kept = {t.untyped_storage().data_ptr() for t in given}, {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage  # held, so that no other gets its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.loss(rows, depth_rows)
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("additions", [False, True], ids=["csm-1b", "all additions"])
@pytest.mark.parametrize("width", [32, 64, 128])
@pytest.mark.parametrize("share", [1 / 16, 1.0])
def test_the_activations_of_training_are_about_what_autograd_keeps(width, share, additions, bf16):
    stack = TransformerConfig(n_layers=2, d_model=width, n_heads=4, n_kv_heads=2, d_ff=3 * width)
    config = (full_config if additions else tiny_config)(backbone=stack, depth=stack, n_codebooks=8, codebook_size=64)
    model, rows = CSM(config), full_context(config, 2, 128)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        kept = bytes_kept(model, rows, pick_depth_rows(rows.targets, share, torch.Generator()))
    memory = training_memory(config, parameter_table(config)["total"], 2, 128, share, bf16)
    assert 0.85 < memory.activations / kept < 1.1


def test_training_memory_has_the_bytes_of_weights_gradients_and_adamw():
    model = tiny_model()
    n = sum(p.numel() for p in model.parameters())
    optimizer = torch.optim.AdamW(model.parameters())
    sum(p.sum() for p in model.parameters()).backward()
    optimizer.step()
    memory = training_memory(model.config, n, 1, 64, 1.0)
    moments = [t for state in optimizer.state.values() for name, t in state.items() if name != "step"]
    assert memory.weights == sum(p.nbytes for p in model.parameters())
    assert memory.gradients == sum(p.grad.nbytes for p in model.parameters())
    assert memory.optimizer == sum(t.nbytes for t in moments)
    assert memory.total == sum(memory)


def test_inference_memory_has_the_bytes_of_the_real_weights_and_caches():
    model = full_model(max_positions=64)
    config, cache = model.config, CSMCache(model)
    text = config.layout.turn_rows(Turn([65] * 64, None)).batch()  # the largest context, as text is never pooled
    with torch.inference_mode():
        model.hidden(text, cache=cache)
    depth = KVCache(config.depth, 1, config.n_codebooks, model.text_embedding.weight)
    tensors = [cache.keys.keys, cache.keys.values, depth.keys, depth.values]
    tensors += [t for layer in cache.cross for t in (layer.text.keys, layer.text.values)]
    tensors += [*cache.memory.state.matrices, *cache.memory.current]
    memory = inference_memory(config, sum(p.numel() for p in model.parameters()))
    assert memory.weights == sum(p.nbytes for p in model.parameters())
    assert memory.caches == sum(t.nbytes for t in tensors) + InferenceModel(model, compiled=False).depth.nbytes
    assert memory.total == memory.weights + memory.caches


@pytest.mark.skipif(not compilers(), reason="there is no C++ compiler")
def test_compiled_steps_hold_the_backbone_once_more():
    model = CSM(preset("nano"))
    caches = [inference_memory(model.config, 1000, compiled=compiled).caches for compiled in (False, True)]
    assert caches[1] - caches[0] == NativeStack(model.backbone).nbytes


def test_in_bf16_weights_and_caches_halve_but_the_memory_stays_fp32():
    config = full_config()
    state = 4 * 2 * 4 * 8 * 8
    fp32, bf16 = (inference_memory(config, 1000, bytes_per_weight=n) for n in (4, 2))
    assert bf16.weights == fp32.weights / 2
    assert bf16.caches - state == (fp32.caches - state) / 2


def test_the_command_prints_parts_memory_and_cost(capsys):
    assert run(architecture.main, ["--model_size", "nano"]) == EXIT_DONE
    out = capsys.readouterr().out
    lines = {line.split()[0]: line.split()[-1] for line in out.splitlines() if line.strip()}
    for part, count in table_of("nano").items():
        assert lines[part] == f"{count:,}"
    for text in ("weights", "activations", "inference, bf16", "training, fp32", "GFLOP", "14.5 passes of the depth"):
        assert text in out


def test_the_command_prints_every_size(capsys):
    for name in PRESETS:
        assert run(architecture.main, ["--model_size", name]) == EXIT_DONE
    assert "1,552,791,552" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--model_size", "huge"], "unknown model size 'huge'"),
        (["--batch_rows", "0"], "batch_rows=0 must be at least 1"),
        (["--row_positions", "1"], "row_positions=1 must be at least 2"),
        (["--row_positions", "4096"], "row_positions=4096 must be at most max_positions=2048"),
        (["--depth_share", "0"], "depth_share=0.0 must be above 0"),
        (["--depth_share", "1.5"], "depth_share=1.5 must be above 0 and at most 1"),
        (["--depth_share", "nan"], "depth_share=nan must be above 0"),
    ],
    ids=str,
)
def test_the_command_refuses_bad_flags_in_one_line(capsys, flags, said):
    assert run(architecture.main, flags) == EXIT_INPUT
    out = capsys.readouterr()
    assert out.err.startswith(f"error: {said}")
    assert out.err.count("\n") == 1 and not out.out
