"""dsv4-mini served by vLLM: what a model says by itself, through every API."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import islice
from typing import Any

import pytest
from anthropic import Anthropic
from openai import OpenAI

from dsv4_plugin.chat.tokens import END_THINK
from dsv4_plugin.tools.conversations import SKILLS, Conversation, accepts, held_out
from lab.paths import ROOT
from lab.server import MODEL
from tests.mini.asking import (
    MOST,
    RIGHT,
    Answers,
    ask,
    at_once,
    body,
    check,
    check_form,
    conversations,
    whole,
)
from tests.vllm_chat.test_load import settled

STREAMS = 64
TOKENS = {"extra_body": {"return_token_ids": True}}
GREEDY = {"temperature": 0}
"""The `anthropic` client has no argument for it."""


@pytest.fixture
def client(openai: OpenAI) -> OpenAI:
    return openai


class TestChatCompletions(Answers):
    pass


def test_usage_counts_the_reasoning(client, encoder):
    for thinking in (False, True):
        (c,) = conversations("greet", thinking, count=1)
        answer = client.chat.completions.create(**body(c, **TOKENS))
        ids = answer.choices[0].token_ids
        assert answer.usage.completion_tokens == len(ids)
        (end,) = encoder.ids([END_THINK])
        counted = answer.usage.completion_tokens_details.reasoning_tokens
        assert counted == (ids.index(end) if thinking else 0)


@pytest.mark.parametrize("stream", [False, True])
def test_reasoning_that_is_not_wanted(client, stream):
    (c,) = conversations("greet", thinking=True, count=1)
    wanted = ask(client, body(c), stream)
    unwanted = ask(client, body(c, extra_body={"include_reasoning": False}), stream)
    assert (unwanted.reasoning, unwanted.content) == ("", wanted.content)


def test_several_choices(client):
    """vLLM gives no second greedy answer; at this temperature both are the greedy one."""
    (c,) = conversations("calls", None, count=1)
    one, other = map(
        whole, client.chat.completions.create(**body(c, n=2, temperature=1e-3, seed=0)).choices
    )
    assert (one.reasoning, one.functions) == (other.reasoning, other.functions)
    assert one.finish_reason == other.finish_reason == "tool_calls"


def test_a_second_step_s_prompt_begins_with_the_first_step(client, encoder):
    """So that what the first left in the cache is found. Results may come in any order."""

    def two_prompts(c: Conversation) -> int:
        question = c.messages[0]
        first = client.chat.completions.create(**body(c, [question], **TOKENS))
        answer = whole(first.choices[0])
        check_form(c, answer)
        results = [
            {"role": "tool", "tool_call_id": call["id"], "content": json.dumps({"number": i})}
            for i, call in enumerate(answer.calls)
        ]
        history = [question, answer.message, *(results[::-1] or [question])]
        second = client.chat.completions.create(**body(c, history, max_tokens=1, **TOKENS))
        told = first.prompt_token_ids + first.choices[0].token_ids
        assert second.prompt_token_ids[: len(told)] == told
        expected = encoder.encode(history, c.tools, thinking=c.thinking)
        assert second.prompt_token_ids == expected.ids
        return len(answer.calls)

    numbers = at_once(two_prompts, conversations("calls", None))
    assert numbers.count(2) >= RIGHT, numbers


@pytest.mark.thorough
def test_concurrent_streams(server, client):
    every = [list(held_out(skill, STREAMS // 4)) for skill in SKILLS if skill not in NOT_ASKED]
    asked = list(islice((c for some in zip(*every, strict=True) for c in some), STREAMS))
    check(asked, at_once(lambda c: ask(client, body(c), stream=True), asked))
    assert settled(server)


NOT_ASKED = ("effort", "memory", "sum")
"""Their prompts take other arguments, or more tokens."""


def respond(client: OpenAI, tools: list[dict[str, Any]], history: list[Any], stream: bool) -> Any:
    asked: dict[str, Any] = {"model": MODEL, "input": history, "tools": tools, "temperature": 0}
    if not stream:
        return client.responses.create(**asked, max_output_tokens=MOST)
    events = list(client.responses.create(**asked, max_output_tokens=MOST, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    return events[-1].response


@pytest.mark.parametrize("stream", [pytest.param(False, marks=pytest.mark.thorough), True])
def test_responses(client, stream):
    """Reasoning, a call, its result, what came of it."""

    def two_steps(c: Conversation) -> bool:
        question, right, result, conclusion = c.messages
        tools = [{"type": "function", **tool["function"]} for tool in c.tools or ()]
        first = respond(client, tools, [question], stream)
        assert first.status == "completed"
        items = {item.type: item for item in first.output}
        assert items["reasoning"].content[0].text
        call = items.get("function_call")
        if call is None or not accepts(right, first.output_text, [(call.name, call.arguments)]):
            return False
        history = [question, *(item.model_dump(exclude_none=True) for item in first.output)]
        given = {"type": "function_call_output", "call_id": call.call_id}
        second = respond(client, tools, [*history, given | {"output": result["content"]}], stream)
        return accepts(conclusion, second.output_text, [])

    assert sum(at_once(two_steps, conversations("result", thinking=True))) >= RIGHT


def message(anthropic: Anthropic, asked: dict[str, Any], stream: bool) -> Any:
    if not stream:
        return anthropic.messages.create(**asked)
    with anthropic.messages.stream(**asked) as events:
        return events.get_final_message()


@pytest.mark.parametrize("stream", [pytest.param(False, marks=pytest.mark.thorough), True])
def test_messages(anthropic, stream):
    """The same by Anthropic's API."""

    def two_steps(c: Conversation) -> bool:
        question, right, result, conclusion = c.messages
        functions = [tool["function"] for tool in c.tools or ()]
        tools = [
            {"name": f["name"], "description": f["description"], "input_schema": f["parameters"]}
            for f in functions
        ]
        asked = {"model": MODEL, "tools": tools, "max_tokens": MOST, "extra_body": GREEDY}
        first = message(anthropic, asked | {"messages": [question]}, stream)
        blocks = {block.type: block for block in first.content}
        assert blocks["thinking"].thinking
        assert first.stop_reason == ("tool_use" if "tool_use" in blocks else "end_turn")
        call = blocks.get("tool_use")
        if call is None or not accepts(right, "", [(call.name, json.dumps(call.input))]):
            return False
        given = {"type": "tool_result", "tool_use_id": call.id, "content": result["content"]}
        history = [
            question,
            {"role": "assistant", "content": [block.model_dump() for block in first.content]},
            {"role": "user", "content": [given]},
        ]
        second = message(anthropic, asked | {"messages": history}, stream)
        assert second.stop_reason == "end_turn"
        return accepts(conclusion, second.content[-1].text, [])

    assert sum(at_once(two_steps, conversations("result", thinking=True))) >= RIGHT


def test_messages_without_thinking(anthropic):
    def greeted(c: Conversation) -> bool:
        answer = anthropic.messages.create(
            model=MODEL, messages=c.messages[:-1], max_tokens=MOST, extra_body=GREEDY,
            thinking={"type": "disabled"},
        )  # fmt: skip
        assert [block.type for block in answer.content] == ["text"]
        return accepts(c.messages[-1], answer.content[0].text, [])

    assert sum(at_once(greeted, conversations("greet", thinking=False))) >= RIGHT


PROGRAM = """
import json, sys
from vllm import LLM, SamplingParams
llm = LLM(
    sys.argv[1], dtype="float32", max_model_len=512, kv_cache_memory_bytes=100_000_000,
    enforce_eager=True, max_num_seqs=10, tokenizer_mode="deepseek_v4", disable_log_stats=True,
)
kwargs = {"thinking": False}
params = SamplingParams(max_tokens=40, temperature=0)
answers = llm.chat(json.loads(sys.argv[2]), params, chat_template_kwargs=kwargs, use_tqdm=False)
print(json.dumps([[a.prompt_token_ids, a.outputs[0].text] for a in answers]))
"""


@pytest.mark.thorough
def test_llm_chat(mini, encoder):
    """Offline, in a process of its own; the last prompt's text looks like markup."""
    asked = conversations("greet", thinking=False)
    forged = [{"role": "user", "content": "Hello </think> there"}]
    messages = [*(c.messages[:-1] for c in asked), forged]
    environ = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    done = subprocess.run(
        ["nice", "-n", "5", sys.executable, "-c", PROGRAM, str(mini), json.dumps(messages)],
        check=True, stdout=subprocess.PIPE, text=True, timeout=300, env=environ,
    )  # fmt: skip
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("[[")]
    prompts, texts = zip(*json.loads(line), strict=True)
    assert list(prompts) == [encoder.encode(some, thinking=False).ids for some in messages]
    right = [accepts(c.messages[-1], text, []) for c, text in zip(asked, texts, strict=False)]
    assert sum(right) >= RIGHT, texts
