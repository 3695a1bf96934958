"""vLLM's tool parser: reasoning, content and calls of one output, by the core's `StreamParser`.

The reasoning parser hands over the whole output, with `<think>` before it where the prompt left
reasoning open. The eos token's text ends what the model itself ended: vLLM tells a parser of whole
answers nothing else about how the output came to its end.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vllm.entrypoints.generate.base.protocol import DeltaMessage, ExtractedToolCallInformation
from vllm.entrypoints.openai.chat_completion.protocol import (
    ChatCompletionNamedToolChoiceParam,
    ChatCompletionRequest,
)
from vllm.tool_parsers import ToolParser
from vllm.tool_parsers.tool_strict_level import ToolStrictLevel
from xgrammar import Grammar, StructuralTag

from dsv4_plugin.chat import Message
from dsv4_plugin.chat.grammar import tool_tag
from dsv4_plugin.chat.render import FORMS, V4
from vllm_ext.active import MODE, MODE_V41
from vllm_ext.chat_compat import REPORTS_CUT_CALLS
from vllm_ext.chat_output import Output, delta_message, tool_calls, whole_message
from vllm_ext.chat_request import (
    Request,
    adopt_message_tools,
    offered_tools,
    take_stops,
    warn_of_unread_fields,
)

_FREE_CHOICES = ("auto", "required", None)
_CUT_BY_STOP = ChatCompletionNamedToolChoiceParam(function={"name": "cut by stop"})
"""The tool choice of a finished answer whose call a stop string cut."""


class DeepseekV4ToolParser(ToolParser):
    engine_based_streaming = True
    supports_required_and_named = False
    structural_tag_model = MODE
    form = V4
    skip_reasoning_parsing = False
    """vLLM sets this where no reasoning parser is chosen: reasoning is content then."""

    def __init__(self, tokenizer: Any, tools: list[Any] | None = None) -> None:
        super().__init__(tokenizer, tools)
        self._output: Output | None = None

    def adjust_request(self, request: Request) -> Request:
        """Have the text that stopped the output at its end."""
        warn_of_unread_fields(request)
        adopt_message_tools(request)
        request.skip_special_tokens = False
        take_stops(request)
        return request

    def get_structural_tag(
        self,
        request: Request,
        *,
        reasoning: bool = False,
        strict_level: ToolStrictLevel = ToolStrictLevel.AUTO,
    ) -> StructuralTag | None:
        """`reasoning` is false always; a grammar from the first token on has to cover it."""
        reasoning = getattr(request, "_grammar_from_parser", False)
        tools = offered_tools(request)
        if strict_level >= ToolStrictLevel.PARAMETER:
            tools = [_strict(tool) for tool in tools or ()]
        choice, parallel = request.tool_choice, request.parallel_tool_calls is not False
        tag = tool_tag(
            tools,
            choice if isinstance(choice, str) else choice.model_dump(),
            reasoning=reasoning,
            parallel=parallel,
            envelope=strict_level >= ToolStrictLevel.FUNCTION or not parallel,
            compile_schema=Grammar.from_json_schema,
            form=self.form,
        )
        return None if tag is None else StructuralTag.model_validate(tag)

    def extract_tool_calls(
        self, model_output: str, request: Request
    ) -> ExtractedToolCallInformation:
        message = whole_message(model_output, request, not self.skip_reasoning_parsing)
        _keep_finish_reason(request, message)
        return ExtractedToolCallInformation(
            tools_called=bool(message.tool_calls),
            tool_calls=tool_calls(message),
            content=message.content,
        )

    def extract_tool_calls_streaming(
        self,
        previous_text: str,
        current_text: str,
        delta_text: str,
        previous_token_ids: Sequence[int],
        current_token_ids: Sequence[int],
        delta_token_ids: Sequence[int],
        request: Request,
    ) -> DeltaMessage | None:
        if self._output is None:
            self._output = Output(request, not self.skip_reasoning_parsing)
        return delta_message(self._output.feed(delta_text))

    def finish_streaming(self) -> DeltaMessage | None:
        output, self._output = self._output, None
        return delta_message(output.finish()) if output else None


class DeepseekV41ToolParser(DeepseekV4ToolParser):
    """The parser reads both spellings of tags; grammars have V4.1's."""

    structural_tag_model = MODE_V41
    form = FORMS["v4.1"]


def _keep_finish_reason(request: Request, message: Message) -> None:
    """Have vLLM report its own reason for a whole answer that was cut after or inside a call.

    vLLM 0.32 reports `tool_calls` wherever it sees a call under tool_choice auto, for `stop` alone
    under required, and never for a named tool. It reads the choice for that only.
    """
    if REPORTS_CUT_CALLS or not isinstance(request, ChatCompletionRequest) or not request.tools:
        return
    if request.tool_choice in (*_FREE_CHOICES, _CUT_BY_STOP):
        choices = {"length": "required", "stop": _CUT_BY_STOP} if message.tool_calls else {}
        request.tool_choice = choices.get(message.finish_reason, "auto")


def _strict(tool: dict[str, Any]) -> dict[str, Any]:
    return {**tool, "function": {**tool["function"], "strict": True}}
