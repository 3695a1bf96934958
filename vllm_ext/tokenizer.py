"""Tokenizer modes `deepseek_v4` and `deepseek_v41`: the checkpoint's own tokenizer, with the core's
chat encoding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import TokenizersBackend
from vllm.tokenizers.hf import get_cached_tokenizer

from dsv4_plugin.config import Generation
from vllm_ext.chat_encoder import ChatEncoder


class ChatTokenizer(TokenizersBackend):
    """Chat templates give ids, whatever `tokenize` says: a prompt as text is not safe to encode."""

    generation: Generation | None = None
    """By config.json, where the mode does not say."""
    chat_encoder: ChatEncoder | None = None
    revision: str | None = None

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        **kwargs: Any,
    ) -> list[int]:
        if self.chat_encoder is None:
            of = self.name_or_path, self.revision, self.generation
            self.chat_encoder = ChatEncoder.of(self, *of)
        return self.chat_encoder.prompt(messages, tools, kwargs, kwargs.get("response_format")).ids

    def num_special_tokens_to_add(self, pair: bool = False) -> int:
        return len(self.encode(""))


class DeepseekV4Tokenizer:
    """What vLLM's registry loads; instances are `ChatTokenizer`s with cached properties."""

    generation: Generation | None = None

    @classmethod
    def from_pretrained(cls, path: str, *args: Any, **kwargs: Any) -> TokenizersBackend:
        tokenizer = ChatTokenizer.from_pretrained(path, *args, **kwargs)
        tokenizer.revision, tokenizer.generation = kwargs.get("revision"), cls.generation
        return get_cached_tokenizer(tokenizer)


class DeepseekV41Tokenizer(DeepseekV4Tokenizer):
    generation = "v4.1"
