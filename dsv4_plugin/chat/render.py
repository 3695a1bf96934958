"""Messages -> the parts of a prompt: control tokens and plain text, before any tokenizer.

Layout (thinking mode): bos, effort text, system texts, tools, response format, then turns
`<｜User｜>..<｜Assistant｜><think>reasoning</think>content + calls, eos`. A turn without reasoning
opens with `</think>`. docs/chat.md tells where public encoders disagree and what is done here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from . import json_text
from .messages import Call, Turn, format_text, read_message
from .tokens import (
    ASSISTANT,
    BOS,
    CALLS,
    DSML,
    END_THINK,
    EOS,
    INVOKE,
    JSON_FORMAT,
    JSON_SCHEMA,
    LATEST_REMINDER,
    PARAMETER,
    SCHEMA_FORMAT,
    SYSTEM,
    TASKS,
    THINK,
    TOOL_CALLS,
    TOOLS_CONCLUSION,
    TOOLS_INTRODUCTION,
    USER,
    Control,
    Part,
)
from .tools import schema_lines

_USER_ROLES = ("user", "developer", "tool", "system")


@dataclass(frozen=True)
class Form:
    """What V4 and V4.1 write differently. system: its token, in front of every system text, which
    stay where they are; block, space: the tag of a block of calls, and what follows DSML in tags;
    any_json: what is said where the answer has to be any JSON object; joins_empty: user texts that
    are empty are joined like others, and a call without parameters has an empty line."""

    system: Control | None = None
    block: str = TOOL_CALLS
    space: str = ""
    any_json: str = JSON_FORMAT
    joins_empty: bool = False

    def introduction(self) -> Iterator[Part]:
        """To the tools, with this form's tags."""
        before: Part = ""
        for part in TOOLS_INTRODUCTION:
            if before == DSML:
                part = self.space + part.replace(TOOL_CALLS, self.block, 1)
            yield part
            before = part

    def said(self, response_format: str) -> str:
        return self.any_json if response_format == JSON_FORMAT else response_format


V4 = Form()
FORMS = {
    "v4.1": Form(SYSTEM, CALLS, " ", SCHEMA_FORMAT.replace("{schema}", JSON_SCHEMA), True),
}
"""By the generation, of those that are not V4's."""


@dataclass(frozen=True)
class Rendered:
    """A prompt as parts. `thinking`: it ends inside a reasoning block."""

    parts: list[Part]
    thinking: bool

    @property
    def text(self) -> str:
        return "".join(self.parts)


def render(
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None = None,
    *,
    thinking: bool = True,
    effort: str = "",
    response_format: Mapping[str, Any] | None = None,
    continue_final_message: bool = False,
    add_generation_prompt: bool = True,
    drop_reasoning: bool = True,
    form: Form = V4,
) -> Rendered:
    """Render OpenAI-style `messages`; `effort` is the text to put in front in thinking mode.

    Raises ValueError naming the message index and field for anything the format cannot hold.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        raise ValueError(f"messages: must be a list, not {messages!r:.80}")
    turns = [read_message(message, index) for index, message in enumerate(messages)]
    _check_order(turns, continue_final_message)
    system = [turn for turn in turns if turn.role == "system"]
    if form.system:  # the others stay where they are, empty ones are left out
        turns = [turn for turn in turns if turn.role != "system" or _says_something(turn)]
        system = [turn for turn in turns[:1] if turn.role == "system"]
        turns = turns[len(system) :]
    else:
        turns = [turn for turn in turns if turn.role != "system"]
    offered = schema_lines(tools) + [tool for turn in system for tool in turn.tools]
    formats = [format_text(response_format, "response_format")]
    formats += [turn.response_format for turn in system]

    writer = _Writer(form)
    writer.control(BOS)
    if form.system and (system or offered or any(formats) or (thinking and effort)):
        writer.control(form.system)
    if thinking:
        writer.text(effort)
    writer.text("\n\n".join(turn.content for turn in system if turn.content))
    writer.tools(offered)
    writer.text("".join(map(form.said, formats)))

    has_tools = bool(offered) or any(turn.tools for turn in turns)
    is_open = bool(turns) and (continue_final_message or turns[-1].prefix)
    opens = add_generation_prompt and not is_open
    keep_all = has_tools or not drop_reasoning
    first_kept = _first_kept(turns, keep_all, is_open, opens) if thinking else len(turns)
    in_reasoning = writer.turns(turns, thinking, first_kept, is_open)
    if opens and not (turns and turns[-1].task):
        writer.control(ASSISTANT, THINK if thinking else END_THINK)
        in_reasoning = thinking
    return Rendered(writer.joined(), in_reasoning)


def _says_something(turn: Turn) -> bool:
    return bool(turn.content or turn.tools or turn.response_format)


def _check_order(turns: Sequence[Turn], continue_final_message: bool) -> None:
    if not turns:
        raise ValueError("messages: must hold at least one message")
    last = len(turns) - 1
    if continue_final_message and turns[last].role != "assistant":
        raise ValueError(
            f"messages[{last}].role: continue_final_message needs a final assistant message, "
            f"not {turns[last].role!r}"
        )
    for index, turn in enumerate(turns):
        if turn.prefix and (index != last or turn.role != "assistant"):
            raise ValueError(
                f"messages[{index}].prefix: only the final message can be a prefix, "
                "and only an assistant message"
            )


def _first_kept(turns: Sequence[Turn], keep_all: bool, is_open: bool, opens: bool) -> int:
    """The index from which assistant turns keep their reasoning.

    With tools all do. Without, reasoning belongs to the turn that is still open: opening a new
    assistant turn closes all others; otherwise everything after the last user turn is open.
    """
    if keep_all:
        return 0
    if is_open:
        return len(turns) - 1
    if opens:
        return len(turns)
    users = [index for index, turn in enumerate(turns) if turn.role in _USER_ROLES]
    return users[-1] if users else 0


class _Writer:
    """Collects parts; adjacent text is joined, since a tokenizer must see it in one piece."""

    def __init__(self, form: Form) -> None:
        self._form = form
        self._parts: list[Part] = []

    def control(self, *tokens: Control) -> None:
        self._parts.extend(tokens)

    def text(self, text: str) -> None:
        if text:
            self._parts.append(text)

    def joined(self) -> list[Part]:
        parts: list[Part] = []
        for kind, run in groupby(self._parts, key=type):
            if kind is Control:
                parts.extend(run)
            else:
                parts.append("".join(run))
        return parts

    def tools(self, lines: Sequence[str]) -> None:
        if lines:
            self._parts.extend(self._form.introduction())
            self.text("\n".join(lines) + TOOLS_CONCLUSION)

    def turns(self, turns: Sequence[Turn], thinking: bool, first_kept: int, is_open: bool) -> bool:
        """Write all turns; returns whether the last one is left open inside its reasoning."""
        in_reasoning = False
        order: dict[str | None, int] = {}
        start = 0
        for run in _runs(turns):
            before = turns[start - 1] if start else None
            turn = run[0]
            stop = start + len(run)
            if turn.role == "assistant":
                if turn.calls:
                    order = {call.id: index for index, call in enumerate(turn.calls)}
                leave_open = is_open and stop == len(turns)
                opened = before is None or before.task is None
                in_reasoning = self._assistant(
                    turn, start >= first_kept, opened, thinking, leave_open
                )
            elif turn.role == "system":
                assert self._form.system is not None
                self.control(self._form.system)
                self.text(turn.content)
                self.tools(turn.tools)
                self.text(self._form.said(turn.response_format))
            elif turn.role == "latest_reminder":
                self.control(LATEST_REMINDER)
                self.text(turn.content)
            else:
                self._user(run, order)
            if run[-1].task and (stop == len(turns) or turns[stop].role == "assistant"):
                self._task(run[-1].task, thinking)
            start = stop
        return in_reasoning

    def _user(self, run: Sequence[Turn], order: Mapping[str | None, int]) -> None:
        """Tool results, in the order of their calls, and the user texts that follow them."""
        results = [turn for turn in run if turn.role == "tool"]
        results.sort(key=lambda turn: order.get(turn.call_id, len(order)))
        texts = [f"<tool_result>{turn.content}</tool_result>" for turn in results]
        if users := run[len(results) :]:
            empty = self._form.joins_empty
            texts.append("\n\n".join(turn.content for turn in users if turn.content or empty))
        self.control(USER)
        self.text("\n\n".join(texts))
        self.tools(run[-1].tools)
        self.text(self._form.said(run[-1].response_format))

    def _assistant(
        self, turn: Turn, keep: bool, opened: bool, thinking: bool, leave_open: bool
    ) -> bool:
        empty = not (turn.content or turn.calls)
        in_reasoning = leave_open and empty and thinking and opened
        if opened:
            self.control(ASSISTANT)
            if keep:
                self.control(THINK)
                self.text(turn.reasoning)
            if not in_reasoning:
                self.control(END_THINK)
        self.text(turn.content)
        self._calls(turn.calls)
        if not leave_open:
            self.control(EOS)
        return in_reasoning

    def _calls(self, calls: Sequence[Call]) -> None:
        if not calls:
            return
        self.text("\n\n")
        self._tag(f"{self._form.block}>\n")
        for call in calls:
            self._tag(f'{INVOKE} name="{call.name}">\n')
            for name, value in call.arguments.items():
                is_text = isinstance(value, str)
                self._tag(f'{PARAMETER} name="{name}" string="{str(is_text).lower()}">')
                self.text(value if is_text else json_text.encode(value, "arguments"))
                self._tag(f"{PARAMETER}>\n", "</")
            if self._form.joins_empty and not call.arguments:
                self.text("\n")
            self._tag(f"{INVOKE}>\n", "</")
        self._tag(f"{self._form.block}>", "</")

    def _tag(self, rest: str, opening: str = "<") -> None:
        self.text(opening)
        self.control(DSML)
        self.text(self._form.space + rest)

    def _task(self, task: Control | None, thinking: bool) -> None:
        assert task is not None
        if task == TASKS["action"]:
            self.control(ASSISTANT, THINK if thinking else END_THINK)
        self.control(task)


def _runs(turns: Sequence[Turn]) -> list[list[Turn]]:
    """Group the messages that share a turn: tool results, then user texts up to a task."""
    runs: list[list[Turn]] = []
    for turn in turns:
        last = runs[-1][-1] if runs else None
        joins = (
            last is not None
            and last.task is None
            and (last.role, turn.role) in (("tool", "tool"), ("tool", "user"), ("user", "user"))
        )
        if joins:
            runs[-1].append(turn)
        else:
            runs.append([turn])
    return runs
