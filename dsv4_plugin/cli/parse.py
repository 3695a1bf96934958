"""`dsv4 parse`: the model's output, as text or as token ids -> the message as JSON."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

from dsv4_plugin.chat import StreamParser, collect
from dsv4_plugin.cli.render import add_tokenizer_argument, read, tokenizer_path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", nargs="?", default="-", help="the output (default: stdin)")
    parser.add_argument(
        "--ids", action="store_true", help="the output is token ids: a JSON list or plain numbers"
    )
    add_tokenizer_argument(parser)
    parser.add_argument(
        "--tools",
        help="JSON file: OpenAI's tools, or a request that has them; without, DSML is content",
    )
    parser.add_argument("--chat", action="store_true", help="the prompt ended in </think>")
    parser.add_argument("--finish", default="stop", help="the engine's finish reason")


def run(args: argparse.Namespace) -> int:
    """Raises ValueError or OSError for what the user can mend."""
    tokenizer = tokenizer_path(args.model) if args.ids else None
    parser = StreamParser(not args.chat, _tools(args.tools), tokenizer)
    text = read(args.file)
    if args.ids:
        events = parser.feed_ids(int(number) for number in re.findall(r"\d+", text))
    else:
        events = parser.feed(text)
    message = collect([*events, *parser.finish(args.finish)])
    found = message.to_openai() | {"finish_reason": message.finish_reason}
    print(json.dumps(found, ensure_ascii=False, indent=2))
    return 0


def _tools(file: str | None) -> Any:
    if file is None:
        return None
    found = json.loads(Path(file).read_text(encoding="utf-8"))
    return found.get("tools") if isinstance(found, dict) else found
