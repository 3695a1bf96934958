"""Splits streamed model output into text and markup tags, holding back at most one tag.

A tag is a complete piece of markup; whether it acts as markup is for the parser to say. What is
held is bounded by `MAX_TAG`, so that the work per character is bounded too.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from .tokens import (
    CALLS,
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

_CONTROLS = (THINK, END_THINK, EOS)
_NAMES = dict.fromkeys((TOOL_CALLS, CALLS, *WRAPPER_SLIPS), TOOL_CALLS)
_NAMES |= {INVOKE: INVOKE, PARAMETER: PARAMETER}
_HEADS = {
    f"{start}{DSML}{space}{spelled}": (name, start == "</")
    for start in ("<", "</")
    for space in ("", " ")
    for spelled, name in _NAMES.items()
}
"""How a tag begins, in V4's spelling or V4.1's: its name and whether it closes."""
_PREFIXES = frozenset(tag[:end] for tag in (*_CONTROLS, *_HEADS) for end in range(1, len(tag) + 1))

_CANDIDATE = re.compile(r"<(?:[/｜t]|\Z)")
_CONTROL = re.compile("|".join(map(re.escape, _CONTROLS)))
_HEAD = re.compile(rf"</?{DSML} ?(?:{'|'.join(_NAMES)})(?=[\s/<>]|\Z)")
_ATTRIBUTE = re.compile(r"""([\w-]+)\s*=\s*(?:"([^"\n]*)"?|'([^'\n]*)'?|([^\s>]+))""")

_PLAIN = r"""[^"'<>\n]*"""
_STRICT = r"""[\w-]+\s*=\s*(?:"[^"\n]*"|'[^'\n]*'|[^\s"'<>=]+)"""
_PART = r"""(?:\s+(?:[\w-]+(?:\s*(?:=\s*(?:"[^"\n]*|'[^'\n]*)?)?)?)?)?"""
_ON_A_LINE = re.compile(rf"""{_PLAIN}(?:(?:"[^"\n]*"|'[^'\n]*'){_PLAIN})*>""")
_ON_LINES = re.compile(rf"(?:\s+{_STRICT})*\s*/?>")
_ON_LINES_SO_FAR = re.compile(rf"(?:\s+{_STRICT})*{_PART}\s*/?\Z")
_WITH_A_QUOTE_LEFT_OUT = re.compile(r"[^<>\n]*>")
_UNENDED = re.compile(rf"(?:[ \t]+{_STRICT})*(?:[ \t]*\n)?")

_END = re.compile(r"\s*/?>")
_END_SO_FAR = re.compile(r"\s*/?\Z")
_NO_END = re.compile(r"[ \t]*(?=[\n<]|\Z)")


@dataclass(slots=True)
class Tag:
    """`name` is "think", "eos", "tool_calls" (any spelling), "invoke" or "parameter"."""

    name: str
    raw: str
    closes: bool = False
    attributes: str = ""
    self_closing: bool = False

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

    def feed(self, text: str, last: bool = False) -> Iterator[str | Tag]:
        """`last`: nothing follows, so that nothing is held back."""
        if self.rest:
            text = self.rest + text
            self.rest = ""
        start = search = 0
        while candidate := _CANDIDATE.search(text, search):
            at = candidate.start()
            tag = _tag(text, at, last)
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


def _tag(text: str, at: int, last: bool) -> Tag | str | None:
    """The tag at a "<", or the rest of `text` where it may still become one, or None."""
    if control := _CONTROL.match(text, at):
        return _control_tag(control[0])
    if not last and len(text) - at <= MAX_TAG and text[at:] in _PREFIXES:
        return text[at:]
    head = _HEAD.match(text, at)
    if head is None:
        return None
    name, closes = _HEADS[head[0]]
    limit = min(len(text), at + MAX_TAG)
    find = _end if closes or name == TOOL_CALLS else _attributes_end
    end = find(text, head.end(), limit, last or limit == at + MAX_TAG)
    if end is None:
        return None
    if end == _OPEN:
        return text[at:]
    attributes = text[head.end() : end].removesuffix(">").rstrip()
    return Tag(
        name,
        text[at:end],
        closes,
        attributes.removesuffix("/"),
        self_closing=not closes and attributes.endswith("/"),
    )


_OPEN = -1
"""The end of a tag that is not there yet."""


def _end(text: str, start: int, limit: int, last: bool) -> int | None:
    """Where a tag without attributes ends: after its ">", or with its line."""
    if end := _END.match(text, start, limit):
        return end.end()
    if not last and _END_SO_FAR.match(text, start):
        return _OPEN
    end = _NO_END.match(text, start, limit)
    return end.end() if end else None


def _attributes_end(text: str, start: int, limit: int, last: bool) -> int:
    """Where a tag ends that may have attributes, on this line or, well-formed, on the next ones.
    Without a ">" it ends after the last of them, or with its line; what follows is text."""
    lines = text.find("\n", start, limit) >= 0
    if not (last or lines) and text.find(">", start, limit) < 0:
        return _OPEN
    if end := _ON_A_LINE.match(text, start, limit):
        return end.end()
    if not (last or lines):
        return _OPEN
    if end := _ON_LINES.match(text, start, limit):
        return end.end()
    if not last and _ON_LINES_SO_FAR.match(text, start):
        return _OPEN
    end = _WITH_A_QUOTE_LEFT_OUT.match(text, start, limit) or _UNENDED.match(text, start, limit)
    assert end is not None, "no attributes are well-formed too"
    return end.end()


def _control_tag(raw: str) -> Tag:
    if raw == EOS:
        return Tag("eos", raw)
    return Tag("think", raw, closes=raw == END_THINK)
