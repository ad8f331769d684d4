"""Compiled steps against the modules whose weights they have."""

import multiprocessing
import shutil
import threading

import pytest
import torch
from conftest import tiny_model

import native_stack
from command_line import MissingRequirement
from folded_stack import eight_bits
from inference_model import InferenceModel
from native_stack import NativeMatrix, NativeStack, compilers
from transformer import KVCache, KVCaches, Transformer, TransformerConfig

pytestmark = pytest.mark.skipif(not compilers(), reason="there is no C++ compiler")
SIZES = [
    {"d_model": 96, "n_heads": 6, "n_kv_heads": 2, "d_ff": 80},  # nothing a multiple of 64
    {"d_model": 128, "n_heads": 2, "n_kv_heads": 2, "d_ff": 256},
    {"d_model": 24, "n_heads": 4, "n_kv_heads": 1, "d_ff": 40},  # heads narrower than a vector
]


def stack_of(sizes: dict, dtype: torch.dtype = torch.float32) -> Transformer:
    torch.manual_seed(0)
    stack = Transformer(TransformerConfig(n_layers=3, rope_scale=4, **sizes)).eval()
    for parameter in stack.parameters():  # scales of 1 would hide where they are folded; weights of 0.02 what they do
        torch.nn.init.uniform_(parameter, 0.5, 1.5) if parameter.ndim == 1 else torch.nn.init.normal_(
            parameter, std=0.1
        )
    return stack.to(dtype)


@torch.inference_mode()
def states(stack, run, pieces: list[int], x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """(B, T, D) read in pieces behind one another."""
    cache = KVCache(stack.config, len(x), x.size(1), x)
    parts = zip(x.split(pieces, dim=1), positions.split(pieces, dim=1), strict=True)
    found = torch.cat([run(part, places, None, cache) for part, places in parts], dim=1)
    assert cache.length == x.size(1)
    return found


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("pieces", [[1] * 9, [4, 1, 3, 1], [20, 1, 1, 5]])
def test_steps_are_those_of_the_stack(sizes, pieces):
    """Also from a cache that the stack has filled, as more rows than a few go that way; times are not whole."""
    stack, T = stack_of(sizes), sum(pieces)
    x = torch.randn(2, T, sizes["d_model"])
    positions = torch.arange(T).repeat(2, 1) * torch.tensor([[1.0], [1.37]])
    expected = states(stack, stack, [T], x, positions)
    found = states(stack, NativeStack(stack).forward, pieces, x, positions)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("sizes", SIZES)
def test_in_bf16_they_are_nearer_to_exact_sums_than_the_stack_is(sizes):
    stack, pieces = stack_of(sizes, torch.bfloat16), [1] * 12
    x, positions = torch.randn(1, 12, sizes["d_model"]).bfloat16(), torch.arange(12)[None]
    plain = states(stack, stack, pieces, x, positions).float()
    found = states(stack, NativeStack(stack).forward, pieces, x, positions).float()
    exact = states(stack.float(), stack.float(), pieces, x.float(), positions)
    errors = [float((y - exact).norm() / exact.norm()) for y in (found, plain)]
    assert 0 < errors[0] < min(errors[1], 0.02)


def test_sequences_of_other_lengths_and_threads_change_no_bit():
    """Each alone by one thread, and all three at once by three."""
    stack = stack_of(SIZES[0])
    native, D = NativeStack(stack), SIZES[0]["d_model"]
    native.most_threads = 3  # so small a stack would have one
    begun, x = [torch.randn(1, n, D) for n in (2, 7, 4)], torch.randn(3, 5, D)
    threads, found = torch.get_num_threads(), {}
    try:
        for together, n_threads in ((False, 1), (True, 3), (True, 2)):
            torch.set_num_threads(n_threads)
            caches = [KVCache(stack.config, 1, 16, x) for _ in begun]
            with torch.inference_mode():
                for rows, cache in zip(begun, caches, strict=True):
                    native.forward(rows, torch.arange(rows.size(1))[None], None, cache)
                steps = []
                for t in range(5):
                    places = torch.tensor([[cache.length] for cache in caches])
                    if together:
                        steps.append(native.forward(x[:, t : t + 1], places, None, KVCaches(caches)))
                    else:
                        rows = zip(x[:, t : t + 1].split(1), places.split(1), caches, strict=True)
                        steps.append(torch.cat([native.forward(row, at, None, own) for row, at, own in rows]))
            found[together, n_threads] = torch.cat(steps, dim=1)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[False, 1], found[True, 3]) and torch.equal(found[False, 1], found[True, 2])


@pytest.mark.parametrize("out", [64, 100, 7])
@pytest.mark.parametrize("sizes", SIZES)
def test_weights_of_8_bits_are_the_nearest(sizes, out):
    """Of unit vectors, no block before it, a head gives its own rounded weights."""
    native, D = NativeStack(stack_of(sizes)), sizes["d_model"]
    weight, x = torch.randn(out, D), torch.eye(D)
    codes, scale = eight_bits(weight)
    rounded = codes * scale[:, None]
    assert ((rounded - weight).abs() <= scale[:, None] * 0.501).all()
    sequences = native.sequences([KVCache(native.config, 1, 1, x) for _ in x], 1)
    logits = native.run(
        x, sequences, torch.zeros(1, 1, native.config.d_head), 0, 0, head=NativeMatrix(weight, torch.int8)
    )
    torch.testing.assert_close(logits, rounded.T, atol=1e-3, rtol=1e-3)


def test_what_is_between_the_blocks_may_keep_what_it_is_given():
    stack, kept, x = stack_of(SIZES[0]), {}, torch.randn(1, 2, 96)
    for name, run in (("stack", stack), ("native", NativeStack(stack).forward)):
        kept[name] = []
        with torch.inference_mode():
            between = lambda layer, y, own=kept[name]: own.append(y) or (y * 2 if layer == 1 else y)  # noqa: E731
            kept[name].append(run(x, torch.arange(2)[None], None, KVCache(stack.config, 1, 2, x), between))
    assert len(kept["stack"]) == 4
    for one, other in zip(kept["stack"], kept["native"], strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-4)


def test_more_rows_than_the_cache_holds_are_refused():
    stack, x = stack_of(SIZES[0]), torch.randn(1, 3, 96)
    cache = KVCache(stack.config, 1, 2, x)
    with torch.inference_mode(), pytest.raises(ValueError, match="the cache holds 2 positions, 3 are needed"):
        NativeStack(stack).forward(x, torch.arange(3)[None], None, cache)


def _step(native: NativeStack, said=None) -> torch.Tensor:
    x = torch.ones(1, 1, native.config.d_model)
    with torch.inference_mode():
        found = native.forward(x, torch.zeros(1, 1), None, KVCache(native.config, 1, 1, x))
    if said is not None:
        said.put(found.tolist())
    return found


def test_threads_of_python_and_forked_processes_may_all_call_it():
    native, threads = NativeStack(stack_of(SIZES[0])), torch.get_num_threads()
    native.most_threads = 2
    torch.set_num_threads(2)
    try:
        expected, found = _step(native), []
        callers = [threading.Thread(target=lambda: found.extend(_step(native) for _ in range(50))) for _ in range(4)]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()
        assert len(found) == 200 and all(torch.equal(expected, each) for each in found)
        if "fork" in multiprocessing.get_all_start_methods():
            fork = multiprocessing.get_context("fork")
            said = fork.Queue()
            child = fork.Process(target=_step, args=(native, said))
            child.start()
            assert said.get(timeout=60) == expected.tolist()
            child.join()
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_precisions_are_refused(dtype):
    with pytest.raises(ValueError, match=f"for fp32 and bf16 on a CPU, the model is of {dtype} on cpu"):
        NativeStack(stack_of(SIZES[0], dtype))


@pytest.fixture
def anew(monkeypatch, tmp_path):
    """Nothing is compiled yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    native_stack._found.cache_clear()
    yield tmp_path
    native_stack._found.cache_clear()


def test_it_is_compiled_once(anew, monkeypatch):
    native_stack.library()
    kept = list((anew / "cache").rglob("*"))
    assert [path.suffix for path in kept if path.is_file()] == [".so"] and len(kept) == 2
    native_stack._found.cache_clear()
    monkeypatch.setattr(native_stack.subprocess, "run", lambda *a, **b: pytest.fail("compiled again"))
    assert native_stack.library()


def test_what_cannot_be_loaded_is_compiled_anew(anew):
    path = native_stack._kept(native_stack.commands()[0])
    path.parent.mkdir(parents=True)
    path.write_bytes(b"\x7fELF, and no more of it")
    assert native_stack.library() and path.stat().st_size > 1000


@pytest.mark.parametrize("homeless", [False, True])
def test_where_nothing_can_be_kept_it_is_compiled_for_this_process(anew, monkeypatch, homeless):
    if homeless:
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setattr(native_stack.Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    else:
        (anew / "cache").write_text("a file where the folder would be")
    assert native_stack.library()


def test_without_a_compiler_one_line_says_so(anew, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(MissingRequirement, match=r"needs a C\+\+ compiler, one of g.*; go without: --no-compile"):
        native_stack.library()
    with pytest.raises(MissingRequirement):
        InferenceModel(tiny_model(), compiled=True)
    assert not InferenceModel(tiny_model()).compiled


def test_a_compiler_that_fails_is_named_and_asked_once(anew, monkeypatch):
    source = anew / "native_step.cpp"
    source.write_text("this is no C++")
    monkeypatch.setattr(native_stack, "SOURCE", source)
    for _ in range(2):
        with pytest.raises(MissingRequirement, match=r"cannot compile native_step.cpp for this machine .*error"):
            native_stack.library()
        monkeypatch.setattr(native_stack.subprocess, "run", lambda *a, **b: pytest.fail("compiled again"))
    assert not [path for path in (anew / "cache").rglob("*") if path.is_file()]


def test_the_compiler_that_is_named_comes_first_and_others_after_it(anew, monkeypatch):
    monkeypatch.setenv("CXX", "false --some flags")
    assert compilers()[0] == ["false", "--some", "flags"] and len(compilers()) > 1
    assert native_stack.library()
