"""The tests bite: whatever mistake of the table is put in, the tests that should notice it fail.

The short set takes a dozen mutants, the next dozen with every commit; `-k` takes those of a name.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from lab.paths import ROOT, python_of
from tests.mutants.table import MUTANTS, Mutant

DOZEN = 12
COPIED = (
    "dsv4_plugin", "vllm_ext", "sglang_ext", "tests", "lab", "benchmarks", "training",
    "pyproject.toml",
)  # fmt: skip
BROKEN = ("SyntaxError", "NameError", "IndentationError", "ImportError", "no tests ran")
"""What pytest prints where a mutant is no program: that is no proof that a test sees it."""


def turn() -> set[str]:
    """Names of this commit's dozen."""
    count = ["git", "rev-list", "--count", "HEAD"]
    done = subprocess.run(count, cwd=ROOT, capture_output=True, text=True, check=False)
    first = DOZEN * int(done.stdout or 0)
    return {MUTANTS[(first + i) % len(MUTANTS)].name for i in range(DOZEN)}


def parameters() -> list[object]:
    mine = turn()
    return [
        pytest.param(m, id=m.name, marks=[] if m.name in mine else pytest.mark.thorough)
        for m in MUTANTS
    ]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project, to be spoilt."""
    tree = tmp_path_factory.mktemp("mutants") / "tree"
    tree.mkdir()
    for name in COPIED:
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
            shutil.copytree(ROOT / name, tree / name, ignore=ignored)
        else:
            shutil.copy(ROOT / name, tree / name)
    return tree


@pytest.mark.parametrize("mutant", parameters())
def test_a_mistake_is_noticed(mutant: Mutant, tree: Path) -> None:
    path = tree / mutant.file
    right = path.read_text()
    assert mutant.old in right, "its text is no longer there"
    path.write_text(right.replace(mutant.old, mutant.new, 1))
    try:
        code, printed = short_tests(mutant, tree)
    finally:
        path.write_text(right)
    assert code != 0, "survived"
    assert code == 1, printed
    assert not any(word in printed for word in BROKEN), printed


def short_tests(mutant: Mutant, tree: Path) -> tuple[int, str]:
    """pytest's exit code and the end of what it prints."""
    env = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    env |= {"DSV4_TEST_GPU": "sm80"} if mutant.compiled else {"TRITON_INTERPRET": "1"}
    command = [str(python_of(mutant.engine)), "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
    command += [f"tests/{mutant.test}.py", *(["-k", mutant.only] if mutant.only else [])]
    done = subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout[-3000:]
