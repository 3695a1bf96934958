"""`vllm serve`, where asked for with scripted words."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lab import server
from lab.paths import ROOT
from lab.server import MODEL

FLAGS = (
    "--dtype float32 --max-model-len 4096 --kv-cache-memory-bytes 500000000 --enforce-eager "
    "--max-num-seqs 16 --tokenizer-mode deepseek_v4 --tool-call-parser deepseek_v4 "
    "--reasoning-parser deepseek_v4 --enable-auto-tool-choice "
    "--logits-processors tests.vllm_chat.script:Script"
)


class Server(server.Server):
    """A running server of a checkpoint: `with Server(checkpoint, log) as running`."""

    def __init__(
        self,
        checkpoint: Path,
        log: Path,
        flags: str = FLAGS,
        environ: dict[str, str] | None = None,
        python: str = sys.executable,
    ) -> None:
        command = [str(Path(python).parent / "vllm"), "serve", str(checkpoint)]
        command += ["--served-model-name", MODEL, *flags.split()]
        super().__init__(command, log, {"PYTHONPATH": str(ROOT)} | (environ or {}))

    def post(self, path: str, body: dict[str, Any]) -> Any:
        return super().post(path, {"model": MODEL} | body)


def scripted(ids: Sequence[int]) -> dict[str, Any]:
    """Request fields that make the model say `ids`."""
    return {"vllm_xargs": {"script": list(ids)}}
