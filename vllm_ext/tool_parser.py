"""vLLM's tool parser: reasoning, content and calls of one output, by the core's `StreamParser`.

The text it gets begins with `<think>` where the reasoning parser handed over an open reasoning
block. It ends with the eos token's text where the model itself ended it: vLLM tells a parser of
whole answers nothing else about how the output came to its end.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vllm.entrypoints.generate.base.protocol import DeltaMessage, ExtractedToolCallInformation
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.tool_parsers import ToolParser
from vllm.tool_parsers.tool_strict_level import ToolStrictLevel
from xgrammar import StructuralTag

from dsv4_plugin.chat import Message, StreamParser, collect
from dsv4_plugin.chat.grammar import tool_tag
from dsv4_plugin.chat.tokens import EOS
from vllm_ext.chat_output import delta_message, tool_calls
from vllm_ext.chat_request import Request, offered_tools


class DeepseekV4ToolParser(ToolParser):
    engine_based_streaming = True
    supports_required_and_named = False
    structural_tag_model = "deepseek_v4"

    def __init__(self, tokenizer: Any, tools: list[Any] | None = None) -> None:
        super().__init__(tokenizer, tools)
        self._parser: StreamParser | None = None
        self._ended = False

    def adjust_request(self, request: Request) -> Request:
        """Have the eos token's text at the end of the output.

        Not with the client's own stops: their text would come too.
        """
        request.skip_special_tokens = False
        if not (request.stop or request.stop_token_ids):
            request.include_stop_str_in_output = True
        return request

    def get_structural_tag(
        self,
        request: Request,
        *,
        reasoning: bool = False,
        strict_level: ToolStrictLevel = ToolStrictLevel.AUTO,
    ) -> StructuralTag | None:
        tools = offered_tools(request)
        if strict_level >= ToolStrictLevel.PARAMETER:
            tools = [_strict(tool) for tool in tools or ()]
        choice = request.tool_choice
        tag = tool_tag(
            tools,
            choice if isinstance(choice, str) else choice.model_dump(),
            reasoning=reasoning,
            parallel=request.parallel_tool_calls is not False,
        )
        if tag is None:
            return super().get_structural_tag(
                request, reasoning=reasoning, strict_level=strict_level
            )
        return StructuralTag.model_validate(tag)

    def extract_tool_calls(
        self, model_output: str, request: Request
    ) -> ExtractedToolCallInformation:
        ended = model_output.endswith(EOS)
        parser = StreamParser(False, offered_tools(request))
        message = collect([*parser.feed(model_output), *parser.finish(_reason(ended))])
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
        if self._parser is None:
            self._parser = StreamParser(False, offered_tools(request))
        self._ended = delta_text.endswith(EOS)
        return delta_message(self._parser.feed(delta_text))

    def finish_streaming(self) -> DeltaMessage | None:
        parser, self._parser = self._parser, None
        return delta_message(parser.finish(_reason(self._ended))) if parser else None


def _reason(ended: bool) -> str:
    return "stop" if ended else "length"


def _keep_finish_reason(request: Request, message: Message) -> None:
    """Have vLLM report `length` for a whole answer that was cut after or inside a call.

    It reports `tool_calls` wherever it sees a call under tool_choice auto, and the engine's own
    reason, `tool_calls` for `stop`, under required. Nothing else reads the choice after parsing.
    """
    if isinstance(request, ChatCompletionRequest) and request.tool_choice in ("auto", "required"):
        cut = bool(message.tool_calls) and message.finish_reason != "tool_calls"
        request.tool_choice = "required" if cut else "auto"


def _strict(tool: dict[str, Any]) -> dict[str, Any]:
    return {**tool, "function": {**tool["function"], "strict": True}}
