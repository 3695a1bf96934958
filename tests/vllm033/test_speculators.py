"""vLLM 0.33's speculators drive the plugin's drafters: the tests of tests/vllm_v2, on a CPU."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from lab.paths import ROOT
from tests.vllm033.get import PIN, SITE
from tests.vllm033.on_cpu import make_site

pytestmark = pytest.mark.skipif(
    not SITE.exists(), reason=f"{PIN} is not here: python -m tests.vllm033.get"
)
WHICH = (
    "import importlib.metadata, vllm; print(importlib.metadata.version('vllm'), vllm.__path__[0])"
)


def test_blocks_and_single_drafts(tmp_path):
    """Every proposal is the local engine's, and no draft changes an answer."""
    site = make_site(tmp_path)
    environ = {k: v for k, v in os.environ.items() if not k.startswith(("TRITON_", "VLLM_"))}
    environ["PYTHONPATH"] = os.pathsep.join(map(str, (site, ROOT)))

    def run(*command: str) -> str:
        done = subprocess.run(
            [sys.executable, *command], env=environ, cwd=ROOT, capture_output=True, text=True,
            timeout=3000,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
        return done.stdout

    assert run("-c", WHICH).split() == [f"{PIN.split('==')[1]}+cpu", str(site / "vllm")]
    said = run("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/vllm_v2/test_dspark.py")
    assert " passed" in said
    assert "skipped" not in said
