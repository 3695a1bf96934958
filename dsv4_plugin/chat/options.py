"""Options that requests spell in several ways, read in one place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_TYPES = {"enabled": True, "disabled": False}


def read_flag(value: Any, field: str, default: bool = False) -> bool:
    """A boolean; null is `default`. Raises ValueError naming `field` for anything else."""
    if value is None:
        return default
    if not isinstance(value, bool):
        raise ValueError(f"{field}: must be true or false, not {value!r:.80}")
    return value


def read_thinking(value: Any, field: str) -> bool | None:
    """Whether the model may think: a boolean or the authors' API's object; None where it is null.

    Raises ValueError naming `field` for anything else: a "false" must not read as true.
    """
    kind = value.get("type") if isinstance(value, Mapping) else None
    if isinstance(kind, str) and kind in _TYPES:
        return _TYPES[kind]
    if value is not None and not isinstance(value, bool):
        raise ValueError(
            f'{field}: must be true, false, {{"type": "enabled"}} or {{"type": "disabled"}}, '
            f"not {value!r:.80}"
        )
    return value


def thinks(kwargs: Mapping[str, Any], field: str = "chat_template_kwargs") -> bool | None:
    """What `thinking` and `enable_thinking`, other templates' name for it, say together: one that
    is false decides, since engines derive the other from the effort. None where both are silent."""
    found = [
        read_thinking(kwargs.get(name), f"{field}.{name}")
        for name in ("thinking", "enable_thinking")
    ]
    return None if found == [None, None] else False not in found
