"""Global and shared memory of the emulated GPU: checked accesses and their counters."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import torch

SECTOR = 32
"""Bytes that DRAM and L2 move at once."""
LANES = {1: 32, 2: 32, 4: 32, 8: 16, 16: 8}
"""Lanes whose shared accesses of 1 .. 16 bytes go together."""


@dataclass
class Counters:
    """What one launch did. Requests are warp-wide; sectors are per request; `dram_*` are bytes of
    distinct sectors of the whole launch, the least any cache could leave."""

    load_requests: int = 0
    load_sectors: int = 0
    load_bytes: int = 0
    store_requests: int = 0
    store_sectors: int = 0
    store_bytes: int = 0
    prefetch_requests: int = 0
    prefetch_sectors: int = 0
    prefetch_bytes: int = 0
    shared_requests: int = 0
    shared_wavefronts: int = 0
    mma_flop: int = 0
    warp_instructions: int = 0
    touched: dict[str, list[np.ndarray]] = field(
        default_factory=lambda: {"load": [], "store": [], "prefetch": []}, repr=False
    )

    def distinct(self, kind: str, tensors: Iterable[torch.Tensor] | None = None) -> int:
        """Bytes of distinct sectors loaded, stored or prefetched; of some tensors only, or of
        all."""
        if not self.touched[kind]:
            return 0
        sectors = np.unique(np.concatenate(self.touched[kind]))
        if tensors is None:
            return SECTOR * len(sectors)
        total = 0
        for t in tensors:
            low = t.data_ptr() // SECTOR
            high = (t.data_ptr() + t.nbytes - 1) // SECTOR
            total += int(((sectors >= low) & (sectors <= high)).sum())
        return SECTOR * total

    def note_global(self, kind: str, address: np.ndarray, nbytes: int, lane: np.ndarray) -> None:
        warp = (lane // 32).astype(np.uint64) << np.uint64(44)
        steps = range(0, nbytes, min(nbytes, SECTOR))
        sectors = np.concatenate([warp ^ ((address + np.uint64(o)) >> np.uint64(5)) for o in steps])
        for name, n in (
            ("requests", len(np.unique(warp))),
            ("sectors", len(np.unique(sectors))),
            ("bytes", len(address) * nbytes),
        ):
            setattr(self, f"{kind}_{name}", getattr(self, f"{kind}_{name}") + n)
        self.touched[kind].append(np.unique(address >> np.uint64(5)))

    def note_shared(self, address: np.ndarray, nbytes: int, lane: np.ndarray) -> None:
        """A wavefront serves every bank once: as many as the fullest bank has distinct words."""
        phase = lane // LANES[nbytes]
        word = (address[:, None] + np.arange(0, max(nbytes, 4), 4)) // 4
        pairs = np.stack([np.repeat(phase, word.shape[1]), word.reshape(-1)], 1)
        distinct = np.unique(pairs, axis=0)
        bank, count = np.unique(distinct[:, 0] * 32 + distinct[:, 1] % 32, return_counts=True)
        fullest = np.zeros(int(bank.max()) // 32 + 1, np.int64)
        np.maximum.at(fullest, bank // 32, count)
        self.shared_requests += len(np.unique(phase))
        self.shared_wavefronts += int(fullest.sum())


class AccessError(RuntimeError):
    """A kernel left its tensors, or an address is not aligned to its access."""


class GlobalMemory:
    """The storages of the tensors passed to a launch; any other address is an error."""

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        sizes = {}
        for t in tensors:
            storage = t.untyped_storage()
            if storage.nbytes():
                sizes[storage.data_ptr()] = storage.nbytes()
        bases = sorted(sizes)
        self.bases = np.array(bases, np.uint64)
        self.ends = np.array([b + sizes[b] for b in bases], np.uint64)
        byte = ctypes.POINTER(ctypes.c_uint8)
        self.views = [np.ctypeslib.as_array(ctypes.cast(b, byte), shape=(sizes[b],)) for b in bases]

    def _find(self, address: np.ndarray, nbytes: int, text: str) -> np.ndarray:
        which = np.searchsorted(self.bases, address, side="right").astype(np.int64) - 1
        outside = which < 0
        if not outside.all():
            outside |= address + np.uint64(nbytes) > self.ends[which]
        if outside.any():
            raise AccessError(f"{int(outside.sum())} of {len(address)} lanes out of bounds: {text}")
        if (address & np.uint64(nbytes - 1)).any():
            raise AccessError(f"misaligned: {text}")
        return which

    def load(self, address: np.ndarray, nbytes: int, text: str) -> np.ndarray:
        """uint8 [lanes, nbytes]."""
        which = self._find(address, nbytes, text)
        out = np.empty((len(address), nbytes), np.uint8)
        for j in np.unique(which):
            mine = which == j
            offset = (address[mine] - self.bases[j]).astype(np.int64)
            out[mine] = self.views[j][offset[:, None] + np.arange(nbytes)]
        return out

    def store(self, address: np.ndarray, data: np.ndarray, text: str) -> None:
        which = self._find(address, data.shape[1], text)
        for j in np.unique(which):
            mine = which == j
            offset = (address[mine] - self.bases[j]).astype(np.int64)
            self.views[j][offset[:, None] + np.arange(data.shape[1])] = data[mine]


class SharedMemory:
    """Shared memory of some thread blocks side by side, `size` bytes each, full of NaN at first."""

    def __init__(self, blocks: int, size: int) -> None:
        self.size = size
        self.bytes = np.full(blocks * size, 0xFF, np.uint8)

    def check(self, address: np.ndarray, nbytes: int, base: np.ndarray, text: str) -> None:
        if ((address < base) | (address + nbytes > base + self.size)).any():
            raise AccessError(f"shared memory out of bounds: {text}")

    def load(self, address: np.ndarray, nbytes: int) -> np.ndarray:
        if nbytes in (2, 4, 8) and not (address % nbytes).any():
            words = self.bytes[: len(self.bytes) // nbytes * nbytes].view(f"u{nbytes}")
            return words[address // nbytes].view(np.uint8).reshape(-1, nbytes)
        return self.bytes[address[:, None] + np.arange(nbytes)]

    def store(self, address: np.ndarray, data: np.ndarray) -> None:
        self.bytes[address[:, None] + np.arange(data.shape[1])] = data

    def matrices(self, rows: np.ndarray, text: str) -> np.ndarray:
        """8 x 8 matrices of 16-bit values from row addresses [W, 8]."""
        if (rows % 16).any():
            raise AccessError(f"misaligned matrix row: {text}")
        return self.bytes.view(np.uint16)[(rows // 2)[:, :, None] + np.arange(8)]
