"""vLLM's V2 model runner on a CPU. Its own kernels are Triton's, for which vLLM's CPU build wants a
CPU backend: here Triton's interpreter runs them. Both are looked for at import, so these tests have
a process to themselves."""

from __future__ import annotations

import os
import sys
from types import SimpleNamespace

from lab.kit import mode


def start() -> None:
    """The strict interpreter would refuse vLLM's kernels, which follow pointers in memory."""
    assert not mode.INTERPRET
    assert not {"triton", "vllm"} & set(sys.modules), "run tests/vllm_v2 by itself"
    os.environ["TRITON_INTERPRET"] = "1"
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1"
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["HF_HUB_OFFLINE"] = "1"
    from triton.backends import backends

    from lab.kit import interpreter

    interpreter.apply()
    driver = SimpleNamespace(is_active=lambda: True)
    backends["cpu"] = SimpleNamespace(driver=driver, compiler=None)
    from vllm.triton_utils import HAS_TRITON

    assert HAS_TRITON
    del backends["cpu"]


start()
