"""Prompts equal `deepseek-recipe`'s, id for id, over generated conversations."""

from __future__ import annotations

from collections import Counter
from typing import Any

import deepseek_recipe
from hypothesis import HealthCheck, given, settings

from . import recipe
from .data import encoder
from .strategies import conversations

accepted: Counter[bool] = Counter()


def ours(request: dict[str, Any]) -> tuple[list[int], str]:
    thinking = request.get("thinking", {}).get("type", "enabled") == "enabled"
    prompt = encoder("0731").encode(
        request["messages"],
        request.get("tools"),
        thinking,
        request.get("reasoning_effort"),
        request.get("response_format"),
    )
    return prompt.ids, prompt.text


@given(conversations())
@settings(max_examples=2000, deadline=None, suppress_health_check=list(HealthCheck))
def test_ids_equal_recipes(request: dict[str, Any]) -> None:
    try:
        ids, text = recipe.encode(request)
    except (deepseek_recipe.ConversionError, ValueError):
        accepted[False] += 1
        return
    accepted[True] += 1
    assert ours(request) == (ids, text)
