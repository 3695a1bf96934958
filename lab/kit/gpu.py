"""A fake GPU that executes what it compiles.

A launch whose PTX and operands equal an earlier one's (as sm_80 and sm_86 give) is not executed
again: the same program on the same bytes writes the same bytes.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from typing import Any, Self

import torch
import triton

from lab.kit import arithmetic, order, transfers  # noqa: F401  (instructions of the emulator)
from lab.kit.emulator import Emulator
from lab.kit.memory import Counters
from lab.kit.targets import FakeGPU

REMEMBERED_BYTES = 1 << 22
"""Launches over more than this are always executed."""


def _stop_at_ptx(
    backend: object = None, stages: dict[str, Any] | None = None, *_: object
) -> tuple[str, str] | None:
    """Triton's hook into its stages: the machine code, half of the time, is not executed here."""
    if stages is None:
        return "stop at ptx", "stop at ptx"
    stages["cubin"] = lambda ptx, metadata: b""
    return None


def _flat(given: Iterable[Any]) -> list[Any]:
    """Arguments, or their types, with those of tuples in their places."""
    return [x for a in given for x in (_flat(a) if isinstance(a, tuple) else [a])]


class EmulatedGPU(FakeGPU):
    """Args:
    name: the architecture.
    count: keep `Counters` of every launch in `counted`: (kernel, grid, counters).
    """

    _emulators: dict[str, Emulator] = {}  # noqa: RUF012  (of all instances, by kernel)
    _known: dict[bytes, list[bytes]] = {}  # noqa: RUF012

    def __init__(self, name: str, count: bool = False) -> None:
        super().__init__(name)
        self.count = count
        self.counted: list[tuple[str, tuple[int, int, int], Counters]] = []

    def __enter__(self) -> Self:
        triton.knobs.runtime.add_stages_inspection_hook = _stop_at_ptx
        return super().__enter__()

    def __exit__(self, *details: object) -> None:
        triton.knobs.runtime.add_stages_inspection_hook = None
        super().__exit__(*details)

    def launch(self, source: Any, metadata: Any, grid: tuple[int, int, int], args: Any) -> None:
        if metadata.hash not in self._emulators:
            ptx = self.kernel(source, metadata).asm["ptx"]
            threads = metadata.num_warps * 32
            self._emulators[metadata.hash] = Emulator(ptx, threads, metadata.shared)
        emulator = self._emulators[metadata.hash]
        kinds = _flat(source.signature.values())
        given = [a for t, a in zip(kinds, _flat(args), strict=True) if t != "constexpr"]
        tensors = [a for a in given if isinstance(a, torch.Tensor)]
        values = [a.data_ptr() if isinstance(a, torch.Tensor) else a for a in given]
        emulator.counters = Counters() if self.count else None
        if self.count:
            self.counted.append((metadata.name, grid, emulator.counters))
            emulator.launch(grid, values, tensors)
            return
        self._remembered(emulator, source, metadata, grid, given, tensors, values)

    def _remembered(
        self,
        emulator: Emulator,
        source: Any,
        metadata: Any,
        grid: tuple[int, int, int],
        given: list[Any],
        tensors: list[torch.Tensor],
        values: list[Any],
    ) -> None:
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors}
        if sum(s.nbytes() for s in storages.values()) > REMEMBERED_BYTES:
            emulator.launch(grid, values, tensors)
            return
        flat = {p: torch.empty(0, dtype=torch.uint8).set_(s) for p, s in storages.items()}  # type: ignore[call-overload]
        text = self.kernel(source, metadata).asm["ptx"]
        digest = hashlib.blake2b(re.sub(r"\.(target|version)[^\n]*|//[^\n]*", "", text).encode())
        for a in given:
            place = (
                (a.storage_offset(), list(flat).index(a.untyped_storage().data_ptr()))
                if (isinstance(a, torch.Tensor))
                else a
            )
            digest.update(repr((place, grid, order.seed())).encode())
        for storage in flat.values():
            digest.update(storage.numpy().tobytes())
        key = digest.digest()
        if key not in self._known:
            emulator.launch(grid, values, tensors)
            self._known[key] = [s.numpy().tobytes() for s in flat.values()]
        else:
            for storage, data in zip(flat.values(), self._known[key], strict=True):
                if not data:
                    continue
                storage.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
