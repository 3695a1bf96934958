"""The core's events and messages in vLLM's types."""

from __future__ import annotations

from collections.abc import Iterable

from vllm.entrypoints.generate.base.protocol import (
    DeltaFunctionCall,
    DeltaMessage,
    DeltaToolCall,
    FunctionCall,
    ToolCall,
)

from dsv4_plugin.chat import (
    ArgumentsDelta,
    ContentDelta,
    Event,
    Message,
    ReasoningDelta,
    ToolCallStart,
)


def delta_message(events: Iterable[Event]) -> DeltaMessage | None:
    """One delta with all that `events` say; None where they say nothing."""
    delta = DeltaMessage()
    calls: dict[int, DeltaToolCall] = {}
    for event in events:
        match event:
            case ReasoningDelta(text):
                delta.reasoning = (delta.reasoning or "") + text
            case ContentDelta(text):
                delta.content = (delta.content or "") + text
            case ToolCallStart(index, call_id, name):
                function = DeltaFunctionCall(name=name, arguments="")
                calls[index] = DeltaToolCall(
                    id=call_id, type="function", index=index, function=function
                )
            case ArgumentsDelta(index, text):
                call = calls.setdefault(
                    index, DeltaToolCall(index=index, function=DeltaFunctionCall(arguments=""))
                )
                call.function.arguments += text
    if calls:
        delta.tool_calls = list(calls.values())
    return delta if delta.model_fields_set else None


def tool_calls(message: Message) -> list[ToolCall]:
    return [
        ToolCall(id=call.id, function=FunctionCall(name=call.name, arguments=call.arguments))
        for call in message.tool_calls
    ]
