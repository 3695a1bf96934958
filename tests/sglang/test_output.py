"""The output parser: stop strings, any split of the ids, SGLang's finish reasons. Outputs are made
up, to be cut and split at will."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from dsv4_plugin.chat import CallDelta, Delta, TokenBytes
from sglang_ext.output import OutputParser

TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
CALL = (
    '<｜DSML｜tool_calls>\n<｜DSML｜invoke name="weather">\n'
    '<｜DSML｜parameter name="city" string="true">Köln</｜DSML｜parameter>\n'
    "</｜DSML｜invoke>\n</｜DSML｜tool_calls>"
)


@pytest.fixture(scope="module")
def tokenizer(tiny: Path) -> Tokenizer:
    return Tokenizer.from_file(str(tiny / "tokenizer.json"))


def run(tokenizer, text, sizes, reason, keep_stop=False, thinking=True, tools=None, **options):
    """The whole delta of an output that arrives in pieces of the given sizes, the rest at last."""
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    parser = OutputParser(TokenBytes(tokenizer), thinking, tools, **options)
    total = Delta()
    for size in sizes:
        add(total, parser.feed(ids[:size]))
        ids = ids[size:]
    add(total, parser.finish(ids, reason, keep_stop))
    assert parser.finish([], reason) == Delta()
    return total


def add(total: Delta, delta: Delta) -> None:
    total.reasoning += delta.reasoning
    total.content += delta.content
    total.calls += delta.calls
    total.finish_reason = delta.finish_reason


@pytest.mark.parametrize("size", [1, 2, 3, 50])
def test_reasoning_content_and_calls(tokenizer, size):
    text = f"Hm 🤔</think>Let me see.\n\n{CALL}<｜end▁of▁sentence｜>"
    delta = run(tokenizer, text, [size] * (40 // size), {"type": "stop", "matched": 1}, tools=TOOLS)
    assert (delta.reasoning, delta.content) == ("Hm 🤔", "Let me see.")
    (call,) = delta.whole_calls()
    assert (call.index, call.name, call.arguments) == (0, "weather", '{"city": "Köln"}')
    assert call.id.startswith("call_")
    assert delta.finish_reason == "tool_calls"


@pytest.mark.parametrize("size", [1, 2, 50])
@pytest.mark.parametrize(("keep", "expected"), [(False, "one two "), (True, "one two three")])
def test_stop_string(tokenizer, size, keep, expected):
    """No part of a stop string is streamed, although its tokens arrive."""
    delta = run(
        tokenizer,
        "one two three",
        [size] * (2 // size),
        {"type": "stop", "matched": "three"},
        keep,
        thinking=False,
        stop=["three", "seven"],
    )
    assert delta == Delta(content=expected, finish_reason="stop")


@pytest.mark.parametrize("size", [1, 3, 50])
@pytest.mark.parametrize(
    ("text", "matched", "arguments", "finish"),
    [
        (CALL, "ln<", '{"city": "Kö', "stop"),
        (CALL + " END", "END", '{"city": "Köln"}', "tool_calls"),
    ],
)
def test_a_stop_string_and_a_call(tokenizer, size, text, matched, arguments, finish):
    """A call that the client's stop string cuts is not complete."""
    end = text.index(matched) + len(matched)
    sizes, reason = [size] * (12 // size), {"type": "stop", "matched": matched}
    delta = run(tokenizer, text[:end], sizes, reason, thinking=False, tools=TOOLS, stop=matched)
    assert [call.arguments for call in delta.whole_calls()] == [arguments]
    assert delta.finish_reason == finish


NAMED = 'Type <｜DSML｜invoke name="weather"> to start.'


@pytest.mark.parametrize("size", [1, 2, 50])
@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        (NAMED, NAMED, []),
        (f"{NAMED}\n\n{CALL}", NAMED, ["Köln"]),
        (CALL.replace(">\n", "\n"), "", ["Köln"]),
        (CALL.replace("</｜DSML｜invoke>", f"so\n{CALL}"), "\nso\n", ["Köln", "Köln"]),
    ],
)
def test_markup_that_is_named_or_not_quite_right(tokenizer, size, text, content, calls):
    sizes, reason = [size] * (40 // size), {"type": "stop", "matched": 1}
    delta = run(tokenizer, text, sizes, reason, thinking=False, tools=TOOLS)
    assert delta.content.strip("\n") == content.strip("\n")
    found = [json.loads(call.arguments)["city"] for call in delta.whole_calls()]
    assert found == calls


@pytest.mark.parametrize("spelled", [False, True])
def test_eos_in_a_value_ends_it(tokenizer, spelled):
    text = CALL[: CALL.index("ln</")] + "<｜end▁of▁sentence｜>" * spelled
    delta = run(tokenizer, text, [5], {"type": "stop"}, thinking=False, tools=TOOLS)
    assert delta.whole_calls()[0].arguments == '{"city": "Kö'
    assert delta.finish_reason == "stop"


def test_held_text_that_is_no_stop_is_kept(tokenizer):
    reason = {"type": "length"}
    delta = run(tokenizer, "one two thr", [1, 1, 1], reason, thinking=False, stop="three")
    assert delta == Delta(content="one two thr", finish_reason="length")


def test_cut_call_is_not_complete(tokenizer):
    text = CALL[: CALL.index("ln</")]
    delta = run(tokenizer, text, [5], {"type": "length"}, thinking=False, tools=TOOLS)
    assert delta.finish_reason == "length"
    assert delta.whole_calls()[0].arguments == '{"city": "Kö'


def test_reasoning_in_one_piece_or_in_the_content(tokenizer):
    parser = OutputParser(TokenBytes(tokenizer), True, None, stream_reasoning=False)
    ids = tokenizer.encode("a b</think>c", add_special_tokens=False).ids
    deltas = [parser.feed([token]) for token in ids]
    assert [d.reasoning for d in deltas if d.reasoning] == ["a b"]
    joined = run(tokenizer, "a b</think>c", [1], {"type": "stop"}, separate_reasoning=False)
    assert (joined.reasoning, joined.content) == ("", "a bc")


def test_pieces_of_two_calls_join():
    delta = Delta(
        calls=[CallDelta(0, "{", "x", "f"), CallDelta(0, "}"), CallDelta(1, "{}", "y", "g")]
    )
    assert delta.whole_calls() == [CallDelta(0, "{}", "x", "f"), CallDelta(1, "{}", "y", "g")]
