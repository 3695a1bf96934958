"""Chat Completions and Completions, with the `openai` client, whole and streamed.

The words are scripted, because a good model would not say them: calls inside the reasoning, calls
cut anywhere, stop strings, odd text. test_mini.py has what a model says by itself.
"""

from __future__ import annotations

import json

import pytest

from dsv4_plugin.chat import parse
from tests.vllm_chat import outputs
from tests.vllm_chat.server import MODEL, scripted

QUESTION = [{"role": "user", "content": "q"}]


def ask(openai, ids, stream, extra=None, **more):
    """The message, its finish reason and its usage."""
    body = {"model": MODEL, "messages": QUESTION, "max_tokens": len(ids)} | more
    extra = scripted(ids) | (extra or {})
    if not stream:
        answer = openai.chat.completions.create(**body, extra_body=extra)
        return answer.choices[0].message.model_dump(), answer.choices[0].finish_reason, answer.usage
    options = {"include_usage": True}
    stream = openai.chat.completions.create(
        **body, stream=True, stream_options=options, extra_body=extra
    )
    return collect(stream)


def collect(stream):
    message = {"reasoning": "", "content": "", "tool_calls": []}
    *chunks, last = stream
    for chunk in chunks:
        delta = chunk.choices[0].delta
        message["reasoning"] += getattr(delta, "reasoning", None) or ""
        message["content"] += delta.content or ""
        for call in delta.tool_calls or ():
            if call.index == len(message["tool_calls"]):
                message["tool_calls"].append(call.model_dump(exclude={"index"}))
            else:
                function = message["tool_calls"][call.index]["function"]
                function["arguments"] += call.function.arguments
    return message, chunks[-1].choices[0].finish_reason, last.usage


def calls(message):
    functions = [call["function"] for call in message["tool_calls"] or ()]
    return [(function["name"], function["arguments"]) for function in functions]


def expected(text, tools=None, finish="stop"):
    message = parse(text, True, tools, finish)
    return message.reasoning, message.content, [(c.name, c.arguments) for c in message.tool_calls]


@pytest.mark.parametrize("stream", [False, True])
def test_odd_text_around_the_reasoning_s_end(openai, words, stream):
    ids = words(outputs.PLAIN)
    message, finish, usage = ask(openai, ids, stream)
    assert (message["reasoning"], message["content"], []) == expected(outputs.PLAIN)
    assert (finish, usage.completion_tokens) == ("stop", len(ids))
    assert usage.completion_tokens_details.reasoning_tokens == ids.index(128822)


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_inside_the_reasoning(openai, words, stream):
    message, finish, _ = ask(openai, words(outputs.IN_REASONING), stream, tools=outputs.TOOLS)
    reasoning, content, wanted = expected(outputs.IN_REASONING, outputs.TOOLS)
    assert message["reasoning"] == reasoning
    assert (message["content"] or None) == content
    assert calls(message) == wanted
    assert finish == "tool_calls"
    assert len({call["id"] for call in message["tool_calls"]}) == len(wanted)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("left_out", [1, 2, 9, 21, 40, 55, 62])
def test_cut_by_max_tokens(openai, words, stream, left_out):
    ids = words(outputs.ONE_CALL)
    cut = {"max_tokens": len(ids) - left_out, "tools": outputs.TOOLS}
    message, finish, _ = ask(openai, ids, stream, {"return_token_ids": True}, **cut)
    said = ids[: len(ids) - left_out]
    reasoning, content, wanted = expected(decoded(openai, said), outputs.TOOLS, "length")
    assert finish == "length"
    assert (message["reasoning"], message["content"] or None) == (reasoning, content)
    assert calls(message) == wanted
    for _, arguments in calls(message)[left_out < 4 :]:
        with pytest.raises(json.JSONDecodeError):
            json.loads(arguments)


def decoded(openai, ids):
    url = str(openai.base_url).removesuffix("v1/") + "detokenize"
    return openai.post(url, body={"tokens": ids, "model": MODEL}, cast_to=dict)["prompt"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_of_the_client(openai, words, stream):
    more = {"stop": ["STOP"], "tools": outputs.TOOLS, "max_tokens": 50}
    message, finish, _ = ask(openai, words("r</think>one STOP two"), stream, **more)
    assert (message["reasoning"], message["content"], finish) == ("r", "one ", "stop")


def test_a_stop_string_that_cuts_a_call(openai, words):
    more = {"stop": ["Hague"], "tools": outputs.TOOLS, "max_tokens": 200}
    message, finish, _ = ask(openai, words(outputs.ONE_CALL), False, **more)
    assert (calls(message), finish) == ([("weather", '{"city": "the \\"')], "stop")


def test_a_stop_string_that_is_not_met(openai, words):
    more = {"stop": ["STOP"], "tools": outputs.TOOLS, "max_tokens": 200}
    message, finish, _ = ask(openai, words(outputs.IN_REASONING), False, **more)
    assert (message["content"], finish) == (None, "tool_calls")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("slip", outputs.SLIPS)
def test_slips(openai, words, slip, stream):
    text = outputs.SLIPS[slip]
    message, finish, _ = ask(openai, words(text), stream, tools=outputs.TOOLS)
    reasoning, content, wanted = expected(text, outputs.TOOLS)
    assert (message["reasoning"] or None, message["content"] or None) == (reasoning, content)
    assert (calls(message), finish) == (wanted, "tool_calls" if wanted else "stop")


def test_completions_with_logprobs(openai, words):
    ids = words("plain <text>")
    answer = openai.completions.create(
        model=MODEL, prompt="Once", max_tokens=len(ids), logprobs=1, extra_body=scripted(ids)
    )
    (choice,) = answer.choices
    assert (choice.text, choice.finish_reason) == ("plain <text>", "stop")
    assert len(choice.logprobs.token_logprobs) == len(ids)


def test_filling_in_the_middle(server, words):
    body = {"prompt": "a", "suffix": "b", "max_tokens": 1, "return_token_ids": True}
    (choice,) = server.post("/v1/completions", body)["choices"]
    fim = words("<｜fim▁begin｜>a<｜fim▁hole｜>b<｜fim▁end｜>", end=False)
    assert choice["prompt_token_ids"] == fim
    assert len(fim) == 5


def test_a_budget_for_reasoning(openai):
    answer = openai.chat.completions.create(
        model=MODEL, messages=QUESTION, max_tokens=12, seed=1, tools=outputs.TOOLS,
        extra_body={"thinking_token_budget": 4, "ignore_eos": True},
    )  # fmt: skip
    assert answer.usage.completion_tokens_details.reasoning_tokens == 4
