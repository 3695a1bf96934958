"""DeepSeek-V4 in plain torch: the shared core of the vLLM and SGLang adapters."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dsv4_plugin.engine import LocalModel, load

__all__ = ["LocalModel", "load"]


def __getattr__(name: str) -> Any:
    """The network is imported on first use, so that `dsv4_plugin.chat` alone needs no torch."""
    if name not in __all__:
        raise AttributeError(f"module 'dsv4_plugin' has no attribute {name!r}")
    from dsv4_plugin import engine

    return getattr(engine, name)
