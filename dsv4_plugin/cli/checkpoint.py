"""Checkpoints: make random ones in the native layout."""

from __future__ import annotations

import argparse

from dsv4_plugin.checkpoint.make import PRESETS, make_checkpoint


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    make = actions.add_parser("make", help="write random weights with the real V4 tokenizer")
    make.add_argument("--preset", choices=sorted(PRESETS), required=True)
    make.add_argument("--out", required=True, metavar="DIR", help="a new or empty folder")
    make.add_argument("--seed", type=int, default=0)
    make.set_defaults(action=_make)


def run(args: argparse.Namespace) -> int:
    return int(args.action(args))


def _make(args: argparse.Namespace) -> int:
    config = make_checkpoint(args.out, args.preset, args.seed)
    print(f"{args.out}: {config.num_hidden_layers} layers, hidden size {config.hidden_size}")
    return 0
