"""Splits streamed model output into text and markup tags, holding back at most one tag.

A tag is a complete piece of markup; whether it acts as markup is for the parser to say. What is
held is bounded by `MAX_TAG`, so that the work per character is bounded too.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from .tokens import (
    DSML,
    END_THINK,
    EOS,
    INVOKE,
    PARAMETER,
    THINK,
    TOOL_CALLS,
    WRAPPER_SLIPS,
)

MAX_TAG = 1024
"""Longest tag, in characters; anything longer is text."""

_WRAPPERS = (TOOL_CALLS, *WRAPPER_SLIPS)
_CONTROLS = (THINK, END_THINK, EOS)
_CLOSED = [f"<{DSML}{name}>" for name in _WRAPPERS]
_CLOSED += [f"</{DSML}{name}>" for name in (*_WRAPPERS, INVOKE, PARAMETER)]
_HEADS = [f"<{DSML}{INVOKE}", f"<{DSML}{PARAMETER}"]
_PREFIXES = frozenset(
    tag[:end] for tag in (*_CONTROLS, *_CLOSED, *_HEADS) for end in range(1, len(tag) + 1)
)

_CANDIDATE = re.compile(r"<(?:[/｜t]|\Z)")
_LITERAL = re.compile("|".join(map(re.escape, (*_CONTROLS, *_CLOSED))))
_HEAD = re.compile(rf"<{DSML}({INVOKE}|{PARAMETER})(?=[\s>])")
_PLAIN = r"""[^"'<>\n]*"""
_ATTRIBUTES = re.compile(rf"""{_PLAIN}(?:(?:"[^"\n]*"|'[^'\n]*'){_PLAIN})*>""")
_BROKEN_ATTRIBUTES = re.compile(r"[^>\n]*>")
_ATTRIBUTE = re.compile(r"""([\w-]+)\s*=\s*(?:"([^"\n]*)"?|'([^'\n]*)'?|([^\s>]+))""")


@dataclass(slots=True)
class Tag:
    """`name` is "think", "eos", "tool_calls" (any spelling), "invoke" or "parameter"."""

    name: str
    raw: str
    closes: bool = False
    attributes: str = ""

    def attribute(self, name: str) -> str | None:
        """The value of an attribute, quoted in any way or not at all."""
        for found in _ATTRIBUTE.finditer(self.attributes):
            if found[1] == name:
                return found[2] or found[3] or found[4] or ""
        return None


class Lexer:
    """`feed` yields the text and tags that are certain so far; `rest` is what is held back."""

    def __init__(self) -> None:
        self.rest = ""

    def feed(self, text: str) -> Iterator[str | Tag]:
        if self.rest:
            text = self.rest + text
            self.rest = ""
        start = search = 0
        while candidate := _CANDIDATE.search(text, search):
            at = candidate.start()
            tag = _tag(text, at)
            if tag is None:
                search = at + 1
                continue
            if start < at:
                yield text[start:at]
            if isinstance(tag, str):
                self.rest = tag
                return
            yield tag
            start = search = at + len(tag.raw)
        if start < len(text):
            yield text[start:]


def _tag(text: str, at: int) -> Tag | str | None:
    """The tag at a "<", or the rest of `text` where it may still become one, or None."""
    if literal := _LITERAL.match(text, at):
        return _literal_tag(literal[0])
    if len(text) - at <= MAX_TAG and text[at:] in _PREFIXES:
        return text[at:]
    head = _HEAD.match(text, at)
    if head is None:
        return None
    limit = min(len(text), at + MAX_TAG)
    end = _ATTRIBUTES.match(text, head.end(), limit)
    if end is None:
        if limit < at + MAX_TAG and text.find("\n", at, limit) < 0:
            return text[at:]
        end = _BROKEN_ATTRIBUTES.match(text, head.end(), limit)
    return Tag(head[1], text[at : end.end()], attributes=end[0][:-1]) if end else None


def _literal_tag(raw: str) -> Tag:
    if raw == EOS:
        return Tag("eos", raw)
    if raw in _CONTROLS:
        return Tag("think", raw, closes=raw == END_THINK)
    name = raw.strip("</>").removeprefix(DSML)
    return Tag(TOOL_CALLS if name in _WRAPPERS else name, raw, closes=raw[1] == "/")
