"""The same chat requests to vLLM and to SGLang: prompt ids, output ids and messages must be equal.

    python -m tests.compare_engines CHECKPOINT --vllm PYTHON --sglang PYTHON

PYTHON is each engine's interpreter. Of every five requests, four make the model say a generated
output (reasoning, text in many scripts, calls), one of them under a JSON schema, and one runs free;
conversations have one to four turns, with tools and without, at every effort.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

from tokenizers import Tokenizer

from lab.server import MODEL
from tests.chat import data, outputs
from tests.sglang import script as sglang_script
from tests.sglang import server as sglang_server
from tests.vllm_chat import server as vllm_server

Json = dict[str, Any]
SGLANG_OPTIONS = (
    *(*sglang_server.FLOAT32, *sglang_server.PARSERS, "--max-total-tokens=16384"),
    *("--max-running-requests=8", f"--served-model-name={MODEL}"),
    *("--enable-custom-logit-processor", "--disable-overlap-schedule"),
)
AT_ONCE = 6
CUT = "\N{REPLACEMENT CHARACTER}"
"""How a free output ends whose last token is part of a character: vLLM then keeps back the text
since the last whole token, SGLang shows it."""


@dataclass(frozen=True)
class Case:
    """A request body, and the ids the model is made to say (none: it chooses)."""

    kind: str
    body: Json
    script: list[int]


def cases(n: int, seed: int, tokenizer: Tokenizer) -> list[Case]:
    kinds = ("scripted", "scripted", "scripted", "json_schema", "free")
    return [_case(kinds[i % len(kinds)], Random(f"{seed}-{i}"), tokenizer) for i in range(n)]


def _case(kind: str, random: Random, tokenizer: Tokenizer) -> Case:
    thinking = kind != "json_schema" and random.random() < 0.5
    tools = data.TOOLS if random.random() < 0.6 else None
    body: Json = {"messages": _conversation(random), "temperature": 0, "max_tokens": 24}
    body["chat_template_kwargs"] = {"thinking": thinking}
    if thinking:
        body["reasoning_effort"] = random.choice(["low", "high", "max"])
    if kind == "json_schema":
        schema, value = _schema(random)
        wanted = {"type": "json_schema", "json_schema": {"name": "w", "schema": schema}}
        ids = tokenizer.encode(json.dumps(value, ensure_ascii=False)).ids
        return Case(kind, body | {"response_format": wanted, "max_tokens": len(ids) + 1}, ids)
    if tools:
        body["tools"] = tools
    if kind == "free":
        return Case(kind, body, [])
    said = outputs.message(random)
    if not thinking:
        del said["reasoning_content"]
    if not tools:
        said.pop("tool_calls", None)
    text = outputs.output_of(said, tools or [], thinking)
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    return Case(kind, body | {"max_tokens": len(ids) + 1}, ids)


def _conversation(random: Random) -> list[Json]:
    messages: list[Json] = []
    if random.random() < 0.5:
        messages.append({"role": "system", "content": outputs.words(random, 12)})
    for turn in range(random.randrange(4)):
        messages.append({"role": "user", "content": outputs.words(random, 12)})
        messages.append(outputs.message(random))
        for i, call in enumerate(messages[-1].get("tool_calls", ())):
            call["id"] = f"call_{turn}_{i}"
            result = {"role": "tool", "tool_call_id": call["id"]}
            messages.append(result | {"content": outputs.words(random, 12)})
    return [*messages, {"role": "user", "content": outputs.words(random, 12) + "?"}]


def _schema(random: Random) -> tuple[Json, Json]:
    """A schema, and an object that it allows."""
    kinds: list[tuple[Json, Any]] = [
        ({"type": "boolean"}, True),
        ({"enum": ["Köln", "漢字", 'a"b']}, 'a"b'),
        ({"type": "array", "items": {"type": "integer"}}, [1, -2]),
        ({"type": "null"}, None),
    ]
    keys = random.sample(["ok", "kind", "город", "n"], random.randrange(1, 4))
    chosen = {key: random.choice(kinds) for key in keys}
    schema = {
        "type": "object",
        "properties": {key: kind for key, (kind, _) in chosen.items()},
        "required": keys,
        "additionalProperties": False,
    }
    return schema, {key: value for key, (_, value) in chosen.items()}


def ask_vllm(server: vllm_server.Server, case: Case) -> Json:
    body = case.body | {"return_token_ids": True}
    if case.script:
        body |= vllm_server.scripted(case.script)
    answer = server.post("/v1/chat/completions", body)
    (choice,) = answer["choices"]
    return _told(choice, answer["prompt_token_ids"], choice["token_ids"])


def ask_sglang(server: sglang_server.Server, case: Case) -> Json:
    body = case.body | {"model": MODEL, "return_prompt_token_ids": True, "return_token_ids": True}
    if case.script:
        body |= sglang_script.scripted(case.script)
    (choice,) = server.post("/v1/chat/completions", body)["choices"]
    return _told(choice, choice["prompt_token_ids"], choice["response_token_ids"])


def _told(choice: Json, prompt: list[int], ids: list[int]) -> Json:
    """What must be equal. (The name of the reasoning's field is each engine's own.)"""
    message = choice["message"]
    return {
        "prompt": prompt,
        "ids": ids,
        "content": message.get("content") or "",
        "reasoning": message.get("reasoning") or message.get("reasoning_content") or "",
        "calls": [
            {key: call["function"][key] for key in ("name", "arguments")}
            for call in message.get("tool_calls") or ()
        ],
        "finish_reason": choice["finish_reason"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    for engine in ("vllm", "sglang"):
        parser.add_argument(f"--{engine}", type=os.path.abspath, required=True, help="its Python")
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    checkpoint = args.checkpoint.resolve()
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    asked = cases(args.requests, args.seed, tokenizer)
    logs = Path(tempfile.mkdtemp(prefix="compare-engines-"))
    vllm = vllm_server.Server(checkpoint, logs / "vllm.log", python=args.vllm)
    sglang = sglang_server.Server(
        checkpoint, *SGLANG_OPTIONS, log=logs / "sglang.log", python=args.sglang
    )
    answers = []
    for server, ask in ((vllm, ask_vllm), (sglang, ask_sglang)):
        with server, ThreadPoolExecutor(AT_ONCE) as pool:
            answers.append(list(pool.map(partial(ask, server), asked)))
    differing = _report(asked, *answers)
    raise SystemExit(f"{differing} of {len(asked)} answers differ" if differing else 0)


def _report(asked: list[Case], vllm: list[Json], sglang: list[Json]) -> int:
    """Print what was compared and every difference; how many answers differ."""
    seen = Counter(case.kind for case in asked)
    differing = 0
    for i, (case, a, b) in enumerate(zip(asked, vllm, sglang, strict=True)):
        fields = [key for key in a if a[key] != b[key]]
        if (b["content"] or b["reasoning"]).endswith(CUT) and not {"prompt", "ids"} & {*fields}:
            seen["cut inside a character"] += 1
            continue
        differing += bool(fields)
        for key in fields:
            print(f"{i} ({case.kind}) {key}: vLLM {a[key]!r}, SGLang {b[key]!r}")
    seen["with tools"] = sum("tools" in case.body for case in asked)
    seen["with reasoning"] = sum(bool(a["reasoning"]) for a in vllm)
    seen["with calls"] = sum(bool(a["calls"]) for a in vllm)
    seen["multi-turn"] = sum(len(case.body["messages"]) > 2 for case in asked)
    print(json.dumps(seen), f"{sum(len(a['ids']) for a in vllm)} output ids")
    return differing


if __name__ == "__main__":
    main()
