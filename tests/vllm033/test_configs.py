"""vLLM 0.33 on GPUs, up to the engine's configuration: who serves, by which runner, with which
CUDA graphs. The command lines are those of README.md and docs/gpu.md."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dsv4_plugin.tools.formats import format_fields
from dsv4_plugin.tools.make import preset_fields, tokenizer_files
from lab.paths import ROOT
from tests.vllm033.get import PIN, SITE

pytestmark = pytest.mark.skipif(
    not SITE.exists(), reason=f"{PIN} is not here: python -m tests.vllm033.get"
)
DEFAULT = "FULL_AND_PIECEWISE"


def documented() -> list[str]:
    """Options of the commands that serve a model with vLLM, as the docs write them."""
    found = []
    for name in ("README.md", "docs/gpu.md"):
        text = (ROOT / name).read_text().replace("\\\n", " ")
        found += re.findall(r"^ *(?:[A-Z0-9_]+=\S+ +)*vllm serve MODEL(.*)$", text, re.MULTILINE)
    return found


@pytest.fixture(scope="module")
def flash(tmp_path_factory):
    """A config.json of Flash's shape, and the tokenizer."""
    folder = tmp_path_factory.mktemp("flash")
    hf = preset_fields("slice")
    layers = {"num_hidden_layers": 43, "compress_ratios": [0, 0] + [4, 128] * 20 + [4]}
    hf |= layers | {"n_routed_experts": 256, "num_hash_layers": 3, "num_nextn_predict_layers": 1}
    (folder / "config.json").write_text(json.dumps(hf | format_fields("fp8-fp4", hf)))
    for source in tokenizer_files():
        shutil.copy(source, folder)
    return folder


def configured(
    checkpoint: Path, capability: str, options: list[str], **environ: str
) -> list[dict[str, object]]:
    lines = [f"{checkpoint} --load-format=dummy {line}" for line in options]
    paths = {"PYTHONPATH": os.pathsep.join(map(str, (SITE, ROOT))), "HF_HUB_OFFLINE": "1"}
    given = {k: v for k, v in os.environ.items() if not k.startswith(("DSV4_", "VLLM_"))}
    done = subprocess.run(
        [sys.executable, "-m", "tests.vllm033.cuda_config", capability, *lines],
        env=given | paths | environ, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_every_documented_command(flash):
    """On A100s, without a word about graphs."""
    lines = documented()
    assert lines
    for line, found in zip(lines, configured(flash, "8.0", lines), strict=True):
        assert found["type"] == "dsv4_plugin", line
        assert found["model"] == "vllm_ext.model"
        assert found["block_size"] == 256
        assert found["cudagraph_mode"] == DEFAULT
        assert found["whole_graphs"]
        assert found["v2_runner"]


@pytest.mark.parametrize(
    ("capability", "environ", "plugin"),
    [
        ("8.9", {}, True),
        ("9.0", {}, False),
        ("9.0", {"DSV4_MODEL": "plugin"}, True),
    ],
)
def test_who_serves(flash, capability, environ, plugin):
    """The log says it, and whose chat layer it is, also where vLLM's own network serves."""
    (found,) = configured(flash, capability, ["--kv-cache-dtype=fp8"], **environ)
    assert found["type"] == ("dsv4_plugin" if plugin else "deepseek_v4")
    (said,) = (line for line in found["said"] if "is served by" in line)
    assert said.startswith(f"DeepSeek-V4 is served by {'dsv4-plugin' if plugin else 'vLLM'}: ")
    assert "its prompts and parsers are dsv4-plugin's" in said
    if plugin:
        assert found["cudagraph_mode"] == DEFAULT


def test_the_engine_s_own_switches_decide(flash):
    cases = {
        "--enforce-eager": "NONE",
        """--compilation-config '{"cudagraph_mode": "FULL_DECODE_ONLY"}'""": "FULL_DECODE_ONLY",
        """--speculative-config '{"method": "mtp", "num_speculative_tokens": 1}'""": DEFAULT,
    }
    for (_, mode), found in zip(cases.items(), configured(flash, "8.0", list(cases)), strict=True):
        assert found["cudagraph_mode"] == mode


def test_the_first_runner(flash):
    (found,) = configured(flash, "8.0", [""], VLLM_USE_V2_MODEL_RUNNER="0")
    assert found["cudagraph_mode"] == DEFAULT
    assert found["whole_graphs"]
    assert not found["v2_runner"]
