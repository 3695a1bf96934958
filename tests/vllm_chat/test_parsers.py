"""The parsers as vLLM composes them, without a server: every cut, every way to ask. Outputs are
made up, because their cuts and oddities are what is tested."""

from __future__ import annotations

import math
from importlib.metadata import requires

import pytest
from packaging.requirements import Requirement
from vllm.entrypoints.openai.chat_completion.protocol import (
    ChatCompletionNamedToolChoiceParam,
    ChatCompletionRequest,
)
from vllm.parser import ParserManager
from vllm.tool_parsers import ToolParserManager

import vllm_ext
from dsv4_plugin.chat import StreamParser, collect, parse
from tests.vllm_chat import outputs
from vllm_ext.chat_compat import REPORTS_CUT_CALLS
from vllm_ext.reasoning_parser import DeepseekV4ReasoningParser
from vllm_ext.tokenizer import DeepseekV4Tokenizer

MODE = "deepseek_v4"
EOS = "<｜end▁of▁sentence｜>"
QUESTION = [{"role": "user", "content": "q"}]


@pytest.fixture(scope="module")
def tokenizer(tiny):
    return DeepseekV4Tokenizer.from_pretrained(str(tiny))


@pytest.fixture
def registered(monkeypatch):
    monkeypatch.setattr(ToolParserManager, "tool_parsers", {})
    vllm_ext.register()


def compose(tokenizer, tools=True, reasoning=True):
    return ParserManager.get_parser(
        tool_parser_name=MODE if tools else None,
        reasoning_parser_name=MODE if reasoning else None,
        enable_auto_tools=tools,
        tokenizer=tokenizer,
    )


def chat(**more):
    return ChatCompletionRequest.model_validate({"messages": QUESTION} | more)


def whole(make, tokenizer, request, text):
    parser = make(tokenizer, request.tools, chat_template_kwargs={})
    parser.adjust_request(request)
    return parser.parse(text, request, enable_auto_tools=True)


def streamed(make, tokenizer, request, pieces, thinking=True):
    """The deltas of a stream, added up: reasoning, content, calls by index."""
    prompt = [0, 128803, 128804, 128821 if thinking else 128822]
    parser = make(tokenizer, request.tools, chat_template_kwargs={})
    parser.adjust_request(request)
    reasoning, content, calls = "", "", {}
    for n, piece in enumerate(pieces):
        last = n == len(pieces) - 1
        delta = parser.parse_delta(piece, [7], request, prompt, finished=last)
        if delta is None:
            continue
        reasoning += delta.reasoning or ""
        content += delta.content or ""
        for call in delta.tool_calls:
            entry = calls.setdefault(call.index, [call.function.name, ""])
            assert call.id is None or entry[1] == ""
            entry[1] += call.function.arguments
    return reasoning, content, list(map(tuple, calls.values()))


def expected(text, tools, ended, thinking=True):
    message = parse(text, thinking, tools, "stop" if ended else "length")
    calls = [(call.name, call.arguments) for call in message.tool_calls]
    return message.reasoning or "", message.content or "", calls


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("text", [outputs.PLAIN, outputs.ONE_CALL, outputs.TWO_CALLS])
def test_an_output_cut_anywhere_gives_what_the_core_gives(tokenizer, text):
    make = compose(tokenizer)
    for end in range(1, len(text) + 2):
        ended = end > len(text)
        cut = text + EOS if ended else text[:end]
        wanted = expected(text[:end], outputs.TOOLS, ended)
        assert streamed(make, tokenizer, chat(tools=outputs.TOOLS), cut) == wanted
        request = chat(tools=outputs.TOOLS)
        reasoning, content, calls = whole(make, tokenizer, request, cut)
        found = [(call.name, call.arguments) for call in calls or ()]
        assert (reasoning or "", content or "", found) == wanted
        if found and not REPORTS_CUT_CALLS:
            assert request.tool_choice == ("auto" if ended else "required")


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("text", [outputs.IN_REASONING, outputs.AGAIN])
@pytest.mark.parametrize("tools", [None, outputs.TOOLS])
def test_reasoning_and_calls_in_any_order(tokenizer, text, tools):
    make = compose(tokenizer)
    more = {"tools": tools} if tools else {}
    wanted = expected(text, tools, ended=True)
    assert streamed(make, tokenizer, chat(**more), [*text, EOS]) == wanted
    reasoning, content, calls = whole(make, tokenizer, chat(**more), text + EOS)
    found = [(call.name, call.arguments) for call in calls or ()]
    assert (reasoning or "", content or "", found) == wanted


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("slip", outputs.SLIPS)
def test_slips_give_what_the_core_gives(tokenizer, slip):
    make, text = compose(tokenizer), outputs.SLIPS[slip]
    wanted = expected(text, outputs.TOOLS, ended=True)
    assert streamed(make, tokenizer, chat(tools=outputs.TOOLS), [*text, EOS]) == wanted
    reasoning, content, calls = whole(make, tokenizer, chat(tools=outputs.TOOLS), text + EOS)
    found = [(call.name, call.arguments) for call in calls or ()]
    assert (reasoning or "", content or "", found) == wanted


@pytest.mark.usefixtures("registered")
def test_the_eos_token_is_no_text_of_a_value(tokenizer):
    make, text = compose(tokenizer), outputs.ONE_CALL[: outputs.ONE_CALL.index("Hague")]
    wanted = expected(text, outputs.TOOLS, ended=True)
    assert wanted[2][0][1] == '{"city": "the \\"'
    assert streamed(make, tokenizer, chat(tools=outputs.TOOLS), [*text, EOS]) == wanted


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("stop", ["STOP", ["zzz", "STOP"]])
@pytest.mark.parametrize("text", [outputs.PLAIN, outputs.ONE_CALL])
def test_a_stop_string_anywhere(tokenizer, text, stop):
    """It ends the text that vLLM hands over, and is not shown; a call that it cuts stays half."""
    make = compose(tokenizer)
    for end in range(1, len(text) + 1):
        parser = StreamParser(True, outputs.TOOLS)
        message = collect([*parser.feed(text[:end]), *parser.finish("stop", cut=True)])
        found = [(call.name, call.arguments) for call in message.tool_calls]
        wanted = message.reasoning or "", message.content or "", found
        request = chat(tools=outputs.TOOLS, stop=stop)
        assert streamed(make, tokenizer, request, [*text[:end], "ST", "OP"]) == wanted
        request = chat(tools=outputs.TOOLS, stop=stop)
        reasoning, content, calls = whole(make, tokenizer, request, f"{text[:end]}STOP")
        found = [(call.name, call.arguments) for call in calls or ()]
        assert (reasoning or "", content or "", found) == wanted
        if found and not REPORTS_CUT_CALLS:
            cut = message.finish_reason == "stop"
            assert isinstance(request.tool_choice, ChatCompletionNamedToolChoiceParam) == cut


@pytest.mark.usefixtures("registered")
def test_a_stop_string_that_is_not_met(tokenizer):
    make, text = compose(tokenizer), outputs.TWO_CALLS
    wanted = expected(text, outputs.TOOLS, ended=True)
    request = chat(tools=outputs.TOOLS, stop="STOP")
    assert streamed(make, tokenizer, request, [*text, EOS]) == wanted
    request = chat(tools=outputs.TOOLS, stop="STOP")
    reasoning, content, calls = whole(make, tokenizer, request, text + EOS)
    found = [(call.name, call.arguments) for call in calls]
    assert (reasoning, content or "", found) == wanted
    assert content is None
    assert request.tool_choice == "auto"


@pytest.mark.usefixtures("registered")
def test_a_stop_that_the_client_wants_to_see(tokenizer):
    make = compose(tokenizer)
    request = chat(tools=outputs.TOOLS, stop="STOP", include_stop_str_in_output=True)
    assert whole(make, tokenizer, request, "r</think>oneSTOP")[:2] == ("r", "oneSTOP")


@pytest.mark.usefixtures("registered")
def test_calls_that_nobody_asked_for_are_content(tokenizer):
    make = compose(tokenizer)
    for more in ({}, {"tools": outputs.TOOLS, "tool_choice": "none"}):
        wanted = expected(outputs.ONE_CALL, None, ended=True)
        assert streamed(make, tokenizer, chat(**more), [*outputs.ONE_CALL, EOS]) == wanted
        reasoning, content, calls = whole(make, tokenizer, chat(**more), outputs.ONE_CALL + EOS)
        assert (reasoning, content, calls) == (*wanted[:2], [])


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("schema", [{"type": "zzz"}, {"properties": []}, {"const": math.nan}])
def test_a_schema_that_no_grammar_can_be_made_of_is_refused_by_name(tokenizer, schema, strict):
    function = {"name": "bad", "parameters": schema} | ({"strict": True} if strict else {})
    tools = [outputs.TOOLS[0], {"type": "function", "function": function}]
    request = chat(tools=tools, tool_choice="auto" if strict else "required")
    with pytest.raises(ValueError, match=r"^tools\[1\]\.function\.parameters: .*(bad|NaN|JSON)"):
        compose(tokenizer)(tokenizer, request.tools).adjust_request(request)


@pytest.mark.usefixtures("registered")
def test_flat_tools_of_a_message_and_those_that_come_too_late(tokenizer):
    make = compose(tokenizer)
    flat = {"type": "function", **outputs.TOOLS[0]["function"]}
    messages = [{"role": "system", "content": "s", "tools": [flat]}, *QUESTION]
    text = outputs.ONE_CALL
    wanted = expected(text, outputs.TOOLS, ended=True)
    assert streamed(make, tokenizer, chat(messages=messages), [*text, EOS]) == wanted
    for tools, match in (([{"type": "x"}], r"\[0\]: must be"), ([flat], "tool_choice none")):
        messages[0]["tools"] = tools
        request = chat(messages=messages, tool_choice="none")
        with pytest.raises(ValueError, match=rf"^messages\[0\]\.tools.*{match}"):
            make(tokenizer, None).adjust_request(request)


@pytest.mark.usefixtures("registered")
def test_tools_of_a_developer_message_are_parsed(tokenizer):
    make = compose(tokenizer)
    messages = [{"role": "developer", "content": "d", "tools": outputs.TOOLS}]
    wanted = expected(outputs.ONE_CALL, outputs.TOOLS, ended=True)
    request = chat(messages=messages)
    assert streamed(make, tokenizer, request, [*outputs.ONE_CALL, EOS]) == wanted
    assert request.tool_choice == "auto"
    request = chat(messages=messages)
    _, _, calls = whole(make, tokenizer, request, outputs.ONE_CALL + EOS)
    assert [(call.name, call.arguments) for call in calls] == wanted[2]


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("text", [outputs.PLAIN, outputs.ONE_CALL, "no end"])
def test_the_reasoning_parser_alone(tokenizer, text):
    make = compose(tokenizer, tools=False)
    wanted = expected(text, None, ended=True)
    assert streamed(make, tokenizer, chat(), list(text)) == wanted
    reasoning, content, _ = whole(make, tokenizer, chat(), text)
    assert (reasoning, content or "") == wanted[:2]


@pytest.mark.usefixtures("registered")
def test_the_tool_parser_alone_leaves_reasoning_in_the_content(tokenizer):
    make = compose(tokenizer, reasoning=False)
    text = outputs.ONE_CALL
    wanted = expected(text, outputs.TOOLS, ended=True)
    content = text[: text.index("\n\n<｜DSML｜tool_calls>")]
    request = chat(tools=outputs.TOOLS)
    assert streamed(make, tokenizer, request, [*text, EOS]) == ("", content, wanted[2])
    reasoning, found, calls = whole(make, tokenizer, request, text + EOS)
    assert (reasoning, found) == (None, content)
    assert [(call.name, call.arguments) for call in calls] == wanted[2]


@pytest.mark.usefixtures("registered")
def test_a_prompt_in_chat_mode_has_no_reasoning(tokenizer):
    make = compose(tokenizer)
    assert streamed(make, tokenizer, chat(), ["a", "b", EOS], False) == ("", "ab", [])
    parser = make(tokenizer, None, chat_template_kwargs={"thinking": False})
    assert parser.parse("ab", chat(), enable_auto_tools=True) == (None, "ab", [])


@pytest.mark.usefixtures("registered")
def test_a_continued_answer_is_content(tokenizer):
    make = compose(tokenizer)
    messages = [*QUESTION, {"role": "assistant", "reasoning": "r", "content": "so"}]
    request = chat(messages=messages, continue_final_message=True, add_generation_prompt=False)
    kwargs = request.build_chat_params(None, "auto").chat_template_kwargs
    parser = make(tokenizer, None, chat_template_kwargs=kwargs)
    assert parser.parse(" be it" + EOS, request, True)[:2] == (None, " be it")
    messages[-1]["content"] = None
    request = chat(messages=messages, continue_final_message=True, add_generation_prompt=False)
    parser = make(tokenizer, None, chat_template_kwargs=kwargs)
    assert parser.parse("e</think>c" + EOS, request, True)[:2] == ("e", "c")


@pytest.mark.parametrize(
    ("messages", "tools", "ended"),
    [
        (QUESTION, None, False),
        (QUESTION, outputs.TOOLS, False),
        ([{"role": "user", "content": "q", "task": "query"}], outputs.TOOLS, True),
    ],
)
def test_where_a_prompt_ends(tokenizer, encoder, messages, tools, ended):
    parser = DeepseekV4ReasoningParser(tokenizer)
    assert parser.is_reasoning_end(encoder.encode(messages, tools).ids) is ended
    chat_mode = encoder.encode(messages, tools, thinking=False)
    assert parser.is_reasoning_end(chat_mode.ids)


def test_reasoning_tokens_are_counted(tokenizer, words):
    parser = DeepseekV4ReasoningParser(tokenizer)
    ids = words(outputs.PLAIN)
    assert parser.count_reasoning_tokens(ids) == 0
    parser.extract_reasoning_streaming("", "", "", [], [], [])
    assert parser.count_reasoning_tokens(ids) == ids.index(128822)


def test_the_finish_reason_still_needs_help():
    """Once vLLM 0.32 is no longer supported, chat_compat and what asks it can go."""
    (required,) = [name for name in requires("dsv4-plugin") if name.startswith("vllm")]
    assert "0.32.0" in Requirement(required).specifier
