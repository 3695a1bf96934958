"""The DeepSeek-V4 chat format: messages to prompts, the model's output to messages.

    prompt = Encoder.from_pretrained(directory).encode(messages, tools)
    parser = StreamParser(prompt.thinking, tools, tokenizer)
    events = parser.feed_ids(ids)  # as the ids come
    events = parser.finish("stop")

Needs the standard library and a tokenizer object only. docs/chat.md describes the format.
"""

from .deltas import CallDelta, Delta
from .detokenize import Detokenizer, TokenBytes
from .encoder import Encoder, Prompt
from .events import (
    ArgumentsDelta,
    ContentDelta,
    Event,
    Finish,
    Message,
    ReasoningDelta,
    ToolCall,
    ToolCallEnd,
    ToolCallStart,
    collect,
)
from .parser import StreamParser, parse
from .render import Rendered, render

__all__ = [
    "ArgumentsDelta",
    "CallDelta",
    "ContentDelta",
    "Delta",
    "Detokenizer",
    "Encoder",
    "Event",
    "Finish",
    "Message",
    "Prompt",
    "ReasoningDelta",
    "Rendered",
    "StreamParser",
    "TokenBytes",
    "ToolCall",
    "ToolCallEnd",
    "ToolCallStart",
    "collect",
    "parse",
    "render",
]
