"""The `dsv4` command: what is wrong is one line, and nothing but what runs is imported."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from importlib.metadata import version

import pytest

from dsv4_plugin.chat import ContentDelta
from dsv4_plugin.tools.cli import COMMANDS, main
from dsv4_plugin.tools.cli import chat as chat_command
from dsv4_plugin.tools.plan import GPUS, gpu_memory


@pytest.fixture
def config(small):
    return str(small / "config.json")


def refused(capsys, *arguments):
    """The line on stderr."""
    assert main(list(arguments)) == 2
    error = capsys.readouterr().err
    assert error.startswith("dsv4: ")
    assert error.count("\n") == 1
    return error


def test_help_imports_no_torch():
    code = (
        "import sys\nfrom dsv4_plugin.tools.cli import main\n"
        "try: main(sys.argv[1:])\nexcept SystemExit as end: assert not end.code\n"
        "assert not {'torch', 'matplotlib', 'aiohttp'} & set(sys.modules)"
    )
    helps = [[name, "--help"] for name in ("render", "parse", "bench")]
    for arguments in (["--help"], ["--version"], *helps):
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True
        )
        assert done.stdout
    assert all(name in _help([]) for name in COMMANDS)


MAIN = "from dsv4_plugin.tools.cli import main; main()"


def _help(arguments):
    done = subprocess.run(
        [sys.executable, "-c", MAIN, *arguments, "--help"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return done.stdout


def test_version(capsys):
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"dsv4 {version('dsv4-plugin')}\n"


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--utilization", "5"], "--utilization is 5.0; allowed are numbers from 0.01 to 1"),
        (["--utilization", "nan"], "--utilization is nan; allowed are numbers from 0.01 to 1"),
        (["--memory", "-5"], "--memory is -5.0; allowed are numbers from 0.01 to 4096"),
        (["--context", "-1"], "--context is -1; allowed are integers from 1 to 16,777,216"),
        (["--speculative-tokens", "-1"], "--speculative-tokens is -1; allowed are integers from 0"),
        (["--block-size", "100"], "--block-size is 100; allowed are multiples of 128 from 128"),
        (["--tp", "0"], "--tp is 0; allowed are integers from 1 to 1,024"),
        (["--gpu", "TPU"], "--gpu is TPU; known are A100-40, A100-80"),
    ],
)
def test_plans_of_nonsense(capsys, config, options, sentence):
    memory = [] if options[0] in ("--gpu", "--memory") else ["--memory", "80"]
    assert sentence in refused(capsys, "plan", config, *memory, *options)


def test_plans_of_what_is_no_checkpoint(capsys, tmp_path):
    number = tmp_path / "number.json"
    number.write_text("5")
    assert "number.json is 5; it must be a JSON object" in refused(
        capsys, "plan", str(number), "--gpu", "a100"
    )
    number.write_text("{")
    assert "number.json is not JSON that can be read" in refused(
        capsys, "plan", str(number), "--gpu", "a100"
    )
    for command in (["plan", "--gpu", "H100"], ["checkpoint", "inspect"], ["chat"]):
        error = refused(capsys, *command, "deepseek-ai/DeepSeek-V4-Flash")
        assert "hf download NAME --local-dir DIR" in error


def test_gpus_in_any_spelling():
    assert [gpu_memory(name) for name in GPUS] == list(GPUS.values())
    assert [gpu_memory(name.lower()) for name in GPUS] == list(GPUS.values())
    for name, memory in {
        "A100": 80, "a100-40gb": 40, "NVIDIA A100-80GB": 80, "4090": 24, "RTX 4090": 24,
        "GeForce RTX 4090-48G": 48, "h100": 80, "RTX A6000": 48, "AMD Instinct MI300X": 192,
    }.items():  # fmt: skip
        assert gpu_memory(name) == memory


@pytest.mark.parametrize(
    ("arguments", "text", "sentence"),
    [
        (["parse", "--ids"], "12 abc", "--ids: 'abc' is no token id; allowed are 0 to 129279"),
        (["parse", "--ids"], "[1, 129280]", "--ids: '129280' is no token id"),
        (["parse", "--ids"], str(1 << 70), "is no token id"),
        (["parse", "--ids"], "-1", "--ids: '-1' is no token id"),
        (["parse", "--ids"], "[1.5]", "--ids: '1.5' is no token id"),
        (["parse", "--tools", "no.json"], "x", "no.json: No such file"),
        (["render"], "{", "standard input is not JSON that can be read"),
        (["render"], "5", "messages: must be a list"),
        (["render", "--model", "broken.json"], "[]", "broken.json is no tokenizer that can be re"),
        (["render", "--model", "nowhere"], "[]", "nowhere does not exist; give a checkpoint fo"),
        (["checkpoint", "make", "--preset", "tiny", "--out", "x", "--experts", "-1"], "",
         "--experts is -1; allowed are integers from 1"),
        (["chat", "ftp://host/v1"], "", "the scheme is ftp; allowed are http and https"),
        (["chat", "nowhere"], "", "nowhere is neither a folder nor an address like http://local"),
        (["chat", "http://[bad"], "", "http://[bad/v1 is no address"),
        (["chat", "localhost:9", "--max-tokens", "0"], "", "--max-tokens is 0; allowed are"),
        (["chat", "localhost:9", "--temperature", "-1"], "", "--temperature is -1.0; allowed are"),
        (["chat", "localhost:9"], "", "http://localhost:9/v1 cannot be reached"),
    ],
)  # fmt: skip
def test_refusals(monkeypatch, capsys, tmp_path, arguments, text, sentence):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.json").write_text("{")
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    assert sentence in refused(capsys, *arguments)


@pytest.mark.parametrize("text", ["[0, 1]", "0 1", "0,1", "[0,\n 1]\n", " 0 \n1"])
def test_ids_in_any_layout(monkeypatch, capsys, text):
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    assert main(["parse", "--ids", "--chat"]) == 0
    assert json.loads(capsys.readouterr().out)["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("target", "url"),
    [
        ("localhost:8000", "http://localhost:8000/v1"),
        ("localhost:8000/v1/", "http://localhost:8000/v1"),
        ("http://host", "http://host/v1"),
        ("https://host/api/v1", "https://host/api/v1"),
    ],
)
def test_addresses(target, url):
    assert chat_command.server_url(target) == url


def test_interrupted_answers_stay_in_the_conversation(monkeypatch, capsys, tmp_path):
    asked = []

    class Slow:
        def __init__(self, args):
            pass

        def answer(self, messages):
            asked.append([m["content"] for m in messages])
            yield ContentDelta("so far")
            if len(asked) == 1:
                raise KeyboardInterrupt
            yield ContentDelta(", so good")

    monkeypatch.setattr(chat_command, "Local", Slow)
    monkeypatch.setattr("sys.stdin", io.StringIO("one\ntwo\n"))
    assert main(["chat", str(tmp_path), "--colour", "never"]) == 0
    assert asked == [["one"], ["one", "so far", "two"]]
    assert "(the answer ends here)" in capsys.readouterr().out


def test_an_interrupted_command_ends_quietly(monkeypatch, capsys, config):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("dsv4_plugin.tools.cli.plan.plan", interrupted)
    assert main(["plan", config, "--gpu", "H100"]) == 130
    assert capsys.readouterr().err == ""
