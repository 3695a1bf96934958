"""`dsv4 chat`: a conversation in the terminal, with a running server or the local engine.

Answers stream; reasoning is dimmed. `/new` forgets the conversation, an empty line or the end of
input ends it.
"""

from __future__ import annotations

import argparse
import json
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
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
    """Raises ValueError or OSError for what the user can mend."""
    backend: Backend = Server(args) if args.target.startswith("http") else Local(args)
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
        try:
            events = list(show(backend.answer(messages), colour))
        except ValueError as error:
            print(f"dsv4: {error}", file=sys.stderr)
            messages.pop()
            continue
        messages.append(collect(events).to_openai())
    return 0


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

    def __init__(self, args: argparse.Namespace) -> None:
        self.url = args.target.rstrip("/")
        self.options = {"max_tokens": args.max_tokens, "temperature": args.temperature}
        if args.effort:
            self.options["reasoning_effort"] = args.effort
        listing = json.load(self._open("models", None))
        self.model = listing["data"][0]["id"]

    def _open(self, path: str, body: dict[str, Any] | None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{self.url}/{path}", data, headers)
        try:
            return urllib.request.urlopen(request)
        except urllib.error.HTTPError as error:
            text = error.read().decode(errors="replace")
            raise ValueError(f"{self.url} answered {error.code}: {text:.300}") from None
        except urllib.error.URLError as error:
            raise OSError(f"{self.url} cannot be reached: {error.reason}") from None

    def answer(self, messages: Messages) -> Iterator[Event]:
        body = {"model": self.model, "messages": messages, "stream": True, **self.options}
        with self._open("chat/completions", body) as lines:
            for line in lines:
                data = line.decode().removeprefix("data:").strip()
                if data and data != "[DONE]":
                    yield from _events(json.loads(data))


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
