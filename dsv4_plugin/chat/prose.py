"""Reasoning and content: text that is shown as it comes, but for `<think>` and `</think>`."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum, auto

from .events import ContentDelta, Event, ReasoningDelta
from .lexer import Tag
from .trial import is_quote


class State(Enum):
    REASONING = auto()
    CONTENT = auto()
    OPENING = auto()  # after the tag that opens a block of calls, before its first call
    BODY = auto()  # in a call, outside of its parameters
    VALUE = auto()  # in a parameter
    CLOSING = auto()  # after a closing tag inside a parameter
    AFTER = auto()  # after a call


class Prose:
    """The states REASONING and CONTENT, and what all states share."""

    _has_tools = False
    _handlers: dict[State, tuple[Callable[[str], None], Callable[[Tag], None]]]

    def __init__(self) -> None:
        self._certain: list[Event] = []
        self._out = self._certain
        self._last = ""
        self._newlines = ""

    def _enter(self, state: State) -> None:
        self._state = state
        self._on_text, self._on_tag = self._handlers[state]

    def _prose(self, text: str) -> None:
        self._last = text[-1]
        if self._has_tools:
            if self._newlines:
                text, self._newlines = self._newlines + text, ""
            if self._last == "\n":
                text = self._hold_newlines(text)
        if text:
            self._emit_prose(text)

    def _hold_newlines(self, text: str) -> str:
        """Hold the last two newlines: before a block of calls they are part of the markup."""
        end = max(len(text.rstrip("\n")), len(text) - 2)
        self._newlines = text[end:]
        return text[:end]

    def _emit_prose(self, text: str) -> None:
        reasoning = self._state is State.REASONING
        self._out.append(ReasoningDelta(text) if reasoning else ContentDelta(text))

    def _flush_newlines(self) -> None:
        if self._newlines:
            self._emit_prose(self._newlines)
            self._newlines = ""

    def _think_tag(self, tag: Tag) -> None:
        if tag.closes and self._state is State.REASONING:
            self._flush_newlines()
            self._enter(State.CONTENT)
            self._last = ""
        elif is_quote(self._last):
            self._prose(tag.raw)
        elif not tag.closes and self._state is State.CONTENT:
            self._flush_newlines()
            self._enter(State.REASONING)
            self._last = ""
