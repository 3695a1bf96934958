"""Differences between vLLM versions, each as a feature probe."""

from __future__ import annotations

from typing import Any

import torch
import vllm

TESTED = ("0.32", "0.33")


def require_tested_version() -> None:
    """Raise RuntimeError on a vLLM whose interfaces were not checked."""
    if not vllm.__version__.startswith(TESTED):
        raise RuntimeError(
            f"vLLM {vllm.__version__} is installed; dsv4-plugin is made for {' and '.join(TESTED)}"
        )


def kv_cache_layouts() -> dict[str, Any]:
    """vLLM's layout names; the one with blocks outermost holds blocks of different sizes."""
    from vllm.v1.kv_cache_layout import KVCacheLayout

    return dict(KVCacheLayout.__members__)


def has_amx() -> bool:
    return bool(torch.cpu._is_amx_tile_supported())
