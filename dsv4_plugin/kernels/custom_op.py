"""Operations as torch.compile sees them: one node of a graph each, of which only shapes are known.

Outside a graph the functions are called as they are, without torch's dispatcher.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")

_library = torch.library.Library("dsv4", "DEF")


def custom_op(schema: str, fake: Callable[P, T]) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Decorator: in a graph, a call of the function is one of torch.ops.dsv4's operation.

    Args:
        schema: name, arguments (positional only) and results, in torch's notation.
        fake: takes the same and returns tensors of the results' shapes and dtypes.
    """
    name = schema.partition("(")[0]

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        _library.define(schema)
        _library.impl(name, function, "CompositeExplicitAutograd")
        torch.library.register_fake(f"dsv4::{name}", fake, lib=_library)
        operation = getattr(torch.ops.dsv4, name).default

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> T:
            which = operation if torch.compiler.is_compiling() else function
            return which(*args, **kwargs)

        return call

    return decorate
