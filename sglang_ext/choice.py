"""Who serves the model on this machine, and why."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dsv4_plugin import env


@dataclass(frozen=True)
class Serving:
    """plugin: the plugin's network serves; reason: half a sentence for the log."""

    plugin: bool
    reason: str


NATIVE_CAPABILITIES = {(9, 0), (10, 0), (10, 3), (12, 0), (12, 1)}
"""CUDA capabilities that SGLang's own V4 kernels are built for."""


def choose(device: str) -> Serving:
    """Apply DSV4_MODEL to `device` ('cpu', 'cuda', ...). Raises ValueError on an unknown value."""
    asked = env.MODEL.read()
    if asked != "auto":
        return Serving(asked == "plugin", f"{env.MODEL.name}={asked}")
    if device == "cpu":
        return Serving(True, "SGLang's own needs a GPU")
    if device != "cuda" or torch.version.hip:
        return Serving(False, f"SGLang has its own for {device}")
    level = torch.cuda.get_device_capability()
    if level not in NATIVE_CAPABILITIES:
        return Serving(True, f"SGLang's own has no kernels for compute capability {level}")
    return Serving(False, "SGLang's own kernels are made for this chip")
