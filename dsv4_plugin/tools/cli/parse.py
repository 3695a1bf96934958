"""`dsv4 parse`: the model's output, as text or as token ids -> the message as JSON."""

from __future__ import annotations

import argparse
import json
import re
from typing import Any

from dsv4_plugin.chat import StreamParser, collect
from dsv4_plugin.chat.encoder import load_tokenizer
from dsv4_plugin.json_file import shown
from dsv4_plugin.tools.cli.arguments import json_of, read_text
from dsv4_plugin.tools.cli.render import add_tokenizer_argument, tokenizer_path


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
    parser.add_argument(
        "--finish",
        choices=("stop", "length", "abort"),
        default="stop",
        help="the engine's finish reason (default: stop)",
    )


def run(args: argparse.Namespace) -> int:
    """Raises ValueError or OSError for what the user can mend."""
    tokenizer = load_tokenizer(tokenizer_path(args.model)) if args.ids else None
    parser = StreamParser(not args.chat, _tools(args.tools), tokenizer)
    text = read_text(args.file)
    if tokenizer is not None:
        events = parser.feed_ids(token_ids(text, tokenizer.get_vocab_size()))
    else:
        events = parser.feed(text)
    message = collect([*events, *parser.finish(args.finish)])
    found = message.to_openai() | {"finish_reason": message.finish_reason}
    print(json.dumps(found, ensure_ascii=False, indent=2))
    return 0


def token_ids(text: str, vocabulary: int) -> list[int]:
    """A JSON list of ids, or numbers with blanks or commas between. Raises ValueError."""
    words = re.split(r"[\s,]+", re.sub(r"^\s*\[(.*)\]\s*$", r"\1", text, flags=re.S).strip())
    ids = []
    for word in filter(None, words):
        if not re.fullmatch(r"[0-9]{1,9}", word) or int(word) >= vocabulary:
            raise ValueError(
                f"--ids: {shown(word)} is no token id; allowed are 0 to {vocabulary - 1}"
            )
        ids.append(int(word))
    return ids


def _tools(file: str | None) -> Any:
    if file is None:
        return None
    found = json_of(file)
    return found.get("tools") if isinstance(found, dict) else found
