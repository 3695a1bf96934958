"""The checks themselves: number formats bit by bit, and that mistakes are found."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError

from dsv4_plugin.kernels.arrival import is_last
from dsv4_plugin.kernels.bits import (
    E4M3_UNIT,
    e4m3_decode,
    e4m3_encode,
    e4m3_scale,
)
from dsv4_plugin.quant.e4m3 import decode_e4m3, quantise_e4m3
from lab.kit import binary, mode
from lab.kit.order import seeded
from lab.kit.waits import LOAD, waits

interpreted = pytest.mark.skipif(not mode.INTERPRET, reason="the interpreter's checks")
emulated = pytest.mark.skipif(
    mode.INTERPRET or mode.DEVICE != "cpu", reason="the emulator's checks"
)


@triton.jit
def _codec(x_ptr, code_ptr, scale_ptr, back_ptr, N: tl.constexpr):
    """Quantise one block of N values and read it back."""
    at = tl.program_id(0) * N + tl.arange(0, N)
    x = tl.load(x_ptr + at)
    byte, inverse = e4m3_scale(tl.max(tl.abs(x)))
    code = e4m3_encode(x * inverse)
    tl.store(code_ptr + at, code)
    tl.store(scale_ptr + tl.program_id(0), byte.to(tl.uint8))
    tl.store(back_ptr + at, e4m3_decode(code) * E4M3_UNIT)


def test_e4m3_is_the_core_s(gpu):
    """Near ties of every code, subnormals, powers of two and 448 * 2^k, one step around each."""
    codes = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    ties = (codes[1:] + codes[:-1]) / 2
    exact = torch.cat([codes, ties])
    x = torch.cat([exact, torch.nextafter(exact, exact + 1), torch.nextafter(exact, exact - 1)])
    x = torch.cat([x, -x]).clamp(-448, 448)
    x = torch.nn.functional.pad(x, (0, -len(x) % 63)).view(-1, 63)
    top = torch.full((len(x), 1), 448.0)
    edges = torch.tensor([0.0, 1e-4, 9e-5, 448.0, 448.00003, 447.99997, 1.75, 1.7500001, 2.0**-100])
    blocks = torch.cat([torch.cat([x, top], 1), edges[:, None].expand(-1, 64)]).contiguous()
    n = len(blocks)
    code, back = torch.empty(n, 64, dtype=torch.uint8), torch.empty(n, 64)
    scale = torch.empty(n, dtype=torch.uint8)
    blocks, code, scale, back = (t.to(mode.DEVICE) for t in (blocks, code, scale, back))
    _codec[(n,)](blocks, code, scale, back, N=64)
    codes, scales = quantise_e4m3(blocks, 64)
    assert torch.equal(code, codes)
    assert torch.equal(scale[:, None], scales)
    assert torch.equal(back, decode_e4m3(codes, torch.ones_like(scales).float(), 64))


@triton.jit
def _copy(x_ptr, out_ptr, n, step, N: tl.constexpr, MASK: tl.constexpr, OTHER: tl.constexpr):
    at = tl.program_id(0) * step + tl.arange(0, N)
    x = tl.load(x_ptr + at, mask=at < n, other=0.0 if OTHER else None)
    tl.store(out_ptr + at, x, mask=at < (n if MASK else n + N))


def _run_copy(n=40, size=40, step=16, mask=True, other=True):
    x, out = torch.ones(n, device=mode.DEVICE), torch.zeros(size, device=mode.DEVICE)
    _copy[(3,)](x, out, n, step, N=16, MASK=mask, OTHER=other)
    return out


def test_a_right_kernel_passes(gpu):
    assert _run_copy().sum() == 40


def test_a_store_past_the_end_is_found(gpu):
    if mode.DEVICE != "cpu":
        pytest.skip("would be undefined")
    with pytest.raises((RuntimeError, InterpreterError), match="out of bounds"):
        _run_copy(mask=False)


@interpreted
def test_programs_that_overlap_are_found(gpu):
    with pytest.raises((RuntimeError, InterpreterError), match="race"):
        _run_copy(step=8)


@triton.jit
def _sum(x_ptr, part_ptr, out_ptr, counter, n, N: tl.constexpr, FAULT: tl.constexpr):
    """The last of n programs adds up what all have stored."""
    at = tl.arange(0, N)
    tl.store(part_ptr + tl.program_id(0) * N + at, tl.load(x_ptr + tl.program_id(0) * N + at))
    if FAULT != "no barrier":
        tl.debug_barrier()
    SEM: tl.constexpr = "relaxed" if FAULT == "relaxed" else "acq_rel"
    SCOPE: tl.constexpr = "cta" if FAULT == "scope" else "gpu"
    MODIFIER: tl.constexpr = "" if FAULT == "L1" else ".cg"
    before = tl.atomic_add(counter, 1, sem=SEM, scope=SCOPE)
    if before == (n - 2 if FAULT == "early" else n - 1):
        if FAULT != "no reset":
            tl.store(counter, 0)
        total = tl.zeros((N,), tl.float32)
        for i in range(n):
            total += tl.load(part_ptr + i * N + at, cache_modifier=MODIFIER)
        tl.store(out_ptr + at, total)


def _run_sum(fault, n=6, width=64):
    """Are both of two launches right?"""
    x = torch.arange(float(n * width), device=mode.DEVICE).view(n, width)
    counter = torch.zeros(1, dtype=torch.int32, device=mode.DEVICE)
    right = True
    for _ in range(2):
        part, out = torch.full_like(x, torch.nan), torch.full_like(x[0], torch.nan)
        _sum[(n,)](x, part, out, counter, n, N=width, FAULT=fault)
        right &= torch.equal(out, x.sum(0))
    return right


def test_a_sum_by_the_last_program(gpu):
    for seed in range(4):
        with seeded(seed):
            assert _run_sum("")


@pytest.mark.parametrize("fault", ["early", "no reset"])
def test_a_wrong_protocol_between_programs_is_found(gpu, fault):
    if mode.DEVICE != "cpu":
        pytest.skip("programs may come in the one order that hides it")
    for seed in range(4):
        with seeded(seed):
            try:
                assert not _run_sum(fault)
            except InterpreterError as e:
                assert "race" in str(e)  # noqa: PT017  (either way is right)


@interpreted
@pytest.mark.parametrize("fault", ["no barrier", "relaxed", "scope", "L1"])
def test_programs_that_atomics_do_not_order_are_found(gpu, fault):
    with pytest.raises(InterpreterError, match="race"):
        _run_sum(fault)


@emulated
def test_a_missing_barrier_is_found_in_compiled_code():
    """Triton puts one before a releasing atomic itself; here its code is run without."""
    from lab.kit.emulator import Emulator
    from lab.kit.targets import FakeGPU

    x, part, out = torch.ones(4, 64), torch.empty(4, 64), torch.empty(64)
    tensors = [x, part, out, torch.zeros(1, dtype=torch.int32)]
    with FakeGPU("sm80") as gpu:
        _sum[(4,)](*tensors, 4, N=64, FAULT="")
    (kernel, grid) = gpu.compiled()[0]
    values = [*(t.data_ptr() for t in tensors), 4]
    ptx = kernel.asm["ptx"]
    Emulator(ptx, 128, kernel.metadata.shared).launch(grid, values, tensors)
    assert torch.equal(out, x.sum(0))
    before, after = ptx.split("atom.global", 1)
    bare = "\n".join(line for line in before.splitlines() if "bar.sync" not in line)
    with pytest.raises(RuntimeError, match="no barrier"):
        Emulator(f"{bare} atom.global{after}", 128, kernel.metadata.shared).launch(
            grid, values, tensors
        )


@triton.jit
def _copy_by_the_last(x_ptr, part_ptr, out_ptr, counter, n, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(part_ptr + tl.program_id(0) * N + at, tl.load(x_ptr + tl.program_id(0) * N + at))
    if is_last(counter, n):
        tl.store(out_ptr + at, tl.load(part_ptr + at, cache_modifier=".cg"))


@emulated
@pytest.mark.parametrize("name", ["gfx942", "gfx950"])
def test_wavefronts_wait_for_their_stores_before_they_arrive(name):
    """By the compiled code: store, wait, barrier, release."""
    from lab.kit.targets import FakeGPU

    x, counter = torch.zeros(4, 256), torch.zeros(1, dtype=torch.int32)
    with FakeGPU(name) as gpu:
        _copy_by_the_last[(4,)](x, x.clone(), x[0].clone(), counter, 4, N=256)
    (kernel, _) = gpu.compiled()[0]
    before = kernel.asm["amdgcn"].split("atomic_add", 1)[0]
    after_store = before.rsplit("_store_", 1)[1]
    assert "vmcnt(0)" in after_store.split("s_barrier", 1)[0]


@interpreted
def test_a_load_without_other_is_poisoned(gpu):
    assert _run_copy(size=56, mask=False, other=False).isnan().any()


@triton.jit
def _count(x_ptr, out_ptr, n, N: tl.constexpr):
    counts = tl.zeros((N,), tl.int32)
    for start in range(0, n, N):
        x = tl.load(x_ptr + start + tl.arange(0, N))
        counts += tl.histogram(x, N, mask=x < N)
    tl.store(out_ptr + tl.arange(0, N), counts)


def test_threads_wait_at_a_barrier(gpu):
    """Those whose values are not counted are at the next one before the others."""
    x = torch.randint(0, 200, (512,), generator=torch.Generator().manual_seed(0)).int()
    expected = torch.bincount(x, minlength=200)[:128].int().to(mode.DEVICE)
    out = torch.empty_like(expected)
    _count[(1,)](x.to(mode.DEVICE), out, len(x), N=128)
    assert torch.equal(out, expected)


@triton.jit
def _product(a_ptr, b_ptr, c_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    at = i[:, None] * N + i[None, :]
    c = tl.dot(tl.load(a_ptr + at), tl.load(b_ptr + at))
    tl.store(c_ptr + at, c)


def test_a_bf16_product(gpu):
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(32, 32, generator=generator).bfloat16() for _ in range(2))
    c = torch.empty(32, 32)
    a, b, c = (t.to(mode.DEVICE) for t in (a, b, c))
    _product[(1,)](a, b, c, N=32)
    torch.testing.assert_close(c, a.float() @ b.float(), rtol=1e-5, atol=1e-5)


@emulated
def test_counters():
    from lab.kit.gpu import EmulatedGPU

    a, b, c = (torch.zeros(32, 32, dtype=t) for t in (torch.bfloat16, torch.bfloat16, torch.float))
    with EmulatedGPU("sm80", count=True) as gpu:
        _product[(1,)](a, b, c, N=32)
    _, _, counters = gpu.counted[0]
    assert counters.mma_flop == 2 * 32**3
    assert counters.distinct("load") == 2 * 2 * 32**2
    assert counters.distinct("load", [a]) == 2 * 32**2
    assert counters.distinct("store") == 4 * 32**2


def test_the_main_loop_is_the_inner_one_that_multiplies():
    names = ("MOV", "LDG.E", "HMMA.16816.F32.BF16", "IADD3", "BRA", "STG.E", "BRA", "FADD", "BRA")
    sass = code(names, {4: "0x20", 6: "0x10", 8: "0x70"})
    loops = binary._loops(sass)
    assert [len(loop) for loop in loops] == [3, 6, 2]
    assert binary._main(loops) == Counter(names[2:5])
    assert binary._main(loops[2:]) == Counter(names[7:])
    assert binary._main([]) == Counter()


def test_a_branch_back_into_a_loop_from_behind_the_end_closes_none():
    names = ("MOV", "UTCHMMA", "BRA", "LDG.E", "BRA", "STG.E", "EXIT", "SYNCS", "BRA", "BRA")
    sass = code(names, {2: "0x70", 4: "0x10", 8: "0x70", 9: "0x30"}, always=(6, 9))
    loops = binary._loops(sass)
    assert [[line.address // 16 for line in loop] for loop in loops] == [
        [1, 2, 3, 4, 7, 8, 9],
        [7, 8],
    ]
    assert binary._main(loops) == Counter(names[1:5] + names[7:])


def code(names, targets, always=()):
    """targets of branches, all of which but those `always` taken have a condition."""
    return [
        binary.Line(16 * i, name, f" {targets[i]};" if i in targets else "", guard)
        for i, name in enumerate(names)
        for guard in ["" if i in always else "@P0 "]
    ]


def test_multiply_adds_of_a_warp():
    """By the shapes in instructions' names; wgmma's are of four warps."""
    of_one = {"HMMA.16816.F32.BF16": 2, "QMMA.16832.F32.E4M3.E4M3": 1, "HMMA.1684.F32.TF32": 1}
    assert binary.multiply_adds(of_one) == 2 * 2048 + 4096 + 512
    assert binary.multiply_adds({"HGMMA.64x32x16.F32.BF16": 3, "FFMA": 7}) == 3 * 64 * 32 * 16 // 4


@pytest.mark.parametrize(
    ("code", "stops"),
    [
        ("LDG.E R4, [R2.64] | LDG.E R5, [R8.64] | FADD R6, R4, R5 | STG.E [R2.64], R6", 1),
        ("LDG.E R4, [R2.64] | IADD3 R8, R4, 1 | LDG.E R5, [R8.64] | FADD R6, R4, R5", 2),
        ("LDG.E.128 R4, [R2.64] | FADD R6, R7, R7 | FADD R6, R4, R4", 1),  # R7 is of the four
        ("STG.E [R4.64], R6 | FADD R6, R6, R4", 0),
    ],
)
def test_a_warp_stops_for_loads_whose_values_are_used(code, stops):
    lines = [binary.Line(16 * i, *line.split(" ", 1)) for i, line in enumerate(code.split(" | "))]
    found = waits(lines)
    assert found.stops == stops
    assert stops * LOAD < found.cycles < (stops + 0.1) * LOAD
