"""The judge of `make eval`: what counts as right, and how rows are made of it."""

import pytest

from benchmarks.accuracy import DRAFTED, Judge, drawn, every, same, table
from dsv4_plugin.tools.conversations import SKILLS, accepts, held_out
from lab.engines import Answers
from training.data import Renderer


@pytest.fixture(scope="module")
def renderer() -> Renderer:
    return Renderer()


@pytest.fixture(scope="module")
def judge(mini) -> Judge:
    return Judge(mini)


def test_the_taught_answers_are_right_and_others_are_not(renderer, judge):
    tests = list(drawn(10, judge.tokens))
    answers = [renderer.answer(c) for _, c in tests]
    row = judge.row(tests, Answers(answers, accepted=0.5, per_step=1.5))
    assert {skill for skill in row if skill in SKILLS} == set(SKILLS) - {"memory", "effort"}
    assert row.pop("drafts") == 50
    assert row.pop("tokens a step") == 1.5
    lengths = [row.pop(f"tokens@{effort}") for effort in ("none", "high", "max")]
    assert lengths[0] == 0 < lengths[1] < lengths[2]
    assert set(row.values()) == {100}
    cut = judge.row(tests, Answers([answer[:2] for answer in answers]))
    assert {v for name, v in cut.items() if not name.startswith("tokens@")} == {0}


def test_answers_with_drafts_are_compared_with_those_without():
    """One of so many is asked, and each beside the same conversation's."""
    assert [every(f"local-{fmt}") for fmt in ("bfloat16", "mtp", "dspark")] == [1, DRAFTED, DRAFTED]
    plain = Answers([[i] for i in range(4 * DRAFTED)])
    drafted = Answers([[i * DRAFTED] for i in range(4)])
    known = {"local-bfloat16": plain, "vllm-mtp": drafted, "local-mtp": drafted}
    assert same("local-mtp", known) == {"same": 100}
    drafted.ids[1].append(7)
    assert same("local-mtp", known) == {"same": 75}
    assert same("local-bfloat16", known) == same("vllm-mtp", known) == {}


def test_arguments_are_compared_as_json():
    c = next(held_out("call", 1))
    right = c.messages[-1]
    (function,) = (call["function"] for call in right["tool_calls"])
    name, arguments = function["name"], function["arguments"]
    assert accepts(right, "", [(name, arguments.replace(": ", ":"))])
    assert accepts(right, "\n", [(name, arguments)])
    for content, calls in (("", []), ("x", [(name, arguments)]), ("", [(name, arguments)] * 2)):
        assert not accepts(right, content, calls)
    for wrong in ("", "{}", arguments[:-1], arguments.replace(":", ': null, "x":')):
        assert not accepts(right, "", [(name, wrong)])
    assert not accepts(right, "", [("another", arguments)])


def test_the_table_has_a_cell_for_every_measure():
    rows = {"a": {"x": 100.0, "y": 33.333}, "b": {"x": 0.0, "z": 7.0}}
    assert table(rows) == [
        "| | x | y | z |",
        "|---|---|---|---|",
        "| a | 100 | 33.3 |  |",
        "| b | 0 |  | 7 |",
    ]
