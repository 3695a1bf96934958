"""Executes PTX on the CPU, as Triton emits it for sm_80 .. sm_120 without wgmma and tcgen05.

Every thread of every block is a numpy lane; lanes go in lock step, lowest program counter first, so
that diverged threads meet again; those at a barrier wait until all are at one. Blocks run in a
random order, and where they meet in atomics some run after others have ended. Global addresses are
the host's, checked against the tensors of the launch. Not modelled: time, races, asynchronous
copies still in flight, flushing of denormals, the order of sums in tensor cores, the last bits of
approximate functions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray

from lab.kit import order
from lab.kit.memory import Counters, GlobalMemory, SharedMemory
from lab.kit.ptx import (
    Immediate,
    Instruction,
    Memory,
    Operand,
    Program,
    Register,
    Special,
    Symbol,
    Type,
    Vector,
    parse,
    type_of,
)

Array = NDArray[np.generic]
Mask = NDArray[np.bool_] | None
"""Lanes that execute an instruction; None means all."""

UNSIGNED = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
SIGNED = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}
FLOAT = {16: np.float16, 32: np.float32, 64: np.float64}
B32, U32, U64, PRED = Type("b", 32), Type("u", 32), Type("u", 64), Type("p", 1)
CHUNK = 1 << 15
"""Most lanes that go in lock step."""


def bf16_to_f32(bits: Array) -> Array:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def f32_to_bf16(value: Array) -> Array:
    value = np.asarray(value, np.float32)
    bits = value.view(np.uint32)
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    rounded = ((bits + np.uint32(0x7FFF) + odd) >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(value), np.uint16(0x7FFF), rounded)


def int_type(t: Type) -> type:
    return (SIGNED if t.kind == "s" else UNSIGNED)[t.width]


class Emulator:
    """One compiled kernel.

    Args:
        ptx: its text.
        threads: of a block.
        shared: bytes of shared memory of a block.
    """

    def __init__(self, ptx: str, threads: int, shared: int) -> None:
        self.program = parse(ptx)
        self.threads, self.shared = threads, max(-(-shared // 16), 1) * 16  # blocks are aligned
        self.counters: Counters | None = None

    def launch(
        self,
        grid: tuple[int, int, int],
        args: Sequence[float],
        tensors: Iterable[torch.Tensor],
    ) -> None:
        """args: values of the parameters in order, tensors by address; tensors: all of them."""
        memory = GlobalMemory(tensors)
        padded = list(args) + [0] * (len(self.program.params) - len(args))
        params = {
            name: _param_bits(kind, value)
            for (kind, name), value in zip(self.program.params, padded, strict=True)
        }
        n, per = grid[0] * grid[1] * grid[2], max(1, CHUNK // self.threads)
        with np.errstate(all="ignore"):
            for wave in order.waves(n) if self.program.atomics else [order.programs(n)]:
                for first in range(0, len(wave), per):
                    Blocks(self, memory, params, wave[first : first + per], grid).run()


def _param_bits(kind: str, value: float) -> int:
    if kind.startswith("f"):
        width = int(kind[1:])
        return int(np.array(value, FLOAT[width]).view(UNSIGNED[width]))
    return int(value) & 0xFFFF_FFFF_FFFF_FFFF


class Blocks:
    """Some blocks of a launch: registers of all their lanes."""

    def __init__(
        self,
        emulator: Emulator,
        memory: GlobalMemory,
        params: dict[str, int],
        blocks: NDArray[np.int64],
        grid: tuple[int, int, int],
    ) -> None:
        threads = emulator.threads
        self.program: Program = emulator.program
        self.memory, self.params, self.counters = memory, params, emulator.counters
        self.shared = SharedMemory(len(blocks), emulator.shared)
        self.lanes = len(blocks) * threads
        self.lane = np.arange(self.lanes)
        self.warp_start = self.lane - self.lane % 32
        self.shared_base = np.repeat(np.arange(len(blocks)) * emulator.shared, threads)
        self.registers: dict[str, Array] = {}
        self.stored = np.zeros(self.lanes, bool)  # to global memory, since the last barrier
        self._block, self._grid, self._threads = np.repeat(blocks, threads), grid, threads

    @cached_property
    def special(self) -> dict[str, Array]:
        (x, y, z), block, thread = self._grid, self._block, self.lane % self._threads
        values = {
            "tid.x": thread, "tid.y": 0, "tid.z": 0, "ntid.x": self._threads,
            "ctaid.x": block % x, "ctaid.y": block // x % y, "ctaid.z": block // (x * y),
            "nctaid.x": x, "nctaid.y": y, "nctaid.z": z,
            "laneid": thread % 32, "warpid": thread // 32,
        }  # fmt: skip
        return {k: self.full(np.asarray(v)).astype(np.uint32) for k, v in values.items()}

    def full(self, value: Array) -> Array:
        return np.broadcast_to(value, (self.lanes,))

    def run(self) -> None:
        instructions, labels = self.program.instructions, self.program.labels
        end, at, mask = len(instructions), 0, None
        counter = np.zeros(self.lanes, np.int32)
        barriers = np.array([i.op[0] in ("bar", "barrier") for i in instructions] + [False])
        while True:
            i = instructions[at]
            active = self._active(i, mask)
            if self.counters is not None and i.op[0] not in ("bra", "ret", "exit"):
                warps = self.lanes // 32 if mask is None else mask.reshape(-1, 32).any(1).sum()
                self.counters.warp_instructions += int(warps)
            if i.op[0] in ("bra", "ret", "exit"):
                target = labels[_symbol(i.operands[-1])] if i.op[0] == "bra" else end
                if mask is None and active is None:
                    if target >= end:
                        return
                    at = target
                    continue
                counter[slice(None) if mask is None else mask] = at + 1
                counter[slice(None) if active is None else active] = target
            else:
                if active is None or active.any():
                    _handler(i.op[0])(self, i, active)
                at += 1
                if mask is None:
                    continue
                counter[mask] = at
            running = counter < end
            if not running.any():
                return
            at = int(counter[running].min())
            if barriers[at] and (others := running & ~barriers[counter]).any():
                at = int(counter[others].min())
            mask = counter == at
            if mask.all():
                mask = None

    def _active(self, i: Instruction, mask: Mask) -> Mask:
        if i.predicate is None:
            return mask
        on = self.registers[i.predicate].astype(bool)
        on = ~on if i.negated else on
        on = on if mask is None else on & mask
        return None if on.all() else on

    def read(self, o: Operand, t: Type) -> Array:
        """The operand as numbers of type t (bf16 as float32): [lanes], or [] where constant."""
        if isinstance(o, Register):
            v = self.registers.get(o.name)
            if v is None:
                v = np.zeros(self.lanes, UNSIGNED[max(t.width, 8)])
        elif isinstance(o, Special):
            v = self.special[o.name]
        elif isinstance(o, Immediate):
            if t.kind == "p":
                return np.bool_(o.bits)
            v = np.array(o.bits & ((1 << t.width) - 1), UNSIGNED[t.width])
        else:
            assert isinstance(o, Symbol), o  # the shared array: at 0
            v = np.array(0, UNSIGNED[t.width])
        if t.kind == "p":
            return v.astype(bool)
        if v.dtype.itemsize * 8 != t.width:
            v = v.astype(UNSIGNED[t.width])
        if t.kind == "B":
            return bf16_to_f32(v)
        if t.kind == "f":
            return v.view(FLOAT[t.width])
        return v.view(SIGNED[t.width]) if t.kind == "s" else v

    def read_all(self, o: Operand, t: Type) -> Array:
        return self.full(self.read(o, t))

    def write(self, o: Operand, v: Array, t: Type, mask: Mask) -> None:
        """Numbers of type t into a register, for the lanes of mask."""
        assert isinstance(o, Register | Symbol), o
        if o.name == "_":
            return
        bits = self._bits(np.asarray(v), t)
        width = self.program.width(o.name)
        if width > t.width and t.kind != "p":
            signed = t.kind == "s"
            bits = bits.view(SIGNED[t.width]).astype(SIGNED[width]) if signed else bits
            bits = bits.view(UNSIGNED[width]) if signed else bits.astype(UNSIGNED[width])
        if bits.shape != (self.lanes,):
            bits = self.full(bits)
        if mask is not None:
            old = self.registers.get(o.name)
            bits = np.where(mask, bits, np.zeros(1, bits.dtype) if old is None else old)
        self.registers[o.name] = bits

    @staticmethod
    def _bits(v: Array, t: Type) -> Array:
        if t.kind == "p":
            return v.astype(np.uint8)
        if t.kind == "B":
            return f32_to_bf16(v)
        if t.kind == "f":
            return v.astype(FLOAT[t.width], copy=False).view(UNSIGNED[t.width])
        if v.dtype == UNSIGNED[t.width]:
            return v
        return v.astype(int_type(t)).view(UNSIGNED[t.width])

    def global_address(self, o: Operand) -> Array:
        assert isinstance(o, Memory)
        offset = np.uint64(o.offset & 0xFFFF_FFFF_FFFF_FFFF)
        return self.full(self.read(o.base, U64) + offset)

    def shared_address(self, o: Operand) -> Array:
        assert isinstance(o, Memory)
        return self.read(o.base, U32).astype(np.int64) + o.offset + self.shared_base

    def release(self, lanes: NDArray[np.int64], text: str) -> None:
        """Each of `lanes` makes its block's stores visible to other blocks."""
        block = np.zeros(self.lanes // self._threads, np.int64)
        np.add.at(block, np.nonzero(self.stored)[0] // self._threads, 1)
        if (block[lanes // self._threads] > self.stored[lanes]).any():
            raise RuntimeError(f"race: no barrier between other threads' stores and {text}")

    def indices(self, mask: Mask) -> NDArray[np.int64]:
        return self.lane if mask is None else np.nonzero(mask)[0]


Handler = Callable[[Blocks, Instruction, Mask], None]
_HANDLERS: dict[str, Handler] = {}


def handles(*names: str) -> Callable[[Handler], Handler]:
    """Register the function that executes opcodes of these names."""

    def register(function: Handler) -> Handler:
        _HANDLERS.update(dict.fromkeys(names, function))
        return function

    return register


def _handler(name: str) -> Handler:
    if name not in _HANDLERS:
        raise NotImplementedError(f"the emulator lacks the instruction {name}")
    return _HANDLERS[name]


def _symbol(o: Operand) -> str:
    assert isinstance(o, Symbol)
    return o.name


def parts_of(o: Operand) -> tuple[Operand, ...]:
    return o.parts if isinstance(o, Vector) else (o,)


__all__ = ["B32", "PRED", "U32", "U64", "Blocks", "Emulator", "handles", "parts_of", "type_of"]
