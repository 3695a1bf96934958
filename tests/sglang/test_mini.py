"""dsv4-mini served by SGLang: what a model says by itself."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from openai import OpenAI

from lab.server import MODEL
from tests.mini.asking import Answers

from .server import FLOAT32, PARSERS, Server


@pytest.fixture(scope="module")
def client(mini: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpenAI]:
    options = ("--max-total-tokens=16384", "--max-running-requests=16")
    named = f"--served-model-name={MODEL}"
    log = tmp_path_factory.mktemp("mini") / "log"
    with Server(mini, *FLOAT32, *PARSERS, *options, named, log=log) as server:
        url = f"{server.url}/v1"
        with OpenAI(base_url=url, api_key="none", timeout=300, max_retries=0) as client:
            yield client


@pytest.mark.thorough
class TestChatCompletions(Answers):
    pass
