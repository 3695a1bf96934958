"""The model's output -> reasoning, content and tool calls: one incremental state machine.

    REASONING -> CONTENT -> OPENING -> BODY <-> VALUE <-> CLOSING, BODY -> AFTER

Text arrives in pieces of any size and every character is looked at a bounded number of times.
Text is emitted as soon as it cannot be the start of markup; markup that turns out not to be any
(DSML quoted in prose, a closing tag inside a value) goes back to where it stood.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import Enum, auto
from typing import Any
from uuid import uuid4

from .arguments import Arguments
from .detokenize import Detokenizer
from .events import (
    ArgumentsDelta,
    ContentDelta,
    Event,
    Finish,
    Message,
    ReasoningDelta,
    ToolCallEnd,
    ToolCallStart,
    collect,
)
from .lexer import Lexer, Tag
from .tokens import DSML, INVOKE, PARAMETER, TOOL_CALLS
from .tools import functions, properties

QUOTES = "`'\""
"""Markup directly after one of these is quoted, not meant."""

_OPEN, _CLOSE = False, True
_FOLLOWS = {
    PARAMETER: {
        (PARAMETER, _OPEN),
        (INVOKE, _OPEN),
        (INVOKE, _CLOSE),
        (TOOL_CALLS, _CLOSE),
        ("eos", _OPEN),
    },
    INVOKE: {(INVOKE, _OPEN), (TOOL_CALLS, _CLOSE), ("eos", _OPEN)},
    TOOL_CALLS: {(TOOL_CALLS, _OPEN), ("eos", _OPEN)},
}
"""A closing tag ends a value only where one of these follows; else it is part of the value."""


class State(Enum):
    REASONING = auto()
    CONTENT = auto()
    OPENING = auto()  # after the tag that opens a block of calls, before its first call
    BODY = auto()  # in a call, between parameters
    VALUE = auto()  # in a parameter
    CLOSING = auto()  # after a closing tag inside a parameter
    AFTER = auto()  # after a call


def new_call_id() -> str:
    return f"call_{uuid4().hex[:24]}"


class StreamParser:
    """Parses one output. Each method returns the events that its input made certain.

    `thinking`: the output starts inside a reasoning block (`Prompt.thinking`).
    `tools`: OpenAI's list; without tools, DSML is content. `tokenizer`, for `feed_ids`: anything
    `Encoder` takes, or a `TokenBytes` shared by all parsers. `call_id` makes the calls' ids.
    """

    def __init__(
        self,
        thinking: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        tokenizer: Any = None,
        call_id: Callable[[], str] = new_call_id,
    ) -> None:
        self._functions = functions(tools)
        self._has_tools = bool(self._functions)
        self._detokenizer = None if tokenizer is None else Detokenizer(tokenizer)
        self._call_id = call_id
        self._lexer = Lexer()
        self._out: list[Event] = []
        self._before = State.CONTENT
        self._last = ""
        self._newlines = ""
        self._saved: list[str] = []
        self._closing = ""
        self._index = -1
        self._arguments = Arguments({})
        self._finished = False
        self._handlers: dict[State, tuple[Callable[[str], None], Callable[[Tag], None]]] = {
            State.REASONING: (self._prose, self._prose_tag),
            State.CONTENT: (self._prose, self._prose_tag),
            State.OPENING: (self._after_markup, self._opening_tag),
            State.BODY: (self._saved.append, self._body_tag),
            State.VALUE: (self._value, self._value_tag),
            State.CLOSING: (self._after_closing, self._closing_tag),
            State.AFTER: (self._after_markup, self._after_tag),
        }
        self._enter(State.REASONING if thinking else State.CONTENT)

    def _enter(self, state: State) -> None:
        self._state = state
        self._on_text, self._on_tag = self._handlers[state]

    def feed(self, text: str) -> list[Event]:
        """Parse the next piece of text, of any size."""
        if self._finished:
            raise ValueError("feed: the output was finished before")
        self._out = []
        if "<" not in text and not self._lexer.rest:
            if text:
                self._on_text(text)
            return self._out
        for piece in self._lexer.feed(text):
            if isinstance(piece, str):
                self._on_text(piece)
            else:
                self._on_tag(piece)
        return self._out

    def feed_ids(self, ids: Iterable[int]) -> list[Event]:
        """Parse the next token ids; needs `tokenizer`."""
        if self._detokenizer is None:
            raise ValueError("feed_ids: StreamParser was made without a tokenizer")
        return self.feed(self._detokenizer.feed(ids))

    def finish(self, reason: str = "stop") -> list[Event]:
        """End the output. `reason` is the engine's: "stop", "length" or another it knows.

        Any reason but "stop" means that the output was cut: what may have been the start of
        markup is then dropped, so that every field is a prefix of what it would have become.
        """
        events = self.feed(self._detokenizer.finish()) if self._detokenizer else []
        self._out = []
        self._finished = True
        cut = reason != "stop"
        self._end_rest(cut)
        complete = self._end_call(cut)
        if reason == "stop" and complete and self._index >= 0:
            reason = "tool_calls"
        self._out.append(Finish(reason))
        return events + self._out

    def _end_rest(self, cut: bool) -> None:
        """Settle what was held back: part of a tag, newlines, an opened block."""
        rest, self._lexer.rest = self._lexer.rest, ""
        if rest and not (cut and self._has_tools and _may_be_dsml(rest)):
            self._on_text(rest)
        if self._state is State.OPENING and not cut:
            self._back_to_prose()
        if not cut:
            self._flush_newlines()

    def _end_call(self, cut: bool) -> bool:
        """Settle an open call; returns whether all calls are complete."""
        if self._state is State.CLOSING:
            self._arguments_delta(self._arguments.close())
            self._saved.clear()
            self._enter(State.BODY)
        if self._state is State.BODY and not cut:
            self._finish_call()
        if self._state is State.BODY:
            raw = self._take_saved()
            body = self._arguments.cut_body(raw)
            self._stray(raw if body is None else "")
            self._arguments_delta(body or self._arguments.cut())
            return False
        if self._state is State.VALUE:
            self._arguments_delta(self._arguments.cut())
            return False
        return True

    # Prose: reasoning and content.

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

    def _prose_tag(self, tag: Tag) -> None:
        quoted = self._last != "" and self._last in QUOTES
        if tag.name == "think":
            self._think_tag(tag, quoted)
        elif tag.name == "eos":
            return
        elif not self._has_tools:
            self._prose(tag.raw)
        elif tag.name == TOOL_CALLS and not tag.closes:
            self._before = self._state
            self._enter(State.OPENING)
            self._saved.append(tag.raw)
        elif _is_call(tag) and not quoted:
            self._start_call(tag)
        elif not tag.closes or quoted or self._index < 0:
            self._prose(tag.raw)

    def _think_tag(self, tag: Tag, quoted: bool) -> None:
        if tag.closes and self._state is State.REASONING:
            self._flush_newlines()
            self._enter(State.CONTENT)
            self._last = ""
        elif quoted:
            self._prose(tag.raw)
        elif not tag.closes and self._state is State.CONTENT:
            self._flush_newlines()
            self._enter(State.REASONING)
            self._last = ""

    # Between prose and calls.

    def _after_markup(self, text: str) -> None:
        """Text after markup: white space belongs to the markup unless prose follows."""
        self._saved.append(text)
        if not text.isspace():
            self._back_to_prose()

    def _back_to_prose(self) -> None:
        opening = self._state is State.OPENING and self._before is State.REASONING
        self._enter(State.REASONING if opening else State.CONTENT)
        if saved := self._take_saved():
            self._prose(saved)

    def _opening_tag(self, tag: Tag) -> None:
        if _is_call(tag):
            self._start_call(tag)
        elif tag.name != "eos":
            self._back_to_prose()
            self._prose_tag(tag)

    def _after_tag(self, tag: Tag) -> None:
        if _is_call(tag):
            self._start_call(tag)
        elif tag.name == TOOL_CALLS and not tag.closes:
            self._before = self._state
            self._enter(State.OPENING)
            self._saved.append(tag.raw)
        elif tag.closes:
            self._saved.clear()
        elif tag.name != "eos":
            self._back_to_prose()
            self._prose_tag(tag)

    # Calls.

    def _start_call(self, tag: Tag) -> None:
        self._saved.clear()
        self._newlines = ""
        self._index += 1
        name = tag.attribute("name") or ""
        called = next((f for f in self._functions if f["name"] == name), {})
        self._arguments = Arguments(properties(called))
        self._out.append(ToolCallStart(self._index, self._call_id(), name))
        self._arguments_delta("{")
        self._enter(State.BODY)

    def _finish_call(self) -> None:
        self._leave_body()
        self._arguments_delta(self._arguments.finish())
        self._out.append(ToolCallEnd(self._index))
        self._enter(State.AFTER)

    def _leave_body(self) -> None:
        """Take what stood between parameters: a JSON object, or text that belongs nowhere."""
        raw = self._take_saved()
        if raw and not raw.isspace():
            merged = self._arguments.merge(raw)
            self._stray(raw if merged is None else "")
            self._arguments_delta(merged or "")

    def _stray(self, text: str) -> None:
        if text and not text.isspace():
            self._out.append(ContentDelta(text))

    def _body_tag(self, tag: Tag) -> None:
        if tag.name == PARAMETER and not tag.closes:
            self._leave_body()
            self._open_parameter(tag)
        elif tag.closes and tag.name in (INVOKE, TOOL_CALLS):
            self._finish_call()
        elif _is_call(tag):
            self._finish_call()
            self._start_call(tag)
        elif tag.name == "think" and "".join(self._saved).strip():
            self._saved.append(tag.raw)

    def _open_parameter(self, tag: Tag) -> None:
        opened = self._arguments.open(tag.attribute("name") or "", tag.attribute("string"))
        self._arguments_delta(opened)
        self._enter(State.VALUE)

    def _value(self, text: str) -> None:
        if delta := self._arguments.value(text):
            self._out.append(ArgumentsDelta(self._index, delta))

    def _value_tag(self, tag: Tag) -> None:
        if tag.closes and tag.name in _FOLLOWS:
            self._closing = tag.name
            self._enter(State.CLOSING)
            self._saved.append(tag.raw)
        elif tag.name == PARAMETER and self._arguments.expects(tag.attribute("name")):
            self._arguments_delta(self._arguments.close())
            self._open_parameter(tag)
        else:
            self._value(tag.raw)

    def _after_closing(self, text: str) -> None:
        self._saved.append(text)
        if not text.isspace():
            self._enter(State.VALUE)
            self._value(self._take_saved())

    def _closing_tag(self, tag: Tag) -> None:
        if (tag.name, tag.closes) in _FOLLOWS[self._closing]:
            self._saved.clear()
            self._arguments_delta(self._arguments.close())
            self._enter(State.BODY)
            if self._closing != PARAMETER:
                self._finish_call()
        else:
            self._enter(State.VALUE)
            self._value(self._take_saved())
        self._on_tag(tag)

    def _arguments_delta(self, text: str) -> None:
        if text:
            self._out.append(ArgumentsDelta(self._index, text))

    def _take_saved(self) -> str:
        saved = "".join(self._saved)
        self._saved.clear()
        return saved


def _is_call(tag: Tag) -> bool:
    return tag.name == INVOKE and not tag.closes and bool(tag.attribute("name"))


def _may_be_dsml(rest: str) -> bool:
    """Whether part of a tag may be DSML markup rather than `<think>` or the like."""
    return any(
        f"{start}{DSML}"[: len(rest)] == rest[: len(start) + len(DSML)] for start in ("<", "</")
    )


def parse(
    text: str,
    thinking: bool = True,
    tools: Sequence[Mapping[str, Any]] | None = None,
    finish: str = "stop",
) -> Message:
    """Parse a whole output; the same as feeding it to `StreamParser` in any pieces."""
    parser = StreamParser(thinking, tools)
    return collect([*parser.feed(text), *parser.finish(finish)])
