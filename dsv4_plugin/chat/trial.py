"""Markup on trial: what may be a call, or text that names one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from .events import Event
from .lexer import MAX_TAG, Tag
from .tokens import INVOKE, TOOL_CALLS

QUOTES = "`'\""
"""Markup between two of the same of these is quoted, not meant; `<think>` after one is."""

Piece = str | Tag


@dataclass(slots=True)
class Trial:
    """Markup that may still be text: what it is made of, the events that it would make, and what
    to go back to. `room`: how much prose may stand in it before it is text."""

    in_reasoning: bool
    last: str
    index: int
    in_block: bool
    pieces: list[Piece]
    events: list[Event] = field(default_factory=list)
    room: int = MAX_TAG
    has_lines: bool = False
    in_sentence: bool = False

    def add(self, piece: Piece) -> None:
        self.pieces.append(piece)
        self.has_lines = self.has_lines or (isinstance(piece, str) and "\n" in piece)

    @property
    def streams(self) -> bool:
        """Whether the first parameter decides. In reasoning or amid a line, a whole call does."""
        return not self.in_reasoning and not self.amid_line

    @property
    def amid_line(self) -> bool:
        return self.last not in ("", "\n")

    def is_decided(self, bare: bool) -> bool:
        """Whether a whole call is meant, now that it is there. Between quotes it is not, nor
        without arguments amid a sentence: that shows behind it (`is_named`)."""
        self.in_sentence = bare and self.amid_line and not self.has_lines
        return not is_quote(self.last) and not self.in_sentence

    def is_named(self, line: str) -> bool:
        """Whether the text behind a call, up to the line's end, shows that prose names it."""
        quoted = is_quote(self.last) and line.startswith(self.last)
        return quoted or (self.in_sentence and bool(line.strip()))


def is_call(tag: Tag) -> bool:
    return tag.name == INVOKE and not tag.closes and bool(tag.attribute("name"))


def is_nameless(tag: Tag) -> bool:
    return tag.name == INVOKE and not tag.closes and not tag.attribute("name")


def opens(tag: Tag) -> bool:
    """Whether a call may begin with `tag`."""
    return is_call(tag) or (tag.name == TOOL_CALLS and not tag.closes)


def is_quote(letter: str) -> bool:
    return letter != "" and letter in QUOTES


def text_of(pieces: Iterable[Piece]) -> str:
    return "".join([piece for piece in pieces if isinstance(piece, str)])


def is_blank(pieces: Iterable[Piece]) -> bool:
    return not text_of(pieces).strip()


def ends_in_quote(pieces: Sequence[Piece]) -> bool:
    return bool(pieces) and isinstance(pieces[-1], str) and is_quote(pieces[-1][-1])
