"""The KV cache in SGLang's two tiers: window blocks in the SWA tier, pages in the full one.

SGLang hands out token slots; a block is `page_size` neighbouring slots of its tier. One buffer per
kind of block holds every layer's part side by side, so that all layers share addresses. Rings are
addressed by the request's row in `ReqToTokenPool`: nothing in them outlives a page boundary, and
SGLang's cached prefixes end at one.
"""

from __future__ import annotations

import logging
from bisect import bisect_right
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.mem_cache.base_swa_memory_pool import BaseSWAKVPool
from sglang.srt.model_executor.pool_configurator import (
    MemoryPoolConfig,
    MemoryPoolConfigurator,
    compute_swa_request_cap,
)
from sglang.srt.runtime_context import get_schedule, get_spec
from torch import Tensor

from dsv4_plugin import env
from dsv4_plugin.cache.layer import bind_layers, block_words
from dsv4_plugin.cache.layout import CacheLayout
from dsv4_plugin.cache.paged import BlockTables
from dsv4_plugin.config import ModelConfig
from sglang_ext.choice import choose

if TYPE_CHECKING:
    from sglang.srt.mem_cache.kv_cache_configurator import KVCacheConfigurator

log = logging.getLogger("sglang.srt.dsv4")

WINDOW_SHARE = 0.1
"""SWA slots per full slot where --swa-full-tokens-ratio is not given, beyond what running requests
need: the windows that cached prefixes keep."""


def drafts() -> int:
    """Tokens drafted per step."""
    spec = get_spec()
    return spec.speculative_num_steps if spec.speculative_algorithm else 0


class Blocks:
    """`count` blocks of `words` words, each with every layer's part side by side."""

    def __init__(self, words: int, count: int, device: str) -> None:
        self.stride = words
        self.storage = allocate(count * words, device)


def allocate(words: int, device: str) -> Tensor:
    """Uninitialised int32 words: no row is read before it is written."""
    return torch.empty(words, dtype=torch.int32, device=device)


class KVPool(BaseSWAKVPool):
    """The caches behind SGLang's `SWATokenToKVPoolAllocator`. Slot 0's block is its padding.

    A drafter has a pool of its own, of windows; its blocks are numbered as the target's.
    """

    swa_kv_pool = full_kv_pool = None

    def __init__(
        self,
        config: ModelConfig,
        layout: CacheLayout,
        ratios: Sequence[int],
        full_tokens: int,
        swa_tokens: int,
        requests: int,
        device: str,
    ) -> None:
        n, size = len(ratios), layout.page_size
        super().__init__(full_tokens, size, torch.int32, n, device, False, 0, n)
        window, page, ring = block_words(layout, ratios)
        self.config, self.layout = config, layout
        self.window = Blocks(window, swa_tokens // size + 1, device)
        self.page = Blocks(page, full_tokens // size + 1, device)
        self.ring = Blocks(ring, requests, device)
        self.layers = bind_layers(
            layout, ratios,
            self.window.storage, self.page.storage, self.ring.storage,
        )  # fmt: skip
        self._finalize_allocation_log(full_tokens)

    def tables(self, slots: Tensor, request: Tensor) -> BlockTables:
        """Block tables of a step, from the slot of each block's first token int [B, blocks] and the
        requests' rows in ReqToTokenPool [B]. Numbers beyond a request's length mean nothing."""
        size = self.page_size
        slots = slots.long()
        return BlockTables(
            window=(self.full_to_swa_index_mapping[slots] // size).int(),
            page=(slots // size).int(),
            ring=request.int(),
            window_stride=self.window.stride,
            page_stride=self.page.stride,
            ring_stride=self.ring.stride,
        )

    def register_mapping(self, full_to_swa_index_mapping: Tensor) -> None:
        self.full_to_swa_index_mapping = full_to_swa_index_mapping

    def translate_loc_from_full_to_swa(self, kv_indices: Tensor) -> Tensor:
        return self.full_to_swa_index_mapping[kv_indices]

    def report(self, model: str) -> None:
        """One line in the log: what serves, and why."""
        log.info(
            "DeepSeek-V4 is served by dsv4-plugin (%s): model %s, attention backend dsv4_plugin, "
            "KV cache %s in pages of %d tokens, chat %s.",
            choose(self.device).reason,
            model,
            self.layout.rows_named(),
            self.page_size,
            env.CHAT.read(),
        )

    def get_kv_size_bytes(self) -> int:
        return sum(blocks.storage.nbytes for blocks in (self.window, self.page, self.ring))

    def get_state_buf_infos(self) -> tuple[list[int], list[int], list[int]]:
        raise NotImplementedError("dsv4-plugin's KV pool cannot be transferred")

    def get_key_buffer(self, layer_id: int) -> Tensor:
        raise NotImplementedError("dsv4-plugin's rows are read through its own addresses")

    get_value_buffer = get_kv_buffer = get_key_buffer

    def set_kv_buffer(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("dsv4-plugin's rows are written through its own addresses")


class PoolSizer(MemoryPoolConfigurator):
    """How many tokens fit: true bytes per token and per request."""

    def __init__(self, kvc: KVCacheConfigurator) -> None:
        model, args = kvc.model, kvc.server_args
        words = block_words(model.layout, model.model.ratios)
        window, page, ring = (4 * n for n in words)
        if drafts():  # the drafter's own window, in a pool beside this one
            window += 4 * model.layout.window.words
        self.page_size, self.sliding_window = model.layout.page_size, model.config.sliding_window
        self.window_block, self.page, self.ring = window, page, ring
        self.requests = get_schedule().max_running_requests
        self.ratio = (
            get_schedule().swa_full_tokens_ratio
            if args._swa_full_tokens_ratio_explicitly_set
            else None
        )
        self.in_flight = compute_swa_request_cap(
            page_size=self.page_size, window=self.sliding_window, attn_dp_size=kvc.attn_dp_size
        )

    def swa_tokens(self, full_tokens: int) -> int:
        """SWA slots beside that many full ones, page-aligned."""
        if self.ratio is not None:
            asked = int(full_tokens * self.ratio)
        else:
            asked = min(full_tokens, max(self.in_flight, int(full_tokens * WINDOW_SHARE)))
        return asked // self.page_size * self.page_size

    def nbytes(self, full_pages: int) -> int:
        """Bytes of pools with that many full pages; each pool has one page more, for padding."""
        swa_pages = self.swa_tokens(full_pages * self.page_size) // self.page_size
        pages = (full_pages + 1) * self.page + (swa_pages + 1) * self.window_block
        return pages + (self.requests + 1) * self.ring

    def calculate_pool_sizes(self, available_bytes: int, page_size: int) -> MemoryPoolConfig:
        most = range(available_bytes // max(1, self.page) + 1)
        pages = bisect_right(most, available_bytes, key=self.nbytes) - 1
        return self.calculate_pool_sizes_from_max_tokens(max(pages, 0) * page_size, page_size)

    def calculate_pool_sizes_from_max_tokens(
        self, max_total_num_tokens: int, page_size: int
    ) -> MemoryPoolConfig:
        full = max_total_num_tokens // page_size * page_size
        swa = self.swa_tokens(full)
        self.validate_swa_pool_size(swa, self.sliding_window, page_size)
        return MemoryPoolConfig(
            max_total_num_tokens=full, full_max_total_num_tokens=full, swa_max_total_num_tokens=swa
        )

    def finalize_with_max_running_requests(self, config: MemoryPoolConfig) -> MemoryPoolConfig:
        log.info(
            "dsv4-plugin KV cache: %.0f bytes per token, %.0f more per token in a window, %d per "
            "running request; room for %d tokens, %d of them in windows, and %d requests.",
            self.page / self.page_size,
            self.window_block / self.page_size,
            self.ring,
            config.full_max_total_num_tokens,
            config.swa_max_total_num_tokens,
            config.max_running_requests,
        )
        return config
