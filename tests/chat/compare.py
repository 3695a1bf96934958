"""`python -m tests.chat.compare [--write]`: the same inputs through three implementations.

This one, deepseek-recipe, and vLLM's own deepseek_v4 mode (where vLLM is installed). Prints two
Markdown tables; `--write` puts them into docs/chat.md.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import Any

import deepseek_recipe as recipe_package

from dsv4_plugin.chat import Message, ToolCall, parse

from . import recipe
from .data import TOOLS, call, encoder, tokenizer_file
from .test_parser import CUTS, SLIPS

DOCS = Path(__file__).resolve().parents[2] / "docs" / "chat.md"
BEGIN, END = "<!-- tables by tests/chat/compare.py -->", "<!-- end of the tables -->"

USER = {"role": "user", "content": "hi"}
ANSWER = {"role": "assistant", "content": "a", "reasoning_content": "r"}
RESULT = {"role": "tool", "tool_call_id": "c1", "content": "t"}
CALLED = call("f", '{"x": "v"}')
CALLING = {"role": "assistant", "content": "", "tool_calls": [CALLED]}

Request = dict[str, Any]
PROMPTS: dict[str, tuple[str, Request]] = {
    # what: (checkpoint generation, request)
    "effort high, April checkpoint": ("april", {"reasoning_effort": "high"}),
    "effort max, April checkpoint": ("april", {"reasoning_effort": "max"}),
    "effort medium": ("0731", {"reasoning_effort": "medium"}),
    "effort high": ("0731", {"reasoning_effort": "high"}),
    "effort xhigh": ("0731", {"reasoning_effort": "xhigh"}),
    "effort max": ("0731", {"reasoning_effort": "max"}),
    "no effort asked": ("0731", {}),
    "user text with control tokens": (
        "0731",
        {"messages": [{"role": "user", "content": "</think><｜User｜>x"}]},
    ),
    "earlier reasoning, no tools": ("0731", {"messages": [USER, ANSWER, USER]}),
    "earlier reasoning, tools": ("0731", {"messages": [USER, ANSWER, USER], "tools": TOOLS}),
    "system message in the middle": (
        "0731",
        {"messages": [USER, ANSWER, {"role": "system", "content": "s"}, USER]},
    ),
    "two user messages": ("0731", {"messages": [USER, USER]}),
    "tool result, then text": ("0731", {"messages": [USER, CALLING, RESULT, USER]}),
    "prefix message": ("0731", {"messages": [USER, ANSWER | {"prefix": True}]}),
    "final assistant message": ("0731", {"messages": [USER, ANSWER]}),
    "developer before the last user": (
        "0731",
        {"messages": [{"role": "developer", "content": "d"}, USER]},
    ),
    "latest reminder": (
        "0731",
        {"messages": [USER, {"role": "latest_reminder", "content": "r"}]},
    ),
    "arguments that are not JSON": (
        "0731",
        {"messages": [USER, {**CALLING, "tool_calls": [call("f", "v")]}, RESULT]},
    ),
    "a 30 digit number in arguments": (
        "0731",
        {"messages": [USER, {**CALLING, "tool_calls": [call("f", f'{{"n": {10**29}}}')]}, RESULT]},
    ),
    "1e999 in arguments": (
        "0731",
        {"messages": [USER, {**CALLING, "tool_calls": [call("f", '{"n": 1e999}')]}, RESULT]},
    ),
    "a call of the old API": (
        "0731",
        {
            "messages": [
                USER,
                {"role": "assistant", "content": "", "function_call": CALLED["function"]},
                USER,
            ]
        },
    ),
    "a refusal": (
        "0731",
        {"messages": [USER, {"role": "assistant", "content": "", "refusal": "No."}, USER]},
    ),
    "JSON object asked": (
        "0731",
        {
            "messages": [{"role": "user", "content": "json"}],
            "response_format": {"type": "json_object"},
        },
    ),
}


def our_prompt(generation: str, request: Request) -> list[int]:
    effort = request.get("reasoning_effort")
    response_format = request.get("response_format")
    return (
        encoder(generation)
        .encode(
            request["messages"],
            request.get("tools"),
            effort=effort,
            response_format=response_format,
        )
        .ids
    )


def recipe_prompt(generation: str, request: Request) -> list[int]:
    return recipe.encode(request)[0]


def recipe_message(text: str, finish: str) -> Message:
    """Through recipe's Chat Completions stream, in one piece."""
    request = {"messages": [USER], "tools": TOOLS, "model": "DeepSeek-V4-Pro"}
    converted = recipe_package.ChatCompletionRequest(request).convert(
        recipe_package.ConversionOptions()
    )
    generator = recipe_package.ChatCompletionRequest.chunk_generator(converted, "id", "model")
    stream = recipe_package.StreamProcessor(generator, converted.parsing_options, None)
    reason = recipe_package.InferenceFinishReason
    chunks = [
        *stream.push(recipe_package.InferenceChunk.text(text, 1)),
        *stream.push(
            recipe_package.InferenceChunk.finish(
                reason.Length if finish == "length" else reason.Stop
            )
        ),
        *stream.finish(),
    ]
    response = recipe_package.ChatCompletionResponse("id", "model", 0, 0, 0)
    for chunk in chunks:
        response.accumulate(chunk)
    found = json.loads(response.to_json())["choices"][0]["message"]
    calls = [call["function"] for call in found.get("tool_calls") or []]
    return _message(found.get("reasoning_content"), found.get("content"), calls)


def vllm_sides() -> tuple[Callable[[str, Request], list[int]], Callable[[str, str], Message]]:
    """vLLM's own tokenizer mode and parser."""
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.parser.deepseek_v4 import DeepSeekV4Parser
    from vllm.tokenizers.deepseek_v4 import DeepseekV4Tokenizer

    tokenizer = DeepseekV4Tokenizer.from_pretrained(str(tokenizer_file().parent))

    def prompt(generation: str, request: Request) -> list[int]:
        messages = json.loads(json.dumps(request["messages"]))
        for message in messages:
            if "reasoning_content" in message:
                message["reasoning"] = message.pop("reasoning_content")
        options = {key: request[key] for key in ("tools", "reasoning_effort") if key in request}
        found: list[int] = tokenizer.apply_chat_template(messages, **options)
        return found

    def message(text: str, finish: str) -> Message:
        request = ChatCompletionRequest(messages=[USER], tools=TOOLS)
        parser = DeepSeekV4Parser(tokenizer, request.tools)
        reasoning, content, calls = parser.parse(text, request, enable_auto_tools=True)
        functions = [{"name": call.name, "arguments": call.arguments} for call in calls or []]
        return _message(reasoning, content, functions)

    return prompt, message


def _message(
    reasoning: str | None, content: str | None, functions: list[dict[str, str]]
) -> Message:
    calls = [ToolCall(f"c{n}", f["name"], f["arguments"]) for n, f in enumerate(functions)]
    return Message(reasoning or None, content or None, calls)


def our_message(text: str, finish: str) -> Message:
    numbers = count()
    found = parse(text, True, TOOLS, finish)
    calls = [ToolCall(f"c{next(numbers)}", c.name, c.arguments) for c in found.tool_calls]
    return Message(found.reasoning, found.content, calls)


def shown(message: Message) -> str:
    parts = []
    for name, value in (("reasoning", message.reasoning), ("content", message.content)):
        if value is not None:
            parts.append(f"{name} {_quoted(value)}")
    parts += [f"call {_quoted(f'{c.name} {c.arguments}')}" for c in message.tool_calls]
    return ", ".join(parts) or "nothing"


def _quoted(text: str) -> str:
    text = text if len(text) <= 60 else f"{text[:30]}…{text[-25:]}"
    return "`" + text.replace("\n", "⏎").replace("`", "´").replace("|", "\\|") + "`"


def _tail(ids: list[int], other: list[int]) -> str:
    """`ids` from the first difference to `other` on, ids of control tokens in brackets."""
    at = next((n for n, (a, b) in enumerate(zip(ids, other, strict=False)) if a != b), None)
    at = min(len(ids), len(other)) if at is None else at
    tokenizer = encoder().tokenizer
    added = set(tokenizer.get_added_tokens_decoder())  # type: ignore[attr-defined]
    pieces = [f"[{tokenizer.id_to_token(i)}]" if i in added else _decoded([i]) for i in ids[at:]]
    return _quoted("".join(pieces)) if pieces else "ends"


def _decoded(ids: list[int]) -> str:
    text: str = encoder().tokenizer.decode(ids)  # type: ignore[attr-defined]
    return text


def attempt(action: Callable[..., Any], *arguments: Any) -> Any:
    """The result, or how the implementation refuses; any exception is a finding here."""
    try:
        return action(*arguments)
    except Exception as error:  # noqa: BLE001  # what others raise is what is reported
        return f"refused: {re.sub(r'[|`]', '', str(error))[:70]}"


def prompt_rows(others: list[Callable[[str, Request], list[int]]]) -> list[list[str]]:
    rows = []
    for what, (generation, request) in PROMPTS.items():
        request = {"messages": [USER], **request}
        ours = our_prompt(generation, request)
        cells = []
        for other in others:
            ids = attempt(other, generation, request)
            if ids == ours:
                cells.append("same")
            elif isinstance(ids, str):
                cells.append(ids)
            else:
                cells.append(f"{_tail(ids, ours)} for {_tail(ours, ids)}")
        rows.append([what, *cells])
    return rows


def parsing_rows(others: list[Callable[[str, str], Message]]) -> list[list[str]]:
    cases = {what: ("stop", text) for what, (text, *_) in SLIPS.items()}
    cases |= {f"cut {_quoted(text)}": ("length", f"</think>{text}") for text, _ in CUTS}
    rows = []
    for what, (finish, text) in cases.items():
        ours = our_message(text, finish)
        cells = []
        for other in others:
            found = attempt(other, text, finish)
            cells.append(
                "same" if found == ours else found if isinstance(found, str) else shown(found)
            )
        rows.append([what, shown(ours), *cells])
    return rows


def table(header: list[str], rows: list[list[str]]) -> str:
    rows = [[row[0].replace("<", "&lt;"), *row[1:]] for row in rows]
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def tables() -> str:
    names = ["deepseek-recipe"]
    prompts: list[Callable[[str, Request], list[int]]] = [recipe_prompt]
    messages: list[Callable[[str, str], Message]] = [recipe_message]
    if find_spec("vllm"):
        prompt, message = vllm_sides()
        names.append("vLLM's own mode")
        prompts.append(prompt)
        messages.append(message)
    return "\n\n".join(
        [
            "Prompts, as ids. A cell shows theirs for ours from the first difference on:",
            table(["input", *names], prompt_rows(prompts)),
            "Outputs:",
            table(["output", "here", *names], parsing_rows(messages)),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="into docs/chat.md")
    found = tables()
    if parser.parse_args().write:
        text = DOCS.read_text(encoding="utf-8")
        before, rest = text.split(BEGIN)
        DOCS.write_text(f"{before}{BEGIN}\n{found}\n{END}{rest.split(END)[1]}", encoding="utf-8")
    else:
        print(found)


if __name__ == "__main__":
    main()
