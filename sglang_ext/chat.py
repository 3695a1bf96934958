"""The chat layer: `dsv4_plugin.chat` behind SGLang's door for chat encodings, spec `dsv4`.

SGLang decides per request whether the model thinks and whether calls are parsed; prompts, and what
the output's token ids mean, are the core's. Without SGLang's parser options (`--reasoning-parser
deepseek-v4`, `--tool-call-parser deepseekv4`) the output stays text.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sglang.srt.entrypoints.openai.chat_encoding_adapters import (
    ADAPTER_OUTPUT_PARSERS,
    ChatEncodingAdapterContext,
    select_new_output_ids,
    token_output_sse_chunks,
)
from sglang.srt.entrypoints.openai.protocol import FunctionResponse, ToolCall
from sglang.srt.function_call.core_types import ToolCallItem
from sglang.srt.function_call.deepseekv4_detector import DeepSeekV4Detector
from sglang.srt.function_call.function_call_parser import FunctionCallParser
from sglang.srt.runtime_context import get_serving
from xgrammar import StructuralTag

from dsv4_plugin.chat import Delta, Encoder, TokenBytes, parse
from dsv4_plugin.chat.grammar import tool_tag
from dsv4_plugin.config import generation_of
from sglang_ext.config import CHAT_SPEC, config_json
from sglang_ext.output import OutputParser

if TYPE_CHECKING:
    from sglang.srt.entrypoints.openai.protocol import (
        ChatCompletionRequest,
        ResponsesRequest,
        Tool,
    )

log = logging.getLogger("sglang.srt.dsv4")

Message = dict[str, Any]


def build_adapter(context: ChatEncodingAdapterContext) -> ChatAdapter | None:
    """None with --skip-tokenizer-init: that server encodes no chat."""
    if context.tokenizer is None:
        return None
    log.info(
        "Chat: SGLang drops `enable_thinking` of a request itself before it gets here; send "
        "`thinking`, or enable_thinking in chat_template_kwargs."
    )
    FunctionCallParser.ToolCallParserEnum[ADAPTER_OUTPUT_PARSERS[CHAT_SPEC][1]] = CallGrammar
    return ChatAdapter(context)


class CallGrammar(DeepSeekV4Detector):
    """SGLang asks its tool parser for the grammar of calls; the adapter parses them."""

    def get_structural_tag(
        self,
        tools: list[Tool] | None = None,
        tool_choice: Any = "auto",
        thinking_mode: bool = False,
        parallel_tool_calls: bool = True,
    ) -> StructuralTag | None:
        offered = [tool.model_dump(exclude_none=True) for tool in tools or ()]
        choice = tool_choice if isinstance(tool_choice, str) else tool_choice.model_dump()
        tag = tool_tag(offered, choice, reasoning=thinking_mode, parallel=parallel_tool_calls)
        return None if tag is None else StructuralTag.model_validate(tag)


class ChatAdapter:
    """SGLang's `ChatEncodingAdapter` and its output half in one."""

    collects_openai_media = False
    strict_tool_call_arguments = False

    def __init__(self, context: ChatEncodingAdapterContext) -> None:
        config = config_json(context.model_path, context.revision)
        self.encoder = Encoder(context.tokenizer, generation_of(config))
        self.bytes = TokenBytes(context.tokenizer)
        self.hooks = context.chat_hooks
        reasoning, calls = ADAPTER_OUTPUT_PARSERS[CHAT_SPEC]
        chosen = (context.reasoning_parser, context.tool_call_parser)
        self.separate_reasoning = chosen[0] == reasoning
        self.parses = reasoning in chosen or calls in chosen
        if self.parses and not (chosen[0] in (None, reasoning) and chosen[1] in (None, calls)):
            raise ValueError(
                f"--reasoning-parser is {chosen[0]!r} and --tool-call-parser {chosen[1]!r}; "
                f"{reasoning!r} and {calls!r} cannot be mixed with others"
            )

    @property
    def output(self) -> ChatAdapter | None:
        return self if self.parses else None

    def encode_messages(
        self,
        *,
        messages: list[Message],
        request: ChatCompletionRequest,
        tools: list[dict[str, Any]] | None,
        thinking: bool,
        image_data: list[Any],
    ) -> list[int]:
        """Prompt ids. Raises ValueError naming the message and field the format cannot hold."""
        return self.encoder.encode(**_conversation(request, tools, thinking)).ids

    def parse_chat_response(
        self,
        *,
        request: ChatCompletionRequest,
        output_ids: list[int],
        finish_reason: dict[str, Any],
    ) -> tuple[str | None, str, list[ToolCall] | None, dict[str, Any]]:
        parser = self._chat_parser(request)
        delta = parser.finish(output_ids, finish_reason, keep_stop=request.no_stop_trim)
        calls = [_call(piece) for piece in delta.whole_calls()]
        if delta.finish_reason == "tool_calls":
            finish_reason = {**finish_reason, "type": "tool_calls", "matched": None}
        return delta.reasoning or None, delta.content, calls or None, finish_reason

    def stream_chat_chunks(
        self,
        *,
        content: dict[str, Any],
        index: int,
        request: ChatCompletionRequest,
        created: int,
        parser_dict: dict[int, Any],
        has_tool_calls: dict[int, bool],
        choice_logprobs: dict[str, Any] | None,
        finish_reason_type: str | None,
        usage: dict[str, Any] | None,
    ) -> list[str]:
        if index not in parser_dict:
            parser_dict[index] = self._chat_parser(request)
        delta = _step(
            parser_dict[index],
            content,
            content["meta_info"]["finish_reason"] if finish_reason_type else None,
            keep_stop=request.no_stop_trim,
        )
        if delta.finish_reason is not None:
            has_tool_calls[index] = delta.finish_reason == "tool_calls"
        return token_output_sse_chunks(
            chunk_id=content["meta_info"]["id"],
            created=created,
            model=request.model,
            index=index,
            usage=usage,
            logprobs=choice_logprobs,
            reasoning=delta.reasoning,
            content=delta.content,
            tool_calls=[_call(piece) for piece in delta.calls],
        )

    def parse_responses_output(
        self,
        *,
        request: ResponsesRequest,
        require_reasoning: bool,
        output_ids: list[int],
        finish_reason: dict[str, Any] | None,
        separate_reasoning: bool,
        parse_tool_calls: bool,
    ) -> tuple[str, str, list[ToolCallItem]]:
        parser = self._responses_parser(
            request, require_reasoning, separate_reasoning, parse_tool_calls
        )
        delta = parser.finish(output_ids, finish_reason or {"type": "stop"})
        return delta.reasoning, delta.content, _items(delta.whole_calls())

    def new_responses_stream(
        self,
        *,
        request: ResponsesRequest,
        require_reasoning: bool,
        separate_reasoning: bool,
        parse_tool_calls: bool,
    ) -> ResponsesStream:
        return ResponsesStream(
            self._responses_parser(request, require_reasoning, separate_reasoning, parse_tool_calls)
        )

    def separate_reasoning_text(self, text: str) -> tuple[str, str]:
        """SGLang's /separate_reasoning: text with a closing mark is reasoning up to there."""
        message = parse(text, thinking="</think>" in text)
        return message.reasoning or "", message.content or ""

    def parse_function_call_text(
        self, text: str, tools: list[Tool]
    ) -> tuple[str, list[ToolCallItem]]:
        """SGLang's /parse_function_call; a call of a tool that was not offered has index -1."""
        offered = [
            {"function": {"name": t.function.name, "parameters": t.function.parameters}}
            for t in tools
        ]
        place = {tool.function.name: i for i, tool in enumerate(tools)}
        message = parse(text, thinking=False, tools=offered)
        calls = [
            ToolCallItem(tool_index=place.get(c.name, -1), name=c.name, parameters=c.arguments)
            for c in message.tool_calls
        ]
        return message.content or "", calls

    def _chat_parser(self, request: ChatCompletionRequest) -> OutputParser:
        """A parser that starts where the prompt of `request` ended."""
        offered = [tool.model_dump(exclude_none=True) for tool in request.tools or ()]
        thinking = self.hooks.thinking_requested(request)
        rendered = self.encoder.render(**_conversation(request, offered, thinking))
        for message in request.messages:
            offered += [t.model_dump(exclude_none=True) for t in getattr(message, "tools", 0) or ()]
        return OutputParser(
            self.bytes,
            rendered.thinking,
            offered if self.hooks.tool_call_parsing_active(request) else None,
            request.stop,
            separate_reasoning=self.separate_reasoning and request.separate_reasoning,
            stream_reasoning=request.stream_reasoning,
        )

    def _responses_parser(
        self,
        request: ResponsesRequest,
        require_reasoning: bool,
        separate_reasoning: bool,
        parse_tool_calls: bool,
    ) -> OutputParser:
        offered = [tool.model_dump(exclude_none=True) for tool in request.tools or ()]
        functions = [tool for tool in offered if tool["type"] == "function"]
        return OutputParser(
            self.bytes,
            require_reasoning,
            functions if parse_tool_calls else None,
            request.stop,
            separate_reasoning=separate_reasoning,
        )


class ResponsesStream:
    """One streamed output of the Responses API."""

    def __init__(self, parser: OutputParser) -> None:
        self.parser = parser

    def step(
        self, chunk: dict[str, Any], finish_reason: dict[str, Any] | None
    ) -> tuple[str, str, list[ToolCallItem]]:
        delta = _step(self.parser, chunk, finish_reason)
        return delta.reasoning, delta.content, _items(delta.calls)


def _conversation(
    request: ChatCompletionRequest, tools: Sequence[Mapping[str, Any]] | None, thinking: bool
) -> dict[str, Any]:
    """The arguments of the core's encoder: `tools` of the request as the client wrote them.
    SGLang's `task` belongs to the last message."""
    wire = request.model_dump(exclude_unset=True, by_alias=True, mode="json")
    names = {tool["function"]["name"] for tool in tools or ()}
    messages = wire["messages"]
    if request.task is not None:
        messages[-1] = messages[-1] | {"task": request.task}
    effort = request.reasoning_effort
    if effort is not None and not isinstance(effort, str):
        raise ValueError(f"reasoning_effort: {effort!r} is not a named effort")
    return {
        "messages": messages,
        "tools": [t for t in wire.get("tools") or () if t["function"]["name"] in names],
        "thinking": thinking,
        "effort": effort,
        "response_format": wire.get("response_format"),
        "continue_final_message": request.continue_final_message,
    }


def _step(
    parser: OutputParser,
    chunk: Mapping[str, Any],
    finish_reason: dict[str, Any] | None,
    keep_stop: bool = False,
) -> Delta:
    """Feed the ids of a chunk that the parser has not seen."""
    new = select_new_output_ids(
        output_ids=chunk.get("output_ids") or [],
        num_consumed_tokens=parser.consumed,
        completion_tokens=chunk["meta_info"]["completion_tokens"],
        finish_reason_type=finish_reason["type"] if finish_reason else None,
        incremental=get_serving().incremental_streaming_output,
    )
    if finish_reason is None:
        return parser.feed(new)
    return parser.finish(new, finish_reason, keep_stop=keep_stop)


def _call(piece: Any) -> ToolCall:
    return ToolCall(
        id=piece.id,
        index=piece.index,
        function=FunctionResponse(name=piece.name, arguments=piece.arguments),
    )


def _items(pieces: Iterable[Any]) -> list[ToolCallItem]:
    return [
        ToolCallItem(tool_index=piece.index, name=piece.name, parameters=piece.arguments)
        for piece in pieces
    ]
