"""The laws the parser keeps, as checks that raise AssertionError."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cache
from itertools import count
from random import Random
from typing import Any

from dsv4_plugin.chat import (
    ArgumentsDelta,
    Event,
    Finish,
    Message,
    StreamParser,
    TokenBytes,
    ToolCallEnd,
    ToolCallStart,
    collect,
)
from dsv4_plugin.chat.lexer import Lexer, Tag
from dsv4_plugin.chat.tokens import DSML, END_THINK, EOS, PARAMETER, THINK

from . import outputs, shapes
from .data import TOOLS, encoder

Tools = Sequence[dict[str, Any]] | None


def read(
    pieces: Iterable[str], thinking: bool = True, tools: Tools = TOOLS, finish: str = "stop"
) -> Message:
    """Parse `pieces`, with call ids c0, c1, ..., checking the order of the events."""
    numbers = count()
    parser = StreamParser(thinking, tools, call_id=lambda: f"c{next(numbers)}")
    events = [event for piece in pieces for event in parser.feed(piece)]
    events += parser.finish(finish)
    check_order(events)
    return collect(events)


def check_order(events: Sequence[Event]) -> None:
    """Calls start in order, one at a time; nothing follows a call's end under its index."""
    started = ended = -1
    for event in events:
        match event:
            case ToolCallStart(index):
                assert index == started + 1
                started = index
            case ArgumentsDelta(index):
                assert index == started > ended
            case ToolCallEnd(index):
                assert index == started > ended
                ended = index
    assert [type(event) for event in events].index(Finish) == len(events) - 1


def strict_json(text: str) -> Any:
    def reject(constant: str) -> None:
        raise AssertionError(f"{constant} in {text!r}")

    return json.loads(text, parse_constant=reject)


def check_any(text: str, thinking: bool, tools: Tools, finish: str, random: Random) -> Message:
    """Laws 1 to 4 and 8 for an output of any kind: splits, streaming, JSON, nothing lost, no call
    made of nothing."""
    whole = read([text], thinking, tools, finish)
    assert read(text, thinking, tools, finish) == whole
    assert read(outputs.split(random, text), thinking, tools, finish) == whole
    for call in whole.tool_calls:
        if call.complete:
            assert isinstance(strict_json(call.arguments), dict)
    check_nothing_invented(text, whole)
    if finish == "stop":
        check_nothing_lost(text, whole)
    return whole


def check_nothing_lost(text: str, message: Message) -> None:
    """All ink outside of tags arrives, in order, and none arrives twice."""
    lexer = Lexer()
    outside = "".join(piece for piece in lexer.feed(text, last=True) if isinstance(piece, str))
    arrived = Counter(ink((message.reasoning or "") + (message.content or "")))
    for call in message.tool_calls:
        arrived += Counter(ink(call.name + call.arguments))
    assert Counter(ink(outside)) <= arrived <= Counter(ink(text)), (text, message)


def check_nothing_invented(text: str, message: Message) -> None:
    """Each complete call has a parameter or an invoke that is closed, if only with its block, or a
    JSON body; an incomplete one has begun a parameter or a body."""
    tags = [piece for piece in Lexer().feed(text, last=True) if isinstance(piece, Tag)]
    closed = sum(tag.self_closing or tag.closes for tag in tags)
    opened = sum(tag.name == PARAMETER and not tag.closes for tag in tags)
    bodies = text.count("{")
    complete = sum(call.complete for call in message.tool_calls)
    assert complete <= closed + bodies, (text, message)
    assert len(message.tool_calls) - complete <= min(1, opened + bodies), (text, message)


def check_ids(text: str, thinking: bool, whole: Message) -> None:
    """Law 1 for ids: what the tokenizer makes of a whole output."""
    numbers = count()
    ids = encoder().tokenizer.encode(text, add_special_tokens=False).ids
    parser = StreamParser(thinking, TOOLS, _bytes(), call_id=lambda: f"c{next(numbers)}")
    events = [event for token in ids for event in parser.feed_ids([token])]
    assert collect(events + parser.finish("stop")) == whole, text


@cache
def _bytes() -> TokenBytes:
    return TokenBytes(encoder().tokenizer)


def ink(text: str) -> str:
    return "".join(letter for letter in text if letter in outputs.INK)


def check_well_formed(random: Random) -> None:
    """Laws 5 and 7, and what an output cut anywhere gives, for a message of ours."""
    message = outputs.message(random)
    thinking = random.random() < 0.8
    if not thinking:
        message["reasoning_content"] = ""
    text = outputs.output_of(message, TOOLS, thinking)
    parsed = check_any(text, thinking, TOOLS, "stop", random)
    assert (parsed.reasoning or "") == message["reasoning_content"]
    assert (parsed.content or "") == message["content"]
    assert all(call.complete for call in parsed.tool_calls)
    assert parsed.finish_reason == ("tool_calls" if parsed.tool_calls else "stop")
    assert outputs.output_of(parsed.to_openai(), TOOLS, thinking) == text
    for markup in (THINK, END_THINK, DSML, EOS):
        assert markup not in f"{parsed.reasoning}{parsed.content}"
    check_cut(text, whole_tokens(text, random.randrange(len(text))), thinking, parsed)


def whole_tokens(text: str, end: int) -> int:
    """`end`, moved to the start of the control token it falls into: ids are never cut inside."""
    for token in (THINK, END_THINK, DSML, EOS):
        at = text.find(token, max(0, end - len(token) + 1))
        if 0 <= at < end:
            return at
    return end


def check_cut(text: str, end: int, thinking: bool, whole: Message) -> None:
    """An output cut at `end` by max_tokens is field by field the start of the whole."""
    cut = read([text[:end]], thinking, TOOLS, "length")
    assert read(text[:end], thinking, TOOLS, "length") == cut
    assert cut.finish_reason == "length"
    assert (whole.reasoning or "").startswith(cut.reasoning or "")
    assert (whole.content or "").startswith(cut.content or "")
    assert len(cut.tool_calls) <= len(whole.tool_calls)
    for index, (part, full) in enumerate(zip(cut.tool_calls, whole.tool_calls, strict=False)):
        assert (part.name, part.id) == (full.name, full.id)
        assert full.arguments.startswith(part.arguments.rstrip(" "))
        if not part.complete:
            assert index == len(cut.tool_calls) - 1
            assert part.arguments != full.arguments


def check_slipped(random: Random, text: str) -> None:
    """An output with named slips, also cut, also as ids."""
    text, thinking = shapes.slipped(random, text), random.random() < 0.7
    whole = check_any(text, thinking, TOOLS, "stop", random)
    check_any(text[: random.randrange(len(text) + 1)], thinking, TOOLS, "length", random)
    if random.random() < 0.2:
        check_ids(text, thinking, whole)


def check(random: Random) -> None:
    """One case of any kind."""
    kind = random.randrange(6)
    if kind == 0:
        check_well_formed(random)
        return
    text = outputs.output_of(outputs.message(random), TOOLS)
    if kind == 1:
        check_slipped(random, text)
        return
    text = outputs.noise(random) if kind == 2 else outputs.mutated(random, text)
    tools = random.choice([TOOLS, TOOLS, TOOLS, None])
    finish = random.choice(["stop", "stop", "length"])
    check_any(text, random.random() < 0.7, tools, finish, random)
