"""`dsv4 chat`: a conversation in the terminal, with a running server or the local engine.

Answers stream; reasoning is dimmed. `/new` forgets the conversation, an empty line or the end of
input ends it.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from http.client import HTTPException, InvalidURL
from pathlib import Path
from typing import Any, Protocol

from dsv4_plugin.chat import (
    ContentDelta,
    Encoder,
    Event,
    Finish,
    ReasoningDelta,
    StreamParser,
    TokenBytes,
    collect,
)
from dsv4_plugin.chat.effort import EFFORTS
from dsv4_plugin.fields import Number, Whole
from dsv4_plugin.json_file import as_object, parse_json, shown
from dsv4_plugin.tools.cli import sentence
from dsv4_plugin.tools.cli.arguments import check_numbers

LIMITS: dict[str, Whole | Number] = {"max_tokens": Whole(1, 1 << 20), "temperature": Number(0, 100)}

_DIM, _BOLD, _PLAIN = "\x1b[2m", "\x1b[1m", "\x1b[0m"

Messages = Sequence[dict[str, object]]


class Backend(Protocol):
    """What answers a conversation."""

    def answer(self, messages: Messages) -> Iterator[Event]: ...


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "target", metavar="DIR|URL", help="a checkpoint folder, or a server's base URL (.../v1)"
    )
    parser.add_argument("--system", help="the system message")
    parser.add_argument("--effort", choices=EFFORTS, help="none: no reasoning")
    parser.add_argument("--max-tokens", type=int, default=512, help="of an answer (default: 512)")
    parser.add_argument("--temperature", type=float, default=0.0, help="default: 0, greedy")
    parser.add_argument("--device", default="cpu", help="of a folder: cpu (default), cuda, cuda:1")
    parser.add_argument("--colour", choices=("auto", "always", "never"), default="auto")


def run(args: argparse.Namespace) -> int:
    """Raises ValueError or OSError for what the user can mend.

    Ctrl-C while the model answers ends the answer, and the conversation goes on with what there is
    of it; elsewhere it ends the conversation.
    """
    check_numbers(args, LIMITS)
    url = server_url(args.target)
    backend: Backend = Local(args) if url is None else Server(url, args)
    colour = args.colour == "always" or (args.colour == "auto" and sys.stdout.isatty())
    first: list[dict[str, object]] = []
    if args.system:
        first = [{"role": "system", "content": args.system}]
    messages = list(first)
    while line := _read(colour):
        if line == "/new":
            messages = list(first)
            continue
        messages.append({"role": "user", "content": line})
        events: list[Event] = []
        try:
            for event in show(backend.answer(messages), colour):
                events.append(event)
        except KeyboardInterrupt:
            print(f"{_PLAIN if colour else ''}\n(the answer ends here)")
        except (ValueError, OSError, HTTPException) as error:
            print(f"dsv4: {sentence(error)}", file=sys.stderr)
            messages.pop()
            continue
        messages.append({"content": "", **collect(events).to_openai()})
    return 0


def server_url(target: str) -> str | None:
    """The base URL of a server, None for a folder. Raises ValueError for what is neither."""
    if Path(target).is_dir():
        return None
    scheme, mark, rest = target.rpartition("://")
    address = rest.rstrip("/")
    if mark and scheme not in ("http", "https"):
        raise ValueError(f"{target}: the scheme is {scheme}; allowed are http and https")
    if not mark and not re.fullmatch(r"[\w.-]+:\d+(/.*)?", target):
        raise ValueError(
            f"{target} is neither a folder nor an address like http://localhost:8000/v1 (names of "
            "the hub are not looked up: `hf download NAME --local-dir DIR` fetches a checkpoint)"
        )
    return f"{scheme or 'http'}://{address}" + ("" if "/" in address else "/v1")


def _read(colour: bool) -> str:
    prompt = f"{_BOLD}> {_PLAIN}" if colour else "> "
    try:
        return input(prompt if sys.stdin.isatty() else "").strip()
    except (EOFError, KeyboardInterrupt):
        return ""


def show(events: Iterator[Event], colour: bool) -> Iterator[Event]:
    """Print events as they come, and pass them on."""
    reasoning = False
    for event in events:
        match event:
            case ReasoningDelta(text):
                if not reasoning:
                    print(_DIM if colour else "[", end="")
                reasoning = True
                print(text, end="", flush=True)
            case ContentDelta(text):
                if reasoning:
                    print(_PLAIN if colour else "]")
                reasoning = False
                print(text, end="", flush=True)
        yield event
    print(_PLAIN if colour and reasoning else "]" if reasoning else "")


class Local:
    """The local engine on a checkpoint folder."""

    def __init__(self, args: argparse.Namespace) -> None:
        from dsv4_plugin.engine import load

        self.model = load(args.target, device=args.device)
        self.encoder = Encoder.from_pretrained(args.target)
        self.bytes = TokenBytes(self.encoder.tokenizer)
        self.effort, self.most, self.temperature = args.effort, args.max_tokens, args.temperature

    def answer(self, messages: Messages) -> Iterator[Event]:
        prompt = self.encoder.encode(messages, effort=self.effort)
        parser = StreamParser(prompt.thinking, None, self.bytes)
        reason = "length"
        for token in self.model.stream(prompt.ids, self.most, self.temperature):
            yield from parser.feed_ids([token])
            if token == self.model.config.eos_token_id:
                reason = "stop"
        yield from parser.finish(reason)


class Server:
    """A server with OpenAI's chat completions, read as server-sent events."""

    def __init__(self, url: str, args: argparse.Namespace) -> None:
        self.url = url
        self.options = {"max_tokens": args.max_tokens, "temperature": args.temperature}
        if args.effort:
            self.options["reasoning_effort"] = args.effort
        match parse_json(self._open("models", None).read(), f"{self.url}/models"):
            case {"data": [{"id": str(model)}, *_]}:
                self.model = model
            case listing:
                raise ValueError(f"{self.url}/models is {shown(listing)}; it must list a model")

    def _open(self, path: str, body: dict[str, Any] | None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        try:
            request = urllib.request.Request(f"{self.url}/{path}", data, headers)
            return urllib.request.urlopen(request)
        except urllib.error.HTTPError as error:
            text = error.read().decode(errors="replace")
            raise ValueError(f"{self.url} answered {error.code}: {text:.300}") from None
        except (InvalidURL, ValueError) as error:
            raise ValueError(f"{self.url} is no address: {error}") from None
        except urllib.error.URLError as error:
            raise OSError(f"{self.url} cannot be reached: {error.reason}") from None

    def answer(self, messages: Messages) -> Iterator[Event]:
        body = {"model": self.model, "messages": messages, "stream": True, **self.options}
        with self._open("chat/completions", body) as lines:
            for line in lines:
                data = line.decode().removeprefix("data:").strip()
                if data and data != "[DONE]":
                    yield from _events(as_object(parse_json(data, "an event"), "an event"))


def _events(chunk: dict[str, Any]) -> Iterator[Event]:
    """Servers call the reasoning `reasoning_content` or `reasoning`."""
    for choice in chunk.get("choices", ()):
        delta = choice.get("delta") or {}
        if text := delta.get("reasoning_content") or delta.get("reasoning"):
            yield ReasoningDelta(text)
        if text := delta.get("content"):
            yield ContentDelta(text)
        if choice.get("finish_reason"):
            yield Finish(choice["finish_reason"])
