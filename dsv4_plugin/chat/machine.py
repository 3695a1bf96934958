"""The state machine of the model's output: from text and tags to events.

    REASONING -> CONTENT -> OPENING -> BODY <-> VALUE <-> CLOSING, BODY -> AFTER

Whether markup is a call shows in what follows it: until then it is on trial, and goes back to where
it stood if it was none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby
from sys import maxsize
from typing import Any

from .arguments import NAMELESS, Arguments
from .events import ArgumentsDelta, ContentDelta, ReasoningDelta, ToolCallEnd, ToolCallStart
from .lexer import Tag
from .prose import Prose, State
from .tokens import INVOKE, PARAMETER, TOOL_CALLS
from .tools import functions
from .trial import (
    Piece,
    Trial,
    ends_in_quote,
    is_blank,
    is_call,
    is_nameless,
    is_quote,
    opens,
    text_of,
)

_OPEN, _CLOSE = False, True
_AFTER_CALL = {(INVOKE, _OPEN), (TOOL_CALLS, _OPEN), (TOOL_CALLS, _CLOSE), ("eos", _OPEN)}
_FOLLOWS = {
    PARAMETER: {(PARAMETER, _OPEN), (INVOKE, _CLOSE), *_AFTER_CALL},
    INVOKE: _AFTER_CALL,
    TOOL_CALLS: {(TOOL_CALLS, _OPEN), ("eos", _OPEN)},
    "eos": set[tuple[str, bool]](),
}
"""A closing tag ends a value only where one of these comes next; else it is part of the value."""


class Machine(Prose):
    """Takes the pieces of one output through `_on_text` and `_on_tag`; `_certain` has the events
    that are certain since it was last emptied."""

    def __init__(
        self,
        thinking: bool,
        tools: Sequence[Mapping[str, Any]] | None,
        call_id: Callable[[], str],
    ) -> None:
        super().__init__()
        self._functions = functions(tools)
        self._has_tools = bool(self._functions)
        self._call_id = call_id
        self._trial: Trial | None = None
        self._saved: list[Piece] = []
        self._closing, self._nothing_since = "", True
        self._opened = self._value_text = ""
        self._in_block = False
        self._index = -1
        self._arguments = Arguments({})
        self._handlers = {
            State.REASONING: (self._prose, self._prose_tag),
            State.CONTENT: (self._prose, self._prose_tag),
            State.OPENING: (self._hold, self._opening_tag),
            State.BODY: (self._hold, self._body_tag),
            State.VALUE: (self._value, self._value_tag),
            State.CLOSING: (self._after_closing, self._closing_tag),
            State.AFTER: (self._after_text, self._after_tag),
        }
        self._enter(State.REASONING if thinking else State.CONTENT)

    def _prose_tag(self, tag: Tag) -> None:
        if tag.name == "think":
            self._think_tag(tag)
        elif tag.name == "eos":
            return
        elif not self._has_tools:
            self._prose(tag.raw)
        elif opens(tag):
            self._start_trial(tag)
        elif is_quote(self._last) or not self._is_leftover(tag):
            self._prose(tag.raw)
        else:
            self._leave_block(tag)

    def _is_leftover(self, tag: Tag) -> bool:
        """Whether a stray tag belongs to calls before it: it is dropped, not shown."""
        return self._index >= 0 if tag.closes else self._in_block

    def _leave_block(self, tag: Tag) -> None:
        if tag.name == TOOL_CALLS:
            self._in_block = False

    # Trials.

    def _start_trial(self, tag: Tag) -> None:
        saved = self._take_saved()
        if self._trial is None:
            reasoning, pieces = self._state is State.REASONING, [*saved, tag]
            self._trial = Trial(reasoning, self._last, self._index, self._in_block, pieces)
            self._out = self._trial.events
        if is_call(tag):
            self._start_call(tag)
        else:
            self._in_block = True
            self._enter(State.OPENING)

    def _try_piece(self, piece: Piece) -> None:
        """Note what the trial is about. Reasoning that ends was no call."""
        assert self._trial is not None
        unfinished = self._trial.in_reasoning and self._state is not State.AFTER
        if unfinished and isinstance(piece, Tag) and piece.name == "think" and piece.closes:
            self._reject()
        else:
            self._trial.add(piece)

    def _commit(self) -> None:
        """The markup on trial, if any, is a call."""
        if self._trial is not None:
            self._certain.extend(self._trial.events)
            self._out, self._trial = self._certain, None
            self._newlines = ""

    def _reject(self) -> None:
        """The markup on trial is text, but for `<think>` and `</think>`."""
        trial, self._trial = self._trial, None
        assert trial is not None
        self._out = self._certain
        self._saved.clear()
        self._last, self._index, self._in_block = trial.last, trial.index, trial.in_block
        self._enter(State.REASONING if trial.in_reasoning else State.CONTENT)
        for piece in trial.pieces:
            if isinstance(piece, str):
                self._prose(piece)
            elif piece.name == "think":
                self._think_tag(piece)
            elif piece.name != "eos":
                self._prose(piece.raw)

    def _reject_before(self, tag: Tag) -> None:
        """As `_reject`, of what came before `tag`, which starts anew."""
        assert self._trial is not None
        self._trial.pieces.pop()
        self._reject()
        self._on_tag(tag)

    def _hold(self, text: str) -> None:
        """Text in a block or call, outside of parameters."""
        self._saved.append(text)
        opening = self._state is State.OPENING
        if self._trial is not None and (opening or self._arguments.empty):
            self._trial.room -= len(text)
            if self._trial.room < 0 and self._has_arguments():
                self._trial.room = maxsize
            elif self._trial.room < 0:
                self._reject()

    # Between prose and calls.

    def _opening_tag(self, tag: Tag) -> None:
        if ends_in_quote(self._saved):
            self._reject_before(tag)
        elif is_call(tag):
            self._start_call(tag)
        elif tag.name == PARAMETER or (tag.name == TOOL_CALLS and tag.closes):
            self._leave_opening(tag)
        else:
            self._saved.append(tag)

    def _leave_opening(self, tag: Tag) -> None:
        """No call comes first. An empty block is dropped where calls came before."""
        if tag.closes and self._index >= 0 and is_blank(self._saved):
            self._saved.clear()
            self._commit()
            self._leave_block(tag)
            self._enter(State.AFTER)
        else:
            self._reject_before(tag)

    def _after_text(self, text: str) -> None:
        """Text after a call: white space belongs to the markup unless prose follows."""
        self._saved.append(text)
        if text.isspace():
            return
        line = text_of(self._saved).split("\n")[0]
        if self._trial is not None and self._trial.is_named(line):
            self._reject()
        else:
            self._back_to_prose()

    def _back_to_prose(self) -> None:
        self._commit()
        self._enter(State.CONTENT)
        if saved := text_of(self._take_saved()):
            self._prose(saved)

    def _after_tag(self, tag: Tag) -> None:
        if opens(tag):
            self._start_trial(tag)
        elif tag.name == "think" and not tag.closes:
            self._back_to_prose()
            self._prose_tag(tag)
        elif tag.name != "eos":
            self._saved.clear()
            self._leave_block(tag)

    # Calls.

    def _start_call(self, tag: Tag) -> None:
        assert self._trial is not None
        self._aside(self._take_saved(), self._trial.in_reasoning)
        self._index += 1
        self._opened = tag.raw
        name = tag.attribute("name") or ""
        self._arguments = Arguments(next((f for f in self._functions if f["name"] == name), {}))
        self._out.append(ToolCallStart(self._index, self._call_id(), name))
        self._arguments_delta("{")
        self._enter(State.BODY)
        if tag.self_closing and self._is_meant(closed=True):
            self._finish_call()
        elif tag.self_closing:
            self._reject()

    def _is_meant(self, closed: bool = False) -> bool:
        """Whether what followed an invoke tag makes it a call: a parameter, or a JSON object. Where
        it was closed without, two of three: a block is open, nothing is between, nothing is
        missing."""
        if not self._arguments.empty:
            return True
        if merged := self._arguments.merge(text_of(self._saved)):
            members, rest = merged
            self._arguments_delta(members)
            self._saved = [rest] if rest else []
            return True
        signs = (self._in_block, is_blank(self._saved), self._arguments.needs_none)
        return closed and sum(signs) >= 2

    def _finish_call(self) -> None:
        self._leave_body()
        self._arguments_delta(self._arguments.finish())
        self._out.append(ToolCallEnd(self._index))
        self._enter(State.AFTER)
        self._last = ""
        if self._trial is not None and self._trial.is_decided(self._arguments.empty):
            self._commit()

    def _leave_body(self) -> None:
        self._aside(self._take_saved())

    def _aside(self, pieces: Iterable[Piece], thinking: bool = False) -> None:
        """Prose inside of markup: content, or reasoning after `<think>`."""
        for is_text, run in groupby(pieces, key=lambda piece: isinstance(piece, str)):
            if not is_text:
                thinks = [tag for tag in run if isinstance(tag, Tag) and tag.name == "think"]
                thinking = not thinks[-1].closes if thinks else thinking
            elif not (text := text_of(run)).isspace():
                self._out.append(ReasoningDelta(text) if thinking else ContentDelta(text))

    def _body_tag(self, tag: Tag) -> None:
        if tag.name == "think":
            self._saved.append(tag)
        elif self._arguments.empty and ends_in_quote(self._saved):
            self._reject_before(tag)
        elif tag.name == PARAMETER and not tag.closes:
            self._leave_body()
            self._open_parameter(tag)
        elif opens(tag) or tag.name == TOOL_CALLS or (tag.name == INVOKE and tag.closes):
            self._end_body(tag)

    def _end_body(self, tag: Tag) -> None:
        if self._is_meant(closed=tag.name == INVOKE and tag.closes):
            self._finish_call()
            self._on_tag(tag)
        elif tag.raw != self._opened or not is_blank(self._saved):
            self._reject_before(tag)

    def _open_parameter(self, tag: Tag) -> None:
        name = tag.attribute("name") or NAMELESS
        opened = self._arguments.open(name, tag.attribute("string"))
        self._arguments_delta(opened)
        self._opened, self._value_text = tag.raw, ""
        self._enter(State.VALUE)
        if self._trial is not None and self._trial.streams:
            self._commit()

    def _value(self, text: str) -> None:
        self._value_text = text
        if delta := self._arguments.value(text):
            self._out.append(ArgumentsDelta(self._index, delta))

    def _value_tag(self, tag: Tag) -> None:
        if (tag.closes or tag.name == "eos") and tag.name in _FOLLOWS:
            self._closing, self._nothing_since = tag.name, True
            self._enter(State.CLOSING)
            self._saved.append(tag)
        elif tag.name == PARAMETER and self._arguments.expects(tag.attribute("name")):
            self._arguments_delta(self._arguments.close())
            self._open_parameter(tag)
        elif self._value_text or tag.raw != self._opened:
            self._value(tag.raw)

    def _after_closing(self, text: str) -> None:
        directly = len(self._saved) == 1
        quoted = directly and is_quote(text[0]) and self._value_text.endswith(text[0])
        self._saved.append(text)
        self._nothing_since = self._nothing_since and text.isspace()
        if quoted or self._closing == "eos":
            self._back_to_value()

    def _closing_tag(self, tag: Tag) -> None:
        doubled = tag.closes and tag.name == self._closing
        if doubled and (self._nothing_since or self._arguments.is_whole()):
            self._saved.append(tag)
        elif (tag.name, tag.closes) in _FOLLOWS[self._closing] and not is_nameless(tag):
            self._end_value()
            if self._closing != PARAMETER:
                self._finish_call()
            self._on_tag(tag)
        elif self._closing != "eos" and (tag.name == "think" or is_nameless(tag)):
            self._saved.append(tag)
        else:
            self._back_to_value()
            self._on_tag(tag)

    def _end_value(self) -> None:
        """The closing tag before did end the value; prose after it is none of it."""
        self._arguments_delta(self._arguments.close())
        self._aside(self._take_saved())
        self._enter(State.BODY)

    def _back_to_value(self) -> None:
        self._enter(State.VALUE)
        pieces = self._take_saved()
        self._value("".join(p if isinstance(p, str) else p.raw for p in pieces))

    def _arguments_delta(self, text: str) -> None:
        if text:
            self._out.append(ArgumentsDelta(self._index, text))

    def _take_saved(self) -> list[Piece]:
        saved, self._saved = self._saved, []
        return saved

    # The end of the output.

    def _end_call(self, cut: bool) -> bool:
        """Settle what is still open; returns whether all calls are complete."""
        if self._state is State.CLOSING:
            self._end_closing(cut)
        if self._state is State.BODY and not cut and self._is_meant():
            self._finish_call()
        undecided = self._trial is not None and self._state is not State.AFTER
        if undecided and not (cut and self._has_arguments()):
            self._end_trial(cut)
            return True
        self._commit()
        if self._state in (State.BODY, State.VALUE):
            self._cut_call()
            return False
        return True

    def _end_closing(self, cut: bool) -> None:
        if self._closing == "eos":
            self._saved.clear()
            self._enter(State.VALUE)
        elif cut and self._closing != PARAMETER and not self._nothing_since:
            self._back_to_value()
        else:
            self._end_value()

    def _has_arguments(self) -> bool:
        in_body = self._state is State.BODY
        object_begins = in_body and text_of(self._saved).lstrip().startswith("{")
        return (
            object_begins or self._state is State.VALUE or (in_body and not self._arguments.empty)
        )

    def _end_trial(self, cut: bool) -> None:
        assert self._trial is not None
        if cut and is_blank(self._trial.pieces):
            self._trial.pieces.clear()
        self._reject()

    def _cut_call(self) -> None:
        if self._state is State.BODY and not self._is_meant():
            raw = text_of(self._saved).lstrip()
            self._saved.clear()
            self._arguments_delta(raw[1:])
        self._leave_body()
        self._arguments_delta(self._arguments.cut())
