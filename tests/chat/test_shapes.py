"""The grid of shapes: every call is found, all prose is content, no markup is left."""

from __future__ import annotations

from random import Random

import pytest

from dsv4_plugin.chat.tokens import DSML

from . import laws
from .shapes import GRID, PROSE, TOOLS, Shape


def name_of(shape: Shape) -> str:
    where = "+".join(shape.where)
    return f"{shape.block}-{shape.closing}-{shape.count}-{where}-{PROSE.index(shape.prose)}"


def test_the_grid_is_whole() -> None:
    assert len(GRID) == len(set(GRID)) == 588


@pytest.mark.parametrize("shape", GRID, ids=name_of)
def test_shapes(shape: Shape) -> None:
    message = laws.check_any(shape.text, False, TOOLS, "stop", Random(0))
    assert [(call.name, call.arguments) for call in message.tool_calls] == shape.calls
    assert all(call.complete for call in message.tool_calls)
    content = message.content or ""
    assert DSML not in content
    prose = shape.prose.strip()
    assert content.count(prose) == shape.text.count(prose)
