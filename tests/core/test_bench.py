"""`dsv4 bench` on servers that stream what a test says: arithmetic, failures, charts, options."""

from __future__ import annotations

import asyncio
import json
import re
import time
import xml.etree.ElementTree as ET
from contextlib import nullcontext
from dataclasses import astuple, replace
from itertools import pairwise
from types import SimpleNamespace

import pytest

from dsv4_plugin.chat import Encoder
from dsv4_plugin.tools.bench import charts, page
from dsv4_plugin.tools.bench.client import (
    Answer,
    Client,
    Load,
    Options,
    Sent,
    Unusable,
    Watch,
    send_all,
)
from dsv4_plugin.tools.bench.datasets import (
    SHORTEST_LONG,
    STEP,
    TURNS,
    Ask,
    Size,
    default_requests,
    make_dataset,
)
from dsv4_plugin.tools.bench.measures import Level, Spread, gaps, measure, percentile
from dsv4_plugin.tools.bench.report import MEASURES, Run, compare, row, runs_in
from dsv4_plugin.tools.bench.run import Plan, bench
from dsv4_plugin.tools.bench.server import Counted, Facts, counted
from dsv4_plugin.tools.cli import main
from dsv4_plugin.tools.cli.render import tokenizer_path
from tests.core.fake_server import Clock, Fake

IDLE = Load(0.1, (0.0001,))


def no_bar(level, requests):
    return nullcontext(SimpleNamespace(update=lambda n: None))


def run_bench(fake, tmp_path, clock=time.perf_counter, **changes):
    plan = Plan(
        url=fake.url, label="a", folder=tmp_path, concurrency=(1,), dataset="random", requests=3,
        prompt=5, output=4, seed=1, patience=10,
    )  # fmt: skip
    levels = []
    run = asyncio.run(bench(replace(plan, **changes), len, levels.append, no_bar, clock))
    assert levels == list(run.levels)
    return run


def ask(fake, path="completions", options=Options(), clock=time.perf_counter):  # noqa: B008 (frozen)
    async def once():
        async with Client(fake.url, "fake", 5, clock, options) as client:
            return await client.send(path, client.encoded(Ask(path, {"prompt": "x"}), 3))

    return asyncio.run(once())


def one_level(level):
    return level.ttft, level.itl, level.tpot, level.e2e


# Arithmetic


def test_latencies_are_those_of_the_server(tmp_path):
    """By a clock that only the server moves: 0.5 s to the first token, then 0.1 and 0.2."""
    clock = Clock()
    with Fake(chunks=((0.5, 1), (0.1, 1), (0.2, 1)), clock=clock) as fake:
        (level,) = run_bench(fake, tmp_path, clock).levels
    near = pytest.approx
    assert astuple(level.ttft) == near((0.5,) * 4)
    assert astuple(level.itl) == near((0.15, 0.15, 0.2, 0.2))
    assert astuple(level.tpot) == near((0.15,) * 4)
    assert astuple(level.e2e) == near((0.8,) * 4)
    assert level.seconds == near(3 * 0.8)
    assert (level.prompt_tokens, level.output_tokens) == (21, 9)
    assert level.output_rate == near(9 / 2.4)
    assert level.total_rate == near(30 / 2.4)


@pytest.mark.parametrize("each", [True, False])
def test_tokens_are_the_servers_and_not_chunks(tmp_path, each):
    """Two chunks with five tokens: with usage in each chunk the second has three of them."""
    clock = Clock()
    with Fake(chunks=((0.5, 2), (0.3, 3)), each=each, clock=clock) as fake:
        (level,) = run_bench(fake, tmp_path, clock).levels
    assert level.output_tokens == 15
    assert level.tpot.mean == pytest.approx(0.3 / 4)
    assert level.itl.mean == pytest.approx(0.1)  # 3 new tokens (5 * 1 // 2 = 2 came before)
    assert level.ttft.mean == pytest.approx(0.5)


def test_tokens_of_a_chunk_share_its_time():
    answer = Answer(0.0, 2.0, ((1.0, 1), (1.4, 3), (1.5, 4)), 1, 4)
    assert gaps(answer) == pytest.approx([0.2, 0.2, 0.1])
    assert gaps(replace(answer, arrivals=((1.0, 4),))) == []


def test_rates_are_over_the_whole_level():
    """Two requests that overlap: from the first's start to the second's end."""
    answers = (
        Answer(1.0, 3.0, ((2.0, 1), (3.0, 2)), 10, 2),
        Answer(2.0, 6.0, ((3.0, 1), (5.0, 3)), 20, 3),
    )
    level = measure(2, Sent(answers, 0, IDLE), Counted())
    assert level.seconds == 5.0
    assert level.output_rate == 1.0
    assert level.total_rate == 7.0
    assert level.ttft.mean == 1.0
    assert level.e2e.mean == 2.5
    assert level.marks == []


@pytest.mark.parametrize("values", [[3.0], [1.0, 2.0], [5.0, 1.0, 4.0, 2.0], list(range(101))])
def test_percentiles_are_numpys(values):
    import numpy

    for share in (0.5, 0.95, 0.99):
        assert percentile(sorted(values), share) == pytest.approx(
            numpy.percentile(values, 100 * share)
        )
    assert Spread.of([]) is None


# Failures


def test_failed_requests_are_counted(tmp_path):
    """Request 0 asks what the server takes, 1 warms up, the level has six."""
    ways = {3: "500", 4: "error", 5: "cut", 6: "500"}
    with Fake(broken=ways.get) as fake:
        run = run_bench(fake, tmp_path, requests=6)
    (level,) = run.levels
    assert run.ended is None
    assert (level.requests, level.completed, level.failed, level.unsent) == (6, 2, 4, 0)
    assert level.errors["500: out of memory"] == 2
    assert level.errors["the stream ended before its [DONE]"] == 1
    assert level.errors['{"message": "the engine is ill"}'] == 1
    assert level.marks[-1] == "4 requests failed"
    assert level.output_tokens == 2 * 3  # of those that completed
    assert "4 requests failed" in page.html([run], "")
    assert any("2 x 500: out of memory" in line for line in row(level))


def test_a_server_that_dies_leaves_what_was_measured(tmp_path, capsys):
    """In the second level: exit code 1, a page, and the JSON of both levels."""
    with Fake(broken=lambda n: "die" if n == 12 else None) as fake:
        code = main(arguments(fake, tmp_path, "--concurrency", "1,2", "--requests", "6"))
    assert code == 1
    captured = capsys.readouterr()
    assert "the server went away at concurrency 2" in captured.err
    run = Run.load(tmp_path / "a.json")
    assert run.ended == "the server went away at concurrency 2"
    first, second = run.levels
    assert (first.completed, first.failed) == (6, 0)
    assert second.completed + second.failed + second.unsent == second.requests == 6
    assert second.failed >= 1
    assert second.unsent >= 1
    assert (tmp_path / "bench.png").stat().st_size > 10_000
    text = (tmp_path / "bench.html").read_text()
    assert "This run is not complete: the server went away at concurrency 2." in text
    assert "requests were not sent" in text


def test_a_run_is_kept_from_its_start(tmp_path):
    """What a client that is killed leaves."""

    def killed(level, requests):
        if level == 2:
            raise KeyboardInterrupt
        return no_bar(level, requests)

    plan = Plan("", "a", tmp_path, (1, 2), "random", 2, 5, 4, 1, 10)
    with Fake() as fake, pytest.raises(KeyboardInterrupt):
        asyncio.run(bench(replace(plan, url=fake.url), len, print, killed, time.perf_counter))
    run = Run.load(tmp_path / "a.json")
    assert [level.concurrency for level in run.levels] == [1]
    assert run.ended == "it was interrupted"


def test_a_silent_server_is_a_failed_request():
    async def once(url):
        async with Client(url, "fake", 0.2) as client:
            return await client.send("completions", client.encoded(Ask("", {"prompt": "x"}), 3))

    with Fake(chunks=((0.0, 1), (1.0, 1))) as fake:
        answer = asyncio.run(once(fake.url))
    assert "Timeout" in answer.error
    assert len(answer.arrivals) == 1


def test_nothing_answered_is_exit_code_1(tmp_path):
    with Fake(broken=lambda n: "500" if n else None) as fake:
        assert main(arguments(fake, tmp_path)) == 1
    (level,) = Run.load(tmp_path / "a.json").levels
    assert (level.completed, level.failed) == (0, 3)
    assert one_level(level) == (None,) * 4


# Client and server


def test_options_are_those_that_the_server_takes(tmp_path):
    for refuses, each, expected in (
        ((), True, Options()),
        ((), False, Options(each=False)),  # it takes the field and does nothing with it
        (("continuous_usage_stats",), True, Options(each=False)),
        (("continuous_usage_stats", "ignore_eos"), True, Options(False, False)),
    ):
        with Fake(refuses=refuses, each=each) as fake:
            run = run_bench(fake, tmp_path)
        assert run.levels[0].completed == 3
        assert run.options["ignore_eos"] == expected.ignore_eos
        assert run.options["usage"].startswith("of each" if expected.each else "of the last")


def test_without_usage_there_is_no_bench(tmp_path):
    with Fake(usage=False, each=False) as fake, pytest.raises(Unusable, match="has no usage"):
        run_bench(fake, tmp_path)
    with Fake(refuses=("model",)) as fake, pytest.raises(Unusable, match="400: "):
        run_bench(fake, tmp_path)


def test_a_level_keeps_as_many_in_flight_as_it_says(tmp_path):
    with Fake(chunks=((0.02, 1), (0.02, 1))) as fake:
        for concurrency in (1, 3):
            fake.most_in_flight = 0
            run_bench(fake, tmp_path, concurrency=(concurrency,), requests=9)
            assert fake.most_in_flight == concurrency


def test_turns_of_a_session_follow_one_another():
    sessions = [[Ask("completions", {"prompt": f"{s}{t}"}) for t in range(3)] for s in "ab"]

    async def send(url):
        async with Client(url, "fake") as client:
            return await send_all(client, sessions, 2, 3)

    with Fake() as fake:
        sent = asyncio.run(send(fake.url))
        prompts = [body["prompt"] for _, body in fake.asked]
    assert len(sent.answers) == 6
    for s in "ab":
        assert [p for p in prompts if p[0] == s] == [f"{s}{t}" for t in range(3)]


def test_a_busy_client_is_marked():
    answers = (Answer(0.0, 1.0, ((0.5, 1), (0.52, 2)), 1, 2),)
    for load, words in (
        (Load(0.85, (0.0,)), "used 85% of a core"),
        (Load(0.1, (0.006,) * 20), "event loop was 6.0 ms late (allowed: 5.0)"),
    ):
        (mark,) = measure(1, Sent(answers, 0, load), Counted()).marks
        assert mark.startswith("the client was the bottleneck")
        assert words in mark
    slow = (Answer(0.0, 1.0, ((0.5, 1), (0.7, 2)), 1, 2),)  # a tenth of 200 ms is allowed
    assert measure(1, Sent(slow, 0, Load(0.8, (0.006,) * 20)), Counted()).marks == []


def test_the_watch_sees_a_blocked_loop():
    async def block():
        async with Watch() as watch:
            await asyncio.sleep(0.03)
            end = time.perf_counter() + 0.2
            while time.perf_counter() < end:
                pass
            await asyncio.sleep(0.03)
        return watch.load

    load = asyncio.run(block())
    assert max(load.lags) > 0.1
    assert load.cpu > 0


VLLM = """# HELP vllm:prefix_cache_queries_total of tokens
vllm:prefix_cache_queries_total{{engine="0"}} {0}.0
vllm:prefix_cache_queries_total{{engine="1"}} {0}.0
vllm:prefix_cache_hits_total{{engine="0"}} {1}
vllm:num_preemptions_total{{engine="0"}} 5
vllm:spec_decode_num_draft_tokens_total{{engine="0"}} 1e3
vllm:spec_decode_num_accepted_tokens_total{{engine="0"}} {1}
"""


def test_what_the_engine_counted(tmp_path):
    """The difference over a level, summed over labels, without the requests that warm it up."""
    with Fake(metrics=lambda n: VLLM.format(100 * n, 25 * n), pages={"version": {"version": "9"}}) as fake:  # fmt: skip  # noqa: E501
        run = run_bench(fake, tmp_path, requests=4)
    assert run.server == Facts("vllm", "9", "fake", 4096)
    found = run.levels[0].counted
    assert found == Counted(prefix_tokens=800, prefix_hits=100, preemptions=0, drafted=0,
                            accepted=100)  # fmt: skip
    assert found.hit_rate == 0.125


def test_acceptance_and_sglangs_counters():
    names = {"draft": 0.0, "accepted": 0.0}
    before = {f"vllm:spec_decode_num_{name}_tokens_total": v for name, v in names.items()}
    after = dict(zip(before, (200.0, 150.0), strict=True))
    assert counted("vllm", before, after).acceptance == 0.75
    sglang = counted("sglang", {}, {"sglang:prompt_tokens_total": 10, "sglang:spec_accept_rate": 1})
    assert (sglang.hit_rate, sglang.acceptance, sglang.preemptions) == (0.0, 1, None)
    assert counted("", {}, after) == counted("vllm", {}, {}) == Counted()


def test_no_secrets_of_a_server_are_kept(tmp_path):
    told = {"tp_size": 2, "api_key": "secret", "model_path": "/home/me", "version": "0.5"}
    told["max_total_num_tokens"] = 1000  # of its pool: less than the model could take
    with Fake(pages={"server_info": told}) as fake:
        run = run_bench(fake, tmp_path)
    assert run.server == Facts("sglang", "0.5", "fake", 1000, {"tp_size": 2})
    assert "secret" not in (tmp_path / "a.json").read_text()


# Datasets


@pytest.fixture(scope="module")
def tokens():
    encoder = Encoder(tokenizer_path(None))
    return lambda messages, tools: len(encoder.encode(messages, tools).ids)


def size(requests=16, highest=4, prompt=None, output=64, limit=65536, seed=3):
    return Size(requests, highest, prompt, output, limit, seed)


def lengths(sessions, tokens):
    return [[tokens(a.body["messages"], a.body.get("tools")) for a in s] for s in sessions]


@pytest.mark.parametrize("name", ["random", "chat", "tools", "long"])
def test_levels_have_the_same_sizes_and_no_request_twice(name, tokens):
    data = make_dataset(name, size(), tokens)
    levels = [data.sessions(level) for level in (-4, 1, 4)]
    firsts = [json.dumps(a.body) for sessions in levels for a, *_ in sessions]
    assert len(set(firsts)) == len(firsts)
    if name == "random":
        assert {len(a.body["prompt"]) for s in levels for (a,) in s} == {1024}
    else:
        assert lengths(levels[1], tokens) == lengths(levels[2], tokens)
    assert levels[1] == make_dataset(name, size(), tokens).sessions(1)
    assert levels[1] != make_dataset(name, size(seed=4), tokens).sessions(1)
    assert sum(map(len, levels[1])) == 16
    assert len(levels[1]) >= 4


@pytest.mark.parametrize(("name", "longest"), [("chat", 2048), ("tools", 4096)])
def test_prompts_of_conversations_grow(name, longest, tokens):
    data = make_dataset(name, size(requests=default_requests(name, 4)), tokens)
    for session in data.sessions(2):
        assert len(session) == TURNS
        found = lengths([session], tokens)[0]
        assert all(b - a > 100 for a, b in pairwise(found))
        assert longest - STEP < found[-1] <= longest
        for before, after in pairwise(session):
            history = before.body["messages"]
            assert after.body["messages"][: len(history)] == history
        roles = {a.body["messages"][-1]["role"] for a in session}
        assert roles <= ({"user", "tool"} if name == "tools" else {"user"})
        assert ("tools" in session[0].body) == (name == "tools")


def test_long_prompts_go_to_the_servers_limit(tokens):
    found = lengths(make_dataset("long", size(requests=8), tokens).sessions(1), tokens)
    expected = [8192, 16384, 32768, 65536 - 64 - 64] * 2
    for (n,), most in zip(found, expected, strict=True):
        assert most - STEP < n <= most
    only = make_dataset("long", size(requests=4, prompt=10_000), tokens).sessions(1)
    assert [n > 9_000 for (n,) in lengths(only, tokens)] == [False, True] * 2


def test_a_files_requests(tmp_path, tokens):
    file = tmp_path / "asks.jsonl"
    message = {"role": "user", "content": "hi"}
    file.write_text(f'{{"prompt": "x"}}\n\n{json.dumps({"messages": [message]})}\n')
    assert default_requests(str(file), 1) == 2
    sessions = make_dataset(str(file), size(requests=3), tokens).sessions(1)
    assert [a.path for (a,) in sessions] == ["completions", "chat/completions", "completions"]


@pytest.mark.parametrize(
    ("name", "change", "sentence"),
    [
        ("random", {"limit": 1000}, "--input-len and --output-len are 1,024 and 64; the server"),
        ("tools", {"prompt": 300}, "--input-len is 300; a conversation of --dataset tools needs"),
        ("long", {"limit": 8192}, f"has prompts of {SHORTEST_LONG:,} tokens and more, of which"),
        ("long", {"limit": None}, "--dataset long needs --input-len"),
        ("long", {"prompt": 5000}, "--input-len is 5,000; --dataset long has prompts of 8,192"),
        ("sonnet", {}, "--dataset is sonnet; allowed are random, chat, long, tools and a file"),
    ],
)
def test_sizes_that_do_not_suit(name, change, sentence, tokens):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        make_dataset(name, size(**change), tokens)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "has no requests"),
        ("{", ":1 is not JSON that can be read"),
        ('{"prompt": "x"}\n{"prompt": 5}', ":2 is no request"),
        ('{"messages": []}', ":1 is no request"),
        ('{"messages": [{}], "max_tokens": 5}', ":1 is no request"),
    ],
)
def test_files_that_hold_no_requests(tmp_path, text, sentence):
    file = tmp_path / "asks"
    file.write_text(text)
    with pytest.raises(ValueError, match=re.escape(f"{file}{sentence}" if sentence[0] == ":" else sentence)):  # fmt: skip  # noqa: E501
        make_dataset(str(file), size(), len)


# The command


def arguments(fake, folder, *more):
    given = ["bench", fake.url, "--out", str(folder), "--label", "a", "--requests", "3"]
    return [*given, "--concurrency", "1", "--input-len", "5", "--output-len", "3", *more]


def test_runs_of_one_folder_share_a_page(tmp_path, capsys):
    with Fake() as fake:
        assert main(arguments(fake, tmp_path)) == 0
        assert main(arguments(fake, tmp_path, "--label", "b", "--note", "<fast>")) == 0
        assert main(arguments(fake, tmp_path, "--label", "b")) == 2
    captured = capsys.readouterr()
    assert "b.json exists; give another label" in captured.err
    assert captured.out.startswith("concurrency  output tokens/s")
    assert [run.label for run in runs_in(tmp_path)] == ["a", "b"]
    text = (tmp_path / "bench.html").read_text()
    assert "<title>dsv4 bench: a, b</title>" in text
    assert "note &lt;fast&gt;" in text
    assert not re.search(r'(src|href)="(?!#)', text)  # nothing is fetched
    assert not re.search(r"url\((?!#)|@import|<script", text)
    run = json.loads((tmp_path / "a.json").read_text())
    assert run["machine"]["local"]
    assert run["machine"]["cores"]
    assert run["code"]["version"]
    assert run["server"]["model"] == "fake"
    assert (
        run["options"]["seed"] != json.loads((tmp_path / "b.json").read_text())["options"]["seed"]
    )


def test_dataset_chat_asks_for_chat(tmp_path):
    with Fake() as fake:
        more = ["--dataset", "tools", "--input-len", "1500", "--model", "mine"]
        assert main(arguments(fake, tmp_path, *more)) == 0
        path, body = fake.asked[-1]
    assert path == "/v1/chat/completions"
    assert body["model"] == "mine"
    assert body["tools"]
    assert body["stream_options"] == {"include_usage": True, "continuous_usage_stats": True}
    assert (body["max_tokens"], body["temperature"], body["ignore_eos"]) == (3, 0, True)


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--concurrency", "1,x"], "--concurrency is 1,x; allowed are integers from 1 to 16,384"),
        (["--concurrency", "0"], "--concurrency is 0; allowed are integers from 1"),
        (["--concurrency", "2,1"], "--concurrency is 2,1; each has to be more than the one before"),
        (["--concurrency", "8"], "--requests is 3; concurrency 8 needs as many"),
        (["--input-len", "0"], "--input-len is 0; allowed are integers from 1"),
        (["--output-len", "-1"], "--output-len is -1; allowed are integers from 1"),
        (["--requests", "0"], "--requests is 0; allowed are integers from 1"),
        (["--timeout", "0"], "--timeout is 0.0; allowed are numbers from 1"),
        (["--seed", "-1"], "--seed is -1; allowed are integers from 0"),
        (["--label", "a/b"], "--label is 'a/b'; allowed are up to 64 letters"),
        (["--dataset", "nothing"], "--dataset is nothing; allowed are random"),
        (["--input-len", "5000"], "the server takes 4,096 tokens of both"),
    ],
)
def test_refusals(tmp_path, capsys, more, sentence):
    with Fake() as fake:
        assert main(arguments(fake, tmp_path, *more)) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert error.count("\n") == 1
    assert not list(tmp_path.glob("*.json"))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["localhost:9"], "--out is missing"),
        (["localhost:9", "--out", "x"], "http://localhost:9/v1 cannot be reached"),
        (["ftp://x", "--out", "x"], "the scheme is ftp; allowed are http and https"),
        ([".", "--out", "x"], ". is a folder; give the address of a running server"),
        (["localhost:9", "localhost:8", "--out", "x"], "localhost:8 is one URL too many"),
        (["compare", "a"], "compare takes two files of runs; 1 are given"),
        (["compare", "a", "b"], "a: No such file"),
        (["compare", "other.json", "other.json"], "other.json is no run of `dsv4 bench`"),
        (["compare", "half.json", "half.json"], "half.json is no run of `dsv4 bench`"),
    ],
)
def test_what_is_no_server_and_no_run(tmp_path, monkeypatch, capsys, arguments, sentence):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other.json").write_text("{}")
    (tmp_path / "half.json").write_text('{"format": 1, "levels": [{}], "server": {}}')
    assert main(["bench", *arguments]) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert error.count("\n") == 1


def test_a_missing_library_is_named(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("dsv4_plugin.tools.cli.bench.find_spec", lambda name: None)
    assert main(["bench", "localhost:9", "--out", str(tmp_path)]) == 2
    assert "pip install 'dsv4-plugin[bench]'" in capsys.readouterr().err


# Reports


def made_level(concurrency, rate, marks=()):
    spread = Spread(*(0.01 * concurrency * k for k in (1.1, 1, 2, 3)))
    return Level(
        concurrency, 4, 4, 0, 0, {}, 2.0, 400, 100, rate, 5 * rate, spread, spread, spread, spread,
        0.1, 0.001, Counted(), list(marks),
    )  # fmt: skip


def made_run(label, factor=1.0, concurrencies=(1, 2, 4), marked=()):
    levels = [
        made_level(c, factor * 10 * c, ["the client was the bottleneck"] * (c in marked))
        for c in concurrencies
    ]
    options = {"dataset": "random", "output_len": 4, "seed": hash(label)}
    machine = {"cores": 2, "gpus": [], "local": True}
    facts = Facts("vllm", "1", "m", None)
    return Run(label, f"2026-01-01 {label}", options, facts, machine, {}, tuple(levels))


def test_a_run_comes_back_from_its_file(tmp_path):
    run = made_run("a", marked=(2,))
    assert Run.load(run.save(tmp_path)) == run


def test_comparison_has_ratios(tmp_path, capsys):
    a, b = made_run("a"), made_run("b", 1.5, (2, 4, 8), marked=(4,))
    b = replace(b, options=b.options | {"output_len": 8})
    files = [str(run.save(tmp_path)) for run in (a, b)]
    assert main(["bench", "compare", *files]) == 0
    out = capsys.readouterr().out
    assert "b / a" in out
    assert re.findall(r"^concurrency (\d+)", out, re.M) == ["2", "4"]
    assert re.findall(r"output tokens/s +(\S+) +(\S+) +(\S+)$", out, re.M) == [
        ("20.0", "30.0", "1.50"), ("40.0", "60.0", "1.50"),
    ]  # fmt: skip
    assert re.search(r"TTFT p50 ms +20\.0 +20\.0 +1\.00$", out, re.M)
    assert "they differ in output_len: 4 and 8" in out
    assert "differ in seed" not in out
    assert "! b: the client was the bottleneck" in out
    assert "only in a: concurrency 1\n" in out
    assert "only in b: concurrency 8\n" in out
    with pytest.raises(ValueError, match="have no concurrency in common"):
        list(compare(a, made_run("c", 1, (16,))))


def test_charts_have_every_run_and_level():
    runs = [made_run("plugin", marked=(4,)), made_run("native", 2.0, (1, 8)), made_run("x", 1, ())]
    figure = charts.draw(runs)
    titles = [axes.get_title() for axes in figure.axes]
    assert titles == [
        "Inter-token latency", "Time to first token", "Throughput scaling",
        "Throughput against latency",
    ]  # fmt: skip
    itl, ttft, throughput, trade = figure.axes
    assert [axes.get_ylabel() for axes in figure.axes] == [
        "ITL (ms)", "TTFT (ms)", "Output tokens per second", "Total tokens per second",
    ]  # fmt: skip
    for axes in (itl, ttft, throughput):
        assert axes.get_xlabel() == "Concurrency (requests in flight)"
        assert list(axes.get_xticks()) == [1, 2, 4, 8]
    solid = [
        line for line in itl.lines if line.get_linestyle() == "-" and len(line.get_xdata()) > 1
    ]
    assert [list(line.get_ydata()) for line in solid] == [[10, 20, 40], [10, 80]]
    assert "Mean TTFT (ms)" in trade.get_xlabel()
    assert [text.get_text() for text in trade.texts] == ["1", "2", "4", "1", "8"]
    assert list(trade.lines[0].get_ydata()) == [50, 100, 200]
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels[:3] == ["plugin", "native", "x (not measured)"]
    assert labels[-1] == "with a mark: see the page"
    hollow = [line for line in throughput.lines if line.get_markerfacecolor() == "white"]
    assert [list(line.get_xdata()) for line in hollow] == [[4]]


def test_the_page_is_whole(tmp_path):
    runs = [made_run("plugin", marked=(4,)), replace(made_run("native", 1, ()), ended="it died")]
    assert all(path.exists() for path in page.write(runs, tmp_path))
    svg = ET.parse(tmp_path / "bench.svg").getroot()
    assert svg.tag.endswith("svg")
    png = (tmp_path / "bench.png").read_bytes()
    assert int.from_bytes(png[16:20], "big") == 1200  # pixels wide
    text = (tmp_path / "bench.html").read_text()
    assert text.count("<svg") == 1
    for name in (m.name for m in MEASURES if m.of(runs[0].levels[0]) is not None):
        assert f"<td>{name}</td>" in text
    assert "Concurrency 4: the client was the bottleneck." in text
    assert "This run is not complete: it died." in text


def test_runs_look_different():
    assert len({charts.look(number) for number in range(30)}) == 30


def test_ticks_enclose_what_is_drawn():
    assert charts.ticks(18.9, 74.0) == [10, 20, 50, 100]
    assert charts.ticks(20, 20) == [20, 50]
    assert charts.ticks(1, 90_000) == [1, 10, 100, 1000, 10_000, 100_000]
    charts.to_png(charts.draw([made_run("nothing", 1, ())]))


def test_pictures_are_the_same_every_time(tmp_path):
    runs = [made_run("a"), made_run("b", 2)]
    assert charts.to_svg(charts.draw(runs)) == charts.to_svg(charts.draw(runs))
