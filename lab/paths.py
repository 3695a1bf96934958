"""Where data beside the checkout lies, and the mark for tests that need it."""

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
STUBS = ROOT / "lab" / "stubs"
"""Stand-ins for CUDA packages that SGLang imports on a CPU too."""
SHARED = ROOT.parent / "shared" / "data"

needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the recorded data is absent")


def python_of(engine: str) -> Path:
    """The interpreter of `make env` (vllm) or `make env-sglang`."""
    return ROOT / f".venv-{engine}" / "bin" / "python"
