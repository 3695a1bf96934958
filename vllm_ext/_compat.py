"""Differences between vLLM versions, each as a feature probe."""

from __future__ import annotations

from functools import wraps
from typing import Any

import torch
import vllm
from pydantic import TypeAdapter
from pydantic.dataclasses import rebuild_dataclass
from pydantic_core import ArgsKwargs, core_schema
from vllm.config.attention import AttentionConfig

TESTED = ("0.32", "0.33")


def require_tested_version() -> None:
    """Raise RuntimeError on a vLLM whose interfaces were not checked."""
    if not vllm.__version__.startswith(TESTED):
        raise RuntimeError(
            f"vLLM {vllm.__version__} is installed; dsv4-plugin is made for {' and '.join(TESTED)}"
        )


def has_amx() -> bool:
    return bool(torch.cpu._is_amx_tile_supported())


FP4_INDEXER = "use_fp4_indexer_cache"
"""The name in the vendors' guides of what vLLM 0.32 calls indexer_kv_dtype=mxfp4."""


def accept_fp4_indexer_option() -> None:
    """Let --attention_config.use_fp4_indexer_cache=True mean what it did, where vLLM dropped it."""
    known = AttentionConfig.__dataclass_fields__
    if FP4_INDEXER in known or "__get_pydantic_core_schema__" in vars(AttentionConfig):
        return

    def schema(cls: type, source: Any, handler: Any) -> Any:
        return core_schema.no_info_before_validator_function(_rename_fp4, handler(source))

    AttentionConfig.__get_pydantic_core_schema__ = classmethod(schema)
    rebuild_dataclass(AttentionConfig, force=True)


def _rename_fp4(given: Any) -> Any:
    fields = given.kwargs if isinstance(given, ArgsKwargs) else given
    if not isinstance(fields, dict) or FP4_INDEXER not in fields:
        return given
    rest = {name: value for name, value in fields.items() if name != FP4_INDEXER}
    if TypeAdapter(bool).validate_python(fields[FP4_INDEXER]):
        rest["indexer_kv_dtype"] = "mxfp4"
    return ArgsKwargs(given.args, rest) if isinstance(given, ArgsKwargs) else rest


def end_streams_at_shutdown() -> None:
    """Tell requests that the engine is gone when vLLM stops it.

    Its shutdown cancels the task that tells them right after the one that it hears it from: where
    both fall into one turn of the event loop, streams never end, and the server waits for their
    connections forever (vllm-project/vllm#48745 is the other half of this race).
    """
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.exceptions import EngineDeadError

    original = AsyncLLM.shutdown
    if hasattr(original, "ends_streams"):
        return

    @wraps(original)
    def shutdown(self: Any, timeout: float | None = None) -> None:
        handler = getattr(self, "output_handler", None)
        original(self, timeout)
        if handler is not None and not handler.get_loop().is_closed():
            tell = self.output_processor.propagate_error
            handler.get_loop().call_soon_threadsafe(tell, EngineDeadError())

    shutdown.ends_streams = True  # type: ignore[attr-defined]
    AsyncLLM.shutdown = shutdown
