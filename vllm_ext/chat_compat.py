"""Differences between vLLM versions in chat, each as a feature probe."""

from __future__ import annotations

from vllm.entrypoints.serve.utils import tool_calls_utils

REPORTS_CUT_CALLS = hasattr(tool_calls_utils, "resolve_finish_reason")
"""From 0.33 on vLLM's finish reason is `length` for a whole answer with calls that was cut."""
