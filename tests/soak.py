"""Load for minutes: streams with tools and reasoning, clients that leave; SIGTERM while more are
open than run."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import threading
import time
import urllib.parse
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from typing import Any

from dsv4_plugin.tools.conversations import held_out
from lab.server import Server
from tests.mini.asking import body

STREAMS = 64
LIFETIME = 600
"""Seconds of a server beside those of the load."""
ROUNDS = 4
GROWTH = 64 << 20
"""Bytes by which a server's processes may grow from the end of the second round to the end of the
last (vLLM in ten minutes: 9 MiB)."""
EXIT = 10
"""Seconds in which a server is gone after SIGTERM, and idle after its clients are."""
COME = 120
"""Seconds in which all streams are open."""
PATH = "/v1/chat/completions"
SKILLS = ("greet", "call", "calls", "result", "json")
Json = dict[str, Any]


def questions() -> list[Json]:
    """Bodies of requests that dsv4-mini has an answer to: with and without reasoning, with tools,
    with their results, with a schema."""
    bodies = [body(c) for skill in SKILLS for c in held_out(skill, 20)]
    return [asked | asked.pop("extra_body") for asked in bodies]


def load(server: Server, seconds: float, seed: int) -> Counter[str]:
    """Ask for that long from as many clients as there are streams; a third leaves in mid-stream, a
    tenth without having read anything. How the requests ended."""
    ends: Counter[str] = Counter()
    until = time.monotonic() + seconds
    asked = questions()

    def client(number: int) -> None:
        random = Random(f"{seed} {number}")
        while time.monotonic() < until:
            question = random.choice(asked)
            if random.random() < 0.3:  # long ones, for which others have to make room
                question = question | {"ignore_eos": True, "max_tokens": random.randint(200, 600)}
            draw = random.random()
            if draw < 0.1:
                vanish(server, question)
                ends["vanished"] += 1
            else:
                ends[read(server, question, random.randint(1, 60) if draw < 0.4 else None)] += 1

    with ThreadPoolExecutor(STREAMS) as pool:
        list(pool.map(client, range(STREAMS)))
    return ends


def read(server: Server, asked: Json, most: int | None = None) -> str:
    """Read a stream, or `most` events of it: 'left', its finish reason, 'error', or 'cut' where the
    connection ends before it does."""
    reason = "cut"
    events = server.stream(PATH, asked)
    try:
        for i, event in enumerate(events):
            if i == most:
                return "left"
            if "error" in event:
                return "error"
            for choice in event.get("choices", ()):
                reason = choice.get("finish_reason") or reason
    except RuntimeError:  # an answer that says so
        return "error"
    except (OSError, http.client.HTTPException):
        return "cut"
    finally:
        events.close()
    return reason


def vanish(server: Server, asked: Json) -> None:
    """Send a request and be gone."""
    address = urllib.parse.urlsplit(server.url)
    data = json.dumps(asked | {"stream": True}).encode()
    head = f"POST {PATH} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    with socket.create_connection((address.hostname, address.port)) as connection:
        connection.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)


def answers(server: Server) -> list[Any]:
    """Greedy answers, one at a time, without the ids of their calls."""

    def said(asked: Json) -> list[Any]:
        message = server.post(PATH, asked)["choices"][0]["message"]
        calls = [call["function"] for call in message.pop("tool_calls", None) or ()]
        return [calls, message]

    return [said(asked) for asked in questions()[::10]]


def soak(server: Server, busy: Callable[[], float], seconds: float) -> None:
    """Rounds of load, after each of which the server is idle at once and answers as before; after
    the last it holds no more memory than after the second."""
    before = answers(server)
    held = []
    for number in range(ROUNDS):
        ends = load(server, seconds / ROUNDS, number)
        until(lambda: busy() == 0, EXIT)
        assert answers(server) == before
        held.append(memory(server.process.pid))
        print(f"round {number}: {dict(ends)}, {held[-1] >> 20} MiB")
        assert ends["left"], ends
        assert ends["vanished"], ends
        assert ends["stop"], ends
        assert ends["tool_calls"], ends
        assert set(ends) <= {"left", "vanished", "stop", "tool_calls", "length"}, ends
    assert held[-1] < held[1] + GROWTH, held


def occupy(server: Server, open_streams: Callable[[], float], tokens: int) -> Callable[[], Counter]:
    """Open streams of as many tokens, more than can run at once, and wait until all are there.

    Args:
        open_streams: how many run or wait.

    Returns:
        A function that gives how each ended, and fails where one has not after EXIT seconds.
    """
    ends: Counter[str] = Counter()
    (greeting, *_) = questions()
    asked = greeting | {"max_tokens": tokens, "ignore_eos": True}

    def client() -> None:
        ends[read(server, asked)] += 1

    clients = [threading.Thread(target=client, daemon=True) for _ in range(STREAMS)]
    for thread in clients:
        thread.start()
    until(lambda: open_streams() == STREAMS, COME)

    def join() -> Counter[str]:
        limit = time.monotonic() + EXIT
        for thread in clients:
            thread.join(max(0.0, limit - time.monotonic()))
        assert ends.total() == STREAMS, f"streams that do not end: {STREAMS - ends.total()}"
        return ends

    return join


def terminate(server: Server, seconds: float = EXIT) -> float:
    """SIGTERM, after which the server is gone in that time, with all its processes. Seconds that
    it took."""
    start = time.monotonic()
    os.kill(server.process.pid, signal.SIGTERM)
    server.process.wait(seconds)
    until(lambda: not group(server.process.pid), 1)
    return time.monotonic() - start


def group(leader: int) -> list[int]:
    """Processes of a session that still run."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, session = path.read_text().rpartition(")")[2].split()[:4]
        except OSError:  # gone meanwhile
            continue
        if int(session) == leader and state != "Z":
            found.append(int(path.parent.name))
    return found


def memory(leader: int) -> int:
    """Resident bytes of a session's processes."""
    pages = 0
    for pid in group(leader):
        try:
            pages += int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        except OSError:
            continue
    return pages * os.sysconf("SC_PAGE_SIZE")


def until(holds: Callable[[], bool], seconds: float) -> None:
    limit = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < limit, f"not within {seconds} seconds"
        time.sleep(0.2)
