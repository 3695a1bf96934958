"""The KV cache in vLLM's hands: three cache entries, one per kind of block, each for all layers.

vLLM sizes one physical block for all its cache groups and allocates by block number. One entry
holds every layer's part of a block, side by side, so that all layers of a kind share addresses:

- window: a sliding-window spec, `window_block` token rows per block;
- page: a full-attention spec whose one opaque state spans `page_size` tokens;
- ring: one block per running request, not cached by prefix.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.kv_cache_interface import (
    CircularBufferSpec,
    FullAttentionSpec,
    KVCacheSpec,
    SlidingWindowSpec,
)
from vllm.v1.kv_cache_layout import KVCacheLayout

from dsv4_plugin.cache.layer import LayerCache, bind_layers, block_words
from dsv4_plugin.cache.layout import CacheLayout
from dsv4_plugin.cache.paged import BlockTables
from dsv4_plugin.config import ModelConfig
from dsv4_plugin.kernels.dispatch import use_triton

if TYPE_CHECKING:
    from vllm.config import VllmConfig

log = logging.getLogger("vllm.dsv4")


@dataclass(frozen=True)
class GroupMetadata:
    """One cache group's part of a step: its block table int [B, blocks] and the batch's shape.

    longest_query, longest: most rows and most tokens that a request has, as the host knows them.
    """

    table: Tensor
    query_start: Tensor
    seq_lens: Tensor
    longest_query: int
    longest: int


class MetadataBuilder(AttentionMetadataBuilder[GroupMetadata]):
    """Hands the block table on; the step is built from all groups at once, in the model.

    Where kernels are Triton's these are vLLM's own buffers, which stay where they are: a step built
    from them inside a captured graph is right whenever the graph is replayed. What the host knows
    of lengths bounds launches, so a graph is captured for the longest requests; programs go by the
    lengths on the device.
    """

    @classmethod
    def get_cudagraph_support(
        cls, vllm_config: VllmConfig, kv_cache_spec: KVCacheSpec
    ) -> AttentionCGSupport:
        """Steps in which every request has as many tokens, one or one and its drafts, where the
        device runs them: they ask the host for nothing. Stages take and leave their streams in
        vLLM's buffers, and data-parallel ranks have as many rows as the graph."""
        on_device = use_triton(torch.device(vllm_config.device_config.device))
        return AttentionCGSupport.UNIFORM_BATCH if on_device else AttentionCGSupport.NEVER

    def __init__(
        self,
        kv_cache_spec: KVCacheSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> GroupMetadata:
        m, n = common_attn_metadata, common_attn_metadata.num_reqs
        tensors = m.block_table_tensor[:n], m.query_start_loc[: n + 1], m.seq_lens[:n]
        return GroupMetadata(*tensors, m.max_query_len, m.max_seq_len)

    def build_for_cudagraph_capture(
        self, common_attn_metadata: CommonAttentionMetadata
    ) -> GroupMetadata:
        longest = self.vllm_config.model_config.max_model_len
        return replace(self.build(0, common_attn_metadata), longest=longest)


class Backend(AttentionBackend):
    """Names the builder and the memory layout; the attention itself is the core's."""

    @staticmethod
    def get_name() -> str:
        return "DSV4_PLUGIN"

    @staticmethod
    def get_impl_cls() -> type[AttentionImpl[Any]]:
        raise NotImplementedError("the core computes attention; vLLM never calls an impl")

    @staticmethod
    def get_builder_cls() -> type[MetadataBuilder]:
        return MetadataBuilder

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[Any, ...]:
        """Blocks outermost: blocks of different sizes share one physical block."""
        return (KVCacheLayout.BLHNC,)


class CacheBlocks(nn.Module, AttentionLayerBase):
    """One cache entry: blocks of one kind, for all layers of a pipeline stage.

    `words` is the same in all stages: vLLM gives all workers the same number of blocks and merges
    entries by name. (With an entry per stage, 0.32 fails where a cache group has no layer of a
    stage.)

    vLLM finds it by `prefix` in the compilation config's static forward context; the prefix has
    to hold exactly one number. It may bind memory more than once and take it back in between: 0.33
    captures its graphs on a small set first, to measure what they take. `changed` is called with
    this entry whenever that happens.
    """

    def __init__(self, kind: str, words: int, spec: dict[str, Any]) -> None:
        super().__init__()
        self.prefix = f"dsv4.0.{kind}"
        self.kind = kind
        self.words = words
        self.spec = spec
        self.storage: Tensor | None = None
        self.changed: Callable[[CacheBlocks], None] = _nothing
        self.stride = self.blocks = 0
        self._given: Tensor | None = None
        context = get_current_vllm_config().compilation_config.static_forward_context
        if self.prefix in context:
            raise ValueError(f"cache entry {self.prefix} exists already: two models in one process")
        context[self.prefix] = self

    def get_attn_backend(self) -> type[AttentionBackend]:
        return Backend

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec:
        return cache_spec(self.kind, self.words, **self.spec)

    def bind_kv_cache(self, kv_cache: Tensor) -> None:
        """Take vLLM's [blocks, 1, states, content] view; keep its storage as flat int32 words."""
        n, stride, offset = kv_cache.shape[0], kv_cache.stride(0), kv_cache.storage_offset()
        size = kv_cache.element_size()
        assert stride * size % 4 == 0
        assert offset * size % 4 == 0
        self.stride, self.blocks = stride * size // 4, n
        words = torch.empty(0, dtype=torch.int32, device=kv_cache.device).set_(
            kv_cache.untyped_storage()[: kv_cache.untyped_storage().nbytes() // 4 * 4]
        )
        start = offset * size // 4
        self.storage = words[start : start + (n - 1) * self.stride + self.words]
        self._given = kv_cache
        self.changed(self)

    @property
    def kv_cache(self) -> Tensor:
        """What vLLM bound, under the name by which it looks for it."""
        return torch.empty(0) if self._given is None else self._given

    @kv_cache.setter
    def kv_cache(self, empty: Tensor) -> None:
        """vLLM takes its memory back by putting an empty tensor in its place."""
        assert empty.numel() == 0
        self.storage = self._given = None
        self.changed(self)


def _nothing(entry: CacheBlocks) -> None:
    """What an entry does when its memory changes, outside PagedCaches."""


def cache_spec(kind: str, words: int, block_size: int, window: int = 0) -> KVCacheSpec:
    """vLLM's spec of a kind of block that takes `words` 32-bit words for all layers."""
    common: dict[str, Any] = {
        "block_size": block_size, "num_kv_heads": 1, "head_size": 1, "dtype": torch.int32,
    }  # fmt: skip
    if kind in ("window", "draft"):
        row = 4 * words // block_size
        return SlidingWindowSpec(**common, sliding_window=window, state_content_bytes=row)
    whole: dict[str, Any] = {"tokens_per_state": block_size, "state_content_bytes": 4 * words}
    spec = FullAttentionSpec if kind == "page" else CircularBufferSpec
    return spec(**common, **whole)


class PagedCaches:
    """All cache entries of a model, and the core's views of them once vLLM has allocated."""

    def __init__(self, config: ModelConfig, layout: CacheLayout, stages: list[list[int]], i: int):
        """stages: compress ratios of the layers of every pipeline stage; i: this one."""
        self.config, self.layout, self.ratios = config, layout, stages[i]

        words = [
            max(stage) for stage in zip(*(block_words(layout, s) for s in stages), strict=True)
        ]

        def entry(kind: str, words: int, **spec: int) -> CacheBlocks:
            return CacheBlocks(kind, words, spec)

        block, span, size = layout.window_block, config.sliding_window, layout.page_size
        self.window = entry("window", words[0], block_size=block, window=span)
        self.page = self.ring = None
        if layout.page:
            self.page = entry("page", words[1], block_size=size)
            self.ring = entry("ring", words[2], block_size=size)
        self._layers: list[LayerCache] | None = None
        self.allocated: Callable[[], None] = lambda: None
        self.taken: Callable[[], None] = lambda: None
        self._entries = [blocks for blocks in (self.window, self.page, self.ring) if blocks]
        self._anew: set[str] = set()
        for blocks in self._entries:
            blocks.changed = self._changed

    def _changed(self, entry: CacheBlocks) -> None:
        """No view of memory that is no longer an entry's may be used; a set is whole once each of
        its entries has been bound anew."""
        self._layers = None
        self.taken()
        self._anew.discard(entry.kind)
        if entry.storage is not None:
            self._anew.add(entry.kind)
        if len(self._anew) == len(self._entries):
            self._anew.clear()
            self.allocated()

    def layers(self) -> list[LayerCache]:
        """One LayerCache per layer; made on first use after a set of caches is bound."""
        if self._layers is None:
            assert self.window.storage is not None
            page, ring = (e.storage if e else None for e in (self.page, self.ring))
            self._layers = bind_layers(self.layout, self.ratios, self.window.storage, page, ring)
        return self._layers

    def report(self) -> None:
        """One log line: what a token and a running request cost, and what fits."""
        block = 4 * self.window.stride
        growing = block / self.layout.page_size if self.page else 0
        windows = -(-(self.config.sliding_window - 1) // self.layout.window_block) + 1
        fixed = block * (windows + (self.ring is not None))
        log.info(
            "KV cache: %s, %d blocks of %.2f MiB; %.0f bytes per token and %.2f MiB per "
            "running request; %d tokens fit if one request has them all (vLLM's own count is of "
            "requests of --max-model-len).",
            self.layout.rows_named(),
            self.window.blocks,
            block / 2**20,
            growing,
            fixed / 2**20,
            max(0, self.window.blocks - 1 - fixed // block) * self.layout.page_size,
        )

    @property
    def strides(self) -> tuple[int, int, int]:
        """Words from a window block, page and ring to the next: those that caches have, or that
        they will have, since all entries share a physical block of the largest's size."""
        block = max(e.words for e in self._entries)
        window, page, ring = (
            0 if e is None else e.stride or block for e in (self.window, self.page, self.ring)
        )
        return window, page, ring

    def nothing(self, device: torch.device) -> BlockTables:
        """Tables of a request without rows, with the strides of all others."""
        return BlockTables.of_nothing(self.strides, device)

    def tables(self, metadata: dict[str, GroupMetadata]) -> BlockTables:
        """The step's block tables, from vLLM's metadata by cache entry."""
        window = metadata[self.window.prefix].table
        if self.page is None or self.ring is None:
            return BlockTables(window, window, window[:, 0], self.window.stride, 0, 0)
        return BlockTables(
            window=window,
            page=metadata[self.page.prefix].table,
            ring=metadata[self.ring.prefix].table[:, 0].contiguous(),
            window_stride=self.window.stride,
            page_stride=self.page.stride,
            ring_stride=self.ring.stride,
        )
