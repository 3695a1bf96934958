"""Who serves the model on this machine, and why."""

from __future__ import annotations

import torch

from dsv4_plugin import serving
from dsv4_plugin.serving import Serving


def choose(device: str) -> Serving:
    """Apply DSV4_MODEL to `device` ('cpu', 'cuda', ...). Raises ValueError on an unknown value."""

    def automatically() -> Serving:
        if device == "cpu":
            return Serving(True, "SGLang's own needs a GPU")
        if device != "cuda" or torch.version.hip:
            return Serving(False, f"SGLang has its own for {device}")
        return serving.by_capability("SGLang", torch.cuda.get_device_capability())

    return serving.choose(automatically)
