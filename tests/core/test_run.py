"""The runner of the tests: what it counts, shows, keeps, and how it ends."""

from __future__ import annotations

import subprocess
import sys

import pytest

from lab import server
from lab.paths import ROOT
from tests import run

SUITE = """
import pytest
def test_good(): pass
def test_bad(): assert 1 == 2
@pytest.fixture
def broken(): raise ValueError
def test_broken(broken): pass
def test_left_out(): pytest.skip("why")
"""


@pytest.fixture
def suite(tmp_path):
    path = tmp_path / "test_suite.py"
    path.write_text(SUITE)
    return f"{sys.executable} -m pytest -p tests.report --report={{report}} {path}"


@pytest.fixture
def runs(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "KEPT", tmp_path / "kept")
    monkeypatch.setattr(run, "ROOT", tmp_path)
    monkeypatch.setattr(run, "files_hash", lambda: "the same")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return lambda: run.Run(long=True)


def test_outcomes_are_counted_and_a_failure_is_shown(runs, suite, capsys):
    it = runs()
    it.run([run.Part("a", suite), run.Part("b", "true")])
    assert it.results["a"].outcomes == {"passed": 1, "failed": 2, "skipped": 1}
    assert it.summary() == 1
    out = capsys.readouterr().out
    assert "a: 2 failed, 1 passed, 1 skipped, exit code 1 in" in out
    assert "assert 1 == 2" in out
    assert "b: passed in" in out
    assert "FAILED: a;" in out


def test_what_passed_is_not_run_again_on_the_same_files(runs, monkeypatch):
    parts = [run.Part("good", "true"), run.Part("bad", "false")]
    runs().run(list(parts))
    assert [part.name for part in runs().unknown(parts)] == ["bad"]
    monkeypatch.setattr(run, "files_hash", lambda: "others")
    assert runs().unknown(parts) == parts


def test_a_part_that_hangs_is_ended(runs, monkeypatch, tmp_path):
    monkeypatch.setattr(run, "LIMIT", 1)
    monkeypatch.setattr(run, "PATIENCE", 1)
    it = runs()
    it.run([run.Part("slow", f"sleep 60 & echo $! > {tmp_path}/child; wait")])
    assert it.results["slow"].code != 0
    child = (tmp_path / "child").read_text().strip()
    state = subprocess.run(["ps", "-o", "stat=", child], capture_output=True, text=True).stdout
    assert not state.strip() or state.startswith("Z")


def test_a_server_that_is_waited_for_ends_with_its_test(tmp_path, monkeypatch):
    waiting = server.Server([sys.executable, "-c", "import time; time.sleep(60)"], tmp_path / "log")
    waiting.command = waiting.command[:-2]  # its host and port

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(server.urllib.request, "urlopen", interrupted)
    with pytest.raises(KeyboardInterrupt), waiting:
        pytest.fail("it is never healthy")
    assert waiting.process.poll() is not None


def test_every_test_belongs_to_a_part():
    """A folder of tests that no part names would never run."""
    commands = " ".join(part.command for part in run.PARTS)
    folders = {path.parent.relative_to(ROOT) for path in (ROOT / "tests").rglob("test_*.py")}
    assert {str(f) for f in folders if f"{f}" not in commands} == set()
