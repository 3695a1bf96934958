"""One server of dsv4-mini for all tests here, and the words to put into its mouth."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from anthropic import Anthropic
from openai import OpenAI
from tokenizers import Tokenizer

from dsv4_plugin.chat import Encoder
from tests.vllm_chat.server import Server

EOS = 1


@pytest.fixture(scope="session")
def server(mini: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(mini, tmp_path_factory.mktemp("vllm_chat") / "server.log") as running:
        yield running
        log = running.read_log()
    assert "Traceback" not in log
    assert " ERROR " not in log


@pytest.fixture(scope="session")
def encoder(mini: Path) -> Encoder:
    return Encoder.from_pretrained(mini)


@pytest.fixture(scope="session")
def backend(mini: Path) -> Tokenizer:
    """The tokenizers library on the checkpoint's own tokenizer.json."""
    return Tokenizer.from_file(str(mini / "tokenizer.json"))


@pytest.fixture(scope="session")
def words(backend: Tokenizer) -> Callable[..., list[int]]:
    """Ids of an output's text; `end`: the model ends it itself."""

    def ids(text: str, end: bool = True) -> list[int]:
        return backend.encode(text, add_special_tokens=False).ids + [EOS] * end

    return ids


@pytest.fixture(scope="session")
def openai(server: Server) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=120, max_retries=0) as client:
        yield client


@pytest.fixture(scope="session")
def anthropic(server: Server) -> Iterator[Anthropic]:
    with Anthropic(base_url=server.url, api_key="none", timeout=120, max_retries=0) as client:
        yield client
