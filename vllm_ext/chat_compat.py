"""Differences between vLLM versions in chat, each as a feature probe."""

from __future__ import annotations

import vllm.exceptions
import vllm.renderers.chat_utils
from vllm.entrypoints.serve.utils import tool_calls_utils

_NAME = "ChatTemplateResolutionError"

REPORTS_CUT_CALLS = hasattr(tool_calls_utils, "resolve_finish_reason")
"""From 0.33 on vLLM's finish reason is `length` for a whole answer with calls that was cut."""

_HOME = vllm.exceptions if hasattr(vllm.exceptions, _NAME) else vllm.renderers.chat_utils
ChatTemplateResolutionError: type[Exception] = getattr(_HOME, _NAME)
"""What vLLM takes as "this model has no chat"; 0.33 moved it."""
