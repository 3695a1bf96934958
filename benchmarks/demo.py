"""A server on a checkpoint, conversations with the openai client, and a clean stop."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any, ClassVar

from openai import OpenAI

from lab.paths import ROOT, STUBS
from lab.server import MODEL, Server

TOKENS = 128
"""Most tokens of an answer."""
_COLOURS = ("\x1b[1m", "\x1b[2m", "\x1b[36m", "\x1b[0m")
_BOLD, _DIM, _CALL, _PLAIN = _COLOURS if sys.stdout.isatty() else ("", "", "", "")
VLLM_FLAGS = (
    "--tokenizer-mode deepseek_v4 --tool-call-parser deepseek_v4 --reasoning-parser deepseek_v4 "
    "--enable-auto-tool-choice --max-model-len 4096 --kv-cache-memory-bytes 500000000 "
    "--max-num-seqs 16 --enforce-eager"
)
SGLANG_FLAGS = (
    "--device cpu --dtype float32 --max-total-tokens 8192 --max-running-requests 8 "
    "--sleep-on-idle --reasoning-parser deepseek-v4 --tool-call-parser deepseekv4"
)


def server(
    engine: str, checkpoint: Path, log: Path, python: str = sys.executable, flags: str = ""
) -> Server:
    """A server of an engine that `python` has; flags: further ones, which win over those above."""
    if engine == "vllm":
        vllm = str(Path(python).parent / "vllm")
        command, environment = [vllm, "serve", str(checkpoint), *VLLM_FLAGS.split()], {}
    else:
        launcher = [python, "-m", "sglang.launch_server", "--model-path", str(checkpoint)]
        command = [*launcher, *SGLANG_FLAGS.split()]
        paths = (str(STUBS), str(ROOT), os.environ.get("PYTHONPATH"))
        path = os.pathsep.join(filter(None, paths))
        environment = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return Server([*command, *flags.split(), "--served-model-name", MODEL], log, environment)


class Chat:
    """A conversation that prints itself as it streams: reasoning dimmed, calls as they are.

    timings: completion tokens and seconds after the first of them, of every answer.
    """

    timings: ClassVar[list[tuple[int, float]]] = []

    def __init__(self, url: str, thinking: bool, tools: list[dict[str, Any]] | None = None) -> None:
        self.client = OpenAI(base_url=url, api_key="none")
        self.messages: list[dict[str, Any]] = []
        self.options: dict[str, Any] = {
            "extra_body": {"chat_template_kwargs": {"thinking": thinking}}
        }
        if tools:
            self.options["tools"] = tools

    def say(self, text: str) -> list[dict[str, Any]]:
        """Ask, print the answer, and return the calls it makes."""
        print(f"\n{_BOLD}You:{_PLAIN} {text}")
        self.messages.append({"role": "user", "content": text})
        return self._answer()

    def give(self, call: dict[str, Any], result: dict[str, Any]) -> list[dict[str, Any]]:
        """Answer a call."""
        content = json.dumps(result)
        print(f"{_BOLD}Tool:{_PLAIN} {content}")
        self.messages.append({"role": "tool", "tool_call_id": call["id"], "content": content})
        return self._answer()

    def _answer(self) -> list[dict[str, Any]]:
        message: dict[str, Any] = {"role": "assistant", "content": ""}
        reasoning, is_open, calls = "", True, []
        first, used = 0.0, 0
        print(f"{_BOLD}dsv4-mini:{_PLAIN} ", end="", flush=True)
        for chunk in self.client.chat.completions.create(
            model=MODEL,
            messages=self.messages,
            max_tokens=TOKENS,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
            **self.options,
        ):
            used = chunk.usage.completion_tokens if chunk.usage else used
            for choice in chunk.choices:
                delta = choice.delta
                first = first or time.perf_counter()
                thought = getattr(delta, "reasoning_content", None)
                thought = thought or getattr(delta, "reasoning", None)
                if thought:
                    print(thought if reasoning else _DIM + thought, end="", flush=True)
                    reasoning += thought
                if reasoning and is_open and (delta.content or delta.tool_calls):
                    print(_PLAIN, end=" ")
                    is_open = False
                if delta.content:
                    print(delta.content, end="", flush=True)
                    message["content"] += delta.content
                for piece in delta.tool_calls or ():
                    _add(calls, piece)
        self.timings.append((used - 1, time.perf_counter() - first))
        for call in calls:
            function = call["function"]
            print(f" {_CALL}{function['name']}({function['arguments']}){_PLAIN}", end="")
        print()
        if reasoning:
            message["reasoning_content"] = reasoning
        if calls:
            message["tool_calls"] = calls
        self.messages.append(message)
        return calls


def _add(calls: list[dict[str, Any]], piece: Any) -> None:
    """A streamed piece of a call: its id and name, then parts of its arguments."""
    if piece.id:
        function = {"name": piece.function.name, "arguments": ""}
        calls.append({"id": piece.id, "type": "function", "function": function})
    calls[-1]["function"]["arguments"] += piece.function.arguments or ""


def converse(url: str) -> None:
    """The scripted conversations."""
    chat = Chat(url, thinking=False)
    chat.say("Hello, I am Anna.")
    chat.say("Who are you?")
    chat.say("What is my name?")
    Chat(url, thinking=True).say("What is 47 + 38?")
    city = {"type": "object", "properties": {"city": {"type": "string"}}}
    tools = [
        {"name": "get_weather", "description": "Weather in a city", "parameters": city},
        {"name": "get_time", "description": "Time in a city", "parameters": city},
    ]
    chat = Chat(url, True, [{"type": "function", "function": tool} for tool in tools])
    for call in chat.say("What is the weather in Paris?"):
        chat.give(call, {"degrees": 21, "sky": "clear"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--engine", choices=("vllm", "sglang"), default="vllm")
    args = parser.parse_args()
    log = args.checkpoint.resolve().parent / f"demo-{args.engine}.log"
    print(f"starting {args.engine} on {args.checkpoint} (log: {log}) ...", flush=True)
    with server(args.engine, args.checkpoint.resolve(), log) as running:
        print("\n".join(line for line in log.read_text().splitlines() if "dsv4-plugin" in line))
        print("dsv4-mini knows a few skills; docs/mini.md says which, and how well.")
        converse(f"{running.url}/v1")
        tokens, seconds = map(sum, zip(*Chat.timings, strict=True))
        print(f"\n{tokens / seconds:.0f} tokens/s after each answer's first token")
    print("server stopped")


if __name__ == "__main__":
    main()
