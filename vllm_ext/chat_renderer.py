"""The renderers of tokenizer modes `deepseek_v4` and `deepseek_v41`: chats become ids without
passing through text."""

from __future__ import annotations

from typing import Any

from vllm.inputs import TokensPrompt
from vllm.renderers.deepseek_v4 import DeepseekV4Renderer
from vllm.renderers.params import ChatParams
from vllm.tokenizers.deepseek_v41 import get_deepseek_v41_tokenizer
from vllm.utils.async_utils import make_async

from dsv4_plugin.chat.tools import without_tools
from dsv4_plugin.config import Generation
from vllm_ext.chat_compat import ChatTemplateResolutionError
from vllm_ext.chat_encoder import ChatEncoder
from vllm_ext.chat_request import is_image, plain_format, settle


class ChatRenderer(DeepseekV4Renderer):
    """Keeps the engine's suffix rendering, thread pool and prompt checks."""

    generation: Generation | None = None

    def __init__(self, config: Any, tokenizer: Any) -> None:
        super().__init__(config, tokenizer)
        model = config.model_config
        self._encoder = None
        if tokenizer is not None:
            self._encoder = ChatEncoder.of(tokenizer, model.model, model.revision, self.generation)
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


class ChatRendererV41(ChatRenderer):
    """V4.1's model in vLLM reads images: requests that have some go vLLM's own way."""

    generation = "v4.1"

    def __init__(self, config: Any, tokenizer: Any) -> None:
        super().__init__(config, tokenizer)
        self._own = None if tokenizer is None else get_deepseek_v41_tokenizer(tokenizer)

    def _apply_chat_template(self, *args: Any, **kwargs: Any) -> Any:
        return self._own.apply_chat_template(*args, **kwargs)

    def render_messages(
        self, messages: list[Any], params: ChatParams
    ) -> tuple[list[Any], TokensPrompt]:
        settle(messages)
        if self._own is not None and any(map(_has_images, messages)):
            return DeepseekV4Renderer.render_messages(self, messages, params)
        return super().render_messages(messages, params)


def _has_images(message: Any) -> bool:
    content = message.get("content") if isinstance(message, dict) else None
    return isinstance(content, list) and any(map(is_image, content))
