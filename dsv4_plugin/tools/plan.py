"""What fits: bytes per GPU of a layout, by part, and the tokens of KV cache that remain.

Weights are counted tensor by tensor from config.json, as the network holds them on NVIDIA's GPUs:
norms in float32, others as stored (AMD's have routers and compressors in float32, 1 % more). The
cache is counted by its own layout. Workspace is an estimate: the largest tensors that a step has at
once.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from dsv4_plugin.cache.layout import CacheLayout
from dsv4_plugin.checkpoint.names import Stored, stored_tensors
from dsv4_plugin.config import SWA, ModelConfig
from dsv4_plugin.model.parallel import OutputGroups

GIB = 1 << 30
GPUS = {
    "A100-40": 40,
    "A100-80": 80,
    "A6000": 48,
    "L40S": 48,
    "4090-24G": 24,
    "4090-48G": 48,
    "5090": 32,
    "H100": 80,
    "H200": 141,
    "B200": 180,
    "MI300X": 192,
}
"""GiB of memory."""
_USUAL = {"a100": "a10080", "4090": "409024"}
"""What is meant where the name leaves the memory out."""
_BYTES = {
    "F32": 4,
    "I64": 8,
    "I32": 4,
    "BF16": 2,
    "F16": 2,
    "F8_E4M3": 1,
    "F8_E8M0": 1,
    "I8": 1,
    "U8": 1,
}
_WIDE = re.compile(r"norm\.weight$")
"""Stored in bfloat16, held in float32."""
_EXPERT = re.compile(r"ffn\.experts\.")
_WO_B = re.compile(r"attn\.wo_b\.")
_SPLIT = re.compile(
    r"attn\.(wq_b|wo_a)\.|attn_sink$|indexer\.(wq_b|weights_proj)\.|shared_experts\.|^(embed|head)\."
)
_LAYER = re.compile(r"layers\.(\d+)\.")


@dataclass(frozen=True)
class Layout:
    """How a model is spread: tp x pp x dp GPUs, experts by number over tp x dp where `ep`.

    num_speculative_tokens: of the drafter, which then sits on the last stage.
    """

    tp: int = 1
    pp: int = 1
    dp: int = 1
    ep: bool = False
    num_speculative_tokens: int = 0

    @property
    def gpus(self) -> int:
        return self.tp * self.pp * self.dp

    def __str__(self) -> str:
        sizes = [f"{name}{n}" for name, n in (("TP", self.tp), ("PP", self.pp), ("DP", self.dp))]
        named = [size for size in sizes if not size.endswith("P1")] or ["one GPU"]
        return " x ".join(named) + (" + EP" if self.ep else "")


@dataclass(frozen=True)
class Stage:
    """Bytes on one GPU of a pipeline stage.

    rows_per_token: of KV cache, the compressed rows; per_token: with the carry and the sharing of
    physical blocks; per_request: window blocks and ring.
    """

    layers: range
    experts: int
    dense: int
    workspace: int
    rows_per_token: float
    per_token: float
    per_request: int

    @property
    def weights(self) -> int:
        return self.experts + self.dense


@dataclass(frozen=True)
class Plan:
    """stages: one GPU of each; budget: bytes of a GPU that may be used; context, requests: asked
    for, per data-parallel rank."""

    config: ModelConfig
    layout: Layout
    stages: Sequence[Stage]
    budget: int
    context: int
    requests: int

    @property
    def free(self) -> list[int]:
        """Bytes for the cache, by stage; negative where the weights do not fit."""
        return [self.budget - s.weights - s.workspace for s in self.stages]

    @property
    def tokens(self) -> int:
        """Tokens of KV cache that fit, over all running requests of a data-parallel rank."""
        return min(
            max(0, int((free - self.requests * s.per_request) // max(s.per_token, 1)))
            for free, s in zip(self.free, self.stages, strict=True)
        )

    @property
    def fits(self) -> bool:
        return self.tokens >= self.requests * self.context


def plan(
    config: ModelConfig,
    layout: Layout,
    memory: int,
    context: int,
    concurrency: int,
    kv_dtype: str = "fp8",
    chunk: int = 2048,
    page_size: int = 256,
) -> Plan:
    """Count everything for GPUs of `memory` usable bytes.

    Args:
        concurrency: running requests, shared by the data-parallel ranks.
        chunk: most tokens of a step.

    Raises:
        ValueError: a layout that the model cannot be split by.
    """
    config.require_tensor_parallel(layout.tp, "--tp")
    if layout.ep:
        config.require_expert_parallel(layout.tp * layout.dp, "--ep")
    if layout.pp > config.num_hidden_layers:
        raise ValueError(f"--pp is {layout.pp}; the model has {config.num_hidden_layers} layers")
    cache = CacheLayout.of(config, kv_dtype, page_size).with_ring_rows(
        layout.num_speculative_tokens + 1
    )
    requests = -(-concurrency // layout.dp)
    parts = split(config, layout.pp)
    mtp = layout.num_speculative_tokens > 0
    # vLLM gives every stage as many blocks, so that the stage with the largest sets the size.
    block = max(_block_bytes(config, cache, part, mtp) for part in parts)
    tensors = stored_tensors(config, mtp)
    stages = [_stage(config, layout, cache, part, chunk, block, tensors) for part in parts]
    return Plan(config, layout, stages, memory, context, requests)


def gpu_memory(name: str) -> int:
    """GiB of a GPU, by its name in any spelling ("A100", "rtx 4090", "NVIDIA A100-80GB").

    Raises ValueError naming the known ones.
    """
    asked = _short(name)
    known = {_short(gpu): memory for gpu, memory in GPUS.items()}
    found = known.get(_USUAL.get(asked, asked))
    if found is None:
        raise ValueError(
            f"--gpu is {name}; known are {', '.join(GPUS)}, and --memory takes any other's GiB"
        )
    return found


def _short(name: str) -> str:
    return re.sub(r"nvidia|amd|geforce|rtx|instinct|[\W_]|g[ib]*b?$", "", name.lower())


def split(config: ModelConfig, stages: int) -> list[range]:
    """The layers of each pipeline stage, as vLLM splits them: what is over goes to the stages
    before the last."""
    n = config.num_hidden_layers
    counts = [n // stages] * stages
    for i in range(2, n % stages + 2):
        counts[-i] += 1
    return [range(sum(counts[:i]), sum(counts[: i + 1])) for i in range(stages)]


def checkpoint_bytes(config: ModelConfig, mtp: bool = True) -> int:
    """Bytes of all tensors as they lie in the files."""
    return sum(_size(stored, stored.dtypes[0]) for stored in stored_tensors(config, mtp).values())


def _size(stored: Stored, dtype: str) -> int:
    count = 1
    for n in stored.shape:
        count *= n
    return count * _BYTES[dtype]


def _block_bytes(config: ModelConfig, cache: CacheLayout, layers: range, mtp: bool) -> int:
    """Of a physical block: it holds a page, a ring or window rows, of all layers of a stage."""
    compressed = [config.compress_ratios[i] for i in layers if config.compress_ratios[i] != SWA]
    drafts = config.draft_layers if mtp and layers.stop == config.num_hidden_layers else 0
    windows = len(layers) + drafts
    return max(
        sum(cache.page[r].nbytes for r in compressed),
        sum(cache.ring[r].nbytes for r in compressed),
        windows * cache.window.nbytes,
    )


def _stage(
    config: ModelConfig,
    layout: Layout,
    cache: CacheLayout,
    layers: range,
    chunk: int,
    block: int,
    tensors: dict[str, Stored],
) -> Stage:
    mtp = layout.num_speculative_tokens > 0
    last = layers.stop == config.num_hidden_layers
    experts = dense = 0
    for name, stored in tensors.items():
        if not _on_stage(name, layers, last, mtp) or name.endswith(".qzeros"):
            continue
        dtype = "F32" if _WIDE.search(name) else stored.dtypes[0]
        size = _size(stored, dtype)
        if _EXPERT.search(name):
            experts += size
        elif _WO_B.search(name):
            groups = OutputGroups(config.num_attention_heads, config.o_groups, 0, layout.tp)
            dense += size * groups.parts // config.o_groups
        else:
            dense += size // layout.tp if _SPLIT.search(name) else size
    if layout.ep:  # of the ranks that hold most
        n = config.n_routed_experts
        experts = experts // n * -(-n // (layout.tp * layout.dp))
    else:
        experts //= layout.tp
    parts = [
        part
        for i in layers
        if config.compress_ratios[i] != SWA
        for name, part in cache.page[config.compress_ratios[i]].parts.items()
        if name != "carry"
    ]
    rows = sum(4 * part.codec.words * part.rows for part in parts)
    windows = -(-(config.sliding_window - 1) // cache.window_block) + 1
    return Stage(
        layers=layers,
        experts=experts,
        dense=dense,
        workspace=workspace_bytes(config, layout.tp, chunk),
        rows_per_token=rows / cache.page_size,
        per_token=block / cache.page_size if cache.page else 0.0,
        per_request=block * (windows + bool(cache.page)),
    )


def _on_stage(name: str, layers: range, last: bool, mtp: bool) -> bool:
    layer = _LAYER.match(name)
    if layer is not None:
        return int(layer[1]) in layers
    if name.startswith("embed."):
        return layers.start == 0 or (mtp and last)
    return last


def workspace_bytes(config: ModelConfig, tp: int, chunk: int) -> int:
    """An estimate for steps of `chunk` tokens: streams in float32 before and after a sublayer,
    queries and outputs of attention in float32, the experts' products."""
    c = config
    streams = 3 * 4 * c.hc_mult * c.hidden_size
    attention = 10 * c.num_attention_heads // tp * c.head_dim
    width = c.moe_intermediate_size * 3 + 2 * c.hidden_size
    experts = 2 * c.num_experts_per_tok * width
    return chunk * (streams + max(attention, experts))
