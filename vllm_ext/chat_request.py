"""vLLM's requests in the core's terms: options, whether reasoning comes first, the tools."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from vllm.entrypoints.openai.chat_completion.protocol import (
    ChatCompletionRequest,
    ChatCompletionToolsParam,
)
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
from vllm.entrypoints.openai.responses.utils import construct_tool_dicts

from dsv4_plugin.chat import render

Request = ChatCompletionRequest | ResponsesRequest


@dataclass(frozen=True)
class ChatOptions:
    """What `chat_template_kwargs` and the request fields merged into them ask for."""

    thinking: bool
    effort: str | None
    continue_final_message: bool
    add_generation_prompt: bool
    drop_reasoning: bool

    @classmethod
    def of(cls, kwargs: Mapping[str, Any] | None) -> ChatOptions:
        """What the kwargs ask for.

        `thinking` beats `enable_thinking`, which vLLM also derives from reasoning_effort.
        """
        kwargs = kwargs or {}
        effort = kwargs.get("reasoning_effort")
        thinking = kwargs.get("thinking")
        if thinking is None:
            thinking = kwargs.get("enable_thinking")
        return cls(
            thinking=effort != "none" and (thinking is None or bool(thinking)),
            effort=effort,
            continue_final_message=bool(kwargs.get("continue_final_message")),
            add_generation_prompt=bool(kwargs.get("add_generation_prompt", True)),
            drop_reasoning=kwargs.get("drop_thinking") is not False,
        )


def settle(messages: Iterable[Any]) -> None:
    """Make lists, in place, of the iterators that pydantic leaves in messages: they work once, and
    the parsers read the messages again."""
    for message in messages:
        if isinstance(message, dict):
            iterators = {key: value for key, value in message.items() if hasattr(value, "__next__")}
            message.update({key: list(value) for key, value in iterators.items()})


def opens_in_reasoning(request: Request, kwargs: Mapping[str, Any] | None) -> bool:
    """Whether the prompt of `request` ends inside a reasoning block.

    For whole answers only: vLLM shows the prompt's ids to the parser of a stream, but not here.
    """
    options = ChatOptions.of(kwargs)
    if isinstance(request, ChatCompletionRequest):
        return render(
            request.messages,
            offered_tools(request),
            thinking=options.thinking,
            continue_final_message=options.continue_final_message,
            add_generation_prompt=options.add_generation_prompt,
        ).thinking
    if options.continue_final_message:
        item = request.input[-1]
        kind = item.get("type") if isinstance(item, dict) else item.type
        return options.thinking and kind == "reasoning"
    return options.thinking


def offered_tools(request: Request) -> list[dict[str, Any]] | None:
    """The tools that the model may call."""
    if request.tool_choice == "none" or not request.tools:
        return None
    if isinstance(request, ResponsesRequest):
        return construct_tool_dicts(request.tools, request.tool_choice)
    return [tool.model_dump() for tool in request.tools]


def adopt_message_tools(request: Request) -> None:
    """Make the tools of system and developer messages the request's own, once it is rendered.

    vLLM parses no calls where the request itself offers nothing.
    """
    if not isinstance(request, ChatCompletionRequest):
        return
    carriers = [m for m in request.messages if m["role"] in ("system", "developer")]
    found = [tool for message in carriers for tool in message.get("tools") or ()]
    tools = [ChatCompletionToolsParam.model_validate(tool) for tool in found]
    names = {tool.function.name for tool in request.tools or ()}
    new = [tool for tool in tools if tool.function.name not in names]
    if not new:
        return
    if not request.tools and "tool_choice" not in request.model_fields_set:
        request.tool_choice = "auto"
    request.tools = [*(request.tools or ()), *new]


def plain_format(response_format: Any) -> Mapping[str, Any] | None:
    """OpenAI's `response_format` as a plain object."""
    if response_format is None or isinstance(response_format, Mapping):
        return response_format
    return response_format.model_dump(by_alias=True, exclude_none=True)
