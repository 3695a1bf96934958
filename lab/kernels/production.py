"""Launches as they are in production, on all ranks, without memory: inputs are meta tensors, and a
fake GPU records what is launched.

Ranks change only the number of heads and the width of experts, and that the compiled code of 16
heads and more does not see: so few cases cover all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from dsv4_plugin.config import CSA, HCA, SWA, ModelConfig
from dsv4_plugin.tools.kernel_work import (
    FLASH,
    PRO,
    Work,
    World,
    attention,
    compressor,
    float32_linear,
    fp8_linear,
    gated_linear,
    grouped_linear,
    index,
    index_queries,
    int4_linear,
    joined_streams,
    latent_norm,
    packed_experts,
    place,
    plain_experts,
    queries_and_window,
    residual_streams,
    rounded_inputs,
    router,
    shared_activation,
)

Case = Callable[[], object]
CHUNK = 8192
"""Rows of a prompt's chunk."""
MILLION = 1 << 20
LAYERS = 43


def case(
    work: Callable[..., Work],
    requests: int,
    tokens: int = 1,
    length: int = MILLION,
    config: ModelConfig = FLASH,
    kv_dtype: str = "fp8",
    index_dtype: str = "auto",
    **of_work: Any,
) -> Case:
    """requests that bring `tokens` tokens each and then have `length`; of_work: as for `work`."""
    meta = torch.device("meta")

    def launch() -> object:
        world = World.of(
            meta, requests, tokens, length, kv_dtype, index_dtype, config, layers=LAYERS
        )
        return work(world, **of_work).launch()

    return launch


def heads(config: ModelConfig, n: int) -> ModelConfig:
    """A rank's part of heads and of index heads."""
    return replace(config, num_attention_heads=n, index_n_heads=min(n, config.index_n_heads))


RANK_OF_8 = replace(PRO, moe_intermediate_size=PRO.moe_intermediate_size // 8)
latent = partial(fp8_linear, n_in="hidden_size", n_out="q_lora_rank")
queries = partial(fp8_linear, n_in="q_lora_rank", n_out="num_attention_heads", factor=512)

ATTENTION: dict[str, Case] = {
    "SWA decode, 64 heads": case(attention, 64, ratio=SWA),
    "SWA prefill, 64 heads": case(attention, 1, CHUNK, ratio=SWA),
    "CSA decode of 1, 64 heads": case(attention, 1, ratio=CSA),
    "CSA decode of 1,024, 64 heads": case(attention, 1024, ratio=CSA),
    "CSA decode of 1, 128 heads": case(attention, 1, config=PRO, ratio=CSA),
    "CSA decode of 1, bfloat16 rows": case(attention, 1, kv_dtype="bfloat16", ratio=CSA),
    "HCA decode of 1, 64 heads": case(attention, 1, ratio=HCA),
    "HCA decode of 1,024, 64 heads": case(attention, 1024, ratio=HCA),
    "CSA prefill, 64 heads": case(attention, 1, CHUNK, length=1 << 16, ratio=CSA),
    "HCA decode of 64, 8 heads": case(attention, 64, config=heads(FLASH, 8), ratio=HCA),
    "HCA prefill, 64 heads": case(attention, 1, CHUNK, ratio=HCA),
    "HCA prefill, 8 heads": case(attention, 1, CHUNK, config=heads(FLASH, 8), ratio=HCA),
    "HCA prefill, bfloat16 rows": case(attention, 1, CHUNK, kv_dtype="bfloat16", ratio=HCA),
    "indexer queries": case(index_queries, 1, CHUNK),
    "indexer queries, fp4 keys": case(index_queries, 1, CHUNK, index_dtype="fp4"),
    "indexer, decode of 1 at 65,536": case(index, 1, length=1 << 16),
    "indexer, decode of 64": case(index, 64),
    "indexer, decode of 64, 8 heads": case(index, 64, config=heads(FLASH, 8)),
    "indexer, decode of 64, fp4 keys": case(index, 64, index_dtype="fp4"),
    "indexer, decode of 64, Pro": case(index, 64, config=PRO),
    "indexer, prefill": case(index, 1, CHUNK),
    "indexer, prefill, fp4 keys": case(index, 1, CHUNK, index_dtype="fp4"),
    "indexer, decode of 64 at 65,536": case(index, 64, length=1 << 16),
    "indexer, decode of 64 at 8,192": case(index, 64, length=1 << 13),
}
AROUND: dict[str, Case] = {
    "step metadata": case(place, 1024, 8),
    "latent norm, Pro": case(latent_norm, 1, CHUNK, config=PRO),
    "latent norm, Pro, rounded": case(latent_norm, 1, CHUNK, config=PRO, rounded=True),
    "queries and window rows, 64 heads": case(queries_and_window, 1),
    "queries and window rows, 128 heads, bfloat16": case(
        queries_and_window, 1, CHUNK, config=PRO, kv_dtype="bfloat16"
    ),
    "compressor, CSA": case(compressor, 1024, ratio=CSA),
    "compressor, CSA, fp4 keys": case(compressor, 1024, index_dtype="fp4", ratio=CSA),
    "compressor, HCA": case(compressor, 1024, 8, ratio=HCA),
    "streams, Flash, decode": case(residual_streams, 1),
    "streams, Flash, rounded": case(residual_streams, 64, rounds=True),
    "streams, Pro, prefill": case(residual_streams, 1, CHUNK, config=PRO),
    "streams, Pro, head": case(residual_streams, 64, config=PRO, head=True),
    "streams between stages": case(joined_streams, 64),
    "router, Flash": case(router, 1024),
    "router, Pro": case(router, 1, CHUNK, config=PRO),
    "router by hash": case(router, 1, hashed=True),
    "router's product, decode": case(float32_linear, 1, outputs=256),
    "compressors' product, CSA, decode": case(float32_linear, 64, outputs=2560),
    "compressors' product, CSA, prefill": case(float32_linear, 1, CHUNK, outputs=2560),
    "SwiGLU of the shared expert": case(shared_activation, 1, CHUNK),
}
PRODUCTS: dict[str, Case] = {
    "experts, Flash, bfloat16, decode": case(plain_experts, 1),
    "experts, Flash, bfloat16, prefill": case(plain_experts, 1, CHUNK),
    "experts, Flash, MXFP4, decode": case(packed_experts, 1, kind="fp4", rounding=True),
    "experts, Flash, MXFP4, decode of 16": case(packed_experts, 16, kind="fp4", rounding=True),
    "experts, Flash, MXFP4, prefill": case(packed_experts, 1, CHUNK, kind="fp4", rounding=True),
    "experts, Flash, NVFP4, decode": case(packed_experts, 1, kind="nvfp4"),
    "experts, Flash, NVFP4, prefill": case(packed_experts, 1, CHUNK, kind="nvfp4"),
    "experts, Flash, FP8, decode": case(packed_experts, 1, kind="fp8", rounding=True),
    "experts, Flash, FP8, prefill": case(packed_experts, 1, CHUNK, kind="fp8", rounding=True),
    "experts, Pro, MXFP4, decode on 8 ranks": case(
        packed_experts, 64, config=RANK_OF_8, kind="fp4", rounding=True
    ),
    "experts, Pro, MXFP4, decode of 1,024 on 8 ranks": case(
        packed_experts, 1024, config=RANK_OF_8, kind="fp4", rounding=True
    ),
    "FP8 linear, decode": case(latent, 1),
    "FP8 linear, decode of 64": case(latent, 64),
    "FP8 linear, prefill": case(queries, 1, CHUNK),
    "FP8 linear of inputs as they are, decode": case(latent, 1, rounded=False),
    "FP8 linear of inputs as they are, prefill": case(queries, 1, CHUNK, rounded=False),
    "FP8 grouped linear, decode": case(grouped_linear, 1, rounded=True),
    "FP8 grouped linear, decode of 64": case(grouped_linear, 64, rounded=True),
    "FP8 grouped linear, prefill": case(grouped_linear, 1, CHUNK, rounded=True),
    "FP8 SwiGLU, decode": case(gated_linear, 1, rounded=True),
    "FP8 SwiGLU, decode of 64": case(gated_linear, 64, rounded=True),
    "FP8 SwiGLU, prefill": case(gated_linear, 1, CHUNK, rounded=True),
    "int4 linear, decode": case(int4_linear, 1),
    "int4 linear, prefill": case(int4_linear, 1, CHUNK),
    "rounded inputs": case(rounded_inputs, 1, CHUNK),
}
GROUPS = ("ATTENTION", "AROUND", "PRODUCTS")
"""Of cases; no two of them launch the same kernel."""
CASES = ATTENTION | AROUND | PRODUCTS
