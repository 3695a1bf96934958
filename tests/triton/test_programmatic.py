"""Launches that come while the one before still runs: every program waits before all else."""

from __future__ import annotations

import ast
import re

import pytest
import torch
import triton

from dsv4_plugin.kernels import programmatic
from dsv4_plugin.kernels.gate import kernel as gate
from lab.kernels import production
from lab.kit import mode
from lab.kit.targets import FakeGPU
from lab.paths import ROOT

compiles = pytest.mark.skipif(
    mode.INTERPRET or "sm80" not in mode.NAMES, reason="compiles, once per run of all modes"
)
ORDINARY = {"attend", "merge", "unpack"}
"""Kernels that are launched as ever. (Any number of such launches may stand between the others.)"""
SHORT = ("step metadata", "router by hash", "streams between stages", "latent norm, Pro, rounded")
ACCESS = re.compile(r"^\s*(@!?%\w+\s+)?(ld|st|atom|red|cp|prefetch)\.[\w.:]*(global|bulk)", re.M)


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(programmatic, "PROGRAMMATIC", {"any": True})


@pytest.fixture
def to_ptx(monkeypatch: pytest.MonkeyPatch) -> None:
    """Machine code is not made."""
    from lab.kit.gpu import _stop_at_ptx

    monkeypatch.setattr(triton.knobs.runtime, "add_stages_inspection_hook", _stop_at_ptx)


def ptx_of(name: str, case: str) -> dict[str, str]:
    """By kernel."""
    with FakeGPU(name) as gpu:
        production.CASES[case]()
    return {k.name: k.asm["ptx"] for k, _ in gpu.compiled()}


def early(ptx: str) -> bool:
    """Is memory touched by what stands before the wait?"""
    wait, access = ptx.index("griddepcontrol.wait"), ACCESS.search(ptx)
    assert access
    return access.start() < wait


@compiles
@pytest.mark.parametrize("name", ["sm90", "sm100", "sm120"])
@pytest.mark.parametrize("case", SHORT)
def test_programs_wait_before_they_touch_memory(on, name, case):
    """And let others come before that. (With machine code.)"""
    for ptx in ptx_of(name, case).values():
        assert not early(ptx)
        assert ptx.count("griddepcontrol.launch_dependents") == ptx.count("griddepcontrol.wait")
        assert ptx.index("griddepcontrol.launch_dependents") < ptx.index("griddepcontrol.wait")


@compiles
@pytest.mark.thorough
@pytest.mark.parametrize("case", production.CASES)
def test_whatever_is_launched_waits(on, to_ptx, case):
    for kernel, ptx in ptx_of("sm90", case).items():
        if kernel not in ORDINARY:
            assert not early(ptx), kernel
        else:
            assert "griddepcontrol" not in ptx, kernel


@compiles
@pytest.mark.parametrize("name", ["sm80", "sm86", "sm90", "sm120"])
def test_launches_are_ordinary_until_the_table_says_so(to_ptx, name):
    for ptx in ptx_of(name, "router by hash").values():
        assert "griddepcontrol" not in ptx


def test_every_kernel_follows():
    """What is launched calls `follow` first, and only that calls it."""
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
            body = f.body[1:] if ast.get_docstring(f) else f.body
            assert ast.unparse(body[0]) == "follow()", f.name
        else:
            assert "follow()" not in ast.unparse(f), f.name
    assert launched == following | ORDINARY


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
