"""Triton's interpreter, made right for bf16 and fp8, and strict.

Stock TRITON_INTERPRET=1 computes with the bit patterns of bf16, truncates float32 to bf16 and
rounds fp8 wrongly, in silence. `apply` repairs that, and with strict=True every launch also

- must stay inside the tensors passed to it,
- finds NaN (or 0xA5) in masked-off lanes of loads without `other`,
- raises where two programs touch a byte that one of them writes and no atomic orders them (see
  `races`), or one store writes a byte twice,
- runs its programs in a random order.

Only in a process that interprets; call once, before the first launch.
"""

from __future__ import annotations

import dataclasses
import types
from typing import Any

import numpy as np
import torch
import triton.language as tl
import triton.runtime.interpreter as interp
from triton._C.libtriton import ir

from lab.kit import order
from lab.kit.races import History, Region

Builder = interp.InterpreterBuilder
Handle = interp.TensorHandle
F8 = {
    tl.float8e5: (torch.float8_e5m2, 57344.0),
    tl.float8e4nv: (torch.float8_e4m3fn, 448.0),
    tl.float8e4b8: (torch.float8_e4m3fnuz, 240.0),
    tl.float8e5b16: (torch.float8_e5m2fnuz, 57344.0),
}
SMALL = {tl.bfloat16, tl.float8e4b15, *F8}
ACQUIRES = (ir.MEM_SEMANTIC.ACQUIRE, ir.MEM_SEMANTIC.ACQUIRE_RELEASE)
RELEASES = (ir.MEM_SEMANTIC.RELEASE, ir.MEM_SEMANTIC.ACQUIRE_RELEASE)
POISON = {1: 0xA5, 2: 0x7FC1, 4: 0x7FC00001, 8: 0x7FF8000000000001}


def apply(strict: bool = False, shuffle: bool = False, overflow: bool = False) -> None:
    """shuffle: run programs in the order of `order`. overflow: raise where an int32 wraps."""
    _repair_conversions()
    _repair_arithmetic()
    _repair_reductions()
    _patch_once(overflow)
    if shuffle:
        _shuffle()
    if strict:
        _check_memory()


def _small(t: Any) -> bool:
    return t.scalar in SMALL


def _to_f32(data: np.ndarray, t: Any) -> np.ndarray:
    t = t.scalar
    raw = np.ascontiguousarray(data)
    if t == tl.bfloat16:
        return (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    if t in F8:
        return torch.from_numpy(raw.view(np.uint8).copy()).view(F8[t][0]).float().numpy()
    if t == tl.float8e4b15:  # a float16 with 3 bits of mantissa
        code = raw.view(np.uint8).astype(np.uint16)
        half = ((code & 0x80) << 8) | ((code & 0x7F) << 7)
        return half.view(np.float16).astype(np.float32)
    return data.astype(np.float32)


def _from_f32(value: np.ndarray, t: Any, rounding: Any = None) -> np.ndarray:
    """Storage bits; to nearest even, fp8 saturating as the hardware's conversion does."""
    t, value = t.scalar, np.ascontiguousarray(value, dtype=np.float32)
    if t == tl.bfloat16:
        if rounding == ir.ROUNDING_MODE.RTZ:
            cut = (value.view(np.uint32) >> 16).astype(np.uint16)
            return np.where(np.isnan(value), np.uint16(0x7FC0), cut)
        narrow = torch.from_numpy(value.copy()).to(torch.bfloat16)
        return narrow.view(torch.int16).numpy().view(np.uint16)
    if t in F8:
        dtype, largest = F8[t]
        bounded = np.where(np.isnan(value), value, np.clip(value, -largest, largest))
        narrow = torch.from_numpy(bounded.astype(np.float32)).to(dtype)
        return narrow.view(torch.uint8).numpy()
    return value.astype(interp._get_np_dtype(t))


def _convert(x: np.ndarray, source: Any, to: Any, rounding: Any = None) -> np.ndarray:
    source, to = source.scalar, to.scalar
    if source == tl.float64 and _small(to):
        x, source = x.astype(np.float32), tl.float32
    value = _to_f32(x, source) if _small(source) else x
    with np.errstate(all="ignore"):
        result = (
            _from_f32(value, to, rounding) if _small(to) else value.astype(interp._get_np_dtype(to))
        )
    return result.reshape(x.shape)


def _repair_conversions() -> None:
    def convert_float(x: np.ndarray, source: Any, to: Any, rounding: Any) -> np.ndarray:
        raw = np.ascontiguousarray(_convert(x, source, to, rounding))
        return raw.view(f"u{to.primitive_bitwidth // 8}").reshape(x.shape)

    def cast(self: Any, x: Any, to: Any) -> Any:
        return Handle(_convert(x.data, x.dtype, to), to.scalar)

    def fp_to_fp(self: Any, x: Any, to: Any, rounding: Any) -> Any:
        return Handle(_convert(x.data, x.dtype, to, rounding), to.scalar)

    interp._convert_float = convert_float
    Builder.cast_impl = cast
    Builder.create_fp_to_fp = fp_to_fp


def _repair_arithmetic() -> None:
    binary, unary = Builder.binary_op, Builder.unary_op
    fma, ternary = Builder.create_fma, Builder.ternary_op

    def wrap(value: np.ndarray, t: Any) -> Any:
        return Handle(_from_f32(value, t).reshape(value.shape), t.scalar)

    def binary_op(self: Any, a: Any, b: Any, op: Any) -> Any:
        if not _small(a.dtype):
            return binary(self, a, b, op)
        out = op(_to_f32(a.data, a.dtype), _to_f32(b.data, b.dtype))
        return Handle(out, tl.int1) if out.dtype == np.bool_ else wrap(out, a.dtype)

    def unary_op(self: Any, a: Any, op: Any) -> Any:
        if not _small(a.dtype):
            return unary(self, a, op)
        return wrap(op(_to_f32(a.data, a.dtype)), a.dtype)

    def create_fma(self: Any, a: Any, b: Any, c: Any) -> Any:
        if not _small(c.dtype):
            return fma(self, a, b, c)
        x, y, z = (_to_f32(v.data, v.dtype).astype(np.float64) for v in (a, b, c))
        return wrap((x * y + z).astype(np.float32), c.dtype)

    def ternary_op(self: Any, a: Any, b: Any, c: Any, op: Any) -> Any:
        if op is not np.clip or not _small(c.dtype):
            return ternary(self, a, b, c, op)
        return wrap(op(*(_to_f32(v.data, v.dtype) for v in (a, b, c))), c.dtype)

    def create_splat(self: Any, to: Any, x: Any) -> Any:
        """By the data's type: of a comparison's result the handle names the operands'."""
        return Handle(np.full(to.shape, x.data.reshape(-1)[0], x.data.dtype), x.dtype.scalar)

    Builder.binary_op, Builder.unary_op = binary_op, unary_op
    Builder.create_splat = create_splat
    Builder.create_fma, Builder.ternary_op, Builder.create_dot = create_fma, ternary_op, _dot


def _dot(self: Any, a: Any, b: Any, c: Any, precision: Any, _: Any) -> Any:
    """Operands of a tf32 product lose 13 bits, as in the tensor cores."""
    if c.data.dtype.kind in "iu" and not _small(c.dtype):
        product = np.matmul(a.data.astype(np.int32), b.data.astype(np.int32))
        return Handle(product + c.data, c.dtype.scalar)
    x, y = _to_f32(a.data, a.dtype), _to_f32(b.data, b.dtype)
    if a.dtype.scalar == tl.float32 and precision == ir.INPUT_PRECISION.TF32:
        x, y = (
            (np.ascontiguousarray(v, np.float32).view(np.uint32) & np.uint32(0xFFFFE000)).view(
                np.float32
            )
            for v in (x, y)
        )
    total = np.matmul(x, y) + _to_f32(c.data, c.dtype)
    return Handle(_convert(total, tl.float32, c.dtype), c.dtype.scalar)


def _repair_reductions() -> None:
    standard = tl.standard
    known = {
        standard._sum_combine: np.sum,
        standard._elementwise_max: np.nanmax,
        standard._elementwise_min: np.nanmin,
    }
    stock = interp.ReduceOps.apply_impl

    def reduce(self: Any, x: Any) -> Any:
        one = isinstance(x, tuple) and len(x) == 1 and _small(x[0].dtype)
        if not one or self.combine_fn not in known:
            return stock(self, x)
        t = x[0].dtype.scalar
        value = _to_f32(x[0].handle.data, t)
        out = np.asarray(known[self.combine_fn](value, axis=self.axis, keepdims=self.keep_dims))
        bits = _from_f32(out, t).reshape(out.shape or (1,))
        kind = tl.block_type(t, list(out.shape)) if out.shape else t
        return (tl.core.tensor(Handle(bits, t), kind),)

    interp.ReduceOps.apply_impl = reduce


def _patch_once(overflow: bool) -> None:
    """Device functions run under their caller's patched language: twice as fast."""
    builder = interp.interpreter_builder
    builder.options = dataclasses.replace(
        builder.options, sanitize_overflow=overflow, debug=overflow
    )
    stock = interp._patch_lang
    both = types.SimpleNamespace(__globals__={"tl": tl, "core": tl.core})
    interp._patch_lang = lambda fn: stock(both)
    interp.InterpretedFunction.__call__ = lambda self, *a, **k: self.rewrite()(*a, **k)


def _shuffle() -> None:
    stock = Builder.set_grid_idx

    def set_grid_idx(self: Any, x: int, y: int, z: int) -> None:
        grid = nx, ny, nz = self.grid_dim
        if getattr(self, "_order_of", None) != (grid, order.seed()):
            self._order_of = grid, order.seed()
            self._order = order.programs(nx * ny * nz)
        i = int(self._order[(x * ny + y) * nz + z])
        stock(self, i // (ny * nz), (i // nz) % ny, i % nz)

    Builder.set_grid_idx = set_grid_idx


_regions: list[Region] = []
_history = History()
"""Of the launch that runs."""


def _register(value: Any, seen: set[int]) -> None:
    if isinstance(value, tuple):
        for part in value:
            _register(part, seen)
    value = getattr(value, "base", value)
    if isinstance(value, torch.Tensor):
        storage = value.untyped_storage()
        low = storage.data_ptr()
        if low not in seen and storage.nbytes():
            seen.add(low)
            _regions.append(Region(low, low + storage.nbytes()))


def _enter(self: Any) -> None:
    _, ny, nz = self.grid_dim
    x, y, z = self.grid_idx
    _history.enter((x * ny + y) * nz + z)


def _check(self: Any, pointers: Any, mask: np.ndarray, kind: str, past_l1: bool = False) -> None:
    live = pointers.data[np.broadcast_to(mask, pointers.data.shape)]
    if live.size == 0:
        return
    _enter(self)
    nbytes = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
    left = np.ones(live.shape, bool)
    for region in _regions:
        inside = left & (live >= np.uint64(region.low))
        inside &= live + np.uint64(nbytes) <= np.uint64(region.high)
        if inside.any():
            left &= ~inside
            region.touch(live[inside], nbytes, kind, _history, past_l1)
    if left.any():
        raise RuntimeError(f"out of bounds: {int(left.sum())} of {live.size} lanes of a {kind}")
    _history.stored |= kind == "store"


def _check_memory() -> None:
    start = interp.GridExecutor._init_args_hst
    load, store = Builder.create_masked_load, Builder.create_masked_store
    rmw = Builder.create_atomic_rmw

    def init_args(self: Any, args: Any, kwargs: Any) -> Any:
        a, k = start(self, args, kwargs)
        global _history
        _regions.clear()
        _history = History()
        seen: set[int] = set()
        for value in [*a, *k.values()]:
            _register(value, seen)
        return a, k

    def create_load(self: Any, pointers: Any, mask: Any, other: Any, policy: Any, *a: Any) -> Any:
        _check(self, pointers, mask.data, "load", policy == "cg")
        result = load(self, pointers, mask, other, policy, *a)
        on = np.broadcast_to(mask.data, result.data.shape)
        if other is not None or on.all() or result.data.dtype == np.bool_:
            return result
        data = result.data.copy()
        data.view(f"u{data.itemsize}")[~on] = POISON[data.itemsize]
        return Handle(data, result.dtype)

    def create_store(self: Any, pointers: Any, value: Any, mask: Any, *a: Any, **k: Any) -> Any:
        _check(self, pointers, mask.data, "store")
        return store(self, pointers, value, mask, *a, **k)

    def create_rmw(
        self: Any, op: Any, pointer: Any, value: Any, mask: Any, sem: Any, scope: Any
    ) -> Any:
        _enter(self)
        wide = scope != ir.MEM_SYNC_SCOPE.CTA
        at = pointer.data[np.broadcast_to(mask.data, pointer.data.shape)].tolist() if wide else []
        if sem in ACQUIRES:
            _history.acquire(at)
        _check(self, pointer, mask.data, "atomic")
        if sem in RELEASES:
            _history.release(at)
        _history.cut()
        return rmw(self, op, pointer, value, mask, sem, scope)

    def create_barrier(self: Any) -> None:
        _history.stored = False

    interp.GridExecutor._init_args_hst = init_args
    Builder.create_masked_load, Builder.create_masked_store = create_load, create_store
    Builder.create_atomic_rmw, Builder.create_barrier = create_rmw, create_barrier
    Builder.get_cache_policy = lambda self, modifier, eviction: modifier
