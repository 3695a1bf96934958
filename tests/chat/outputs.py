"""Model outputs for the parser's tests, made up to be odd: well-formed ones of strange text, slips,
mutations, noise."""

from __future__ import annotations

import json
from random import Random
from typing import Any

from dsv4_plugin.chat import render
from dsv4_plugin.chat.tokens import ASSISTANT, DSML, END_THINK, EOS, THINK

INK = "漢字Ωßйक🙂€ñ"
"""Characters that no markup contains and no JSON escapes: they show whether text is lost."""

WORDS = [
    "a",
    "B7",
    "12.5",
    "<",
    "</",
    "> ",
    '"',
    "'",
    "`",
    "\\",
    "\n",
    "\n\n",
    "\t",
    "{",
    "}",
    *INK,
]
FRAGMENTS = [
    *(THINK, END_THINK, EOS, DSML, f"<{DSML}", f"</{DSML}"),
    *(f"<{DSML}{n}>" for n in ("tool_calls", "function_calls", "toolcalls", "tool", "invoke")),
    *(f"</{DSML}{n}>" for n in ("tool_calls", "function_calls", "invoke", "parameter", "tool")),
    *(f"\n\n<{DSML}tool_calls>\n<{DSML}invoke name={q}{n}{q}>\n" for q in "\"'" for n in "fg"),
    *(f'<{DSML}parameter name="{n}" string="{s}">' for n in "xno" for s in ("true", "false")),
    *(f"<{DSML}parameter name=x>", f"<{DSML}parameter name='y' string='true' a=\"b\">"),
    *(f'<{DSML}parameter name="arguments">', f'<{DSML}parameter string="true">'),
    *(f"</{DSML}parameter>\n</{DSML}invoke>\n</{DSML}tool_calls>", f'<{DSML}invoke name="f'),
    *(f'<{DSML}invoke name="bash">', f'<{DSML}invoke name="get_time"/>', f"<{DSML}tool_calls\n"),
    *('{"x": "1"}', '{"arguments": {"x": 1}}', "NaN", "[1, 2]", "null", "-0.5e3", "\\ud800"),
]


def words(random: Random, most: int = 6) -> str:
    return "".join(random.choices(WORDS, k=random.randrange(most)))


def json_value(random: Random, depth: int = 2) -> Any:
    kind = random.randrange(7 if depth else 5)
    if kind < 5:
        return [None, True, random.randrange(-9, 10**6), random.randrange(64) / 8, words(random)][
            kind
        ]
    if kind == 5:
        return [json_value(random, depth - 1) for _ in range(random.randrange(3))]
    return {words(random, 3): json_value(random, depth - 1) for _ in range(random.randrange(3))}


def message(random: Random) -> dict[str, Any]:
    """An assistant message whose texts hold no markup, with calls of the tools in data.TOOLS."""
    calls = []
    for index in range(random.randrange(3)):
        keys = random.sample(["x", "n", "o", "input ", "漢"], random.randrange(4))
        arguments = {key: json_value(random) for key in keys}
        function = {"name": random.choice(["f", "get_weather", "get_time", "unknown-1"])}
        function["arguments"] = json.dumps(arguments, ensure_ascii=False)
        calls.append({"id": f"c{index}", "type": "function", "function": function})
    found = {"role": "assistant", "content": words(random), "reasoning_content": words(random)}
    return found | ({"tool_calls": calls} if calls else {})


def output_of(message: dict[str, Any], tools: list[dict[str, Any]], thinking: bool = True) -> str:
    """What the model writes for `message`: its rendering after the generation prompt, with eos."""
    turns = [{"role": "user", "content": ""}, message]
    text = render(turns, tools, thinking=thinking, add_generation_prompt=False).text
    opened = ASSISTANT + (THINK if thinking else END_THINK)
    return text[text.rindex(opened) + len(opened) :]


def mutated(random: Random, text: str) -> str:
    """`text` with pieces dropped, doubled, moved or replaced by markup."""
    for _ in range(random.randrange(1, 5)):
        start = random.randrange(len(text) + 1)
        stop = min(len(text), start + random.randrange(20))
        piece = random.choice(["", text[start:stop] * 2, random.choice(FRAGMENTS), words(random)])
        text = text[:start] + piece + text[stop:]
    return text


def noise(random: Random) -> str:
    """Fragments of markup and text in any order."""
    return "".join(random.choices(FRAGMENTS + WORDS, k=random.randrange(30)))


def split(random: Random, text: str) -> list[str]:
    """`text` in pieces of random sizes, down to one character."""
    longest = random.choice([1, 3, 8, 40])
    pieces = []
    while text:
        size = random.randint(1, longest)
        pieces.append(text[:size])
        text = text[size:]
    return pieces
