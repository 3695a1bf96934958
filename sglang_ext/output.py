"""One output: token ids and SGLang's finish reasons in, deltas as SGLang streams them out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dsv4_plugin.chat import (
    ArgumentsDelta,
    ContentDelta,
    Detokenizer,
    Event,
    Finish,
    ReasoningDelta,
    StreamParser,
    TokenBytes,
    ToolCallStart,
)


@dataclass
class CallPiece:
    """Part of a call's arguments; id and name come with its first piece."""

    index: int
    arguments: str = ""
    id: str | None = None
    name: str | None = None


@dataclass
class Delta:
    reasoning: str = ""
    content: str = ""
    calls: list[CallPiece] = field(default_factory=list)
    finish_reason: str | None = None

    def whole_calls(self) -> list[CallPiece]:
        """The calls of a whole output, their pieces joined."""
        calls: dict[int, CallPiece] = {}
        for piece in self.calls:
            if piece.index in calls:
                calls[piece.index].arguments += piece.arguments
            else:
                calls[piece.index] = CallPiece(piece.index, piece.arguments, piece.id, piece.name)
        return list(calls.values())


class OutputParser:
    """Parses one choice.

    SGLang matches stop strings and hands over their tokens too: as much text as could begin one is
    held back, and the match is cut off at the end.

    Args:
        thinking, tools: as for `StreamParser`.
        stop: the request's stop strings.
        separate_reasoning: else reasoning is part of the content.
        stream_reasoning: else it comes in one piece, when it has ended.
    """

    def __init__(
        self,
        tokens: TokenBytes,
        thinking: bool,
        tools: Sequence[Mapping[str, Any]] | None,
        stop: str | Sequence[str] | None = None,
        separate_reasoning: bool = True,
        stream_reasoning: bool = True,
    ) -> None:
        self.detokenizer = Detokenizer(tokens)
        self.parser = StreamParser(thinking, tools)
        stops = [stop] if isinstance(stop, str) else stop or []
        self.hold = max(map(len, stops), default=1) - 1
        self.held = ""
        self.separate_reasoning = separate_reasoning
        self.hold_reasoning = separate_reasoning and not stream_reasoning
        self.reasoning = ""
        self.consumed = 0
        self.finished = False

    def feed(self, ids: Sequence[int]) -> Delta:
        self.consumed += len(ids)
        text = self.held + self.detokenizer.feed(ids)
        end = max(0, len(text) - self.hold)
        self.held = text[end:]
        return self._delta(self.parser.feed(text[:end]))

    def finish(
        self, ids: Sequence[int], reason: Mapping[str, Any], keep_stop: bool = False
    ) -> Delta:
        """The last ids, and SGLang's finish reason {'type', 'matched'}; a repetition is empty."""
        if self.finished:
            return Delta()
        self.finished = True
        self.consumed += len(ids)
        matched = reason.get("matched")
        if isinstance(matched, int) and not keep_stop and list(ids[-1:]) == [matched]:
            ids = ids[:-1]
        text = self.held + self.detokenizer.feed(ids) + self.detokenizer.finish()
        stopped = isinstance(matched, str) and matched in text
        if stopped:
            end = text.index(matched) + (len(matched) if keep_stop else 0)
            text = text[:end]
        events = self.parser.feed(text)
        cut = stopped or reason["type"] != "stop"
        return self._delta(events + self.parser.finish(reason["type"], cut))

    def _delta(self, events: Iterable[Event]) -> Delta:
        delta = Delta()
        for event in events:
            match event:
                case ReasoningDelta(text):
                    delta.reasoning += text
                case ContentDelta(text):
                    delta.content += text
                case ToolCallStart(index, call_id, name):
                    delta.calls.append(CallPiece(index, "", call_id, name))
                case ArgumentsDelta(index, text):
                    self._arguments(delta.calls, index, text)
                case Finish(reason):
                    delta.finish_reason = reason
        return self._place_reasoning(delta)

    @staticmethod
    def _arguments(calls: list[CallPiece], index: int, text: str) -> None:
        if calls and calls[-1].index == index:
            calls[-1].arguments += text
        else:
            calls.append(CallPiece(index, text))

    def _place_reasoning(self, delta: Delta) -> Delta:
        if not self.separate_reasoning:
            delta.content, delta.reasoning = delta.reasoning + delta.content, ""
        if self.hold_reasoning:
            self.reasoning += delta.reasoning
            delta.reasoning = ""
            if delta.content or delta.calls or delta.finish_reason:
                delta.reasoning, self.reasoning = self.reasoning, ""
        return delta
