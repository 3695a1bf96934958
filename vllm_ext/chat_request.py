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
from vllm.logger import init_logger

from dsv4_plugin.chat import render
from dsv4_plugin.chat.messages import read_string
from dsv4_plugin.chat.options import read_flag, thinks
from dsv4_plugin.chat.tools import functions

log = init_logger("vllm.dsv4_chat")

Request = ChatCompletionRequest | ResponsesRequest


@dataclass(frozen=True)
class ChatOptions:
    """What `chat_template_kwargs` and the request fields merged into them ask for."""

    thinking: bool
    effort: str | int | None
    continue_final_message: bool
    add_generation_prompt: bool
    drop_reasoning: bool

    @classmethod
    def of(cls, kwargs: Mapping[str, Any] | None) -> ChatOptions:
        """Raises ValueError naming the field for values that are not what it takes."""
        kwargs = kwargs or {}
        effort = kwargs.get("reasoning_effort")

        def flag(name: str, default: bool) -> bool:
            return read_flag(kwargs.get(name), f"chat_template_kwargs.{name}", default)

        return cls(
            thinking=effort != "none" and thinks(kwargs) is not False,
            effort=effort,
            continue_final_message=flag("continue_final_message", False),
            add_generation_prompt=flag("add_generation_prompt", True),
            drop_reasoning=flag("drop_thinking", True),
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
            without_images(request.messages),
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


IMAGES = ("image_url", "input_image", "image_pil")
"""Types of content parts that V4.1 reads and V4 does not."""


def without_images(messages: Iterable[Any]) -> list[Any]:
    """Messages with nothing in place of their images."""
    return [
        message | {"content": [part for part in content if not is_image(part)]}
        if isinstance(content := message.get("content"), list)
        else message
        for message in messages
    ]


def is_image(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type") in IMAGES


def offered_tools(request: Request) -> list[dict[str, Any]] | None:
    """The tools that the model may call."""
    if request.tool_choice == "none" or not request.tools:
        return None
    if isinstance(request, ResponsesRequest):
        return construct_tool_dicts(request.tools, request.tool_choice)
    return [tool.model_dump() for tool in request.tools]


def adopt_message_tools(request: Request) -> None:
    """Make the tools of system and developer messages the request's own, once it is rendered.

    vLLM parses no calls where the request itself offers nothing. Raises ValueError for
    tool_choice none that comes too late: vLLM tells its renderer of it only beside own tools.
    """
    if not isinstance(request, ChatCompletionRequest):
        return
    found = [
        (f"messages[{index}].tools", function)
        for index, message in enumerate(request.messages)
        if message["role"] in ("system", "developer")
        for function in functions(message.get("tools"), f"messages[{index}].tools")
    ]
    chosen = request.tools or "tool_choice" in request.model_fields_set
    if found and request.tool_choice == "none" and chosen:
        if not request.tools:
            raise ValueError(f"{found[0][0]}: must be left out for tool_choice none")
        return
    names = {tool.function.name for tool in request.tools or ()}
    new = [
        ChatCompletionToolsParam.model_validate({"type": "function", "function": function})
        for _, function in found
        if function["name"] not in names
    ]
    if not new:
        return
    if not chosen:
        request.tool_choice = "auto"
    request.tools = [*(request.tools or ()), *new]


def warn_of_unread_fields(request: Request) -> None:
    """vLLM takes fields that it does not know, and shows them to no renderer."""
    for field in ("thinking", "enable_thinking"):
        if field in (request.model_extra or {}):
            log.warning_once(
                "A request's own `%s` has no effect in vLLM: send chat_template_kwargs.%s, or "
                'reasoning_effort "none" for chat mode.',
                field,
                field,
            )


def take_stops(request: Request) -> None:
    """Have the output end in the text that stopped it, the eos token's or one of the client's stop
    strings: it says how the output ended. Not with the client's stop tokens, whose text is not
    known here. `stops_of` has the strings that the client does not want to see."""
    given = request.stop or []
    stops = [given] if isinstance(given, str) else list(given)
    for index, stop in enumerate(stops):
        read_string(stop, f"stop[{index}]")
    if not (request.stop_token_ids or request.include_stop_str_in_output):
        request.include_stop_str_in_output = True
        request.dsv4_stops = stops


def stops_of(request: Request) -> list[str]:
    return (request.model_extra or {}).get("dsv4_stops", [])


def plain_format(response_format: Any) -> Mapping[str, Any] | None:
    """OpenAI's `response_format` as a plain object."""
    if response_format is None or isinstance(response_format, Mapping):
        return response_format
    return response_format.model_dump(by_alias=True, exclude_none=True)
