"""The control tokens and the literal texts of the DeepSeek-V4 chat format, each written once.

Source: the model authors' encoding folder (MIT) and what `deepseek-recipe` renders.
"""

from __future__ import annotations


class Control(str):
    """A control token: the encoder writes it by id, never by tokenizing its text."""

    __slots__ = ()


Part = Control | str
"""A prompt is a sequence of control tokens and of plain text (any other `str`)."""

BOS = Control("<｜begin▁of▁sentence｜>")
EOS = Control("<｜end▁of▁sentence｜>")
USER = Control("<｜User｜>")
ASSISTANT = Control("<｜Assistant｜>")
THINK = Control("<think>")
END_THINK = Control("</think>")
DSML = Control("｜DSML｜")
SYSTEM = Control("<｜System｜>")
"""V4.1's only."""
LATEST_REMINDER = Control("<｜latest_reminder｜>")
TASKS = {
    task: Control(f"<｜{task}｜>")
    for task in ("action", "query", "authority", "domain", "title", "read_url")
}

TOOL_CALLS, INVOKE, PARAMETER = "tool_calls", "invoke", "parameter"
CALLS = "calls"
"""V4.1's name of the block, whose tags have a space after DSML."""
WRAPPER_SLIPS = ("function_calls", "toolcalls", "tool_call", "tool")
"""Other names models give the block of calls: V3.2's and misspellings seen in the field."""

ABSOLUTE_EFFORT = (
    "Reasoning Effort: Absolute maximum with no shortcuts permitted.\n"
    "You MUST be very thorough in your thinking and comprehensively decompose the problem to "
    "resolve the root cause, rigorously stress-testing your logic against all potential paths, "
    "edge cases, and adversarial scenarios.\n"
    "Explicitly write out your entire deliberation process, documenting every intermediate step, "
    "considered alternative, and rejected hypothesis to ensure absolutely no assumption is left "
    "unchecked.\n\n"
)
BEYOND_EFFORT = (
    "Reasoning Effort: Beyond maximum — exhaustive, relentless, and uncompromising.\n"
    "You MUST reason with the utmost depth and rigor, leaving absolutely nothing to chance: "
    "exhaustively decompose the problem into its most fundamental components, trace every causal "
    "chain to its root, and resolve the underlying cause rather than any surface symptom.\n"
    "Do not stop reasoning until you have independently verified the solution from multiple "
    "angles and are certain that no assumption remains unchecked and no error remains "
    "undiscovered.\n\n"
)

NUMBERED_EFFORT = (
    "Reasoning Effort: {} (range 1-100, the higher the value, the more thorough the reasoning)\n\n"
)

TOOLS_INTRODUCTION: tuple[Part, ...] = (
    "\n\n## Tools\n\nYou have access to a set of tools to help answer the user's question. "
    'You can invoke tools by writing a "<',
    DSML,
    'tool_calls>" block like the following:\n\n<',
    DSML,
    "tool_calls>\n<",
    DSML,
    'invoke name="$TOOL_NAME">\n<',
    DSML,
    'parameter name="$PARAMETER_NAME" string="true|false">$PARAMETER_VALUE</',
    DSML,
    "parameter>\n...\n</",
    DSML,
    "invoke>\n<",
    DSML,
    'invoke name="$TOOL_NAME2">\n...\n</',
    DSML,
    "invoke>\n</",
    DSML,
    "tool_calls>\n\nString parameters should be specified as is and set "
    '`string="true"`. For all other types (numbers, booleans, arrays, objects), pass the value '
    'in JSON format and set `string="false"`.\n\nIf thinking_mode is enabled (triggered by ',
    THINK,
    "), you MUST output your complete reasoning inside ",
    THINK,
    "...",
    END_THINK,
    " BEFORE any tool calls or final response.\n\nOtherwise, output directly after ",
    END_THINK,
    " with tool calls or final response.\n\n### Available Tool Schemas\n\n",
)
TOOLS_CONCLUSION = (
    "\n\nYou MUST strictly follow the above defined tool name and parameter schemas to invoke "
    "tool calls.\n"
)
SCHEMA_FORMAT = (
    "\n\n## Response Format:\n\n"
    "You MUST strictly adhere to the following schema to reply:\n{schema}"
)
JSON_FORMAT = (
    "\n\nYou are a helpful assistant designed to output JSON.\n"
    "## Response Format:\n\nReply with JSON object ONLY."
)
JSON_SCHEMA = '{"type": "json_object"}'
"""What V4.1's prompts have for a schema where any JSON object will do."""
