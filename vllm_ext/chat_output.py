"""One output through the core's parser, with its events in vLLM's types."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from vllm.entrypoints.generate.base.protocol import (
    DeltaFunctionCall,
    DeltaMessage,
    DeltaToolCall,
    FunctionCall,
    ToolCall,
)

from dsv4_plugin.chat import (
    CallDelta,
    ContentDelta,
    Delta,
    Event,
    Finish,
    Message,
    ReasoningDelta,
    StreamParser,
    collect,
)
from dsv4_plugin.chat.tokens import END_THINK, EOS, THINK
from vllm_ext.chat_request import Request, offered_tools, opens_in_reasoning, stops_of


class Output:
    """The text of one output, in pieces.

    Where reasoning is split off, the text of an output that starts inside reasoning comes with
    `<think>` before it; else reasoning is content, with its markup. The text that stopped the
    output is its end (`take_stops`): as much as could be a stop string waits.
    """

    def __init__(self, request: Request, splits_reasoning: bool) -> None:
        opened = False
        if not splits_reasoning:
            kwargs = request.build_chat_params(None, "auto").chat_template_kwargs
            opened = opens_in_reasoning(request, kwargs)
        self._parser = StreamParser(opened, offered_tools(request))
        self._splits_reasoning = splits_reasoning
        self._inside = opened
        self._stops = stops_of(request)
        self._hold = max(map(len, self._stops), default=0)
        self._held = ""
        self._ended = False

    def feed(self, text: str) -> list[Event]:
        self._ended = text.endswith(EOS)
        text = self._held + text
        end = max(0, len(text) - self._hold)
        self._held = text[end:]
        return self._events(self._parser.feed(text[:end]))

    def finish(self) -> list[Event]:
        """End the output: by the model itself if the eos token's text came last, by the client if
        a stop string did, else cut."""
        text = self._held if self._ended else without_stop(self._held, self._stops)
        stopped = self._ended or text != self._held
        events = self._parser.feed(text)
        events += self._parser.finish("stop" if stopped else "length", cut=not self._ended)
        return self._events(events)

    def _events(self, events: list[Event]) -> list[Event]:
        return events if self._splits_reasoning else list(self._joined(events))

    def _joined(self, events: Iterable[Event]) -> Iterator[Event]:
        for event in events:
            inside = isinstance(event, ReasoningDelta)
            if inside != self._inside and not isinstance(event, Finish):
                self._inside = inside
                yield ContentDelta(str(THINK if inside else END_THINK))
            yield ContentDelta(event.text) if isinstance(event, ReasoningDelta) else event


def without_stop(text: str, stops: Iterable[str]) -> str:
    """`text` without the client's stop string that ended it."""
    return text.removesuffix(next(filter(text.endswith, stops), ""))


def whole_message(text: str, request: Request, splits_reasoning: bool = True) -> Message:
    output = Output(request, splits_reasoning)
    return collect([*output.feed(text), *output.finish()])


def delta_message(events: Iterable[Event]) -> DeltaMessage | None:
    """One delta with all that `events` say; None where they say nothing."""
    found = Delta.of(events)
    said = {"reasoning": found.reasoning, "content": found.content}
    delta = DeltaMessage(**{name: text for name, text in said.items() if text})
    if found.calls:
        delta.tool_calls = [_call(part) for part in found.calls]
    return delta if delta.model_fields_set else None


def _call(part: CallDelta) -> DeltaToolCall:
    if part.name is None:
        function = DeltaFunctionCall(arguments=part.arguments)
        return DeltaToolCall(index=part.index, function=function)
    function = DeltaFunctionCall(name=part.name, arguments=part.arguments)
    return DeltaToolCall(id=part.id, type="function", index=part.index, function=function)


def tool_calls(message: Message) -> list[ToolCall]:
    return [
        ToolCall(id=call.id, function=FunctionCall(name=call.name, arguments=call.arguments))
        for call in message.tool_calls
    ]
