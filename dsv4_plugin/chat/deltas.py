"""Events joined into what an engine streams: one delta with all that they say."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from dsv4_plugin.chat.events import (
    ArgumentsDelta,
    ContentDelta,
    Event,
    Finish,
    ReasoningDelta,
    ToolCallStart,
)


@dataclass
class CallDelta:
    """Part of a call's arguments; id and name come with its first part."""

    index: int
    arguments: str = ""
    id: str | None = None
    name: str | None = None


@dataclass
class Delta:
    reasoning: str = ""
    content: str = ""
    calls: list[CallDelta] = field(default_factory=list)
    finish_reason: str | None = None

    @classmethod
    def of(cls, events: Iterable[Event]) -> Delta:
        delta = cls()
        for event in events:
            match event:
                case ReasoningDelta(text):
                    delta.reasoning += text
                case ContentDelta(text):
                    delta.content += text
                case ToolCallStart(index, call_id, name):
                    delta.calls.append(CallDelta(index, "", call_id, name))
                case ArgumentsDelta(index, text):
                    if not delta.calls or delta.calls[-1].index != index:
                        delta.calls.append(CallDelta(index))
                    delta.calls[-1].arguments += text
                case Finish(reason):
                    delta.finish_reason = reason
        return delta

    def whole_calls(self) -> list[CallDelta]:
        """The calls of a whole output, their parts joined."""
        calls: dict[int, CallDelta] = {}
        for part in self.calls:
            if part.index in calls:
                calls[part.index].arguments += part.arguments
            else:
                calls[part.index] = CallDelta(part.index, part.arguments, part.id, part.name)
        return list(calls.values())
