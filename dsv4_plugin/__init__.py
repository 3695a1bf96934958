"""DeepSeek-V4 in plain torch: the shared core of the vLLM and SGLang adapters."""

from dsv4_plugin.engine import LocalModel, load

__all__ = ["LocalModel", "load"]
