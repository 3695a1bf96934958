"""Prompts equal `deepseek-recipe`'s id for id, but for the differences listed here as data."""

from __future__ import annotations

from functools import cache, partial
from itertools import pairwise
from typing import Any

import deepseek_recipe
import pytest
from hypothesis import HealthCheck, given, settings

from dsv4_plugin.chat import Encoder, StreamParser, collect
from dsv4_plugin.chat.tokens import DSML

from . import recipe
from .data import call, encoder, tokenizer_file, tool
from .strategies import conversations


def thinks(request: dict[str, Any]) -> bool:
    disabled = request.get("thinking", {}).get("type") == "disabled"
    return not disabled and request.get("reasoning_effort") != "none"


def ours(request: dict[str, Any]) -> tuple[list[int], str]:
    prompt = encoder("0731").encode(
        request["messages"],
        request.get("tools"),
        thinks(request),
        request.get("reasoning_effort"),
        response_format=request.get("response_format"),
    )
    return prompt.ids, prompt.text


examples = partial(
    settings, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)


@given(conversations())
@examples(max_examples=500)
def test_ids_equal_recipes(request: dict[str, Any]) -> None:
    assert ours(request) == recipe.encode(request)


@pytest.mark.thorough
@given(conversations())
@examples(max_examples=5000)
def test_ids_of_many_equal_recipes(request: dict[str, Any]) -> None:
    assert ours(request) == recipe.encode(request)


@cache
def encoder_of_v41() -> Encoder:
    return Encoder(tokenizer_file(), "v4.1")


def text_of_v41(request: dict[str, Any]) -> str:
    rendered = encoder_of_v41().render(
        request["messages"],
        request.get("tools"),
        thinks(request),
        request.get("reasoning_effort"),
        response_format=request.get("response_format"),
    )
    return rendered.text


@given(conversations())
@examples(max_examples=300)
def test_texts_of_v41_equal_recipes(request: dict[str, Any]) -> None:
    """Its tokenizer is not at hand: `<｜System｜>` is a token there. Of reminders that follow each
    other the authors' code writes the first only (here none is lost), and it does not reason about
    what no user has asked for."""
    roles = [m["role"] for m in request["messages"] if m["role"] != "system" or m["content"]]
    if ("latest_reminder", "latest_reminder") in pairwise(roles) or "user" not in roles:
        return
    try:
        expected = recipe.text_of_v41(request)
    except deepseek_recipe.ConversionError:
        return
    assert text_of_v41(request) == expected


USER = {"role": "user", "content": "hi"}
SYSTEM = {"role": "system", "content": "As JSON."}
ANSWER = {"role": "assistant", "content": "a", "reasoning_content": "r"}
V41_REQUESTS: list[dict[str, Any]] = [
    {"messages": messages, **rest}
    for messages in (
        [USER],
        [SYSTEM, USER],
        [SYSTEM, SYSTEM, USER],
        [USER, ANSWER, SYSTEM, USER],
        [USER, ANSWER, SYSTEM],
        [SYSTEM, USER, ANSWER, SYSTEM, USER, ANSWER, USER],
    )
    for rest in (
        {},
        {"thinking": {"type": "disabled"}},
        {"tools": [tool("f", a={"type": "string"})]},
        {"tools": [tool("f", a={"type": "string"})], "thinking": {"type": "disabled"}},
        *({"reasoning_effort": e} for e in ("minimal", "low", "medium", "high", "xhigh", "max")),
    )
]
JSON_REQUEST = {"messages": [SYSTEM, USER], "response_format": {"type": "json_object"}}


@pytest.mark.parametrize("request_", [*V41_REQUESTS, JSON_REQUEST])
def test_system_texts_and_efforts_of_v41(request_: dict[str, Any]) -> None:
    assert text_of_v41(request_) == recipe.text_of_v41(request_)


def test_v41_needs_its_own_tokenizer() -> None:
    with pytest.raises(ValueError, match=r"has no token '<｜System｜>'; is it DeepSeek-V4.1's\?"):
        encoder_of_v41().encode([USER])


@pytest.mark.parametrize("cut", range(1, 40))
def test_v41_s_tags_are_read(cut: int) -> None:
    """In any pieces, to the same message as V4's."""
    own = (
        f'so\n\n<{DSML}tool_calls>\n<{DSML}invoke name="f">\n<{DSML}parameter name="a" '
        f'string="true">x</{DSML}parameter>\n</{DSML}invoke>\n</{DSML}tool_calls>'
    )
    theirs = own.replace(DSML, f"{DSML} ").replace("tool_calls", "calls")
    tools = [tool("f", a={"type": "string"})]
    parser = StreamParser(False, tools, call_id=lambda: "1")
    pieces = [theirs[i : i + cut] for i in range(0, len(theirs), cut)]
    found = collect([e for p in pieces for e in parser.feed(p)] + parser.finish("stop"))
    whole = StreamParser(False, tools, call_id=lambda: "1")
    assert found == collect([*whole.feed(own), *whole.finish("stop")])
    assert [c.name for c in found.tool_calls] == ["f"]


def calling(arguments: str) -> list[dict[str, Any]]:
    result = {"role": "tool", "tool_call_id": "c1", "content": ""}
    return [{"role": "assistant", "content": "", "tool_calls": [call("f", arguments)]}, result]


STRICT = tool("f", a={"type": "string", "minLength": 2})
STRICT["function"]["strict"] = True

DIFFERENCES: dict[str, tuple[dict[str, Any], str, str]] = {
    # what: (request, in recipe's prompt only, in ours only)
    "xhigh asks for the most, as max does": (
        {"messages": [USER], "reasoning_effort": "xhigh"},
        "Absolute maximum",
        "Beyond maximum",
    ),
    "effort none is chat mode, whatever else is asked": (
        {"messages": [USER], "reasoning_effort": "none", "thinking": {"type": "enabled"}},
        "<｜Assistant｜><think>",
        "<｜Assistant｜></think>",
    ),
    "integers of any size stay exact": (
        {"messages": calling('{"n": 123456789012345678901}')},
        '"false">1.2345678901234568e+20<',
        '"false">123456789012345678901<',
    ),
    "small numbers are written as Python's json does, like the authors' own encoder": (
        {"messages": calling('{"n": 0.00001}')},
        '"false">0.00001<',
        '"false">1e-05<',
    ),
    "no arguments are no parameters, not one empty parameter": (
        {"messages": calling("")},
        'name="arguments" string="true"></',
        '<｜DSML｜invoke name="f">\n</｜DSML｜invoke>',
    ),
    "a strict tool's schema is shown as the user wrote it": (
        {"messages": [USER], "tools": [STRICT]},
        '"additionalProperties": false',
        '"minLength": 2',
    ),
}


@pytest.mark.parametrize("what", DIFFERENCES)
def test_differences(what: str) -> None:
    """Each is still one, so that the list in docs/chat.md stays true."""
    request, theirs, mine = DIFFERENCES[what]
    expected, found = recipe.encode(request)[1], ours(request)[1]
    assert (theirs in expected, theirs in found) == (True, False)
    assert (mine in expected, mine in found) == (False, True)


ACCEPTED_HERE_ONLY: dict[str, list[dict[str, Any]]] = {
    "developer": [{"role": "developer", "content": "d"}, USER],
    "null content": [{"role": "user", "content": None}],
    "empty assistant message": [USER, {"role": "assistant", "content": None}, USER],
    "calls that nobody answered": [calling("{}")[0], USER],
    "a result that nobody asked for": [{"role": "tool", "tool_call_id": "x", "content": "r"}],
    "arguments as an object": calling({"a": 1}),  # type: ignore[arg-type]
    "an empty list of calls": [{"role": "assistant", "content": "a", "tool_calls": []}, USER],
}


@pytest.mark.parametrize("what", ACCEPTED_HERE_ONLY)
def test_accepted_here_only(what: str) -> None:
    request = {"messages": ACCEPTED_HERE_ONLY[what]}
    with pytest.raises((deepseek_recipe.ConversionError, ValueError)):
        recipe.encode(request)
    assert ours(request)


def test_images_are_refused_not_dropped() -> None:
    image = {"type": "image_url", "image_url": {"url": "http://localhost/a.png"}}
    request = {"messages": [{"role": "user", "content": [image]}]}
    assert "[Unsupported Image]" in recipe.encode(request)[1]
    with pytest.raises(ValueError, match="reads text only"):
        ours(request)
