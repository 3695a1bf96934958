"""Checkpoints: make random ones in any published format or the trained mini, convert, inspect."""

from __future__ import annotations

import argparse

from dsv4_plugin.config import ModelConfig
from dsv4_plugin.fields import Whole
from dsv4_plugin.tools.cli.arguments import check_numbers, checkpoint_path
from dsv4_plugin.tools.convert import CONVERSIONS, convert_checkpoint
from dsv4_plugin.tools.formats import FORMATS
from dsv4_plugin.tools.inspect import describe
from dsv4_plugin.tools.make import PRESETS, make_checkpoint
from dsv4_plugin.tools.mini import make_mini

MINI = ("mini", "mini-dspark")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    make = actions.add_parser("make", help="random weights (mini: trained), real tokenizer")
    make.add_argument("--preset", choices=sorted([*PRESETS, *MINI]), required=True)
    make.add_argument("--format", choices=FORMATS, default="bf16", dest="fmt")
    make.add_argument("--out", required=True, metavar="DIR", help="a new or empty folder")
    make.add_argument("--seed", type=int, default=0)
    make.add_argument("--experts", type=int, help="routed experts per layer, if not the preset's")
    make.set_defaults(action=_make)
    convert = actions.add_parser("convert", help="round a bfloat16 checkpoint to FP8, FP4 or NVFP4")
    convert.add_argument("source", metavar="DIR")
    convert.add_argument("--format", choices=CONVERSIONS, default="fp8-fp4", dest="fmt")
    convert.add_argument("--out", required=True, metavar="DIR", help="a new or empty folder")
    convert.set_defaults(action=_convert)
    inspect = actions.add_parser("inspect", help="variant, sizes and what is missing")
    inspect.add_argument("directory", metavar="DIR")
    inspect.set_defaults(action=_inspect)


def run(args: argparse.Namespace) -> int:
    return int(args.action(args))


def _make(args: argparse.Namespace) -> int:
    check_numbers(args, {"experts": Whole(1, 1 << 13)})
    if args.preset in MINI:
        if args.fmt != "bf16" or args.experts is not None:
            raise ValueError(
                f"preset {args.preset} is trained in bf16: make it, then `checkpoint convert`"
            )
        return _done(args.out, make_mini(args.out, dspark=args.preset == "mini-dspark"))
    overrides = {} if args.experts is None else {"n_routed_experts": args.experts}
    config = make_checkpoint(args.out, args.preset, args.seed, overrides, fmt=args.fmt)
    return _done(args.out, config)


def _convert(args: argparse.Namespace) -> int:
    return _done(args.out, convert_checkpoint(checkpoint_path(args.source), args.out, args.fmt))


def _inspect(args: argparse.Namespace) -> int:
    print("\n".join(describe(checkpoint_path(args.directory))))
    return 0


def _done(directory: str, config: ModelConfig) -> int:
    print(f"{directory}: {config.num_hidden_layers} layers, hidden size {config.hidden_size}")
    return 0
