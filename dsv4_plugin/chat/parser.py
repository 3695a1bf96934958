"""The model's output -> reasoning, content and tool calls, incrementally.

Text arrives in pieces of any size and every character is looked at a bounded number of times.
Text is emitted as soon as it cannot be the start of markup.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any
from uuid import uuid4

from .detokenize import Detokenizer
from .events import Event, Finish, Message, collect
from .lexer import Lexer
from .machine import Machine
from .tokens import DSML


def new_call_id() -> str:
    return f"call_{uuid4().hex[:24]}"


class StreamParser(Machine):
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
        super().__init__(thinking, tools, call_id)
        self._detokenizer = None if tokenizer is None else Detokenizer(tokenizer)
        self._lexer = Lexer()
        self._finished = False

    def feed(self, text: str) -> list[Event]:
        """Parse the next piece of text, of any size."""
        if self._finished:
            raise ValueError("feed: the output was finished before")
        certain: list[Event] = []
        self._certain = certain
        if self._trial is None:
            self._out = certain
            if "<" not in text and not self._lexer.rest:
                if text:
                    self._on_text(text)
                return certain
        self._read(text)
        return certain

    def _read(self, text: str, last: bool = False) -> None:
        for piece in self._lexer.feed(text, last):
            if self._trial is not None:
                self._try_piece(piece)
            if isinstance(piece, str):
                self._on_text(piece)
            else:
                self._on_tag(piece)

    def feed_ids(self, ids: Iterable[int]) -> list[Event]:
        """Parse the next token ids; needs `tokenizer`."""
        if self._detokenizer is None:
            raise ValueError("feed_ids: StreamParser was made without a tokenizer")
        return self.feed(self._detokenizer.feed(ids))

    def finish(self, reason: str = "stop", cut: bool | None = None) -> list[Event]:
        """End the output. `reason` is the engine's: "stop", "length" or another it knows.

        Any reason but "stop" means that the output was cut, unless `cut` says otherwise (true for
        a stop string of the client's): what may have been the start of markup is then dropped, so
        that every field is a prefix of what it would have become.
        """
        before = self.feed(self._detokenizer.finish()) if self._detokenizer else []
        self._finished = True
        self._certain = []
        if self._trial is None:
            self._out = self._certain
        cut = reason != "stop" if cut is None else cut
        if not (cut and self._has_tools and _may_be_dsml(self._lexer.rest)):
            self._read("", last=True)
        complete = self._end_call(cut)
        if not cut or reason == "stop":
            self._flush_newlines()
        if reason == "stop" and complete and self._index >= 0:
            reason = "tool_calls"
        return [*before, *self._certain, Finish(reason)]


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
