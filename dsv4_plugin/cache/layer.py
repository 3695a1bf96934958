"""One layer's caches, as pools of rows."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from dsv4_plugin.cache.layout import BlockLayout, CacheLayout
from dsv4_plugin.cache.rows import RowPool
from dsv4_plugin.config import SWA


@dataclass(frozen=True)
class LayerCache:
    """window: KV rows of recent tokens. kv, key, carry, sums: see `layout`; None where the layer
    kind has none."""

    layout: CacheLayout
    window: RowPool
    kv: RowPool | None = None
    key: RowPool | None = None
    carry: RowPool | None = None
    sums: RowPool | None = None

    @classmethod
    def bind(
        cls,
        layout: CacheLayout,
        ratio: int,
        window: Tensor,
        page: Tensor | None,
        ring: Tensor | None,
    ) -> LayerCache:
        """Views of a layer's storage: 1-D int32 tensors that start at the layer's first block."""
        pools = {"window": _pools(layout.window, window)["kv"]}
        if ratio != SWA:
            assert page is not None
            assert ring is not None
            pools |= _pools(layout.page[ratio], page) | _pools(layout.ring[ratio], ring)
        return cls(layout, **pools)


def _pools(layout: BlockLayout, storage: Tensor) -> dict[str, RowPool]:
    return {name: RowPool(storage, part.codec) for name, part in layout.parts.items()}
