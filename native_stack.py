"""Steps of a stack on a CPU by `native_step.cpp`, which the first use compiles: some seconds, once per machine.

Operation by operation, starting each and fetching weights anew is most of a small model's step; here it is one call
that reads every weight once, in its order. Weights are as given or of 8 bits, sums in fp32. Letters: N sequences, T
positions of each, R = N T rows, D width, G key/value heads, S positions in a cache, d channels of a head.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import math
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from checkpointing import write_atomically
from command_line import MissingRequirement
from folded_stack import eight_bits
from transformer import Block, KVCache, KVCaches, Transformer

SOURCE = Path(__file__).with_name("native_step.cpp")
COMPILERS = ("g++", "clang++")
A_THREAD = 16 << 20  # bytes of weights: with less for each, threads wait for one another, and torch's for both
FEW_ROWS = 16  # of a sequence; from more on arithmetic is what takes the time, not reading weights
BESIDE = {torch.float32: (1, 1), torch.bfloat16: (1, 2), torch.int8: (2, 2)}  # in 4 bytes: inputs, registers of outputs
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


class Library(NamedTuple):
    """The compiled source."""

    step: Callable
    lanes: int  # floats in a register; a panel has 4 registers of outputs


def compilers() -> list[list[str]]:
    """Commands of the C++ compilers of this machine, CXX before others."""
    try:
        named = shlex.split(os.environ.get("CXX", ""))
    except ValueError:  # a quote that does not end
        named = []
    return [command for command in (named, *([name] for name in COMPILERS)) if command and shutil.which(command[0])]


def commands() -> list[list[str]]:
    """Of each compiler, with what this processor can do."""
    flags = [*FLAGS, *INSTRUCTIONS.get(torch.backends.cpu.get_cpu_capability(), [])]
    return [[*compiler, *flags] for compiler in compilers()]


def library() -> Library:
    """MissingRequirement: nothing to compile with, or what is compiled does not run here."""
    found = _found()
    if isinstance(found, str):
        raise MissingRequirement(f"{found}; go without: --no-compile")
    return found


@functools.cache
def _found() -> Library | str:
    """Or why there is none; asked for once in a process."""
    if os.name == "nt":
        return "steps of the model are not compiled on Windows"
    reasons = [f"compiling needs a C++ compiler, one of {', '.join(COMPILERS)}"]
    for command in commands():
        try:
            return _built(command)
        except (OSError, subprocess.SubprocessError) as error:
            reasons.append(f"{command[0]} cannot compile {SOURCE.name} for this machine ({error})")
    return reasons[-1]


def _built(command: list[str]) -> Library:
    """From this user's cache, else compiled and put there. OSError, SubprocessError: it cannot be."""
    kept = _kept(command)
    if kept is not None and kept.is_file():
        with contextlib.suppress(OSError):  # of another machine that shares the folder, or damaged: compiled anew
            return _loaded(kept)
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "step.so"
        done = subprocess.run(
            [*command, str(SOURCE), "-o", str(made)], capture_output=True, text=True, errors="replace"
        )
        if done.returncode:
            said = (line for line in done.stderr.splitlines() if "error" in line)
            raise subprocess.SubprocessError(next(said, f"exit code {done.returncode}"))
        if kept is not None:
            with contextlib.suppress(OSError):  # it cannot be kept, or was not
                kept.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(kept, made.read_bytes())
                return _loaded(kept)
        return _loaded(made)


def _kept(command: list[str]) -> Path | None:
    """Where the library is kept for the next process; None if this user has no such place."""
    machine = platform.system(), platform.machine(), platform.libc_ver(), shutil.which(command[0])
    key = hashlib.sha256(SOURCE.read_bytes() + repr((command, machine)).encode()).hexdigest()[:16]
    try:
        kept = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "native_step" / f"{key}.so"
        kept.is_file()
    except (OSError, RuntimeError):  # there is no home, or not for us
        return None
    return kept


def _loaded(path: Path) -> Library:
    loaded = ctypes.CDLL(str(path))
    pointer, number = ctypes.c_void_p, ctypes.c_int32
    loaded.step.argtypes = [pointer, *[number] * 3, pointer, pointer, number, pointer, ctypes.c_int64, number]
    loaded.step.argtypes += [pointer, pointer, number]
    loaded.step.restype = None
    return Library(loaded.step, loaded.lanes())


class NativeMatrix:
    """(out, in) weights as fp32, bf16 or numbers of 8 bits with a scale for each output, in panels of outputs."""

    def __init__(self, weight: Tensor, dtype: torch.dtype):
        (out, inputs), lanes = weight.shape, library().lanes
        filled = out + -out % (4 * lanes)
        self.scales = None
        if dtype == torch.int8:
            weight, scale = eight_bits(weight)
            self.scales = torch.zeros(filled)
            self.scales[:out] = scale
        weight = weight.to(dtype)
        n, groups = BESIDE[dtype]
        panels = weight.new_zeros(filled, inputs + -inputs % n)
        panels[:out, :inputs] = weight
        panels = panels.unflatten(1, (-1, n)).unflatten(0, (-1, 4 // groups, groups, lanes))
        self.weights = panels.permute(0, 4, 1, 3, 5, 2).contiguous()  # (panels, in / n, 4 / groups, lanes, n, groups)
        scales = None if self.scales is None else self.scales.data_ptr()
        self.c = _Matrix(self.weights.data_ptr(), scales, out, inputs, KINDS[dtype])

    @property
    def nbytes(self) -> int:
        return self.weights.nbytes + (0 if self.scales is None else self.scales.nbytes)


def _native(block: Block, dtype: torch.dtype) -> tuple[NativeMatrix, ...]:
    """The four matrices of a block with the scales of its norms folded in, and that of the queries; rounded last."""
    a, f, half = block.attention, block.feed_forward, 2 * library().lanes
    length = math.sqrt(block.attention_norm.weight.numel())  # of a vector whose mean square is 1
    qkv = torch.cat((a.q_proj.weight.float() * a.d_head**-0.5, a.k_proj.weight, a.v_proj.weight))
    gate_up = torch.stack((f.gate_proj.weight.float(), f.up_proj.weight.float()))  # (2, d_ff, D)
    gate_up = F.pad(gate_up, (0, 0, 0, -gate_up.size(1) % half))
    gate_up = gate_up.unflatten(1, (-1, half)).transpose(0, 1).flatten(0, 2)  # half a panel of one, half of the other
    folded = (
        qkv * (length * block.attention_norm.weight),
        a.o_proj.weight.float(),
        gate_up * (length * block.feed_forward_norm.weight),
        f.down_proj.weight.float(),
    )
    return tuple(NativeMatrix(weight, dtype) for weight in folded)


def takes(stack: Transformer) -> bool:
    """Whether its weights are where, and of a precision that, native steps are for."""
    weight = stack.norm.weight
    return weight.device.type == "cpu" and weight.dtype in (torch.float32, torch.bfloat16)


class NativeStack:
    """The blocks that `stack` has now: make another one when they change. Its caches are those of the stack.

    Of more rows than a few at once `forward` leaves the work to `stack` as it is then. MissingRequirement: nothing to
    compile with. ValueError: the weights are not on a CPU, or of another precision than fp32 and bf16.
    """

    @torch.no_grad()
    def __init__(self, stack: Transformer, int8: bool = False):
        if not takes(stack):
            found = f"{stack.norm.weight.dtype} on {stack.norm.weight.device}"
            raise ValueError(f"native steps are for fp32 and bf16 on a CPU, the model is of {found}")
        self.step, self.stack, self.config = library().step, stack, stack.config
        self.dtype = torch.int8 if int8 else stack.norm.weight.dtype
        self.matrices = [_native(block, self.dtype) for block in stack.blocks]
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
            layer, row, head, *_ = cache.both.stride()
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
        rows = sum(sequence.rows for sequence in sequences)
        if x.shape != (rows, c.d_model) or not (x.is_contiguous() and turns.is_contiguous()):
            raise ValueError(f"{tuple(x.shape)} is not ({rows}, {c.d_model}) in one piece")
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
        x = _own(x)
        for layer in range(c.n_layers):
            self.run(x, sequences, turns, layer, layer + 1, bf16)
            if between is not None:  # which may keep what it is given
                x = _own(between(layer, x.to(dtype).view(B, T, D)))
        cache.advance(T)
        return self.stack.norm(x.to(dtype).view(B, T, D))


def _own(x: Tensor) -> Tensor:
    """A copy of (B, T, D) as (B T, D) in fp32, row after row."""
    return x.flatten(0, 1).to(torch.float32, copy=True, memory_format=torch.contiguous_format)
