"""Which implementation of an operation runs.

An operation is a package whose module `reference` defines it in plain torch, to be read; `cpu` is
torch's fast way, made for CPUs, which GPUs without Triton take too; `kernel` is Triton's. Which one
a device takes is decided once.
"""

from __future__ import annotations

import logging
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch

from dsv4_plugin import env

log = logging.getLogger("dsv4_plugin")

LOWEST = (8, 0)
"""The oldest NVIDIA compute capability the kernels are compiled and checked for."""
MODULES = {"triton": "kernel", "torch": "cpu", "reference": "reference"}


def implementation(operation: str, device: torch.device) -> Any:
    """The module that computes an operation on a device; operation: its package's `__name__`."""
    return _module(operation, device.type, device.index)


def use_triton(device: torch.device) -> bool:
    """Are this device's operations Triton's?"""
    return choice_for(device.type, device.index) == "triton"


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
        assert driver.active  # It may be one that was put there, as tests do.
    except RuntimeError:
        raise ValueError(
            "DSV4_KERNELS is 'triton', but Triton finds no GPU driver here; "
            "allowed without one are auto, torch and reference"
        ) from None


@lru_cache
def choice_for(kind: str, index: int | None) -> str:
    """triton, torch or reference, for a device; logged once, with the reason.

    Raises ModuleNotFoundError where DSV4_KERNELS=triton and there is no Triton."""
    choice, reason = _choose(kind, index, env.KERNELS.read())
    log.info("Kernels on %s: %s (%s).", kind, choice.replace("triton", "Triton"), reason)
    return choice


@lru_cache
def _module(operation: str, kind: str, index: int | None) -> Any:
    return import_module(f"{operation}.{MODULES[choice_for(kind, index)]}")


def choose_again() -> None:
    """Forget what was chosen: DSV4_KERNELS has changed, as it does in tests."""
    choice_for.cache_clear()
    _module.cache_clear()


def _choose(kind: str, index: int | None, choice: str) -> tuple[str, str]:
    installed = find_spec("triton") is not None
    if choice != "auto":
        if choice == "triton" and not installed:
            raise ModuleNotFoundError("DSV4_KERNELS is triton, but Triton is not installed")
        return choice, f"DSV4_KERNELS={choice}"
    if kind != "cuda":
        return "torch", "not a GPU"
    if not installed:
        return "torch", "Triton is not installed"
    if torch.version.hip is None:
        found = torch.cuda.get_device_capability(index)
        if found < LOWEST:
            return "torch", f"compute capability {found[0]}.{found[1]} is below {LOWEST[0]}.0"
    return "triton", torch.cuda.get_device_name(index)
