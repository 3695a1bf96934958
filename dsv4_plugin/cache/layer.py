"""One layer's caches, as pools of rows."""

from __future__ import annotations

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


def _pools(layout: BlockLayout, storage: Tensor) -> dict[str, RowPool]:
    return {name: RowPool(storage, part.codec) for name, part in layout.parts.items()}
