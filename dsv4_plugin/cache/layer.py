"""One layer's caches, as pools of rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from dsv4_plugin.cache.layout import BlockLayout, CacheLayout
from dsv4_plugin.cache.paged import BlockTables, Paged
from dsv4_plugin.cache.rows import RowPool
from dsv4_plugin.config import SWA


@dataclass(frozen=True)
class LayerCache:
    """window: KV rows of recent tokens. kv, key, carry, sums: see `layout`; None where the layer
    kind, `ratio`, has none."""

    layout: CacheLayout
    ratio: int
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
        return cls(layout, ratio, **pools)

    def window_rows(self, tables: BlockTables) -> Paged:
        """The rows of positions."""
        block = self.layout.window_block
        return Paged(self.window, tables.window, tables.window_stride, 0, block)

    def entries(self, tables: BlockTables) -> Paged:
        """The compressed rows."""
        return self._in_pages(self.kv, "kv", tables)

    def keys(self, tables: BlockTables) -> Paged:
        """The indexer's keys of the compressed rows."""
        return self._in_pages(self.key, "key", tables)

    def _in_pages(self, pool: RowPool | None, name: str, tables: BlockTables) -> Paged:
        assert pool is not None
        part = self.layout.page[self.ratio].parts[name]
        return Paged(pool, tables.page, tables.page_stride, part.offset, part.rows)


def block_words(layout: CacheLayout, ratios: Sequence[int]) -> tuple[int, int, int]:
    """Words of a window block, a page and a ring that hold the parts of all layers side by side."""
    kinds = [ratio for ratio in ratios if ratio != SWA]
    return (
        layout.window.words * len(ratios),
        sum(layout.page[ratio].words for ratio in kinds),
        sum(layout.ring[ratio].words for ratio in kinds),
    )


def bind_layers(
    layout: CacheLayout,
    ratios: Sequence[int],
    window: Tensor,
    page: Tensor | None,
    ring: Tensor | None,
) -> list[LayerCache]:
    """Every layer's views of such blocks: 1-D int32 tensors that start at the first one. Layers
    share addresses; each has a base of its own."""
    found = []
    for i, ratio in enumerate(ratios):
        _, in_page, in_ring = block_words(layout, ratios[:i])
        own = window[layout.window.words * i :]
        pages = page[in_page:] if page is not None and ratio != SWA else None
        rings = ring[in_ring:] if ring is not None and ratio != SWA else None
        found.append(LayerCache.bind(layout, ratio, own, pages, rings))
    return found


def _pools(layout: BlockLayout, storage: Tensor) -> dict[str, RowPool]:
    return {name: RowPool(storage, part.codec) for name, part in layout.parts.items()}
