"""What the parser emits, and the whole message its events add up to."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass(slots=True)
class ReasoningDelta:
    text: str


@dataclass(slots=True)
class ContentDelta:
    text: str


@dataclass(slots=True)
class ToolCallStart:
    """Call number `index` (from 0) begins; its arguments follow as `ArgumentsDelta`."""

    index: int
    id: str
    name: str


@dataclass(slots=True)
class ArgumentsDelta:
    """The next piece of the JSON text of call `index`."""

    index: int
    text: str


@dataclass(slots=True)
class ToolCallEnd:
    """Call `index` is complete: its arguments are valid JSON. A cut call never gets this."""

    index: int


@dataclass(slots=True)
class Finish:
    """`reason` as OpenAI defines it: stop, length, tool_calls, or what the engine reported."""

    reason: str


Event = ReasoningDelta | ContentDelta | ToolCallStart | ArgumentsDelta | ToolCallEnd | Finish


@dataclass(slots=True)
class ToolCall:
    """`arguments` is JSON text, valid whenever the call is `complete`."""

    id: str
    name: str
    arguments: str = ""
    complete: bool = False


@dataclass(slots=True)
class Message:
    """An assistant message; `reasoning` and `content` are None where the model wrote none."""

    reasoning: str | None = None
    content: str | None = None
    tool_calls: list[ToolCall] = field(default_factory=list)
    finish_reason: str | None = None

    def to_openai(self) -> dict[str, object]:
        """The message as a dict that `Encoder.encode` takes back as history."""
        message: dict[str, object] = {"role": "assistant", "content": self.content}
        if self.reasoning is not None:
            message["reasoning_content"] = self.reasoning
        if self.tool_calls:
            message["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {"name": call.name, "arguments": call.arguments},
                }
                for call in self.tool_calls
            ]
        return message


def collect(events: Iterable[Event]) -> Message:
    """Add up a whole stream of events."""
    message = Message()
    reasoning: list[str] = []
    content: list[str] = []
    arguments: list[list[str]] = []
    for event in events:
        match event:
            case ReasoningDelta(text):
                reasoning.append(text)
            case ContentDelta(text):
                content.append(text)
            case ToolCallStart(_, call_id, name):
                message.tool_calls.append(ToolCall(call_id, name))
                arguments.append([])
            case ArgumentsDelta(index, text):
                arguments[index].append(text)
            case ToolCallEnd(index):
                message.tool_calls[index].complete = True
            case Finish(reason):
                message.finish_reason = reason
    message.reasoning = "".join(reasoning) or None
    message.content = "".join(content) or None
    for call, pieces in zip(message.tool_calls, arguments, strict=True):
        call.arguments = "".join(pieces)
    return message
