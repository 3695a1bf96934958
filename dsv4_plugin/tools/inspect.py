"""What a checkpoint folder holds, from its headers alone."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from dsv4_plugin.checkpoint.files import MTP, TensorInfo, problems_of, read_headers
from dsv4_plugin.checkpoint.names import SCALE
from dsv4_plugin.checkpoint.spelling import natives
from dsv4_plugin.config import CSA, HCA, SWA, ModelConfig

VARIANTS = {
    "plain": "unquantised",
    "fp4": "FP8 with FP4 experts",
    "fp8": "FP8, experts too (Base)",
    "nvfp4": "FP8 with NVFP4 experts",
    "ct-nvfp4": "compressed-tensors, NVFP4 experts",
    "w4a16": "compressed-tensors, int4 experts (W4A16)",
    "gptq": "int4 (GPTQ, AutoRound)",
}
KINDS = {SWA: "SWA", CSA: "CSA", HCA: "HCA"}
PARTS = {
    r"mtp\.": "draft stages",
    r"(vision|aligner)\.|image_": "images (skipped)",
    r"(embed|head)\.": "embedding and head",
    r".*\.ffn\.experts\.": "routed experts",
    r".*\.ffn\.shared_experts\.": "shared experts",
    r".*\.ffn\.gate\.": "gates",
    r".*\.attn\.indexer\.": "indexers",
    r".*\.attn\.compressor\.": "compressors",
    r".*\.attn\.": "attention",
    r"(.*\.)?hc_": "mHC",
    r"": "norms",
}
"""The first pattern that a tensor's name begins with decides its part."""
SHOWN = 10


def describe(directory: str | Path) -> list[str]:
    """Lines of text: variant, layers by kind, parameters and bytes by part, and what is wrong.

    Raises:
        ValueError, FileNotFoundError: config.json or a file cannot be read at all.
    """
    config = ModelConfig.from_pretrained(directory)
    found = natives(config, read_headers(directory))
    kinds = Counter(KINDS[r] for r in config.compress_ratios)
    layers = ", ".join(f"{n} {kind}" for kind, n in kinds.items())
    drafts = any(name.startswith(MTP) for name in found)
    problems = list(problems_of(config, found, drafts))
    return [
        f"variant     {VARIANTS[config.experts]}, generation {config.generation}{_for(config)}",
        f"layers      {config.num_hidden_layers} ({layers}), {config.num_hash_layers} hash-routed",
        f"experts     {config.n_routed_experts} per layer, {config.num_experts_per_tok} per token",
        "",
        *_table(found),
        "",
        *_problems(problems),
    ]


def _for(config: ModelConfig) -> str:
    return ", Vision-Exp (served for text)" if config.vision_n_layers else ""


def _table(found: dict[str, TensorInfo]) -> Iterator[str]:
    parameters: Counter[str] = Counter()
    nbytes: Counter[str] = Counter()
    for name, info in found.items():
        part = next(part for pattern, part in PARTS.items() if re.match(pattern, name))
        nbytes[part] += info.nbytes
        parameters[part] += count_parameters(name, info)
    yield f"{'part':20}{'parameters':>18}{'GiB':>10}"
    for part in PARTS.values():
        if nbytes[part]:
            yield f"{part:20}{parameters[part]:>18,}{nbytes[part] / 2**30:>10.3f}"
    yield f"{'all':20}{parameters.total():>18,}{nbytes.total() / 2**30:>10.3f}"


def count_parameters(name: str, info: TensorInfo) -> int:
    """Values of the network in a tensor: none in a scale or a token table, two in an FP4 byte."""
    if SCALE.fullmatch(name) or name.endswith(
        ("input_scale", "input_global_scale", "weight_shape", "tid2eid", "qzeros", "g_idx")
    ):
        return 0
    n = 1
    for size in info.shape:
        n *= size
    return n * {"I8": 2, "U8": 2, "I32": 8}.get(info.dtype, 1)


def _problems(problems: list[str]) -> Iterator[str]:
    if not problems:
        yield "complete"
        return
    yield f"{len(problems)} problems:"
    yield from (f"  {problem}" for problem in problems[:SHOWN])
    if len(problems) > SHOWN:
        yield f"  and {len(problems) - SHOWN} more"
