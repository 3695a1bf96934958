"""Memory plans against the published figures, and the documented table against the command."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from dsv4_plugin.config import ModelConfig
from dsv4_plugin.tools.cli import main
from dsv4_plugin.tools.plan import GIB, Layout, checkpoint_bytes, plan, split
from lab.paths import SHARED, needs_shared

TABLE = Path(__file__).resolve().parents[2] / "docs" / "parallel.md"


def path_of(name: str) -> Path:
    return SHARED / "configs" / f"DeepSeek-V4-{name}.config.json"


def published(name: str) -> ModelConfig:
    return ModelConfig.from_hf(json.loads(path_of(name).read_text()))


@needs_shared
def test_the_published_figures_of_flash():
    flash = published("Flash")
    assert checkpoint_bytes(flash) == 159_609_485_896
    found = plan(flash, Layout(tp=4), 74 * GIB, context=1 << 20, concurrency=1)
    assert int(found.stages[0].rows_per_token) == 3850


@needs_shared
def test_parts_add_up():
    flash = published("Flash")
    one = plan(flash, Layout(), 200 * GIB, 1024, 1).stages[0]
    for layout in (Layout(tp=8), Layout(tp=2, dp=4, ep=True)):
        assert plan(flash, layout, 74 * GIB, 1024, 8).stages[0].experts * 8 == one.experts
    uneven = plan(flash, Layout(tp=2, dp=3, ep=True), 74 * GIB, 1024, 8).stages[0]
    assert uneven.experts * 256 == one.experts * 43  # 43, 43, 43, 43, 42 and 42 experts
    halves = plan(flash, Layout(pp=2), 200 * GIB, 1024, 1).stages
    assert sum(stage.weights for stage in halves) == one.weights
    assert plan(flash, Layout(tp=16), 74 * GIB, 1024, 1).stages[0].dense < one.dense / 2


@needs_shared
def test_stages_are_vllms():
    distributed = pytest.importorskip("vllm.distributed.utils")
    flash = published("Flash")
    for n in (1, 2, 3, 4, 5, 8):
        theirs = [range(*distributed.get_pp_indices(43, i, n)) for i in range(n)]
        assert split(flash, n) == theirs


@needs_shared
def test_the_command(capsys):
    flash = [str(path_of("Flash")), "--gpu", "A100-80"]
    assert main(["plan", *flash, "--tp", "4"]) == 0
    out = capsys.readouterr().out
    assert "159,609,485,896 bytes with its MTP layer" in out
    assert "8 requests of 32,768 tokens fit" in out
    late = path_of("Flash-0731").with_suffix("").with_suffix(".config.reconstructed.json")
    main(["plan", str(late), *flash[1:], "--tp", "4"])
    assert "bytes with its 3 draft stages" in capsys.readouterr().out
    assert main(["plan", *flash]) == 1
    assert "does not fit: " in capsys.readouterr().out
    assert main(["plan", *flash, "--tp", "3"]) == 2
    assert "--tp is 3; it must divide" in capsys.readouterr().err
    assert main(["plan", *flash, "--tp", "8", "--dp", "33", "--ep"]) == 2
    assert "--ep over 264 ranks" in capsys.readouterr().err


@pytest.mark.thorough
@needs_shared
def test_the_documented_table(capsys):
    """Every row's command prints the row's numbers."""
    rows = re.findall(
        r"^\| (Flash|Pro) \| [^|]+ \| `([^`]+)` \| ([\d,]+) \| ([^|]+) \|", TABLE.read_text(), re.M
    )
    assert len(rows) >= 12
    common = shlex.split("--context 131072 --concurrency 8")
    for name, options, weights, tokens in rows:
        code = main(["plan", str(path_of(name)), *shlex.split(options), *common])
        out = capsys.readouterr().out
        sizes = re.findall(r"(?:experts|other weights) +([\d,]+) bytes", out)
        numbers = [int(size.replace(",", "")) for size in sizes]
        pairs = zip(numbers[::2], numbers[1::2], strict=True)
        assert max(map(sum, pairs)) == int(weights.replace(",", ""))
        if tokens == "does not fit":
            assert code == 1
            assert "does not fit: " in out
        else:
            assert code == 0
            assert f"{tokens} tokens of KV cache fit" in out


@needs_shared
def test_the_table_of_cards(capsys):
    """What `dsv4 plan` says of Flash, in every row of docs/gpu.md."""
    text = (TABLE.parent / "gpu.md").read_text()
    rows = re.findall(r"^\| [^|]+ \| `(--[^`]+)` \| ([\d,]+) \| `([^`]+)` \|", text, re.M)
    assert len(rows) == 12
    for options, tokens, serving in rows:
        assert main(["plan", str(path_of("Flash")), *shlex.split(options)]) == 0
        assert f"{tokens} tokens of KV cache fit" in capsys.readouterr().out
        for mine, vllm in (("tp", "tensor"), ("pp", "pipeline"), ("dp", "data")):
            found = re.search(rf"--{mine} (\d+)", options)
            theirs = re.search(rf"--{vllm}-parallel-size (\d+)", serving)
            assert bool(found) is bool(theirs)
            assert not found or found[1] == theirs[1]
        assert ("--ep" in options) is ("--enable-expert-parallel" in serving)
