"""`dsv4 render` and `dsv4 parse`, reading stdin."""

from __future__ import annotations

import argparse
import io
import json
from pathlib import Path
from typing import Any

import pytest

from dsv4_plugin.tools.cli import parse, render

from .data import TOOLS, call, encoder
from .outputs import output_of


def run(command: Any, monkeypatch: pytest.MonkeyPatch, stdin: str, *arguments: str) -> int:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    monkeypatch.setattr("sys.stdin", io.StringIO(stdin))
    return int(command.run(parser.parse_args(arguments)))


def test_render(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    messages = '[{"role": "user", "content": "<think>"}]'
    assert run(render, monkeypatch, messages, "--colour", "always") == 0
    text, ids = capsys.readouterr().out.split("\n\nids: ")
    assert text.endswith("\x1b[0m<think>\x1b[1;36m<｜Assistant｜>\x1b[0m\x1b[1;36m<think>\x1b[0m")
    assert ids.split()[0] == "0"
    assert ids.split()[-2:] == [str(len(ids.split()) - 2), "tokens"]


def test_render_a_request_as_json(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    request = {"messages": [{"role": "user", "content": "é"}], "tools": TOOLS}
    file = tmp_path / "request.json"
    file.write_text(json.dumps(request | {"reasoning_effort": "max"}), encoding="utf-8")
    assert run(render, monkeypatch, "", str(file), "--json", "--generation", "0731") == 0
    prompt = encoder("0731").encode(**request, effort="max")
    found = json.loads(capsys.readouterr().out)
    assert found == {"text": prompt.text, "ids": prompt.ids, "tokens": len(prompt.ids)}


@pytest.mark.parametrize("as_ids", [False, True])
def test_parse(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    as_ids: bool,
) -> None:
    message = {"role": "assistant", "content": "c", "reasoning_content": "r"}
    message |= {"tool_calls": [call("f", '{"x": "é"}')]}
    text = output_of(message, TOOLS)
    if as_ids:
        text = str(encoder().tokenizer.encode(text, add_special_tokens=False).ids)
    tools = tmp_path / "tools.json"
    tools.write_text(json.dumps({"tools": TOOLS}))
    arguments = ["--tools", str(tools), *(["--ids"] if as_ids else [])]
    assert run(parse, monkeypatch, text, *arguments) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["tool_calls"][0].pop("id").startswith("call_")
    message["tool_calls"][0].pop("id")  # type: ignore[attr-defined]
    assert found == message | {"finish_reason": "tool_calls"}


def test_parse_of_a_cut_output(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(parse, monkeypatch, "half", "--chat", "--finish", "length") == 0
    expected = {"role": "assistant", "content": "half", "finish_reason": "length"}
    assert json.loads(capsys.readouterr().out) == expected


@pytest.mark.parametrize(
    ("command", "stdin", "arguments", "error"),
    [
        (render, "[]", (), "messages: must hold at least one message"),
        (render, "{", (), "Expecting property name"),
        (render, '{"messages": 1}', (), "messages: must be a list"),
        (
            render,
            "[]",
            ("--model", "/nowhere"),
            "/nowhere does not exist; give a checkpoint folder or its",
        ),
        (parse, "x", ("--tools", "/nowhere"), "No such file"),
    ],
)
def test_errors(
    monkeypatch: pytest.MonkeyPatch,
    command: Any,
    stdin: str,
    arguments: tuple[str, ...],
    error: str,
) -> None:
    with pytest.raises((ValueError, OSError), match=error):
        run(command, monkeypatch, stdin, *arguments)
