"""Reasoning effort: which text a checkpoint generation was trained with for which request."""

from __future__ import annotations

from typing import get_args

from dsv4_plugin import env
from dsv4_plugin.config import Generation

from .tokens import ABSOLUTE_EFFORT, BEYOND_EFFORT, NUMBERED_EFFORT

EFFORTS = env.EFFORT.allowed

_TEXTS: dict[Generation, dict[str, str]] = {
    "april": dict.fromkeys(("xhigh", "max", "ultra"), ABSOLUTE_EFFORT),
    "0731": dict.fromkeys(("medium", "high"), ABSOLUTE_EFFORT)
    | dict.fromkeys(("xhigh", "max", "ultra"), BEYOND_EFFORT),
    "v4.1": {
        effort: NUMBERED_EFFORT.format(number)
        for number, efforts in {
            50: ("minimal", "low"),
            75: ("medium", "high", "xhigh"),
            100: ("max", "ultra"),
        }.items()
        for effort in efforts
    },
}


def check_effort(effort: str | int, generation: str = "") -> str | int:
    """Return `effort`, or raise a ValueError that names the known values. V4.1 also knows numbers
    from 1 to 100."""
    if generation == "v4.1" and type(effort) is int and 1 <= effort <= 100:
        return effort
    if generation == "v4.1" and effort not in EFFORTS:
        known = ", ".join(EFFORTS)
        raise ValueError(f"effort: {effort!r} is not one of {known}, or an integer from 1 to 100")
    if effort not in EFFORTS:
        raise ValueError(f"effort: {effort!r} is not one of {', '.join(EFFORTS)}")
    return effort


def check_generation(generation: str) -> Generation:
    for known in get_args(Generation):
        if generation == known:
            return known  # type: ignore[no-any-return]  # get_args is untyped
    raise ValueError(f"generation: {generation!r} is not one of {get_args(Generation)}")


def effort_text(generation: Generation, effort: str | int) -> str:
    """The text that follows the bos token in thinking mode; empty for most efforts."""
    if isinstance(effort, int):
        return NUMBERED_EFFORT.format(effort)
    return _TEXTS[generation].get(effort, "")
