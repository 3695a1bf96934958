"""The requests of a level. Each level has as many, of the same sizes, and none is asked twice.

A session is a list of requests that are sent one after another: the turns of a conversation.
Nothing is downloaded: token ids are drawn, conversations come from `tools.conversations`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import cycle, islice
from pathlib import Path
from random import Random
from typing import Any, Protocol

from dsv4_plugin.json_file import as_object, parse_json
from dsv4_plugin.tools.conversations import TOOLS, Conversation, Writer

Messages = list[dict[str, Any]]
Tokens = Callable[[Messages, list[dict[str, Any]] | None], int]
"""(messages, tools) -> tokens of their prompt."""

GENERATED = ("random", "chat", "long", "tools")
INPUT = {"random": 1024, "chat": 2048, "tools": 4096}
"""Tokens of a prompt, or of a conversation's last one, where nothing else is asked for."""
TURNS = 8
"""Most requests of a conversation."""
STEP = 192
"""Least tokens by which a conversation grows from turn to turn: more than an exchange has, 138."""
SHORTEST_LONG = 8192
"""Tokens of the shortest prompts of `long`; each size is twice the one before."""
MARGIN = 64
"""Tokens that a server's own way of writing a prompt may add to what is counted here."""
ORDINARY = range(1000, 100_000)
"""Token ids that are ordinary text in V4's vocabulary."""


@dataclass(frozen=True)
class Ask:
    """What a request asks: `path` below the base URL, and what its body has of its own."""

    path: str
    body: dict[str, Any]


Session = Sequence[Ask]


class Dataset(Protocol):
    """sessions(level): always the same ones, and others for another level.

    A level is known by its concurrency, the requests that warm up for it by the negative.
    """

    def sessions(self, level: int) -> list[Session]: ...


@dataclass(frozen=True)
class Size:
    """How much is asked.

    Args:
        requests: of a level.
        highest: concurrency; there are at least as many sessions.
        prompt: tokens of the longest prompt; None: the dataset's own.
        output: tokens of an answer.
        limit: tokens of prompt and answer that the server takes; None: not known.
        seed: of all that is drawn.
    """

    requests: int
    highest: int
    prompt: int | None
    output: int
    limit: int | None
    seed: int


def default_requests(name: str, highest: int) -> int:
    """Of a level: conversations have all their turns at the highest concurrency."""
    if name == "random":
        return 2 * highest
    if name in ("chat", "tools"):
        return TURNS * highest
    return highest if name == "long" else max(highest, len(_lines(Path(name))))


def make_dataset(name: str, size: Size, tokens: Tokens) -> Dataset:
    """The dataset of a name of GENERATED, or of a file.

    Raises:
        ValueError: the sizes do not suit it or the server, or the file does not hold requests.
    """
    if name not in GENERATED:
        return Given.read(Path(name), size)
    if name == "long":
        return Long.of(size, tokens)
    prompt = size.prompt or INPUT[name]
    if size.limit is not None and prompt + size.output > size.limit:
        raise ValueError(
            f"--input-len and --output-len are {prompt:,} and {size.output:,}; "
            f"the server takes {size.limit:,} tokens of both"
        )
    if name == "random":
        return RandomIds(size.requests, prompt, size.seed)
    return Grown.of(name, replace(size, prompt=prompt), tokens)


@dataclass(frozen=True)
class RandomIds:
    """Prompts of `length` random token ids."""

    requests: int
    length: int
    seed: int

    def sessions(self, level: int) -> list[Session]:
        prompts = (
            Random(f"{self.seed}/{level}/{i}").choices(ORDINARY, k=self.length)
            for i in range(self.requests)
        )
        return [[Ask("completions", {"prompt": ids})] for ids in prompts]


@dataclass(frozen=True)
class Grown:
    """Conversations whose prompts grow, as agents send them: each is the one before and more.

    The history is written here, not by the server, so that prompts do not depend on its answers.
    Levels and sessions differ in the numbers that the first message begins with: a prefix cache
    finds a session's earlier turns and what comes before that message, the tools.

    Args:
        turns: of each session.
        longest: tokens of every session's prompts, one number for each turn: at most so many.
        tools: that are offered; a turn is then a question or the results of calls.
        tokens: counts a prompt's.
    """

    turns: tuple[int, ...]
    longest: tuple[int, ...]
    tools: bool
    seed: int
    tokens: Tokens

    @classmethod
    def of(cls, name: str, size: Size, tokens: Tokens) -> Grown:
        assert size.prompt is not None
        tools = name == "tools"
        c = _opened(Writer(0), tools)
        first = tokens(c.messages[:1], c.tools)
        room = size.prompt - first
        if room < STEP:
            raise ValueError(
                f"--input-len is {size.prompt:,}; a conversation of --dataset {name} needs "
                f"{first + STEP:,} tokens"
            )
        turns = min(TURNS, size.requests // size.highest, room // STEP)
        whole, rest = divmod(size.requests, turns)
        longest = tuple(first + room * (t + 1) // turns for t in range(turns))
        return cls((turns,) * whole + (rest,) * (rest > 0), longest, tools, size.seed, tokens)

    def sessions(self, level: int) -> list[Session]:
        return [
            [_chat(c, cut, _mark(self.seed, level, i)) for cut in cuts[:turns]]
            for i, (turns, (c, cuts)) in enumerate(zip(self.turns, self._written, strict=True))
        ]

    @cached_property
    def _written(self) -> list[tuple[Conversation, list[int]]]:
        return [
            _write(self.seed, i, self.tools, self.longest[:turns], self.tokens)
            for i, turns in enumerate(self.turns)
        ]


@dataclass(frozen=True)
class Long:
    """Prompts of 8,192 tokens, of twice as many and so on, up to the longest, one after another.

    All are the beginnings of one long conversation, each with numbers of its own at its start, so
    that a prefix cache finds nothing.
    """

    requests: int
    lengths: tuple[int, ...]
    seed: int
    tokens: Tokens

    @classmethod
    def of(cls, size: Size, tokens: Tokens) -> Long:
        limit = None if size.limit is None else size.limit - size.output - MARGIN
        longest = size.prompt or limit
        if longest is None:
            raise ValueError(
                "the server does not tell its longest prompt (/v1/models has no length); "
                "--dataset long needs --input-len"
            )
        if longest < SHORTEST_LONG or (limit is not None and longest > limit):
            server = "" if limit is None else f", of which the server takes {limit:,}"
            given = f"--input-len is {size.prompt:,}; " if size.prompt else ""
            raise ValueError(
                f"{given}--dataset long has prompts of {SHORTEST_LONG:,} tokens and more{server}"
            )
        lengths = [SHORTEST_LONG]
        while lengths[-1] * 2 < longest:
            lengths.append(lengths[-1] * 2)
        if longest > SHORTEST_LONG:
            lengths.append(longest)
        return cls(size.requests, tuple(lengths), size.seed, tokens)

    def sessions(self, level: int) -> list[Session]:
        c, cuts = self._written
        chosen = islice(cycle(cuts if level > 0 else cuts[:1]), self.requests)
        return [[_chat(c, cut, _mark(self.seed, level, i))] for i, cut in enumerate(chosen)]

    @cached_property
    def _written(self) -> tuple[Conversation, list[int]]:
        return _write(self.seed, 0, False, self.lengths, self.tokens)


@dataclass(frozen=True)
class Given:
    """A file's requests, from the start again where there are fewer than are sent."""

    asks: tuple[Ask, ...]
    requests: int

    @classmethod
    def read(cls, path: Path, size: Size) -> Given:
        """Lines of JSON: `{"prompt": ...}`, or `{"messages": [...]}` with or without `tools`."""
        asks = tuple(_ask(line, f"{path}:{i}") for i, line in _lines(path))
        if size.prompt is not None:
            raise ValueError(f"--input-len is {size.prompt:,}; the prompts of {path} are its own")
        return cls(asks, size.requests)

    def sessions(self, level: int) -> list[Session]:
        return [[ask] for ask in islice(cycle(self.asks), self.requests)]


def _lines(path: Path) -> list[tuple[int, str]]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ValueError(
            f"--dataset is {path}; allowed are {', '.join(GENERATED)} and a file of requests"
        ) from None
    except UnicodeDecodeError:
        raise ValueError(f"--dataset: {path} is not text in UTF-8") from None
    lines = [(i, line) for i, line in enumerate(text.splitlines(), 1) if line.strip()]
    if not lines:
        raise ValueError(f"--dataset: {path} has no requests")
    return lines


def _ask(line: str, where: str) -> Ask:
    match as_object(parse_json(line, where), where):
        case {"prompt": str(prompt), **rest} if not rest:
            return Ask("completions", {"prompt": prompt})
        case {"messages": [*messages], **rest} if messages and rest.keys() <= {"tools"}:
            return Ask("chat/completions", {"messages": messages, **rest})
    raise ValueError(
        f'{where} is no request; allowed are {{"prompt": TEXT}} and '
        '{"messages": [...], "tools": [...]}, where tools may be left out'
    )


def _mark(seed: int, level: int, session: int) -> str:
    """Four numbers, which are as many tokens whichever they are."""
    numbers = Random(f"{seed}/{level}/{session}").choices(range(100, 1000), k=4)
    return f"Session {' '.join(map(str, numbers))}. "


def _chat(c: Conversation, cut: int, mark: str) -> Ask:
    first = c.messages[0] | {"content": mark + c.messages[0]["content"]}
    body: dict[str, Any] = {"messages": [first, *c.messages[1:cut]]}
    return Ask("chat/completions", body | ({"tools": c.tools} if c.tools else {}))


def _opened(writer: Writer, tools: bool) -> Conversation:
    c = Conversation("bench", tools=[t.schema(n) for n, t in TOOLS.items()] if tools else None)
    writer.extend(c)
    return c


def _write(
    seed: int, number: int, tools: bool, longest: Sequence[int], tokens: Tokens
) -> tuple[Conversation, list[int]]:
    """A conversation, and how many of its messages make the longest prompt of each length."""
    writer = Writer(Random(f"{seed}/{number}").getrandbits(64))
    c = _opened(writer, tools)
    points = _points(writer, c, tokens)
    point, cuts = next(points), []
    for length in longest:
        last = None
        while point[1] <= length:
            last, point = point, next(points)
        assert last is not None, (longest, length)  # STEP is more than an exchange
        cuts.append(last[0])
    return c, cuts


def _points(writer: Writer, c: Conversation, tokens: Tokens) -> Iterator[tuple[int, int]]:
    """Where the assistant is to answer, as (messages before, tokens), in a conversation that grows
    as it is asked for more. An exchange is counted after the first one, not after all of them."""
    mark = _mark(0, 0, 0)
    opening = [c.messages[0] | {"content": mark + c.messages[0]["content"]}, *c.messages[1:]]
    for i, message in enumerate(opening):
        if message["role"] == "assistant":
            yield i, tokens(opening[:i], c.tools)
    base = size = tokens(opening, c.tools)
    while True:
        start = len(c.messages)
        writer.extend(c)
        new = c.messages[start:]
        for i, message in enumerate(new):
            if message["role"] == "assistant":
                yield start + i, size + tokens(opening + new[:i], c.tools) - base
        size += tokens(opening + new, c.tools) - base
