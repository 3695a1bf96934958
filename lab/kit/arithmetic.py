"""PTX instructions on registers: integers, floats, bits, conversions."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from lab.kit.emulator import (
    B32,
    FLOAT,
    PRED,
    SIGNED,
    U32,
    UNSIGNED,
    Array,
    Blocks,
    Mask,
    bf16_to_f32,
    f32_to_bf16,
    handles,
    int_type,
    parts_of,
)
from lab.kit.ptx import Immediate, Instruction, Type, Vector, type_of

F8 = {"e4m3x2": (torch.float8_e4m3fn, 448.0), "e5m2x2": (torch.float8_e5m2, 57344.0)}
ROUND = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
COMPARE = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal,
    "gt": np.greater, "ge": np.greater_equal,
}  # fmt: skip
UNSIGNED_COMPARE = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}
LOGIC = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}
FUNCTION: dict[str, Callable[[Array], Array]] = {
    "ex2": np.exp2, "lg2": np.log2, "rsqrt": lambda v: 1 / np.sqrt(v), "sqrt": np.sqrt,
    "rcp": lambda v: 1 / v, "sin": np.sin, "cos": np.cos, "tanh": np.tanh,
}  # fmt: skip


@handles("bar", "barrier")
def barrier(m: Blocks, i: Instruction, mask: Mask) -> None:
    """Lock step needs none; noted for `Blocks.release`."""
    if "warp" not in i.op:
        m.stored[m.indices(mask)] = False


@handles("membar", "fence", "griddepcontrol", "prefetch", "nanosleep")
def nothing(m: Blocks, i: Instruction, mask: Mask) -> None:
    """Lock step needs no synchronisation."""


@handles("mov")
def mov(m: Blocks, i: Instruction, mask: Mask) -> None:
    to, source = i.operands
    t = PRED if i.op[-1] == "pred" else Type("b", type_of(i.op[-1]).width)
    if isinstance(to, Vector):
        width = t.width // len(to.parts)
        value = m.read(source, t)
        for j, part in enumerate(to.parts):
            piece = (value >> UNSIGNED[t.width](j * width)).astype(UNSIGNED[width])
            m.write(part, piece, Type("b", width), mask)
    elif isinstance(source, Vector):
        width = t.width // len(source.parts)
        big = UNSIGNED[t.width]
        value = big(0)
        for j, part in enumerate(source.parts):
            value = value | (m.read(part, Type("b", width)).astype(big) << big(j * width))
        m.write(to, value, t, mask)
    else:
        m.write(to, m.read(source, t), t, mask)


@handles("cvta")
def cvta(m: Blocks, i: Instruction, mask: Mask) -> None:
    m.write(i.operands[0], m.read(i.operands[1], Type("u", 64)), Type("u", 64), mask)


@handles("setp")
def setp(m: Blocks, i: Instruction, mask: Mask) -> None:
    t, relation = type_of(i.op[-1]), i.op[1]
    x, y = m.read(i.operands[1], t), m.read(i.operands[2], t)
    if relation in ("nan", "num"):
        either = np.isnan(x) | np.isnan(y)
        result = either if relation == "nan" else ~either
    else:
        result = COMPARE[UNSIGNED_COMPARE.get(relation, relation[:2])](x, y)
        if t.kind in "fB":
            either = np.isnan(x) | np.isnan(y)
            unordered = len(relation) == 3 and relation.endswith("u")
            result = result | either if unordered else result & ~either
    if len(i.op) > 3 and i.op[2] in LOGIC:
        result = LOGIC[i.op[2]](result, m.read(i.operands[3], PRED))
    m.write(i.operands[0], result, PRED, mask)


@handles("selp")
def selp(m: Blocks, i: Instruction, mask: Mask) -> None:
    t = Type("b", type_of(i.op[-1]).width)
    to, a, b, choice = i.operands
    m.write(to, np.where(m.read(choice, PRED), m.read(a, t), m.read(b, t)), t, mask)


@handles("and", "or", "xor", "not")
def logic(m: Blocks, i: Instruction, mask: Mask) -> None:
    t = type_of(i.op[-1])
    x = m.read(i.operands[1], t)
    if i.op[0] == "not":
        m.write(i.operands[0], ~x, t, mask)
    else:
        m.write(i.operands[0], LOGIC[i.op[0]](x, m.read(i.operands[2], t)), t, mask)


@handles("shl", "shr")
def shift(m: Blocks, i: Instruction, mask: Mask) -> None:
    t = type_of(i.op[-1])
    x, n = m.read(i.operands[1], t), m.read(i.operands[2], U32)
    capped = np.minimum(n, t.width - 1).astype(x.dtype)
    moved = x << capped if i.op[0] == "shl" else x >> capped
    if i.op[0] == "shl" or t.kind != "s":
        moved = np.where(n >= t.width, x.dtype.type(0), moved)
    m.write(i.operands[0], moved, t, mask)


@handles("neg", "abs")
def sign(m: Blocks, i: Instruction, mask: Mask) -> None:
    t = type_of(i.op[-1])
    x = m.read(i.operands[1], t)
    m.write(i.operands[0], -x if i.op[0] == "neg" else np.abs(x), t, mask)


@handles(*FUNCTION)
def function(m: Blocks, i: Instruction, mask: Mask) -> None:
    t = type_of(i.op[-1])
    x = m.read(i.operands[1], t).astype(np.float64)
    m.write(i.operands[0], FUNCTION[i.op[0]](x).astype(np.float32), t, mask)


@handles("add", "sub", "mul", "mad", "fma", "min", "max", "div", "rem")
def arithmetic(m: Blocks, i: Instruction, mask: Mask) -> None:
    if i.op[-1].endswith("x2"):
        packed(m, i, mask)
        return
    if i.op[-2] == "f32":
        mixed(m, i, mask)
        return
    t, wide = type_of(i.op[-1]), "wide" in i.op
    double = Type(t.kind, 2 * t.width)
    result_type = double if wide else t
    x, y = m.read(i.operands[1], t), m.read(i.operands[2], t)
    if t.kind in "us" and (wide or "hi" in i.op):
        x, y = x.astype(int_type(double)), y.astype(int_type(double))
    z = m.read(i.operands[3], result_type) if len(i.operands) > 3 else None
    v = _float(i.op[0], x, y, z) if t.kind in "fB" else _integer(i.op[0], x, y, z, t.kind)
    if t.kind in "us" and "hi" in i.op:
        v = (v >> v.dtype.type(t.width)).astype(int_type(t))
    if "sat" in i.op and t.kind == "f":
        v = np.clip(v, 0, 1)
    m.write(i.operands[0], v, result_type, mask)


def mixed(m: Blocks, i: Instruction, mask: Mask) -> None:
    """Narrow factors, or a narrow first term, and float32 for the rest (from sm_100 on)."""
    narrow, wide = type_of(i.op[-1]), Type("f", 32)
    sources = i.operands[1:]
    kinds = [narrow] * (len(sources) - 1) + [wide]
    values = [m.read(o, t).astype(np.float32) for o, t in zip(sources, kinds, strict=True)]
    result = _float(i.op[0], values[0], values[1], values[2] if len(values) > 2 else None)
    m.write(i.operands[0], result, wide, mask)


def _float(name: str, x: Array, y: Array, z: Array | None) -> Array:
    if name in ("fma", "mad"):
        assert z is not None
        return (x.astype(np.float64) * y + z).astype(x.dtype)
    if z is not None:  # max and min of three, from sm_100 on
        return _float(name, _float(name, x, y, None), z, None)
    return {
        "add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide,
        "min": np.fmin, "max": np.fmax,
    }[name](x, y)  # fmt: skip


def _integer(name: str, x: Array, y: Array, z: Array | None, kind: str) -> Array:
    if name in ("mad", "fma"):
        assert z is not None
        return x * y + z
    assert z is None, name
    if name not in ("div", "rem"):
        table = {
            "add": np.add, "sub": np.subtract, "mul": np.multiply,
            "min": np.minimum, "max": np.maximum,
        }  # fmt: skip
        return table[name](x, y)
    y = np.where(y == 0, y.dtype.type(1), y)
    quotient = np.abs(x) // np.abs(y) if kind == "s" else x // y
    if kind == "s":
        quotient = np.where((x < 0) != (y < 0), -quotient, quotient)
    return quotient if name == "div" else x - quotient * y


def packed(m: Blocks, i: Instruction, mask: Mask) -> None:
    """Two values side by side."""
    kind = i.op[-1]
    if kind == "f32x2":
        values = [
            np.ascontiguousarray(m.read_all(o, Type("b", 64))).view(np.float32)
            for o in i.operands[1:]
        ]
        result = _float(i.op[0], values[0], values[1], values[2] if len(values) > 2 else None)
        bits = np.ascontiguousarray(result).view(np.uint64)
        m.write(i.operands[0], bits, Type("b", 64), mask)
        return
    if kind in ("u16x2", "s16x2"):
        half = np.uint16 if kind[0] == "u" else np.int16
        x, y = (np.ascontiguousarray(m.read_all(o, B32)).view(half) for o in i.operands[1:])
        m.write(i.operands[0], _integer(i.op[0], x, y, None, kind[0]).view(np.uint32), B32, mask)
        return
    brain = kind == "bf16x2"
    halves = []
    for o in i.operands[1:]:
        v = m.read_all(o, B32)
        low, high = (
            (v & np.uint32(0xFFFF)).astype(np.uint16),
            (v >> np.uint32(16)).astype(np.uint16),
        )
        halves.append(
            [
                bf16_to_f32(h) if brain else h.view(np.float16).astype(np.float32)
                for h in (low, high)
            ]
        )
    out = []
    for j in range(2):
        args = [h[j] for h in halves]
        r = _float(i.op[0], args[0], args[1], args[2] if len(args) > 2 else None)
        out.append(_narrow(r, "bf16" if brain else "f16").astype(np.uint32))
    m.write(i.operands[0], out[0] | (out[1] << np.uint32(16)), B32, mask)


def _narrow(x: Array, kind: str) -> Array:
    return f32_to_bf16(x) if kind == "bf16" else x.astype(np.float16).view(np.uint16)


@handles("cvt")
def cvt(m: Blocks, i: Instruction, mask: Mask) -> None:
    to, source = i.op[-2], i.op[-1]
    if to in ("bf16x2", "f16x2") and source == "f32":
        high, low = (_narrow(m.read_all(o, Type("f", 32)), to[:-2]) for o in i.operands[1:3])
        bits = (high.astype(np.uint32) << np.uint32(16)) | low
        m.write(i.operands[0], bits, B32, mask)
    elif to in F8:
        _cvt_to_f8(m, i, mask)
    elif source in F8:
        x = np.ascontiguousarray(m.read_all(i.operands[1], Type("b", 16)))
        half = torch.from_numpy(x.view(np.uint8).copy()).view(F8[source][0]).to(torch.float16)
        m.write(i.operands[0], half.view(torch.int16).numpy().view(np.uint32), B32, mask)
    else:
        _cvt_scalar(m, i, mask)


def _cvt_to_f8(m: Blocks, i: Instruction, mask: Mask) -> None:
    dtype, largest = F8[i.op[-2]]

    def code(v: Array) -> Array:
        v = np.where(np.isnan(v), v, np.clip(v, -largest, largest)).astype(np.float32)
        return torch.from_numpy(np.array(v)).to(dtype).view(torch.uint8).numpy()

    if i.op[-1] == "f32":
        high, low = (code(m.read_all(o, Type("f", 32))) for o in i.operands[1:3])
        bits = (high.astype(np.uint16) << np.uint16(8)) | low
    else:
        x = np.ascontiguousarray(m.read_all(i.operands[1], B32)).view(np.float16)
        bits = code(x.astype(np.float32)).view(np.uint16)
    m.write(i.operands[0], bits, Type("b", 16), mask)


def _cvt_scalar(m: Blocks, i: Instruction, mask: Mask) -> None:
    to, source = type_of(i.op[-2]), type_of(i.op[-1])
    x = m.read(i.operands[1], source)
    rounding = next((ROUND[q] for q in i.op if q in ROUND), None)
    if source.kind in "fB" and to.kind in "su":
        assert rounding is not None
        info = np.iinfo(int_type(to))
        r = rounding(x.astype(np.float64))
        v = np.where(np.isnan(r), 0, np.clip(r, info.min, info.max))
        big = SIGNED[64] if to.kind == "s" else UNSIGNED[64]
        m.write(i.operands[0], v.astype(big).astype(int_type(to)), to, mask)
    elif to.kind in "fB":
        x = rounding(x) if rounding is not None else x
        dtype = np.float32 if to.kind == "B" else FLOAT[to.width]
        m.write(i.operands[0], x.astype(dtype), to, mask)
    else:
        m.write(i.operands[0], x.astype(int_type(to)), to, mask)


@handles("prmt")
def prmt(m: Blocks, i: Instruction, mask: Mask) -> None:
    low, high, control = (m.read(o, B32).astype(np.uint64) for o in i.operands[1:4])
    both, value = low | (high << np.uint64(32)), np.uint64(0)
    for j in range(4):
        choice = (control >> np.uint64(4 * j)) & np.uint64(15)
        byte = (both >> ((choice & np.uint64(7)) * np.uint64(8))) & np.uint64(255)
        spread = np.where(byte & np.uint64(128), np.uint64(255), np.uint64(0))
        byte = np.where(choice & np.uint64(8), spread, byte)
        value = value | (byte << np.uint64(8 * j))
    m.write(i.operands[0], value.astype(np.uint32), B32, mask)


@handles("bfe")
def bfe(m: Blocks, i: Instruction, mask: Mask) -> None:
    t = type_of(i.op[-1])
    x = m.read(i.operands[1], Type("u", t.width))
    one, most = x.dtype.type(1), x.dtype.type(t.width - 1)
    start, length = (m.read(o, U32).astype(x.dtype) for o in i.operands[2:4])
    field = (one << np.minimum(length, most)) - one
    v = (x >> np.minimum(start, most)) & field
    if t.kind == "s":
        negative = ((v >> (length - one)) & one).astype(bool)
        v = np.where(negative, v | ~((one << length) - one), v)
    m.write(i.operands[0], v, Type("u", t.width), mask)


@handles("bfi")
def bfi(m: Blocks, i: Instruction, mask: Mask) -> None:
    t = type_of(i.op[-1])
    word = UNSIGNED[t.width]
    x, y = (m.read(o, Type("u", t.width)) for o in i.operands[1:3])
    start, length = (m.read(o, U32).astype(word) for o in i.operands[3:5])
    field = ((word(1) << length) - word(1)) << start
    m.write(i.operands[0], ((x << start) & field) | (y & ~field), t, mask)


@handles("shf")
def shf(m: Blocks, i: Instruction, mask: Mask) -> None:
    low, high, n = (m.read(o, U32).astype(np.uint64) for o in i.operands[1:4])
    both = low | (high << np.uint64(32))
    n = np.minimum(n, np.uint64(32)) if "clamp" in i.op else n & np.uint64(31)
    v = (both << n) >> np.uint64(32) if i.op[1] == "l" else both >> n
    m.write(i.operands[0], v.astype(np.uint32), B32, mask)


@handles("lop3")
def lop3(m: Blocks, i: Instruction, mask: Mask) -> None:
    x, y, z = (m.read(o, U32) for o in i.operands[1:4])
    table = i.operands[4]
    assert isinstance(table, Immediate)
    v = np.uint32(0)
    for j in range(8):
        if table.bits >> j & 1:
            v = v | ((x if j & 4 else ~x) & (y if j & 2 else ~y) & (z if j & 1 else ~z))
    m.write(i.operands[0], v, B32, mask)


@handles("popc", "clz", "brev")
def count_bits(m: Blocks, i: Instruction, mask: Mask) -> None:
    width = type_of(i.op[-1]).width
    x = m.read_all(i.operands[1], Type("u", width))
    places = np.arange(width, dtype=x.dtype)
    bits = ((x[:, None] >> places) & x.dtype.type(1)).astype(UNSIGNED[width])
    if i.op[0] == "popc":
        v = bits.sum(1)
    elif i.op[0] == "clz":
        v = np.where(bits.any(1), np.argmax(bits[:, ::-1], 1), width)
    else:
        v = (bits[:, ::-1] << places).sum(1)
    result = Type("b", width if i.op[0] == "brev" else 32)
    m.write(i.operands[0], v.astype(UNSIGNED[result.width]), result, mask)


@handles("shfl")
def shfl(m: Blocks, i: Instruction, mask: Mask) -> None:
    to, source, amount, control = i.operands[:4]
    assert isinstance(control, Immediate)
    x, n = m.read_all(source, B32), m.read(amount, U32).astype(np.int64)
    lane = m.lane % 32
    segment, limit = (control.bits >> 8) & 31, control.bits & 31
    low = lane & segment
    high = low | (limit & ~segment)
    mode = i.op[2]
    other = {
        "bfly": lambda: lane ^ n, "idx": lambda: low | (n & ~segment & 31),
        "up": lambda: lane - n, "down": lambda: lane + n,
    }[mode]()  # fmt: skip
    inside = other >= low if mode == "up" else other <= high
    m.write(to, x[m.warp_start + np.where(inside, other, lane)], B32, mask)


@handles("vote")
def vote(m: Blocks, i: Instruction, mask: Mask) -> None:
    on = m.read_all(i.operands[1], PRED)
    warps = (on if mask is None else on & mask).reshape(-1, 32)
    if "ballot" in i.op:
        places = np.arange(32, dtype=np.uint64)
        bits = (warps.astype(np.uint64) << places).sum(1).astype(np.uint32)
        m.write(i.operands[0], np.repeat(bits, 32), B32, mask)
    else:
        result = warps.all(1) if "all" in i.op else warps.any(1)
        m.write(i.operands[0], np.repeat(result, 32), PRED, mask)


@handles("redux")
def redux(m: Blocks, i: Instruction, mask: Mask) -> None:
    t = type_of(i.op[-1])
    combine = {"add": np.add, "min": np.minimum, "max": np.maximum, **LOGIC}[i.op[2]]
    warps = m.read_all(i.operands[1], t).reshape(-1, 32)
    m.write(i.operands[0], np.repeat(combine.reduce(warps, axis=1), 32), t, mask)


def fragments(m: Blocks, o: object, warps: Array) -> Array:
    """Registers of a matrix operand: uint32 [warps, 32, registers]."""
    assert isinstance(o, Vector)
    rows = [m.read_all(r, B32).reshape(-1, 32)[warps] for r in o.parts]
    return np.stack(rows, -1)


def _unpack(bits: Array, kind: str) -> Array:
    bits = np.ascontiguousarray(bits)
    if kind == "bf16":
        return bf16_to_f32(bits.view(np.uint16))
    if kind == "f16":
        return bits.view(np.float16).astype(np.float32)
    if kind == "tf32":
        return (bits & np.uint32(0xFFFFE000)).view(np.float32)
    if kind == "s8":
        return bits.view(np.int8).astype(np.float32)
    dtype = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}[kind]
    return torch.from_numpy(bits.view(np.uint8).copy()).view(dtype).float().numpy()


PER_REGISTER = {"bf16": 2, "f16": 2, "tf32": 1, "s8": 4, "e4m3": 4, "e5m2": 4}


@handles("mma")
def mma(m: Blocks, i: Instruction, mask: Mask) -> None:
    """16 x 8 x K products; fragments as the PTX manual lays them out over a warp's lanes."""
    shape, kinds = i.op[3], [x for x in i.op[6:] if x != "satfinite"]
    k = int(shape.removeprefix("m16n8k"))
    per = PER_REGISTER[kinds[1]]
    if k != 8 * per:
        raise NotImplementedError(i.text)
    warps = whole_warps(m, i, mask)
    n = len(warps)
    if m.counters is not None:
        m.counters.mma_flop += 2 * 16 * 8 * k * n
    a, b, c = (fragments(m, o, warps) for o in i.operands[1:4])
    a = _unpack(a, kinds[1]).reshape(n, 8, 4, 2, 2, per).transpose(0, 4, 1, 3, 2, 5)
    b = _unpack(b, kinds[2]).reshape(n, 8, 4, 2, per).transpose(0, 3, 2, 4, 1)
    total = c.view(np.float32 if kinds[0] == "f32" else np.int32)
    total = total.reshape(n, 8, 4, 2, 2).transpose(0, 3, 1, 2, 4).reshape(n, 16, 8)
    product = np.matmul(a.reshape(n, 16, k), b.reshape(n, k, 8)).astype(total.dtype) + total
    out = np.ascontiguousarray(product.reshape(n, 2, 8, 4, 2).transpose(0, 2, 3, 1, 4))
    write_warps(m, i.operands[0], out.reshape(n, 32, 4).view(np.uint32), warps, mask)


def whole_warps(m: Blocks, i: Instruction, mask: Mask) -> Array:
    """The warps that execute i; a matrix instruction in half a warp is an error."""
    if mask is None:
        return np.arange(m.lanes // 32)
    by_warp = mask.reshape(-1, 32)
    if (by_warp.any(1) != by_warp.all(1)).any():
        raise RuntimeError(f"a diverged warp at {i.text}")
    return np.nonzero(by_warp[:, 0])[0]


def write_warps(m: Blocks, o: object, values: Array, warps: Array, mask: Mask) -> None:
    """values uint32 [warps, 32, registers] into a vector of registers."""
    for j, register in enumerate(parts_of(o)):  # type: ignore[arg-type]
        full = np.zeros((m.lanes // 32, 32), np.uint32)
        full[warps] = values[..., j]
        m.write(register, full.reshape(-1), B32, mask)
