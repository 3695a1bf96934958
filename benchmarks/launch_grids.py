"""What `benchmarks.tune` tries: of each operation with a launch table, the work and the values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from math import inf
from typing import Any

from dsv4_plugin.cache.layout import CacheLayout
from dsv4_plugin.config import CSA, HCA, SWA
from dsv4_plugin.kernels.attention import kernel as attention
from dsv4_plugin.kernels.experts import kernel as experts
from dsv4_plugin.kernels.index import kernel as index
from dsv4_plugin.kernels.index import topk
from dsv4_plugin.kernels.linear import kernel as linear
from dsv4_plugin.kernels.packed import fp8
from dsv4_plugin.kernels.packed import kernel as int4
from dsv4_plugin.kernels.streams import kernel as streams
from dsv4_plugin.tools import kernel_work as work
from dsv4_plugin.tools.kernel_work import Work, World

SIZES = {
    "decode of 1": (1, 1, 1 << 16),
    "decode of 16": (16, 1, 1 << 13),
    "decode of 64": (64, 1, 1 << 13),
    "decode of 256": (256, 1, 1 << 11),
    "prefill of 4,096": (1, 4096, 1 << 13),
}
"""Requests, tokens of each in the step, and tokens they then have."""
LONG = SIZES | {"decode of 1 at a million": (1, 1, 1 << 20)}


@dataclass(frozen=True)
class Op:
    """table: the launch table whose row is varied. work: what it launches, at `sizes`. fields:
    values to try of each field of the row; 'few.warps' lies in its `few`, 'fp8.0.columns' in the
    first of its `fp8`; fields that have to be equal stand together.

    sums: None: a request's bits may differ from launch to launch. Else they may not, and so each
    variant has to have the present row's; but for these fields, which say in what order all of the
    row's launches add.
    """

    table: dict[str, Any]
    work: dict[str, Callable[[World], Work]]
    sizes: dict[str, tuple[int, int, int]]
    fields: dict[str, tuple[Any, ...]]
    sums: tuple[str, ...] | None = None


def _of(name: str, **values: tuple[Any, ...]) -> dict[str, tuple[Any, ...]]:
    """Of the row's part `name`."""
    return {f"{name}.{field}": some for field, some in values.items()}


def _bfloat16(world: World) -> World:
    return replace(world, layout=CacheLayout.of(world.config, "bfloat16"))


_WARPS, _STAGES, _TURNED = (4, 8), (2, 3, 4), (False, True)
LATENT = partial(work.fp8_linear, n_in="hidden_size", n_out="q_lora_rank")
QUERIES = partial(work.fp8_linear, n_in="q_lora_rank", n_out="num_attention_heads", factor=512)
OPS = {
    "attention": Op(
        attention.LAUNCHES,
        {
            "SWA": partial(work.attention, ratio=SWA),
            "CSA": partial(work.attention, ratio=CSA),
            "HCA": partial(work.attention, ratio=HCA),
            "HCA, bfloat16 rows": lambda world: work.attention(_bfloat16(world), HCA),
        },
        LONG,
        {
            "heads": (16, 32, 64),
            "fp8.0.below": (4, 16, 32, 64),
            **_of("fp8.0", columns=(1, 2, 4), warps=_WARPS, deal=(0, 4, inf)),
            "fp8.1.below": (32, 64, 128),
            **_of("fp8.1", columns=(1, 2, 4), warps=_WARPS, deal=(4, inf)),
            **_of("fp8.2", columns=(1, 2, 4), warps=_WARPS, unpack=(2, 4, 16, inf)),
            "bfloat16.0.below": (4, 16, 32, 64),
            **_of("bfloat16.0", columns=(1, 2, 4), warps=_WARPS, stages=(1, 2, 3)),
            "bfloat16.1.below": (32, 64, 128),
            **_of("bfloat16.1", columns=(1, 2, 4), warps=_WARPS, stages=(1, 2, 3)),
            **_of("bfloat16.2", columns=(1, 2, 4), warps=_WARPS, stages=(1, 2, 3)),
        },
        sums=("heads",),
    ),
    "index": Op(
        index.LAUNCHES,
        {"scores and choice": work.index},
        LONG,
        {
            "entries": (32, 64, 128),
            "paged.warps flat.warps": (2, 4, 8),
            "paged.stages": (1, 2),
            "flat.stages": (2, 3, 4),
            "programs": (432, 864, 1728),
            "blocks": (8, 16, 32, 64),
        },
        sums=("entries", "paged.warps flat.warps"),
    ),
    "topk": Op(
        topk.LAUNCHES,
        {"scores and choice": work.index},
        LONG,
        {
            "values": (8, 16, 32),
            "warps": (8, 16),
        },
        sums=(),
    ),
    "experts": Op(
        experts.LAUNCHES,
        {
            "MXFP4": partial(work.packed_experts, kind="fp4"),
            "FP8": partial(work.packed_experts, kind="fp8"),
        },
        SIZES,
        {
            "split": (0, 8, 16, 48, 96),
            "piece": (512, 1024, 2048),
            "limit": (4, 8, 16, 32),
            **_of("few", columns=(64, 128), depth=(128, 256), warps=_WARPS, stages=_STAGES),
            **_of("many", rows=(32, 64, 128), columns=(64, 128, 256), warps=_WARPS),
            **_of("many", stages=_STAGES, turned=_TURNED),
            **_of("many_fp8", rows=(32, 64, 128), warps=_WARPS, turned=_TURNED),
        },
    ),
    "experts-bfloat16": Op(
        experts.LAUNCHES,
        {"bfloat16": work.plain_experts},
        SIZES,
        {
            **_of("plain_few", columns=(32, 64), depth=(64, 128), warps=_WARPS, stages=_STAGES),
            **_of("plain_many", rows=(32, 64, 128), columns=(64, 128), warps=_WARPS),
        },
    ),
    "fp8": Op(
        fp8.LINEARS,
        {
            "latent": LATENT,
            "queries": QUERIES,
            "gated": partial(work.gated_linear, rounded=False),
        },
        SIZES,
        {
            "programs": (96, 128, 192, 256, 384),
            "least": (256, 512, 1024),
            "line": (32, 64, 128, 256),
            "group": (1, 4, 8),
            **_of("codes.plain.few", warps=_WARPS, stages=_STAGES, outputs=(32, 64, 128)),
            **_of("codes.plain.some", rows=(32, 64, 128), warps=_WARPS, stages=_STAGES),
            **_of("codes.plain.many", outputs=(64, 128, 256), rows=(64, 128), turned=_TURNED),
            **_of("codes.gated.few", warps=_WARPS, stages=_STAGES),
            **_of("codes.gated.some", rows=(16, 32, 64), warps=_WARPS),
            **_of("codes.gated.many", rows=(32, 64, 128), stages=_STAGES),
        },
    ),
    "fp8-by-bits": Op(
        fp8.LINEARS,
        {
            "latent": partial(LATENT, rounded=False),
            "queries": partial(QUERIES, rounded=False),
            "groups of heads": partial(work.grouped_linear, rounded=True),
            "gated": partial(work.gated_linear, rounded=False),
        },
        SIZES,
        {
            "programs": (96, 128, 192, 256, 384),
            "least": (256, 512, 1024),
            "line": (32, 64, 128, 256),
            **_of("bits.plain.few", warps=_WARPS, stages=_STAGES, outputs=(32, 64, 128)),
            **_of("bits.plain.some", rows=(16, 32, 64), warps=_WARPS, stages=_STAGES),
            **_of("bits.plain.many", outputs=(64, 128), rows=(64, 128), stages=_STAGES),
            **_of("bits.rounded.few", warps=_WARPS, stages=_STAGES),
            **_of("bits.rounded.some", rows=(16, 32, 64), warps=_WARPS, stages=_STAGES),
            **_of("bits.rounded.many", rows=(32, 64, 128), stages=_STAGES),
            **_of("bits.gated.some", rows=(16, 32, 64), warps=_WARPS),
            **_of("bits.gated.many", rows=(32, 64, 128), stages=_STAGES),
        },
    ),
    "int4": Op(
        int4.TILES,
        {"latent": work.int4_linear},
        SIZES,
        {
            **_of("few", columns=(32, 64), warps=_WARPS, stages=_STAGES),
            **_of("many", rows=(16, 32, 64, 128), columns=(32, 64, 128), warps=_WARPS),
        },
    ),
    "float32": Op(
        linear.LAUNCHES,
        {
            "router": partial(work.float32_linear, outputs=256),
            "compressors": partial(work.float32_linear, outputs=2560),
        },
        SIZES,
        {
            "split": (32, 128, 512),
            "piece": (256, 512, 1024),
            "many": (32, 64, 128),
            "columns": (32, 64, 128),
            "depth": (32, 64, 128),
            "together": (1, 2, 4),
            "warps": _WARPS,
            "stages": _STAGES,
        },
        sums=("piece", "columns", "depth", "warps"),
    ),
    "streams": Op(
        streams.LAUNCHES,
        {"before a sublayer": work.residual_streams},
        SIZES,
        {
            "block": (32, 64),
            "few": (16, 64, 128),
            "parts": (2, 4, 8),
            "stages": _STAGES,
            "slab": (1024, 4096),
            "warps": _WARPS,
            "end_warps": (4, 8, 16),
        },
        sums=("block", "warps", "end_warps"),
    ),
}
