"""In which order the programs of a launch run: at random, from a seed that a test may set."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray

_seed = 0


@contextmanager
def seeded(value: int) -> Iterator[None]:
    """Inside, launches run their programs in the order of this seed."""
    global _seed
    before, _seed = _seed, value
    try:
        yield
    finally:
        _seed = before


def seed() -> int:
    return _seed


def programs(n: int) -> NDArray[np.int64]:
    """A permutation of n programs."""
    return np.random.default_rng(_seed).permutation(n)


def waves(n: int) -> list[NDArray[np.int64]]:
    """The same, where some run to their end before others begin; the last runs alone."""
    order = programs(n)
    cut = int(np.random.default_rng(_seed + n).integers(0, n))
    return [w for w in (order[: min(cut, n - 1)], order[cut:-1], order[-1:]) if len(w)]
