"""The run on a card, without one: it goes on after a failure, and judges answers."""

from __future__ import annotations

import json
from subprocess import CompletedProcess

import pytest

from tests import on_card


def test_a_failure_does_not_end_the_rest(tmp_path, monkeypatch):
    asked = []

    def run(command, **_):
        asked.append(command)
        if "--ask" in command:
            with open(command[-1], "w") as file:
                json.dump([[1]] * 10, file)
        return CompletedProcess(command, len(asked) == 1, "first\nlast\n", "")

    monkeypatch.setattr(on_card.subprocess, "run", run)
    monkeypatch.setattr(on_card, "make_mini", lambda folder: None)
    monkeypatch.setattr(on_card, "ask", lambda *_: [[1]] * 9 + [[2]])
    monkeypatch.setattr(on_card.importlib.util, "find_spec", lambda name: None)
    steps = on_card.run(True, str(tmp_path / "out.json"))
    assert [s["ok"] for s in steps] == [False, True, True]
    assert steps[0]["said"] == "last"
    assert steps[2]["said"] == "9 of 10 as the CPU's"
    assert [s["name"] for s in json.loads((tmp_path / "out.json").read_text())] == [
        "kernels' tests", "gpu-check", "answers, local",
    ]  # fmt: skip
    assert "--quick" in asked[1]


@pytest.mark.parametrize(("same", "ok"), [(10, True), (9, True), (8, False)])
def test_most_answers_have_to_be_the_cpu_s(same, ok):
    found = on_card.judged([[1]] * 10, [[1]] * same + [[2]] * (10 - same))
    assert found["ok"] is ok


def test_without_a_gpu_it_says_so(monkeypatch):
    monkeypatch.setattr("sys.argv", ["on_card"])
    if not on_card.torch.cuda.is_available():
        with pytest.raises(SystemExit, match="needs a GPU"):
            on_card.main()
