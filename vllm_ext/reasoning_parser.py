"""vLLM's reasoning parser: says where reasoning ends, and splits it off.

vLLM drives a reasoning parser and a tool parser one after the other, each with half of the
output. V4's output is one grammar (a call may come in the reasoning, reasoning may come again), so
where the tool parser runs too, it gets the whole output, opened by `<think>`, and does the work.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from openai.types.responses import ToolChoiceCustom, ToolChoiceFunction
from vllm.entrypoints.generate.base.protocol import DeltaMessage
from vllm.entrypoints.openai.chat_completion.protocol import (
    ChatCompletionNamedToolChoiceParam,
    ChatCompletionRequest,
)
from vllm.reasoning import ReasoningParser
from vllm.sampling_params import StructuredOutputsParams
from vllm.tool_parsers import ToolParserManager

from dsv4_plugin.chat import StreamParser, parse
from dsv4_plugin.chat.grammar import response_tag
from dsv4_plugin.chat.tokens import ASSISTANT, DSML, END_THINK, THINK, USER
from vllm_ext.active import CHAT, TOOL_PARSER
from vllm_ext.chat_output import delta_message, whole_message, without_stop
from vllm_ext.chat_request import (
    Request,
    adopt_message_tools,
    opens_in_reasoning,
    plain_format,
    stops_of,
    warn_of_unread_fields,
)

_CALLS_ARE_PARSED = (
    str | None | ToolChoiceFunction | ToolChoiceCustom | ChatCompletionNamedToolChoiceParam
)
"""The tool choices for which vLLM runs the tool parser on a whole answer."""


def tool_parser_runs() -> bool:
    """Whether this process loaded the plugin's tool parser: vLLM does so where it is chosen."""
    found = [ToolParserManager.tool_parsers.get(mode) for mode in CHAT]
    return any(parser is not None and parser.__module__ == TOOL_PARSER for parser in found)


class DeepseekV4ReasoningParser(ReasoningParser):
    engine_based_streaming = True
    reasoning_start_str = str(THINK)
    reasoning_end_str = str(END_THINK)

    def __init__(
        self,
        tokenizer: Any,
        *args: Any,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(tokenizer, *args, **kwargs)
        self._kwargs = chat_template_kwargs
        names = (THINK, END_THINK, DSML, USER, ASSISTANT)
        ids = tokenizer.convert_tokens_to_ids([str(name) for name in names])
        self._think, self._end_think, self._dsml, *self._turns = ids
        self._opened = False
        self._handed_over = False
        self._parser: StreamParser | None = None

    def is_reasoning_end(self, input_ids: Sequence[int]) -> bool:
        """Whether `input_ids`, a prompt or an output, ends outside reasoning."""
        for token_id in reversed(input_ids):
            if token_id == self._think:
                return False
            if token_id == self._end_think or token_id in self._turns:
                return True
        return True

    def is_reasoning_end_streaming(
        self, input_ids: Sequence[int], delta_ids: Iterable[int]
    ) -> bool:
        return self._end_think in delta_ids

    def extract_content_ids(self, input_ids: list[int]) -> list[int]:
        if self._end_think not in input_ids:
            return []
        return input_ids[input_ids.index(self._end_think) + 1 :]

    def count_reasoning_tokens(self, token_ids: Sequence[int]) -> int:
        """Tokens between `<think>` and `</think>`; a call ends the reasoning too."""
        count, inside = 0, self._opened
        for token_id in token_ids:
            if token_id == self._think:
                inside = True
            elif token_id in (self._end_think, self._dsml):
                inside = False
            else:
                count += inside
        return count

    def adjust_request(self, request: Request) -> Request:
        """Where reasoning is not wanted back, vLLM applies a grammar from the first token on: have
        it cover the reasoning."""
        warn_of_unread_fields(request)
        if tool_parser_runs():
            adopt_message_tools(request)
        if not isinstance(request, ChatCompletionRequest) or request.include_reasoning:
            return request
        if opens_in_reasoning(request, self._kwargs):
            request._grammar_from_parser = True
            wanted = plain_format(request.response_format)
            if wanted is not None and wanted["type"] in ("json_object", "json_schema"):
                tag = json.dumps(response_tag(wanted, reasoning=True))
                request.response_format = None
                request.structured_outputs = StructuredOutputsParams(structural_tag=tag)
        return request

    def extract_reasoning(
        self, model_output: str, request: Request
    ) -> tuple[str | None, str | None]:
        self._opened = opens_in_reasoning(request, self._kwargs)
        if tool_parser_runs() and isinstance(request.tool_choice, _CALLS_ARE_PARSED):
            handed_over = (THINK if self._opened else "") + model_output
            return whole_message(handed_over, request).reasoning, handed_over
        message = parse(without_stop(model_output, stops_of(request)), self._opened)
        return message.reasoning, message.content

    def extract_reasoning_streaming(
        self,
        previous_text: str,
        current_text: str,
        delta_text: str,
        previous_token_ids: Sequence[int],
        current_token_ids: Sequence[int],
        delta_token_ids: Sequence[int],
    ) -> DeltaMessage | None:
        self._opened = True
        if tool_parser_runs():
            self._handed_over = True
            return DeltaMessage(content=THINK + delta_text)
        if self._parser is None:
            self._parser = StreamParser(thinking=True)
        return delta_message(self._parser.feed(delta_text))

    def has_engine_confirmed_reasoning_end(self) -> bool:
        return self._handed_over

    def finish_streaming(self) -> DeltaMessage | None:
        parser, self._parser = self._parser, None
        return delta_message(parser.finish()) if parser else None
