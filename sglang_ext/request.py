"""SGLang's chat requests, settled before SGLang itself reads them."""

from __future__ import annotations

from typing import Any

from xgrammar import Grammar

from dsv4_plugin.chat.grammar import tool_tag
from dsv4_plugin.chat.options import read_thinking, thinks


def settle(request: Any) -> None:
    """Have all ways to switch thinking say the same, in the one place that SGLang reads: the
    request's own `thinking` decides, else `chat_template_kwargs`. With tool_choice none no message
    offers tools.

    Raises ValueError naming the field for values that are neither on nor off.
    """
    kwargs = request.chat_template_kwargs or {}
    asked, own = thinks(kwargs), read_thinking(request.thinking, "thinking")
    thinking = asked if own is None else own
    if request.reasoning_effort == "none":
        thinking = False
    if thinking is not None:
        request.chat_template_kwargs = {**kwargs, "thinking": thinking, "enable_thinking": thinking}
    if request.tool_choice == "none":
        for message in request.messages:
            if getattr(message, "tools", None):
                message.tools = None


def check_schemas(request: Any) -> None:
    """SGLang goes on with another grammar where the plugin's raises: refuse before, by name."""
    offered = list(request.tools or ())
    for message in request.messages:
        offered += getattr(message, "tools", None) or ()
    if offered:
        choice = request.tool_choice
        tool_tag(
            [tool.model_dump(exclude_none=True) for tool in offered],
            choice if isinstance(choice, str) else choice.model_dump(),
            compile_schema=Grammar.from_json_schema,
        )
