"""The core's encoder, fed with what vLLM's renderers and tokenizers are given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Self

from transformers.utils.hub import cached_file

from dsv4_plugin.chat import Encoder, Prompt
from dsv4_plugin.config import Generation, generation_of
from dsv4_plugin.json_file import read_object
from vllm_ext.chat_request import ChatOptions


class ChatEncoder(Encoder):
    """The encoder of one checkpoint."""

    @classmethod
    def of(
        cls,
        tokenizer: Any,
        model: str,
        revision: str | None = None,
        generation: Generation | None = None,
    ) -> Self:
        """`model` is the checkpoint, a directory or a repository: its config.json tells which
        texts it was trained with, where `generation` does not."""
        if generation is not None:
            return cls(tokenizer, generation)
        path = cached_file(model, "config.json", revision=revision)
        return cls(tokenizer, generation_of(read_object(path)))

    def prompt(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        kwargs: Mapping[str, Any],
        response_format: Mapping[str, Any] | None = None,
    ) -> Prompt:
        """`kwargs` are vLLM's `chat_template_kwargs`. Raises ValueError as the core does."""
        options = ChatOptions.of(kwargs)
        return self.encode(
            messages,
            tools,
            thinking=options.thinking,
            effort=options.effort,
            response_format=response_format,
            continue_final_message=options.continue_final_message,
            add_generation_prompt=options.add_generation_prompt,
            drop_reasoning=options.drop_reasoning,
        )
