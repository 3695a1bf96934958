"""Which bytes a layer keeps, and where: the page layouts of the KV cache.

Three kinds of block, all managed by the engine:

- window block: `window_block` token rows, the last `sliding_window` tokens of a request;
- page: everything that lasts, for `page_size` tokens: compressed rows, indexer keys, and for CSA
  the carry (the sums of half 0 of the page's last window) that the next page starts from;
- ring: one per running request, the pooling sums after its last position, or after each of its
  last `ring_rows` positions, in a row each.

Every ratio divides the page, so a prefix that ends with a page needs nothing but its pages and
the window rows: prefix caching, preemption and chunking are plain consequences of that.
Pooling sums are (max, sum, weighted sum) per channel; a carry is kept as (log-sum-exp, mean).
Sums cannot be taken back, but rows by position can be returned to: with N speculative tokens a ring
has N + 1 rows, and a step after a rejection simply reads an earlier one. All other rows are written
again before they are read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from dsv4_plugin.cache.rows import (
    BFloat16Rows,
    Float32Rows,
    FP4IndexRows,
    FP8IndexRows,
    FP8KVRows,
    RowCodec,
    RowFormat,
)
from dsv4_plugin.config import CSA, HCA, SWA, ModelConfig

KV_DTYPES = ("auto", "float32", "bfloat16", "fp8")
INDEX_DTYPES = ("auto", "bfloat16", "fp8", "fp4")


@dataclass(frozen=True)
class Part:
    """`rows` rows of a codec inside a block, `offset` words from the block's start."""

    codec: RowCodec
    rows: int
    offset: int


@dataclass(frozen=True)
class BlockLayout:
    """The named parts of one layer's block, and its size in words."""

    parts: dict[str, Part]
    words: int

    @classmethod
    def of(cls, **parts: tuple[RowCodec, int]) -> BlockLayout:
        placed, offset = {}, 0
        for name, (codec, rows) in parts.items():
            placed[name] = Part(codec, rows, offset)
            offset += codec.words * rows
        return cls(placed, offset)

    @property
    def nbytes(self) -> int:
        return 4 * self.words


@dataclass(frozen=True)
class CacheLayout:
    """Block layouts by layer kind (compress ratio), shared by all layers of the kind."""

    sliding_window: int
    page_size: int
    window_block: int
    ring_rows: int
    window: BlockLayout
    page: dict[int, BlockLayout]
    ring: dict[int, BlockLayout]

    @classmethod
    def of(
        cls,
        config: ModelConfig,
        kv_dtype: str,
        page_size: int = 256,
        window_block: int = 32,
        num_speculative_tokens: int = 0,
        index_dtype: str = "auto",
    ) -> CacheLayout:
        """Lay out the caches.

        Args:
            kv_dtype: 'float32', 'bfloat16' or 'fp8' (KV rows and indexer keys).
            page_size: tokens per page, a multiple of every compress ratio of the model.
            index_dtype: of indexer keys: 'auto' (as kv_dtype), 'bfloat16', 'fp8' or 'fp4'.

        Raises:
            ValueError: an unknown dtype, or a page size that a ratio does not divide.
        """
        ratios = sorted(set(config.compress_ratios) - {SWA})
        config.require_page_size(page_size)
        kv, key = _codecs(config, kv_dtype)
        if index_dtype not in INDEX_DTYPES:
            raise ValueError(
                f"index_dtype is {index_dtype!r}; allowed are {', '.join(INDEX_DTYPES)}"
            )
        if index_dtype == "fp4" and config.index_head_dim not in (32, 64, 128):
            raise ValueError(
                f"index_dtype is 'fp4' and index_head_dim is {config.index_head_dim}; fp4 keys "
                "have 32, 64 or 128 values, whose scales fill one word"
            )
        if index_dtype != "auto":
            key = _INDEX_ROWS[index_dtype](config.index_head_dim)
        d = config.head_dim
        dc = config.head_dim + config.index_head_dim
        page, ring, rows = {}, {}, num_speculative_tokens + 1
        if CSA in ratios:
            n = page_size // CSA
            page[CSA] = BlockLayout.of(kv=(kv, n), key=(key, n), carry=(Float32Rows(2 * dc), 1))
            ring[CSA] = BlockLayout.of(sums=(Float32Rows(6 * dc), rows))
        if HCA in ratios:
            page[HCA] = BlockLayout.of(kv=(kv, page_size // HCA))
            ring[HCA] = BlockLayout.of(sums=(Float32Rows(3 * d), rows))
        window = BlockLayout.of(kv=(kv, window_block))
        return cls(config.sliding_window, page_size, window_block, rows, window, page, ring)

    def require_kernel_rows(self) -> None:
        """Raise ValueError where rows are of a format that Triton's kernels do not read."""
        if self.window.parts["kv"].codec.format == RowFormat.FLOAT32:
            raise ValueError(
                "KV rows are float32, which Triton's kernels do not read; ask for bfloat16 or fp8 "
                "rows, or set DSV4_KERNELS=torch"
            )

    def rows_named(self) -> str:
        """For a log line: `FP8KV rows, FP4Index keys`."""
        kv = type(self.window.parts["kv"].codec).__name__.removesuffix("Rows")
        if CSA not in self.page:
            return f"{kv} rows"
        key = type(self.page[CSA].parts["key"].codec).__name__.removesuffix("Rows")
        return f"{kv} rows, {key} keys"

    def growth(self, ratios: Iterable[int]) -> float:
        """Bytes that every further token of a request takes, over layers of these ratios."""
        return sum(self.page[r].nbytes for r in ratios if r != SWA) / self.page_size

    def windows_only(self) -> CacheLayout:
        """The same layout for layers without compression."""
        return replace(self, page={}, ring={})

    def with_ring_rows(self, rows: int) -> CacheLayout:
        """The same layout for `rows` - 1 speculative tokens."""
        ring = {
            ratio: BlockLayout.of(sums=(block.parts["sums"].codec, rows))
            for ratio, block in self.ring.items()
        }
        return replace(self, ring_rows=rows, ring=ring)


def resolve_kv_dtype(kv_dtype: str, model_dtype: str) -> str:
    """'auto' is float32 for a float32 model (exact) and bfloat16 otherwise. Raises ValueError."""
    if kv_dtype not in KV_DTYPES:
        raise ValueError(f"kv_dtype is {kv_dtype!r}; allowed are {', '.join(KV_DTYPES)}")
    if kv_dtype != "auto":
        return kv_dtype
    return "float32" if model_dtype == "float32" else "bfloat16"


def _codecs(config: ModelConfig, kv_dtype: str) -> tuple[RowCodec, RowCodec]:
    d, di = config.head_dim, config.index_head_dim
    if kv_dtype == "float32":
        return Float32Rows(d), Float32Rows(di)
    if kv_dtype == "bfloat16":
        return BFloat16Rows(d), BFloat16Rows(di)
    if kv_dtype == "fp8":
        return FP8KVRows(d, config.qk_rope_head_dim), FP8IndexRows(di)
    raise ValueError(f"kv_dtype is {kv_dtype!r}; allowed are {', '.join(KV_DTYPES[1:])}")


_INDEX_ROWS: dict[str, Callable[[int], RowCodec]] = {
    "bfloat16": BFloat16Rows,
    "fp8": FP8IndexRows,
    "fp4": FP4IndexRows,
}
