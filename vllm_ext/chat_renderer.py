"""The renderer of tokenizer mode `deepseek_v4`: chats become ids without passing through text."""

from __future__ import annotations

from typing import Any

from vllm.inputs import TokensPrompt
from vllm.renderers.deepseek_v4 import DeepseekV4Renderer
from vllm.renderers.params import ChatParams
from vllm.utils.async_utils import make_async

from dsv4_plugin.chat.tools import without_tools
from vllm_ext.chat_compat import ChatTemplateResolutionError
from vllm_ext.chat_encoder import ChatEncoder
from vllm_ext.chat_request import plain_format, settle


class ChatRenderer(DeepseekV4Renderer):
    """Keeps the engine's suffix rendering, thread pool and prompt checks."""

    def __init__(self, config: Any, tokenizer: Any) -> None:
        super().__init__(config, tokenizer)
        model = config.model_config
        self._encoder = None
        if tokenizer is not None:
            self._encoder = ChatEncoder.of(tokenizer, model.model, model.revision)
        self._render_in_pool = make_async(self.render_messages, executor=self._executor)

    def render_messages(
        self, messages: list[Any], params: ChatParams
    ) -> tuple[list[Any], TokensPrompt]:
        """The messages as given (vLLM echoes the last one) and the prompt."""
        if self._encoder is None:
            raise ChatTemplateResolutionError(
                "chat needs the tokenizer; --skip-tokenizer-init serves token ids only"
            )
        settle(messages)
        kwargs = params.chat_template_kwargs
        offers = params.tool_choice != "none"
        prompt = self._encoder.prompt(
            messages if offers else without_tools(messages),
            kwargs.get("tools") if offers else None,
            kwargs,
            plain_format(params.response_format),
        )
        return messages, TokensPrompt(prompt_token_ids=prompt.ids, prompt=prompt.text)

    async def render_messages_async(
        self, messages: list[Any], params: ChatParams
    ) -> tuple[list[Any], TokensPrompt]:
        return await self._render_in_pool(messages, params)
