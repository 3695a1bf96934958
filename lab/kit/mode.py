"""How a test run executes kernels, from the environment of its process:

TRITON_INTERPRET=1      the strict interpreter (Triton reads it at import: one process, one mode)
DSV4_TEST_GPU=A,B,...   compiled code: emulated for sm80, sm86, ...; `device`: on this machine's GPU

Import this module before any kernel.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext

import pytest

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
NAMES = ["interpret"] if INTERPRET else (os.environ.get("DSV4_TEST_GPU") or "sm80").split(",")
"""What every test is repeated for."""
DEVICE = "cuda" if NAMES == ["device"] else "cpu"
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

if INTERPRET:
    from lab.kit import interpreter

    interpreter.apply(strict=True, shuffle=True)


def interpreted_first(*values: object) -> object:
    """A case of every interpreted run; compiled, where it takes far longer, of the long set's."""
    return pytest.param(*values, marks=[] if INTERPRET else pytest.mark.thorough)


def kernels(monkeypatch: pytest.MonkeyPatch, choice: str) -> None:
    """From now on operations are `choice`'s: triton, torch or reference. Each test chooses anew."""
    from dsv4_plugin.kernels import dispatch

    monkeypatch.setenv("DSV4_KERNELS", choice)
    dispatch.choose_again()


def gpu(name: str) -> AbstractContextManager[object]:
    """Kernels launched inside run as `name` (of NAMES) says."""
    if name in ("interpret", "device"):
        return nullcontext()
    from lab.kit.gpu import EmulatedGPU

    return EmulatedGPU(name)
