"""Launches that come while the one before still runs: no program touches memory that a launch
writes before it has waited. Until then it may ask for its weights, and for nothing else."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import triton
from torch import Tensor

from dsv4_plugin.kernels import arrival, programmatic
from dsv4_plugin.kernels.gate import kernel as gate
from dsv4_plugin.kernels.linear import kernel as linear
from dsv4_plugin.kernels.packed import FP8Matrix, Int4Matrix
from dsv4_plugin.kernels.packed import fp8 as by_block
from dsv4_plugin.kernels.packed import kernel as by_group
from dsv4_plugin.kernels.programmatic import follow, prefetch
from dsv4_plugin.kernels.streams import Mixer
from dsv4_plugin.kernels.streams import kernel as streams
from lab.kernels import production
from lab.kit import mode
from lab.kit.gpu import EmulatedGPU, _stop_at_ptx
from lab.kit.memory import AccessError, Counters
from lab.kit.targets import FakeGPU
from lab.paths import ROOT

compiles = pytest.mark.skipif(
    mode.INTERPRET or "sm80" not in mode.NAMES, reason="compiles, once per run of all modes"
)
PREFETCHING = {"fp8_product", "float32_product", "mix_part", "int4_product"}
"""Kernels that ask for weights."""
SHORT = (
    "step metadata", "router by hash", "streams between stages", "latent norm, Pro, rounded",
    "int4 linear, decode", "SWA decode, 64 heads",
)  # fmt: skip
ACCESS = re.compile(r"^\s*(@!?%?\w+\s+)?(ld|st|atom|red|cp|prefetch)\.[\w.:]*(global|bulk)", re.M)


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(programmatic, "PROGRAMMATIC", {"any": True})


@pytest.fixture
def to_ptx(monkeypatch: pytest.MonkeyPatch) -> None:
    """Machine code is not made."""
    monkeypatch.setattr(triton.knobs.runtime, "add_stages_inspection_hook", _stop_at_ptx)


def ptx_of(name: str, case: str) -> dict[str, str]:
    """By kernel."""
    with FakeGPU(name) as gpu:
        production.CASES[case]()
    return {k.name: k.asm["ptx"] for k, _ in gpu.compiled()}


def check_order(kernel: str, ptx: str) -> None:
    """Before the wait memory is not touched; weights are asked for there alone."""
    before, after = ptx.split("griddepcontrol.wait")
    accesses = [[m[0] for m in ACCESS.finditer(text)] for text in (before, after)]
    asked = [["bulk.prefetch" in access for access in part] for part in accesses]
    assert all(asked[0]), (kernel, accesses[0])
    assert bool(asked[0]) == (kernel in PREFETCHING), kernel
    assert accesses[1], kernel
    assert not any(asked[1]), kernel


@compiles
@pytest.mark.parametrize("name", ["sm90", "sm100", "sm120"])
@pytest.mark.parametrize("case", SHORT)
def test_programs_wait_before_they_touch_memory(on, name, case):
    """And let others come before that. (With machine code.)"""
    for kernel, ptx in ptx_of(name, case).items():
        check_order(kernel, ptx)
        assert ptx.count("griddepcontrol.launch_dependents") == 1
        assert ptx.index("griddepcontrol.launch_dependents") < ptx.index("griddepcontrol.wait")


@compiles
@pytest.mark.thorough
@pytest.mark.parametrize("case", production.CASES)
def test_whatever_is_launched_waits(on, to_ptx, case):
    for kernel, ptx in ptx_of("sm90", case).items():
        check_order(kernel, ptx)


@compiles
@pytest.mark.parametrize("name", ["sm80", "sm86", "sm90", "sm120"])
@pytest.mark.parametrize("case", ["router by hash", "int4 linear, decode"])
def test_launches_are_ordinary_until_the_table_says_so(to_ptx, name, case):
    for ptx in ptx_of(name, case).values():
        assert "griddepcontrol" not in ptx
        assert "prefetch" not in ptx


def test_every_kernel_follows():
    """What is launched calls `follow`, and only that calls it: first, or behind a prefetch."""
    files = (ROOT / "dsv4_plugin/kernels").rglob("*.py")
    nodes = [n for path in files for n in ast.walk(ast.parse(path.read_text()))]
    launched = {
        n.func.value.id
        for n in nodes
        if isinstance(n, ast.Call)
        and isinstance(n.func, ast.Subscript)
        and isinstance(n.func.value, ast.Name)
    }
    following = set()
    for f in (n for n in nodes if isinstance(n, ast.FunctionDef)):
        if any(ast.unparse(d).startswith("kernel(") for d in f.decorator_list):
            following.add(f.name)
            body = [ast.unparse(s) for s in f.body[1 if ast.get_docstring(f) else 0 :]]
            assert "\n".join(body).count("follow()") == 1, f.name
            head = "\n".join(body[: body.index("follow()")])
            assert ("prefetch(" in head) == (f.name in PREFETCHING) == bool(head), f.name
            assert not re.search(r"return|tl\.(load|store|atomic)", head), f.name
        else:
            assert "follow()" not in ast.unparse(f), f.name
    assert launched == following


@pytest.mark.skipif(mode.INTERPRET, reason="launches nothing")
@pytest.mark.parametrize("name", [n for n in mode.NAMES if n == "sm80"] or mode.NAMES)
def test_results_are_the_same(on, monkeypatch, name):
    """On sm_90, where the emulator takes such instructions as they come: one launch at a time."""
    generator = torch.Generator().manual_seed(0)
    logits, bias = torch.randn(5, 40, generator=generator), torch.randn(40, generator=generator)
    ids, position = torch.zeros(5, dtype=torch.int64), torch.arange(5, dtype=torch.int32)
    given = [t.to(mode.DEVICE) for t in (logits, bias, ids, position)]

    def routed() -> tuple[torch.Tensor, torch.Tensor]:
        logits, bias, ids, position = given
        with mode.gpu("sm90" if name == "sm80" else name):
            return gate.gate(logits, 6, 1.5, bias, None, ids, position)

    found = routed()
    monkeypatch.setattr(programmatic, "PROGRAMMATIC", {"any": False})
    for a, b in zip(found, routed(), strict=True):
        assert torch.equal(a, b)


@dataclass
class Product:
    """What came out of a kernel that asks for the weights it reads ahead."""

    kernel: str
    weights: tuple[Tensor, ...]
    out: object


def numbers(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def fp8_matrix(n: int, k: int, rounded: bool, height: int = 128) -> FP8Matrix:
    codes = (numbers(n, k) * 40 + 60).clamp(0, 0x70).to(torch.uint8)
    scale = numbers(-(-n // height), k // 128).abs()
    return by_block.arranged(FP8Matrix(codes, scale, height), rounded)


def fp8(rows: int, n: int, k: int, rounded: bool) -> Product:
    x, matrix = numbers(rows, k).bfloat16(), fp8_matrix(n, k, rounded)
    out = by_block.product(by_block.round_rows(x) if rounded else x, matrix)
    return Product("fp8_product", (matrix.codes, matrix.scale), out)


def gated(rows: int, n: int, k: int) -> Product:
    x, matrix = numbers(rows, k).bfloat16(), fp8_matrix(2 * n, k, rounded=True)
    out = by_block.gated_product(by_block.round_rows(x), matrix, 1.0, False)
    return Product("fp8_product", (matrix.codes, matrix.scale), out)


def grouped(rows: int, groups: int, n: int, k: int) -> Product:
    x = numbers(rows, groups, k).bfloat16()
    matrix = fp8_matrix(groups * n, k, rounded=False, height=1)
    out = by_block.grouped_product(x, matrix, False)
    return Product("fp8_product", (matrix.codes, matrix.scale), out)


def float32(rows: int, n: int, k: int) -> Product:
    weight = linear.parts(numbers(n, k))
    return Product(
        "float32_product", (weight,), linear.product(numbers(rows, k).bfloat16(), weight)
    )


def mixed(rows: int, r: int, d: int) -> Product:
    n = (2 + r) * r
    mixer = Mixer(numbers(n, r * d), numbers(n), numbers(n), numbers(d), 3, 1e-6, 1e-6)
    out = streams.streams(None, numbers(rows, r, d).bfloat16(), None, mixer)
    return Product("mix_part", (mixer.fn,), out)


def int4(rows: int, n: int, k: int) -> Product:
    matrix = Int4Matrix((numbers(n, k // 2) * 99).to(torch.uint8), numbers(n, k // 32).half())
    out = by_group.product(numbers(rows, k).bfloat16(), matrix)
    return Product("int4_product", (matrix.data, matrix.scale), out)


READERS: dict[str, Callable[[], Product]] = {
    "codes": lambda: fp8(1, 200, 1024, rounded=True),
    "bits, two row tiles": lambda: fp8(40, 136, 512, rounded=False),
    "gated": lambda: gated(3, 128, 1024),
    "groups": lambda: grouped(3, 2, 40, 512),
    "a float32 weight's parts": lambda: float32(20, 70, 1200),
    "streams": lambda: mixed(20, 4, 264),
    "a float32 weight whole": lambda: float32(130, 24, 544),
    "shares of many tokens": lambda: mixed(80, 4, 72),
    "two streams": lambda: mixed(2, 2, 128),
    "int4": lambda: int4(20, 72, 512),
}
"""Whose rows are whole multiples of 16 bytes, as a model's are."""
ODD: dict[str, Callable[[], Product]] = {
    "blocks": lambda: fp8(1, 72, 384, rounded=True),
    "float32": lambda: float32(1, 9, 100),
    "streams of odd width": lambda: mixed(1, 4, 71),
    "int4 scales": lambda: int4(2, 40, 160),
}


def sectors(found: Iterable[np.ndarray], tensors: Iterable[Tensor]) -> set[int]:
    """Of those found, in tensors."""
    every = np.unique(np.concatenate([*found, np.empty(0, np.uint64)])).astype(np.uint64)
    ends = [(t.data_ptr() // 32, (t.data_ptr() + t.nbytes - 1) // 32) for t in tensors]
    return {int(s) for low, high in ends for s in every[(every >= low) & (every <= high)]}


def run(case: str) -> tuple[Product, Counters]:
    """On sm_120, and what the kernel did."""
    arrival._made.cache_clear()
    with EmulatedGPU("sm120", count=True) as gpu:
        product = (READERS | ODD)[case]()
    (counters,) = [c for kernel, _, c in gpu.counted if kernel == product.kernel]
    return product, counters


def flat(x: object) -> list[Tensor]:
    if isinstance(x, Tensor):
        return [x]
    if isinstance(x, tuple):
        return [t for part in x for t in flat(part)]
    return flat(tuple(vars(x).values())) if hasattr(x, "__dict__") else []


@compiles
@pytest.mark.parametrize("case", READERS | ODD)
def test_the_weights_that_are_read_are_asked_for(on, monkeypatch, case):
    """These and no others, all of them where rows are whole, and but for scales once; and nothing
    comes of it but time. (The emulator refuses what lies outside of all tensors.)"""
    product, counters = run(case)
    asked = counters.touched["prefetch"]
    read = sectors(counters.touched["load"], product.weights)
    assert read
    assert sectors(asked, product.weights) <= read
    assert counters.distinct("prefetch") == counters.distinct("prefetch", product.weights)
    if case in READERS:
        assert sectors(asked, product.weights) == read
    weight, *scales = (t.nbytes for t in product.weights)
    assert counters.prefetch_bytes <= weight + 2 * sum(scales)
    monkeypatch.setattr(programmatic, "PROGRAMMATIC", {"any": False})
    ordinary, counters = run(case)
    assert counters.prefetch_bytes == 0
    assert flat(product.out)
    for a, b in zip(flat(product.out), flat(ordinary.out), strict=True):
        assert torch.equal(a, b)


@triton.jit
def _ask(x, rows, width):
    prefetch(x, rows, width, width, 16)
    follow()


@compiles
def test_a_prefetch_beyond_its_tensor_is_found():
    x = torch.zeros(3, 8)
    with EmulatedGPU("sm120", count=True) as gpu:
        _ask[(1,)](x, 3, 8, launch_pdl=True)
        _ask[(1,)](x, -1, 8, launch_pdl=True)
        _ask[(1,)](x, 4, 8)
        with pytest.raises(AccessError, match="out of bounds"):
            _ask[(1,)](x, 4, 8, launch_pdl=True)
    assert [c.prefetch_bytes for _, _, c in gpu.counted] == [96, 0, 0, 0]
