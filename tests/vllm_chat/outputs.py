"""Tools, and what the model is made to say."""

from __future__ import annotations

from typing import Any


def tool(name: str, properties: dict[str, Any], **more: Any) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties, **more.pop("schema", {})}
    function = {"name": name, "description": f"Does {name}.", "parameters": parameters, **more}
    return {"type": "function", "function": function}


TOOLS = [
    tool("weather", {"city": {"type": "string"}, "days": {"type": "integer"}}),
    tool("clock", {}),
]


def call(name: str, **arguments: str | int) -> str:
    lines = [f'<｜DSML｜invoke name="{name}">\n']
    for key, value in arguments.items():
        is_text = str(isinstance(value, str)).lower()
        tag = f'<｜DSML｜parameter name="{key}" string="{is_text}">'
        lines.append(f"{tag}{value}</｜DSML｜parameter>\n")
    return "".join([*lines, "</｜DSML｜invoke>\n"])


def block(*calls: str) -> str:
    return f"\n\n<｜DSML｜tool_calls>\n{''.join(calls)}</｜DSML｜tool_calls>"


PLAIN = "Let me think: 1 < 2.</think>The answer is 你好 🎈."
ONE_CALL = "I need it.\n</think>One moment." + block(call("weather", city='the "Hague" 🎈', days=3))
TWO_CALLS = "Both.</think>" + block(call("weather", city="Rome"), call("clock"))
IN_REASONING = "I will just" + block(call("clock"))
AGAIN = "a</think>b<think>c</think>d"

NAMED = 'Type <｜DSML｜invoke name="weather"> to start.'
SLIPS = {
    "named in reasoning": f"{NAMED}</think>Done.",
    "named in content": f"</think>{NAMED} Then\n\nwait.",
    "text behind a closed parameter": "</think>"
    + block(call("weather", city="Rome").replace("</｜DSML｜invoke>", "so"), call("clock")),
    "no > at the line's end": "</think>" + block(call("weather", city="Rome")).replace(">\n", "\n"),
    "</think> in a call": "</think>" + block(call("clock").replace(">\n", ">\n</think>\n", 1)),
}
