"""Differences between vLLM versions, each as a feature probe."""

from __future__ import annotations

import torch
import vllm

TESTED = ("0.32", "0.33")


def require_tested_version() -> None:
    """Raise RuntimeError on a vLLM whose interfaces were not checked."""
    if not vllm.__version__.startswith(TESTED):
        raise RuntimeError(
            f"vLLM {vllm.__version__} is installed; dsv4-plugin is made for {' and '.join(TESTED)}"
        )


def has_amx() -> bool:
    return bool(torch.cpu._is_amx_tile_supported())
