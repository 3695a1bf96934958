"""dsv4-mini asked through the `openai` client, and what its answers have to be.

Here no model is played: mini itself answers conversations that it was not trained on. It is right
in about 19 of 20, so most answers have to be right; every one of them has to be well formed. They
are greedy and in float32, so a run sees what the last one saw.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any

import pytest
from openai import OpenAI

from dsv4_plugin.chat.tokens import DSML, END_THINK, THINK
from dsv4_plugin.tools.conversations import Conversation, accepts, held_out
from lab.server import MODEL

ASKED, RIGHT = 10, 9
"""Conversations of a test, and how many of the answers have to be right."""
MOST = 128
"""Tokens of an answer."""
Json = dict[str, Any]


@dataclass(frozen=True)
class Answer:
    """What the client sees of an answer; calls are OpenAI's tool_calls."""

    reasoning: str
    content: str
    calls: list[Json]
    finish_reason: str

    @property
    def functions(self) -> list[tuple[str, str]]:
        """Name and arguments of every call."""
        return [(c["function"]["name"], c["function"]["arguments"]) for c in self.calls]

    @property
    def message(self) -> Json:
        """As a turn of the history."""
        turn: Json = {"role": "assistant", "content": self.content}
        if self.reasoning:
            turn["reasoning_content"] = self.reasoning
        return turn | ({"tool_calls": self.calls} if self.calls else {})


def conversations(skill: str, thinking: bool | None, count: int = ASKED) -> list[Conversation]:
    """Held-out ones, with reasoning or without it, or (None) both."""
    drawn = held_out(skill, 1000)
    return list(islice((c for c in drawn if thinking in (None, c.thinking)), count))


def body(c: Conversation, messages: Sequence[Json] | None = None, **more: Any) -> Json:
    """Arguments of `chat.completions.create` for the conversation's last answer, or for the answer
    to other messages."""
    kwargs = {"chat_template_kwargs": {"thinking": c.thinking}} | more.pop("extra_body", {})
    asked: Json = {"model": MODEL, "messages": list(messages or c.messages[:-1])}
    asked |= {"temperature": 0, "max_tokens": MOST, "extra_body": kwargs}
    asked |= {"tools": c.tools} if c.tools else {}
    asked |= {"response_format": c.response_format} if c.response_format else {}
    return asked | more


def ask(client: OpenAI, asked: Json, stream: bool) -> Answer:
    if stream:
        return added_up(client.chat.completions.create(**asked, stream=True))
    (choice,) = client.chat.completions.create(**asked).choices
    return whole(choice)


def whole(choice: Any) -> Answer:
    message = choice.message
    calls = [
        {"id": call.id, "type": "function", "function": call.function.model_dump()}
        for call in message.tool_calls or ()
    ]
    return Answer(_reasoning(message), message.content or "", calls, choice.finish_reason)


def added_up(stream: Any) -> Answer:
    """The answer that a stream's deltas add up to."""
    reasoning = content = finish = ""
    calls: list[Json] = []
    for chunk in stream:
        for choice in chunk.choices:
            reasoning += _reasoning(choice.delta)
            content += choice.delta.content or ""
            for call in choice.delta.tool_calls or ():
                if call.index == len(calls):
                    function = {"name": call.function.name, "arguments": ""}
                    calls.append({"id": call.id, "type": "function", "function": function})
                calls[call.index]["function"]["arguments"] += call.function.arguments or ""
            finish = choice.finish_reason or finish
    return Answer(reasoning, content, calls, finish)


def _reasoning(message: Any) -> str:
    """Each engine has its own name for it."""
    names = ("reasoning", "reasoning_content")
    return next((text for name in names if (text := getattr(message, name, None))), "")


def at_once(work: Callable[[Conversation], Any], asked: Sequence[Conversation]) -> list[Any]:
    """One thread for each conversation; results in their order."""
    with ThreadPoolExecutor(len(asked)) as pool:
        return list(pool.map(work, asked))


def check(asked: Sequence[Conversation], answers: Sequence[Answer]) -> None:
    """Every answer is well formed, most of them are right."""
    for c, answer in zip(asked, answers, strict=True):
        check_form(c, answer)
    wrong = [
        (answer, c.messages[-1])
        for c, answer in zip(asked, answers, strict=True)
        if not accepts(c.messages[-1], answer.content, answer.functions)
    ]
    assert len(asked) - len(wrong) >= len(asked) * RIGHT // ASKED, wrong


def check_form(c: Conversation, answer: Answer) -> None:
    """No markup is left over, reasoning came where it was asked for, calls are of known tools with
    ids of their own, arguments and answers to schemas are JSON objects."""
    text = answer.reasoning + answer.content
    assert not any(str(mark) in text for mark in (THINK, END_THINK, DSML)), answer
    assert bool(answer.reasoning) == c.thinking, answer
    assert answer.finish_reason == ("tool_calls" if answer.calls else "stop"), answer
    offered = [tool["function"]["name"] for tool in c.tools or ()]
    for name, arguments in answer.functions:
        assert name in offered, answer
        assert isinstance(json.loads(arguments), dict), answer
    assert len({call["id"] for call in answer.calls}) == len(answer.calls), answer
    if c.response_format:
        assert isinstance(json.loads(answer.content), dict), answer


class Answers:
    """Tests of chat completions; a subclass stands where the fixture `client` is an OpenAI client
    of a server of mini."""

    @pytest.mark.parametrize("stream", [False, True])
    @pytest.mark.parametrize(
        ("skill", "thinking"),
        [("greet", False), ("greet", True), ("call", None), ("calls", None), ("json", None)],
    )
    def test_answers(self, client: OpenAI, skill: str, thinking: bool | None, stream: bool):
        asked = conversations(skill, thinking)
        check(asked, at_once(lambda c: ask(client, body(c), stream), asked))

    @pytest.mark.parametrize("stream", [False, True])
    def test_a_tool_s_result(self, client: OpenAI, stream: bool):
        """The model calls, the client hands over the result, the model says what came of it."""
        asked = conversations("result", None)

        def two_steps(c: Conversation) -> tuple[Answer, Answer]:
            question, right, result, _ = c.messages
            first = ask(client, body(c, [question]), stream)
            check_form(c, first)
            said = first.message if first.calls else right
            history = [question, said, result | {"tool_call_id": said["tool_calls"][0]["id"]}]
            return first, ask(client, body(c, history), stream)

        first, second = zip(*at_once(two_steps, asked), strict=True)
        called = [
            accepts(c.messages[1], a.content, a.functions)
            for c, a in zip(asked, first, strict=True)
        ]
        assert sum(called) >= RIGHT, first
        check(asked, second)

    def test_streams_add_up_to_whole_answers(self, client: OpenAI):
        for skill in ("greet", "calls", "json"):
            (c,) = conversations(skill, thinking=True, count=1)
            one, other = (ask(client, body(c), stream) for stream in (False, True))
            assert one.functions == other.functions
            assert (one.reasoning, one.content, one.finish_reason) == (
                other.reasoning, other.content, other.finish_reason,
            )  # fmt: skip
