"""Cache memory of Flash, by vLLM's own grouping code."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from vllm.v1.core import kv_cache_utils
from vllm.v1.kv_cache_interface import CircularBufferSpec, FullAttentionSpec
from vllm.v1.kv_cache_layout import KVCacheLayout

from dsv4_plugin.cache.layout import CacheLayout
from dsv4_plugin.config import SWA
from dsv4_plugin.tools.kernel_work import flash
from vllm_ext.cache import cache_spec

RATIOS = [0, 0] + [4 if i % 2 == 0 else 128 for i in range(41)]
EVEN = [4, 128] * 21 + [0]
"""As many CSA as HCA layers: entries of one size each would be split over several groups."""


def specs(ratios: list[int]) -> dict[str, object]:
    layout = CacheLayout.of(flash(ratios), "fp8", page_size=256)
    compressed = [r for r in ratios if r != SWA]
    return {
        "dsv4.0.window": cache_spec(
            "window", layout.window.words * len(ratios), layout.window_block, window=128
        ),
        "dsv4.0.page": cache_spec("page", sum(layout.page[r].words for r in compressed), 256),
        "dsv4.0.ring": cache_spec("ring", sum(layout.ring[r].words for r in compressed), 256),
    }


@pytest.mark.parametrize("ratios", [RATIOS, EVEN])
def test_flash_in_fp8(ratios):
    config = SimpleNamespace(
        cache_config=SimpleNamespace(
            get_resolved_kv_cache_layout=lambda: KVCacheLayout.BLHNC,
            num_gpu_blocks_override=None,
            prefix_cache_retention_interval=0,
        ),
        scheduler_config=SimpleNamespace(disable_hybrid_kv_cache_manager=False),
        speculative_config=None,
        attention_config=SimpleNamespace(hisparse_config=None),
        model_config=SimpleNamespace(
            max_model_len=131072, hf_config=SimpleNamespace(model_type="x")
        ),
        parallel_config=SimpleNamespace(decode_context_parallel_size=1),
        max_in_flight_tokens=2048,
    )
    groups = kv_cache_utils.get_kv_cache_groups(config, specs(ratios))
    assert len(groups) == 3
    block = kv_cache_utils._get_kv_cache_bytes_per_block(groups, KVCacheLayout.BLHNC)
    growing, fixed = 0.0, 0
    for group in groups:
        spec = kv_cache_utils._get_per_layer_spec(group, group.layer_names[0])
        if isinstance(spec, FullAttentionSpec):
            growing += block / spec.block_size
        elif isinstance(spec, CircularBufferSpec):
            fixed += block
        else:
            fixed += block * (-(-(spec.sliding_window - 1) // spec.block_size) + 1)
    assert growing <= 4500
    assert fixed <= 8 * 2**20
