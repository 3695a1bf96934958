"""Plans: what a model takes on given GPUs, part by part, and what fits."""

from __future__ import annotations

import argparse

from dsv4_plugin.config import ModelConfig
from dsv4_plugin.fields import Number, Whole
from dsv4_plugin.json_file import read_object
from dsv4_plugin.serving import with_int4
from dsv4_plugin.tools.cli.arguments import check_numbers, checkpoint_path
from dsv4_plugin.tools.plan import GIB, GPUS, Layout, Plan, checkpoint_bytes, gpu_memory, plan

LIMITS: dict[str, Whole | Number] = {
    "tp": Whole(1, 1024),
    "pp": Whole(1, 1024),
    "dp": Whole(1, 1024),
    "context": Whole(1, 1 << 24),
    "concurrency": Whole(1, 1 << 20),
    "chunk": Whole(1, 1 << 20),
    "block_size": Whole(128, 1 << 16, unit=128),
    "speculative_tokens": Whole(0, 16),
    "memory": Number(0.01, 4096),
    "utilization": Number(0.01, 1),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help="a checkpoint folder or its config.json")
    parser.add_argument("--gpu", help=f"one of {', '.join(GPUS)}")
    parser.add_argument("--memory", type=float, metavar="GIB", help="of a GPU, instead of --gpu")
    parser.add_argument("--tp", type=int, default=1, help="tensor-parallel size")
    parser.add_argument("--pp", type=int, default=1, help="pipeline-parallel size")
    parser.add_argument("--dp", type=int, default=1, help="data-parallel size")
    parser.add_argument("--ep", action="store_true", help="experts by number over tp x dp")
    parser.add_argument("--context", type=int, default=32768, help="tokens per request")
    parser.add_argument("--concurrency", type=int, default=8, help="running requests")
    parser.add_argument("--kv-dtype", default="fp8", choices=("fp8", "bfloat16", "float32"))
    parser.add_argument("--block-size", type=int, default=256, help="tokens per page")
    parser.add_argument("--chunk", type=int, default=2048, help="most tokens of a step")
    parser.add_argument("--speculative-tokens", type=int, default=0, help="of the drafter")
    parser.add_argument("--utilization", type=float, default=0.92, help="share of a GPU to use")


def run(args: argparse.Namespace) -> int:
    if (args.gpu is None) == (args.memory is None):
        raise ValueError("give one of --gpu and --memory")
    check_numbers(args, LIMITS)
    path = checkpoint_path(args.config, "a checkpoint folder or its config.json")
    if path.is_dir():
        config = with_int4(ModelConfig.from_pretrained(path), str(path))
    else:
        config = ModelConfig.from_hf(read_object(path))
    memory = (gpu_memory(args.gpu) if args.gpu else args.memory) * GIB
    layout = Layout(args.tp, args.pp, args.dp, args.ep, args.speculative_tokens)
    found = plan(
        config,
        layout,
        int(memory * args.utilization),
        args.context,
        args.concurrency,
        args.kv_dtype,
        args.chunk,
        args.block_size,
    )
    print(report(found))
    return 0 if found.fits else 1


def report(found: Plan) -> str:
    """The plan as text: a line per part and stage, then what fits."""
    config, layout = found.config, found.layout
    dspark = config.dspark is not None
    drafter = f"{config.draft_layers} draft stages" if dspark else "MTP layer"
    mtp = dspark or config.num_nextn_predict_layers == 1
    lines = [
        f"checkpoint {checkpoint_bytes(config, mtp):>20,} bytes"
        + (f" with its {drafter}" if mtp else ""),
        f"layout     {layout}: {layout.gpus} GPUs, {found.budget / GIB:.1f} GiB of each to use",
    ]
    for i, (stage, free) in enumerate(zip(found.stages, found.free, strict=True)):
        first, last = stage.layers.start, stage.layers.stop - 1
        where = f" (stage {i}, layers {first}-{last})" if layout.pp > 1 else ""
        lines += [
            f"each GPU{where}",
            f"  experts      {stage.experts:>20,} bytes",
            f"  other weights{stage.dense:>20,} bytes",
            f"  workspace    {stage.workspace:>20,} bytes (estimate)",
            f"  KV cache     {max(free, 0):>20,} bytes",
            f"    {stage.rows_per_token:,.0f} bytes of rows per token, {stage.per_token:,.0f} with"
            f" carries and the sharing of blocks; {stage.per_request:,} per running request",
        ]
        if free < 0:
            lines.append(f"  does not fit: {-free / GIB:.1f} GiB too much")
    ranks = f" per data-parallel rank ({layout.dp} of them)" if layout.dp > 1 else ""
    asked = f"{found.requests} requests of {found.context:,} tokens{ranks}"
    verdict = "fit" if found.fits else "do not fit"
    lines.append(f"{found.tokens:,} tokens of KV cache fit{ranks}: {asked} {verdict}")
    return "\n".join(lines)
