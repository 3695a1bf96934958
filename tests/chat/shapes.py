"""Shapes that real outputs take: a grid of calls with prose around and in them, and the slips that
the fuzzer makes of well-formed outputs."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain, combinations, product
from random import Random

from dsv4_plugin.chat.tokens import DSML, END_THINK, EOS, THINK

from .data import tool
from .outputs import words

TOOLS = [tool("get_weather", ["city"], city={"type": "string"}), tool("get_time")]

CLOSINGS = ("closed", "self-closing", "unclosed")
PLACES = ("before", "between", "after")
PROSE = (
    *("so", "\nso\n", "\n\nso, 漢字.\n\n", "\n<b>so</b>\n", "\n1 < 2 > 0\n"),
    *("\n{so}: it's\n", "\n- a\n- b\n"),
)


@dataclass(frozen=True)
class Shape:
    """One or two calls, with `prose` in all places of `where`."""

    block: bool
    closing: str
    count: int
    where: tuple[str, ...]
    prose: str

    def _at(self, place: str) -> str:
        return self.prose if place in self.where else ""

    def _call(self, city: str) -> str:
        if self.closing == "self-closing":
            return f'<{DSML}invoke name="get_time"/>\n'
        inside = self._at("between")
        opening = f'<{DSML}invoke name="get_weather">\n{inside}'
        value = f'<{DSML}parameter name="city" string="true">{city}</{DSML}parameter>\n{inside}'
        return opening + value + (f"</{DSML}invoke>\n" if self.closing == "closed" else "")

    @property
    def text(self) -> str:
        inside = self._at("between")
        calls = inside.join(map(self._call, "AB"[: self.count]))
        if self.block:
            calls = f"<{DSML}tool_calls>\n{inside}{calls}{inside}</{DSML}tool_calls>"
        return self._at("before") + calls + self._at("after")

    @property
    def calls(self) -> list[tuple[str, str]]:
        if self.closing == "self-closing":
            return [("get_time", "{}")] * self.count
        return [("get_weather", f'{{"city": "{city}"}}') for city in "AB"[: self.count]]


WHERE = list(chain.from_iterable(combinations(PLACES, count) for count in (1, 2, 3)))
GRID = [Shape(*case) for case in product((True, False), CLOSINGS, (1, 2), WHERE, PROSE)]

_TAG = re.compile(rf"</?{DSML}\w+[^>]*>")


def _replaced(random: Random, text: str, pattern: str, new: Callable[[str], str]) -> str:
    """`text` with one match of `pattern` replaced."""
    found = list(re.finditer(pattern, text))
    if not found:
        return text
    at = random.choice(found)
    return text[: at.start()] + new(at[0]) + text[at.end() :]


def _unended(random: Random, text: str) -> str:
    return _replaced(random, text, rf"{_TAG.pattern}(?=\n|\Z)", lambda tag: tag[:-1])


def _doubled(random: Random, text: str) -> str:
    between = random.choice(["", "\n"])
    return _replaced(random, text, _TAG.pattern, lambda tag: tag + between + tag)


def _dropped(random: Random, text: str) -> str:
    return _replaced(random, text, _TAG.pattern, lambda _: "")


def _self_closed(random: Random, text: str) -> str:
    return _replaced(random, text, rf"<{DSML}\w+[^>]*>", lambda tag: f"{tag[:-1]}/>")


def _spread(random: Random, text: str) -> str:
    return _replaced(random, text, rf"<{DSML}\w+ [^>]*>", lambda tag: tag.replace(" ", "\n"))


def _with_prose(random: Random, text: str) -> str:
    prose = f"\n{words(random)}\n" if random.random() < 0.5 else words(random)
    at = random.choice([found.end() for found in _TAG.finditer(text)] or [0])
    return text[:at] + prose + text[at:]


def _with_token(random: Random, text: str) -> str:
    token = random.choice([EOS, THINK, END_THINK, f"{THINK}{words(random)}{END_THINK}"])
    at = random.randrange(len(text) + 1)
    return text[:at] + token + text[at:]


SLIPS = (_unended, _doubled, _dropped, _self_closed, _spread, _with_prose, _with_token)


def slipped(random: Random, text: str) -> str:
    """`text`, a well-formed output, with one to three slips."""
    for slip in random.choices(SLIPS, k=random.randrange(1, 4)):
        text = slip(random, text)
    return text
