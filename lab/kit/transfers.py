"""PTX instructions that touch memory."""

from __future__ import annotations

import numpy as np

from lab.kit.arithmetic import LOGIC, whole_warps, write_warps
from lab.kit.emulator import (
    B32,
    U32,
    UNSIGNED,
    Blocks,
    Mask,
    bf16_to_f32,
    f32_to_bf16,
    handles,
    parts_of,
)
from lab.kit.memory import AccessError
from lab.kit.ptx import Immediate, Instruction, Memory, Symbol, Type, type_of


@handles("ld")
def ld(m: Blocks, i: Instruction, mask: Mask) -> None:
    t = type_of(i.op[-1])
    t = Type("s" if t.kind == "s" else "u", t.width)
    registers, source = parts_of(i.operands[0]), i.operands[1]
    if "param" in i.op:
        assert isinstance(source, Memory)
        assert isinstance(source.base, Symbol)
        bits = (m.params[source.base.name] >> (8 * source.offset)) & ((1 << t.width) - 1)
        m.write(registers[0], np.full(m.lanes, bits, UNSIGNED[t.width]), t, mask)
        return
    nbytes, lane = t.width // 8 * len(registers), m.indices(mask)
    if "shared" in i.op:
        address = m.shared_address(source)[lane]
        m.shared.check(address, nbytes, m.shared_base[lane], i.text)
        if m.counters is not None:
            m.counters.note_shared(address, nbytes, lane)
        data = m.shared.load(address, nbytes)
    else:
        address = np.ascontiguousarray(m.global_address(source)[lane])
        if m.counters is not None:
            m.counters.note_global("load", address, nbytes, lane)
        data = m.memory.load(address, nbytes, i.text)
    values = np.ascontiguousarray(data).view(UNSIGNED[t.width]).reshape(len(lane), len(registers))
    for j, register in enumerate(registers):
        value = values[:, j]
        if mask is not None:
            full = np.zeros(m.lanes, value.dtype)
            full[lane] = value
            value = full
        m.write(register, value, t, mask)


@handles("st")
def st(m: Blocks, i: Instruction, mask: Mask) -> None:
    width = type_of(i.op[-1]).width
    registers, lane = parts_of(i.operands[1]), m.indices(mask)
    columns = [m.read_all(r, Type("b", width))[lane] for r in registers]
    data = np.ascontiguousarray(np.stack(columns, 1)).view(np.uint8).reshape(len(lane), -1)
    nbytes = data.shape[1]
    if "shared" in i.op:
        address = m.shared_address(i.operands[0])[lane]
        m.shared.check(address, nbytes, m.shared_base[lane], i.text)
        if m.counters is not None:
            m.counters.note_shared(address, nbytes, lane)
        m.shared.store(address, data)
    else:
        address = np.ascontiguousarray(m.global_address(i.operands[0])[lane])
        if m.counters is not None:
            m.counters.note_global("store", address, nbytes, lane)
        m.memory.store(address, data, i.text)
        m.stored[lane] = True


@handles("cp")
def cp_async(m: Blocks, i: Instruction, mask: Mask) -> None:
    """Copies at once what the GPU copies by the next wait; bytes beyond the source size are 0."""
    if i.op[2:4] == ("bulk", "prefetch"):
        prefetch(m, i, mask)
    if i.op[2] != "ca" and i.op[2] != "cg":
        return
    size = i.operands[2]
    assert isinstance(size, Immediate)
    n, lane = size.bits, m.indices(mask)
    to = m.shared_address(i.operands[0])[lane]
    m.shared.check(to, n, m.shared_base[lane], i.text)
    given = np.full(len(lane), n)
    if len(i.operands) > 3:
        given = m.read_all(i.operands[3], U32)[lane].astype(np.int64)
    if not np.isin(given, (0, n)).all():
        raise NotImplementedError(f"a copy of part of a vector: {i.text}")
    some = given > 0
    source = np.ascontiguousarray(m.global_address(i.operands[1])[lane][some])
    if m.counters is not None and len(source):
        m.counters.note_global("load", source, n, lane[some])
        m.counters.note_shared(to, n, lane)
    data = np.zeros((len(lane), n), np.uint8)
    if len(source):
        data[some] = m.memory.load(source, n, i.text)
    m.shared.store(to, data)


def prefetch(m: Blocks, i: Instruction, mask: Mask) -> None:
    """Changes nothing, but what is asked for has to be there, and in whole pieces of 16 bytes."""
    lane = m.indices(mask)
    address = np.ascontiguousarray(m.global_address(i.operands[0])[lane])
    size = m.read_all(i.operands[1], U32)[lane].astype(np.int64)
    if (size % 16).any():
        raise AccessError(f"not a multiple of 16 bytes: {i.text}")
    pieces = size // 16
    which = np.repeat(np.arange(len(lane)), pieces)
    nth = np.arange(len(which)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    address = address[which] + (16 * nth).astype(np.uint64)
    m.memory.load(address, 16, i.text)
    if m.counters is not None and len(address):
        m.counters.note_global("prefetch", address, 16, lane[which])


@handles("ldmatrix")
def ldmatrix(m: Blocks, i: Instruction, mask: Mask) -> None:
    warps, registers = whole_warps(m, i, mask), parts_of(i.operands[0])
    address = m.full(m.shared_address(i.operands[1])).reshape(-1, 32)[warps]
    values = np.empty((len(warps), 32, len(registers)), np.uint32)
    for j in range(len(registers)):
        rows = m.shared.matrices(address[:, 8 * j : 8 * j + 8], i.text)
        rows = rows.transpose(0, 2, 1) if "trans" in i.op else rows
        values[..., j] = np.ascontiguousarray(rows).view(np.uint32).reshape(len(warps), 32)
    write_warps(m, i.operands[0], values, warps, mask)


@handles("stmatrix")
def stmatrix(m: Blocks, i: Instruction, mask: Mask) -> None:
    warps = whole_warps(m, i, mask)
    address = m.full(m.shared_address(i.operands[0])).reshape(-1, 32)[warps]
    for j, register in enumerate(parts_of(i.operands[1])):
        rows = address[:, 8 * j : 8 * j + 8]
        v = np.ascontiguousarray(m.read_all(register, B32).reshape(-1, 32)[warps])
        v = v.view(np.uint16).reshape(len(warps), 8, 8)
        v = v.transpose(0, 2, 1) if "trans" in i.op else v
        m.shared.bytes.view(np.uint16)[(rows // 2)[:, :, None] + np.arange(8)] = v


@handles("atom", "red")
def atomic(m: Blocks, i: Instruction, mask: Mask) -> None:
    """Lanes one after the other."""
    if "shared" not in i.op and ("acq_rel" in i.op or "release" in i.op):
        m.release(m.indices(mask), i.text)
    t, returns, shared = type_of(i.op[-1]), i.op[0] == "atom", "shared" in i.op
    memory, first = i.operands[1 if returns else 0], 2 if returns else 1
    nbytes = t.width // 8
    address = m.full(m.shared_address(memory) if shared else m.global_address(memory))
    value = m.read_all(i.operands[first], t)
    old = np.zeros(m.lanes, value.dtype)
    name = next(n for n in i.op if n in ATOMIC or n == "cas")
    for lane in m.indices(mask):
        at = address[lane : lane + 1]
        raw = m.shared.load(at, nbytes) if shared else m.memory.load(at, nbytes, i.text)
        bits = np.ascontiguousarray(raw).view(UNSIGNED[t.width]).reshape(-1)
        now = bf16_to_f32(bits) if t.kind == "B" else bits.view(value.dtype)
        old[lane], x = now[0], value[lane : lane + 1]
        if name == "cas":
            swap = m.read_all(i.operands[first + 1], t)[lane : lane + 1]
            new = np.where(now == x, swap, now)
        else:
            new = ATOMIC[name](now, x)
        new = f32_to_bf16(new) if t.kind == "B" else new
        data = np.ascontiguousarray(new).view(np.uint8).reshape(1, nbytes)
        if shared:
            m.shared.store(at, data)
        else:
            m.memory.store(at, data, i.text)
    if returns:
        m.write(i.operands[0], old, t, mask)


ATOMIC = {
    "add": np.add, "min": np.minimum, "max": np.maximum, "exch": lambda _, new: new, **LOGIC,
}  # fmt: skip
