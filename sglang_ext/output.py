"""One output: token ids and SGLang's finish reasons in, deltas as SGLang streams them out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dsv4_plugin.chat import Delta, Detokenizer, Event, StreamParser, TokenBytes


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
        return self._place_reasoning(Delta.of(events))

    def _place_reasoning(self, delta: Delta) -> Delta:
        if not self.separate_reasoning:
            delta.content, delta.reasoning = delta.reasoning + delta.content, ""
        if self.hold_reasoning:
            self.reasoning += delta.reasoning
            delta.reasoning = ""
            if delta.content or delta.calls or delta.finish_reason:
                delta.reasoning, self.reasoning = self.reasoning, ""
        return delta
