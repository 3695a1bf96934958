"""Which implementation of an operation runs: Triton's kernel or plain torch."""

from __future__ import annotations

import logging
from functools import lru_cache
from importlib.util import find_spec

import torch

from dsv4_plugin import env

log = logging.getLogger("dsv4_plugin")

LOWEST = (8, 0)
"""The oldest NVIDIA compute capability the kernels are compiled and checked for."""


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def use_triton(device: torch.device) -> bool:
    """Are this device's operations Triton's? Logged once, with the reason."""
    return _decide(device.type, device.index, env.KERNELS.read())


def require_driver() -> None:
    """Raise ValueError where DSV4_KERNELS=triton asks for kernels that nothing here can run: at
    start, where it is one sentence and not a failed process."""
    if env.KERNELS.read() != "triton" or find_spec("triton") is None:
        return
    from triton.backends import backends
    from triton.runtime.driver import driver

    if any(backend.driver.is_active() for backend in backends.values()):
        return
    try:
        assert driver.active  # one that was put there, as by tests
    except RuntimeError:
        raise ValueError(
            "DSV4_KERNELS is 'triton', but Triton finds no GPU driver here; "
            "allowed without one are auto and torch"
        ) from None


@lru_cache
def _decide(kind: str, index: int | None, choice: str) -> bool:
    """Raises ModuleNotFoundError where DSV4_KERNELS=triton and there is no Triton."""
    triton, reason = _choose(kind, index, choice)
    log.info("Kernels on %s: %s (%s).", kind, "Triton" if triton else "torch", reason)
    return triton


def _choose(kind: str, index: int | None, choice: str) -> tuple[bool, str]:
    installed = find_spec("triton") is not None
    if choice != "auto":
        if choice == "triton" and not installed:
            raise ModuleNotFoundError("DSV4_KERNELS is triton, but Triton is not installed")
        return choice == "triton", f"DSV4_KERNELS={choice}"
    if kind != "cuda":
        return False, "not a GPU"
    if not installed:
        return False, "Triton is not installed"
    if torch.version.hip is None:
        found = torch.cuda.get_device_capability(index)
        if found < LOWEST:
            return False, f"compute capability {found[0]}.{found[1]} is below {LOWEST[0]}.0"
    return True, torch.cuda.get_device_name(index)
