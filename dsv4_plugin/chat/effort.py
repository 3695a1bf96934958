"""Reasoning effort: which text a checkpoint generation was trained with for which request."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Literal, get_args

from .tokens import ABSOLUTE_EFFORT, BEYOND_EFFORT

Generation = Literal["april", "0731"]

EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max", "ultra")

_TEXTS: dict[Generation, dict[str, str]] = {
    "april": dict.fromkeys(("xhigh", "max", "ultra"), ABSOLUTE_EFFORT),
    "0731": dict.fromkeys(("medium", "high"), ABSOLUTE_EFFORT)
    | dict.fromkeys(("xhigh", "max", "ultra"), BEYOND_EFFORT),
}

DEFAULT_EFFORT_VARIABLE = "DSV4_DEFAULT_EFFORT"


def check_effort(effort: str, source: str = "effort") -> str:
    """Return `effort`, or raise a ValueError that names `source` and the known values."""
    if effort not in EFFORTS:
        raise ValueError(f"{source}: {effort!r} is not one of {', '.join(EFFORTS)}")
    return effort


def check_generation(generation: str) -> Generation:
    for known in get_args(Generation):
        if generation == known:
            return known  # type: ignore[no-any-return]  # get_args is untyped
    raise ValueError(f"generation: {generation!r} is not one of {get_args(Generation)}")


def effort_text(generation: Generation, effort: str) -> str:
    """The text that follows the bos token in thinking mode; empty for most efforts."""
    return _TEXTS[generation].get(effort, "")


def generation_of(config: Mapping[str, Any]) -> Generation:
    """The generation of a checkpoint by its `config.json`: 0731 brought the `dspark_*` fields."""
    return "0731" if any(key.startswith("dspark_") for key in config) else "april"


def default_effort(environ: Mapping[str, str] = os.environ) -> str:
    """The effort of requests that name none: `DSV4_DEFAULT_EFFORT`, by default `high`.

    The authors' API takes high; on April checkpoints that adds no text, on 0731 the "absolute
    maximum" text. Setting it to `low` gives 0731 prompts without an effort text.
    """
    return check_effort(environ.get(DEFAULT_EFFORT_VARIABLE, "high"), DEFAULT_EFFORT_VARIABLE)
