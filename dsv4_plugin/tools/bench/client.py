"""Streams requests through OpenAI's API and notes when tokens come.

How many tokens came is what the server's usage says, in each chunk where it can, else in the last
one; chunks are not counted as tokens.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import aiohttp

from dsv4_plugin.json_file import shown
from dsv4_plugin.tools.bench.datasets import Ask, Session

Clock = Callable[[], float]
"""Seconds from any start."""
LONGEST_LINE = 1 << 22
"""Bytes of an event."""
IDLE = 2
"""Seconds after which an unused connection is closed: servers do so after 5, and a request that is
sent as its connection closes fails."""
REFUSED = (400, 422)
"""Statuses by which servers refuse a field."""
EVERY = 0.02
"""Seconds between looks at how late the event loop is."""


@dataclass(frozen=True)
class Answer:
    """What came of one request.

    Args:
        sent: when, in seconds of the client's clock; so are `arrivals` and `ended`.
        arrivals: (when, tokens of the answer so far) of each chunk that brought tokens.
        prompt, output: tokens by the server's usage.
        error: None, or why it counts as failed; the rest is what came until then.
        each: usage came before the last chunk too.
    """

    sent: float
    ended: float
    arrivals: tuple[tuple[float, int], ...] = ()
    prompt: int = 0
    output: int = 0
    error: str | None = None
    each: bool = False


@dataclass(frozen=True)
class Options:
    """What the server takes of what is not in OpenAI's API.

    Args:
        each: usage in every chunk; otherwise an answer's tokens are spread evenly over its chunks.
        ignore_eos: answers have as many tokens as are asked for.
    """

    each: bool = True
    ignore_eos: bool = True


class Unusable(ValueError):
    """The server does not answer as a bench needs it."""


@dataclass
class Client:
    """Requests to one server; `async with` opens and closes its connections.

    Args:
        url: the base URL, which ends with the API's version.
        model: the name to ask for.
        patience: seconds without a byte after which a request has failed.
    """

    url: str
    model: str
    patience: float = 600.0
    clock: Clock = time.perf_counter
    options: Options = field(default_factory=Options)

    async def __aenter__(self) -> Client:
        key = os.environ.get("OPENAI_API_KEY")
        self.http = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=IDLE),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=self.patience),
            headers={"Authorization": f"Bearer {key}"} if key else None,
            read_bufsize=LONGEST_LINE,
        )
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.http.close()

    def encoded(self, ask: Ask, output: int) -> bytes:
        """The request's body, for an answer of `output` tokens."""
        usage = {"include_usage": True}
        if self.options.each:
            usage["continuous_usage_stats"] = True
        body: dict[str, Any] = {
            "model": self.model,
            "stream": True,
            "stream_options": usage,
            "max_tokens": output,
            "temperature": 0,
        }
        if self.options.ignore_eos:
            body["ignore_eos"] = True
        return json.dumps(body | ask.body).encode()

    async def negotiate(self, ask: Ask) -> None:
        """Find the options that the server takes. Raises Unusable where it answers with none."""
        for options in (Options(), Options(each=False), Options(each=False, ignore_eos=False)):
            self.options = options
            answer = await self.send(ask.path, self.encoded(ask, 2))
            if answer.error is None:
                self.options = replace(options, each=answer.each)
                return
            if not answer.error.startswith(tuple(f"{status}: " for status in REFUSED)):
                break
        raise Unusable(f"{self.url} does not answer the first request: {answer.error}")

    async def send(self, path: str, body: bytes) -> Answer:
        """One request; whatever goes wrong is the answer's error."""
        stream = Stream()
        sent = now = self.clock()
        try:
            async with self.http.post(
                f"{self.url}/{path}", data=body, headers={"Content-Type": "application/json"}
            ) as response:
                if response.status != 200:
                    text = await response.text(errors="replace")
                    stream.error = f"{response.status}: {' '.join(text.split())[:300]}"
                else:
                    async for line in response.content:
                        if line.startswith(b"data:"):
                            now = self.clock()
                            stream.feed(now, line[5:].strip())
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
            # ValueError: what is no JSON, or a line without end
            stream.error = stream.error or f"{type(error).__name__}: {error}".rstrip(": ")
            now = self.clock()
        return stream.answer(sent, now)

    async def alive(self) -> bool:
        """Does anything answer there?"""
        try:
            timeout = aiohttp.ClientTimeout(total=10)
            async with self.http.get(f"{self.url}/models", timeout=timeout) as response:
                return response.status < 500
        except (aiohttp.ClientError, TimeoutError, OSError):
            return False


class Stream:
    """The events of an answer as they come."""

    def __init__(self) -> None:
        self.arrivals: list[tuple[float, int]] = []
        self.texts: list[float] = []
        self.usage: dict[str, Any] | None = None
        self.usages = 0
        self.done = False
        self.error: str | None = None

    def feed(self, now: float, data: bytes) -> None:
        """An event at time `now`: a chunk of JSON or `[DONE]`. Raises ValueError for another."""
        if data == b"[DONE]":
            self.done = True
            return
        chunk = json.loads(data)
        if not isinstance(chunk, dict):
            raise ValueError(f"an event is {shown(chunk)}; it must be a JSON object")
        if error := chunk.get("error"):
            self.error = " ".join(json.dumps(error).split())[:300]
        if usage := chunk.get("usage"):
            self.usage = usage
            self.usages += 1
            tokens = usage.get("completion_tokens", 0)
            if tokens > (self.arrivals[-1][1] if self.arrivals else 0):
                self.arrivals.append((now, tokens))
        if any(map(_has_text, chunk.get("choices") or ())):
            self.texts.append(now)

    def answer(self, sent: float, ended: float) -> Answer:
        """All of it, once the stream has ended."""
        if self.error is None and not self.done:
            self.error = "the stream ended before its [DONE]"
        if self.error is None and self.usage is None:
            self.error = "the stream has no usage, without which tokens cannot be counted"
        usage = self.usage or {}
        output = usage.get("completion_tokens", 0)
        arrivals = self.arrivals
        if len(arrivals) <= 1 < len(self.texts):  # usage in the last chunk only
            n = len(self.texts)
            arrivals = [(when, output * i // n) for i, when in enumerate(self.texts, 1)]
        if self.error is None and not output:
            self.error = "the answer has no tokens"
        prompt = usage.get("prompt_tokens", 0)
        each = self.usages > 1
        return Answer(sent, ended, tuple(arrivals), prompt, output, self.error, each)


def _has_text(choice: dict[str, Any]) -> bool:
    delta = choice.get("delta") or {}
    return bool(
        choice.get("text")
        or delta.get("content")
        or delta.get("reasoning_content")
        or delta.get("reasoning")
        or delta.get("tool_calls")
    )


@dataclass(frozen=True)
class Load:
    """How busy the client was while it sent.

    Args:
        cpu: seconds of its process per second.
        lags: seconds by which the event loop was late, looked at every EVERY seconds.
    """

    cpu: float
    lags: tuple[float, ...]


class Watch:
    """`async with Watch() as watch`: afterwards watch.load says how busy this process was."""

    load: Load

    async def __aenter__(self) -> Watch:
        self.lags: list[float] = []
        self.start, self.used = time.perf_counter(), time.process_time()
        self.task = asyncio.create_task(self._look())
        return self

    async def _look(self) -> None:
        while True:
            start = time.perf_counter()
            await asyncio.sleep(EVERY)
            self.lags.append(time.perf_counter() - start - EVERY)

    async def __aexit__(self, *exception: object) -> None:
        self.task.cancel()
        cpu = time.process_time() - self.used
        self.load = Load(cpu / (time.perf_counter() - self.start), tuple(self.lags))


@dataclass(frozen=True)
class Sent:
    """The answers of a level in the order in which they ended; `unsent` requests never started,
    because the server was gone."""

    answers: tuple[Answer, ...]
    unsent: int
    load: Load


async def send_all(
    client: Client,
    sessions: Sequence[Session],
    concurrency: int,
    output: int,
    done: Callable[[Answer], object] = lambda _: None,
) -> Sent:
    """Send sessions, `concurrency` at a time; a session's requests one after another.

    Args:
        output: tokens of each answer.
        done: is called with every answer.
    """
    waiting = deque([(a.path, client.encoded(a, output)) for a in s] for s in sessions)
    answers: list[Answer] = []
    gone = False

    async def work() -> None:
        nonlocal gone
        while waiting and not gone:
            for path, body in waiting.popleft():
                if gone:
                    return
                answer = await client.send(path, body)
                answers.append(answer)
                done(answer)
                gone = gone or (answer.error is not None and not await client.alive())

    async with Watch() as watch:
        await asyncio.gather(*(work() for _ in range(min(concurrency, len(waiting)))))
    total = sum(map(len, sessions))
    return Sent(tuple(answers), total - len(answers), watch.load)
