"""What the programs of a launch may see of each other, checked at every access.

A byte that one program writes no other may touch, unless atomics put the two in order: one that
releases publishes at its address what its program and all before it did, one that acquires takes
over what was published there. What another program stored has to be read past L1, and a barrier
has to stand between a program's stores and the atomic, made by a single thread, that releases them.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np


class History:
    """Which stretches of programs come before the running one's; atomics cut a program into
    stretches, numbered in the order in which they ran."""

    def __init__(self) -> None:
        self.program = -1
        self.owner: list[int] = []  # the program of each stretch
        self.before: set[int] = set()
        self.published: dict[int, set[int]] = {}
        self.stored = False  # since the last barrier

    @property
    def now(self) -> int:
        return len(self.owner) - 1

    def enter(self, program: int) -> None:
        if program != self.program:
            self.program, self.before, self.stored = program, set(), False
            self.owner.append(program)

    def acquire(self, addresses: Iterable[int]) -> None:
        for a in addresses:
            self.before |= self.published.get(a, set())

    def release(self, addresses: Iterable[int]) -> None:
        if self.stored:
            raise RuntimeError("race: no barrier between stores and the atomic that releases them")
        for a in addresses:
            self.published.setdefault(a, set()).update(self.before, {self.now})

    def cut(self) -> None:
        """After an atomic."""
        self.before.add(self.now)
        self.owner.append(self.program)

    def others(self, stretches: np.ndarray) -> set[int]:
        """Those of [N] that are not this one, -1 (nobody) left out."""
        elsewhere = stretches[(stretches >= 0) & (stretches != self.now)]
        return set(np.unique(elsewhere).tolist()) if len(elsewhere) else set()

    def unordered(self, stretches: np.ndarray) -> bool:
        return not self.others(stretches) <= self.before

    def foreign(self, stretches: np.ndarray) -> bool:
        return any(self.owner[s] != self.program for s in self.others(stretches))


class Region:
    """A tensor's storage during a launch: which stretch wrote and read each byte last.

    Kept for tensors up to 64 MiB; larger ones are only bounds-checked.
    """

    def __init__(self, low: int, high: int) -> None:
        self.low, self.high = low, high
        small = high - low <= 1 << 26
        self.writer = np.full(high - low, -1, np.int32) if small else None
        self.reader = np.full(high - low, -1, np.int32) if small else None

    def touch(
        self, address: np.ndarray, nbytes: int, kind: str, history: History, past_l1: bool
    ) -> None:
        """kind: load, store or atomic."""
        if self.writer is None or self.reader is None:
            return
        at = (address - np.uint64(self.low)).astype(np.int64)
        at = (at[:, None] + np.arange(nbytes)).reshape(-1)
        written = self.writer[at]
        if history.unordered(written):
            raise RuntimeError(f"race: program {history.program}'s {kind} meets another's store")
        if kind == "load" and not past_l1 and history.foreign(written):
            raise RuntimeError("race: another program's store is read through L1")
        if kind != "store":
            self.reader[at] = history.now
            return
        if history.unordered(self.reader[at]):
            raise RuntimeError(f"race: program {history.program} stores what another reads")
        if len(np.unique(at)) != len(at):
            raise RuntimeError("race: two lanes of one store write the same byte")
        self.writer[at] = history.now
