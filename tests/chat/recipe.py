"""`deepseek-recipe`, the authors' renderer and parser, behind functions shaped like ours."""

from __future__ import annotations

from functools import cache
from typing import Any

import deepseek_recipe as recipe

from .data import tokenizer_file


@cache
def _encoding() -> recipe.DeepseekV4Encoding:
    tokenizer = recipe.Tokenizer.from_file(str(tokenizer_file()))
    return recipe.DeepseekV4Encoding().with_tokenizer(tokenizer)


def conversation(request: dict[str, Any]) -> recipe.Conversation:
    """A Chat Completions request; raises ConversionError or ValueError where it is refused."""
    body = {"model": "DeepSeek-V4-Pro", **request}
    return recipe.ChatCompletionRequest(body).convert(recipe.ConversionOptions()).conversation


def text_of_v41(request: dict[str, Any]) -> str:
    """The text of a request to V4.1; raises ConversionError where it is refused."""
    converted = conversation(request | {"model": "DeepSeek-V4.1-Flash"})
    return recipe.DeepseekV41Encoding().render_conversation(converted).prompt


def encode(request: dict[str, Any]) -> tuple[list[int], str]:
    """The ids and the text of a Chat Completions request."""
    converted = conversation(request)
    encoding = _encoding()
    return encoding.encode(converted), encoding.render_conversation(converted).prompt
