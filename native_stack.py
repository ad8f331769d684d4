"""Steps of a stack on a CPU by `native_step.cpp`, which the first use compiles: some seconds, once per machine.

Operation by operation, starting each and fetching weights anew is most of a small model's step; here it is one call
that reads every weight once, in its order. Weights are as given or of 8 bits, sums in fp32. Letters: N sequences, T
positions of each, R = N T rows, D width, G key/value heads, S positions in a cache, d channels of a head.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import math
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from command_line import MissingRequirement
from folded_stack import eight_bits
from transformer import Block, KVCache, KVCaches, Transformer

SOURCE = Path(__file__).with_name("native_step.cpp")
COMPILERS = ("g++", "clang++")
A_THREAD = 16 << 20  # bytes of weights: with less for each, threads wait for one another, and torch's for both
FEW_ROWS = 16  # of a sequence; from more on arithmetic is what takes the time, not reading weights
BESIDE = {torch.float32: (1, 1), torch.bfloat16: (1, 2), torch.int8: (2, 2)}  # in 4 bytes: inputs, groups of 16 outputs
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}
FLAGS = ["-std=c++17", "-O3", "-fPIC", "-shared", "-pthread", "-fno-trapping-math", "-fno-math-errno"]
INSTRUCTIONS = {  # of what torch says of the processor
    "AVX512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"],
    "AVX2": ["-mavx2", "-mfma"],
}


class _Matrix(ctypes.Structure):
    _fields_ = [
        ("weights", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("out", ctypes.c_int32),
        ("in_", ctypes.c_int32),
        ("kind", ctypes.c_int32),
    ]


class _Block(ctypes.Structure):
    _fields_ = [(name, _Matrix) for name in ("qkv", "out", "gate_up", "down")]


class _Stack(ctypes.Structure):
    _fields_ = [
        ("blocks", ctypes.POINTER(_Block)),
        *((name, ctypes.c_int32) for name in ("d_model", "n_heads", "n_kv_heads", "d_head", "d_ff")),
        ("least", ctypes.c_float),
    ]


class _Sequence(ctypes.Structure):
    _fields_ = [
        ("cache", ctypes.c_void_p),
        ("per_layer", ctypes.c_int64),
        ("per_head", ctypes.c_int64),
        ("length", ctypes.c_int32),
        ("rows", ctypes.c_int32),
    ]


def compiler() -> str | None:
    """The C++ compiler of this machine, CXX before others; None if there is none."""
    named = os.environ.get("CXX")
    return next((found for name in (named, *COMPILERS) if name and (found := shutil.which(name))), None)


class Library(NamedTuple):
    """The compiled source."""

    step: Callable
    lanes: int  # floats in a register; a panel has 4 registers of outputs


@functools.cache
def library() -> Library:
    """MissingRequirement: no compiler, or one that fails."""
    with_ = compiler()
    if with_ is None:
        raise MissingRequirement(f"compiling needs a C++ compiler, one of {', '.join(COMPILERS)}; or go without")
    flags = [*FLAGS, *INSTRUCTIONS.get(torch.backends.cpu.get_cpu_capability(), [])]
    key = hashlib.sha256(SOURCE.read_bytes() + repr((with_, flags, platform.machine())).encode()).hexdigest()[:16]
    kept = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "native_step" / f"{key}.so"
    if not kept.is_file():
        made = _compiled([with_, *flags], kept)
        loaded = _load(made)
        if made != kept:
            shutil.rmtree(made.parent, ignore_errors=True)
    else:
        loaded = _load(kept)
    pointer, number = ctypes.c_void_p, ctypes.c_int32
    loaded.step.argtypes = [pointer, *[number] * 3, pointer, pointer, number, pointer, ctypes.c_int64, number]
    loaded.step.argtypes += [pointer, pointer, number]
    loaded.step.restype = None
    return Library(loaded.step, loaded.lanes())


def _load(path: Path) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise MissingRequirement(
            f"{path} cannot be loaded ({error}); delete it, or go without: --no-compile"
        ) from error


def _compiled(command: list[str], kept: Path) -> Path:
    """Where the library is now: `kept`, or a folder of this process where that cannot be written."""
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(dir=kept.parent))
    except OSError:
        folder = Path(tempfile.mkdtemp())
        kept = folder / kept.name
    made = folder / "made.so"
    done = subprocess.run([*command, str(SOURCE), "-o", str(made)], capture_output=True, text=True)
    if done.returncode:
        shutil.rmtree(folder)
        said = next((line for line in done.stderr.splitlines() if "error" in line), f"exit code {done.returncode}")
        raise MissingRequirement(f"{command[0]} cannot compile {SOURCE.name} ({said}); go without: --no-compile")
    made.replace(kept)
    if folder != kept.parent:
        shutil.rmtree(folder)
    return kept


class NativeMatrix:
    """(out, in) weights, of 8 bits if `int8`, in panels of outputs."""

    def __init__(self, weight: Tensor, int8: bool):
        (out, inputs), lanes = weight.shape, library().lanes
        filled = out + -out % (4 * lanes)
        self.scales = None
        if int8:
            weight, scale = eight_bits(weight)
            self.scales = torch.zeros(filled)
            self.scales[:out] = scale
        if weight.dtype not in KINDS:
            weight = weight.float()
        n, groups = BESIDE[weight.dtype]
        panels = weight.new_zeros(filled, inputs + -inputs % n)
        panels[:out, :inputs] = weight
        panels = panels.unflatten(1, (-1, n)).unflatten(0, (-1, 4 // groups, groups, lanes))
        self.weights = panels.permute(0, 4, 1, 3, 5, 2).contiguous()  # (panels, in / n, 4 / groups, lanes, n, groups)
        scales = None if self.scales is None else self.scales.data_ptr()
        self.c = _Matrix(self.weights.data_ptr(), scales, out, inputs, KINDS[weight.dtype])

    @property
    def nbytes(self) -> int:
        return self.weights.nbytes + (0 if self.scales is None else self.scales.nbytes)


def _native(block: Block, int8: bool) -> tuple[NativeMatrix, ...]:
    """The four matrices of a block with the scales of its norms folded in, and that of the queries."""
    a, f, half = block.attention, block.feed_forward, 2 * library().lanes
    length = math.sqrt(block.attention_norm.weight.numel())  # of a vector whose mean square is 1
    qkv = torch.cat((a.q_proj.weight * a.d_head**-0.5, a.k_proj.weight, a.v_proj.weight))
    gate_up = torch.stack((f.gate_proj.weight, f.up_proj.weight))  # (2, d_ff, D)
    gate_up = F.pad(gate_up, (0, 0, 0, -gate_up.size(1) % half))
    gate_up = gate_up.unflatten(1, (-1, half)).transpose(0, 1).flatten(0, 2)  # half a panel of one, half of the other
    folded = (
        qkv * (length * block.attention_norm.weight),
        a.o_proj.weight,
        gate_up * (length * block.feed_forward_norm.weight),
        f.down_proj.weight,
    )
    return tuple(NativeMatrix(weight, int8) for weight in folded)


class NativeStack:
    """The blocks that `stack` has now: make another one when they change. Its caches are those of the stack.

    MissingRequirement: nothing to compile with. ValueError: the weights are not on a CPU.
    """

    @torch.no_grad()
    def __init__(self, stack: Transformer, int8: bool = False):
        if stack.norm.weight.device.type != "cpu":
            raise ValueError(f"native steps are for a CPU, the model is on {stack.norm.weight.device}")
        self.step, self.stack, self.config = library().step, stack, stack.config
        self.matrices = [_native(block, int8) for block in stack.blocks]
        self.blocks = (_Block * len(self.matrices))(*(_Block(*(m.c for m in four)) for four in self.matrices))
        c = stack.config
        sizes = c.d_model, c.n_heads, c.n_kv_heads, c.d_head, c.d_ff
        self.c = _Stack(self.blocks, *sizes, c.norm_eps * c.d_model)
        self.most_threads = max(1, self.nbytes // A_THREAD)

    @property
    def nbytes(self) -> int:
        return sum(matrix.nbytes for four in self.matrices for matrix in four)

    def turns(self, positions: Tensor) -> Tensor:
        """(..., T) positions -> (..., T, d) cosines, then sines, of the angles that the channels are turned by."""
        angles = positions[..., None].float() * self.stack.frequencies
        return torch.cat((angles.cos(), angles.sin()), dim=-1)

    def sequences(self, caches: Sequence[KVCache], rows: int) -> ctypes.Array:
        """Of one sequence or several each, all of which have so many rows to come."""
        found = []
        for cache in caches:
            layer, row, head, position, _ = cache.both.stride()
            for index in range(cache.both.size(1)):
                where = cache.both.data_ptr() + index * row * cache.both.element_size()
                found.append(_Sequence(where, layer, head, cache.length, rows))
        return (_Sequence * len(found))(*found)

    def run(
        self,
        x: Tensor,
        sequences: ctypes.Array,
        turns: Tensor,
        first: int,
        last: int,
        bf16: bool = False,
        head: NativeMatrix | None = None,
    ) -> Tensor | None:
        """(R, D) in fp32, changed in place by the blocks first .. last - 1, the rows of one sequence after those of the
        one before; `turns` are (N or 1, R / N, d). (N, V) logits of the last row of each of N sequences, if there is a
        `head`. The last block of the stack lengthens the sequences."""
        N, c = len(sequences), self.config
        logits = None if head is None else x.new_empty(N, head.c.out)
        self.step(
            ctypes.byref(self.c),
            first,
            last,
            last == c.n_layers,
            x.data_ptr(),
            sequences,
            N,
            turns.data_ptr(),
            0 if turns.size(0) == 1 else turns.stride(0),
            bf16,
            None if head is None else ctypes.byref(head.c),
            None if logits is None else logits.data_ptr(),
            min(self.most_threads, torch.get_num_threads()),
        )
        return logits

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        allowed: Tensor | None,
        cache: KVCache | KVCaches,
        between: Callable[[int, Tensor], Tensor] | None = None,
    ) -> Tensor:
        """As `Transformer.forward`; more than a few rows go that way, as their time is arithmetic."""
        (B, T, D), c = x.shape, self.config
        if T > FEW_ROWS or allowed is not None:
            return self.stack(x, positions, allowed, cache, between)
        caches = cache.caches if isinstance(cache, KVCaches) else [cache]
        for own in caches:
            own.check_room(T)
        sequences, turns, dtype = self.sequences(caches, T), self.turns(positions), x.dtype
        bf16 = caches[0].both.dtype == torch.bfloat16
        x = x.reshape(B * T, D).to(torch.float32, copy=True)
        for layer in range(c.n_layers):
            self.run(x, sequences, turns, layer, layer + 1, bf16)
            if between is not None:  # which may keep what it is given
                x = between(layer, x.to(dtype).view(B, T, D)).reshape(B * T, D).to(torch.float32, copy=True)
        cache.advance(T)
        return self.stack.norm(x.to(dtype).view(B, T, D))
