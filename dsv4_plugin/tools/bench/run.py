"""Levels one after another, kept as they end."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from dsv4_plugin.tools.bench.client import Client, Clock, send_all
from dsv4_plugin.tools.bench.datasets import (
    GENERATED,
    INPUT,
    Ask,
    Dataset,
    Session,
    Size,
    Tokens,
    default_requests,
    make_dataset,
)
from dsv4_plugin.tools.bench.measures import Level, measure
from dsv4_plugin.tools.bench.report import Run, code, machine
from dsv4_plugin.tools.bench.server import counted, counters, facts_of, model_of

WARM_UP_OUTPUT = 16
"""Most tokens of an answer that warms the server up."""


class Progress(Protocol):
    """Counts answers."""

    def update(self, n: int = 1) -> object: ...


Bar = Callable[[int, int], AbstractContextManager[Progress]]
"""(concurrency, requests) -> the bar of a level."""


@dataclass(frozen=True)
class Plan:
    """What is to be run.

    Args:
        concurrency: the levels, in their order.
        dataset: a name of GENERATED or a file.
        requests, prompt: None: the dataset's own (prompt: tokens).
        output: tokens of an answer.
        patience: seconds without a byte after which a request has failed.
    """

    url: str
    label: str
    folder: Path
    concurrency: tuple[int, ...]
    dataset: str
    requests: int | None
    prompt: int | None
    output: int
    seed: int
    patience: float
    note: str = ""
    model: str | None = None

    @property
    def total(self) -> int:
        """Requests of a level. Raises ValueError where a level could not be reached."""
        highest = max(self.concurrency)
        requests = self.requests or default_requests(self.dataset, highest)
        if requests < highest:
            raise ValueError(f"--requests is {requests}; concurrency {highest} needs as many")
        return requests


async def bench(
    plan: Plan, tokens: Tokens, show: Callable[[Level], None], bar: Bar, clock: Clock
) -> Run:
    """Measure every level; after each the run is written.

    Where the server goes away the run has what was measured until then, and says so in `ended`.

    Args:
        tokens: counts a prompt's.
        show: is called with every level.
        clock: of the client, in seconds.

    Raises:
        Unusable: the server cannot be reached, or does not answer as it has to.
        ValueError: sizes that do not suit the dataset or the server.
    """
    requests = plan.total
    async with Client(plan.url, plan.model or "", plan.patience, clock) as client:
        name, limit = await model_of(client)
        client.model = plan.model or name
        facts = await facts_of(client, client.model, limit)
        size = Size(
            requests, max(plan.concurrency), plan.prompt, plan.output, facts.limit, plan.seed
        )
        dataset = make_dataset(plan.dataset, size, tokens)
        await client.negotiate(dataset.sessions(-1)[0][0])
        run = Run(
            label=plan.label,
            started=time.strftime("%Y-%m-%dT%H:%M:%S"),
            options=_options(plan, requests, client),
            server=facts,
            machine=machine(urlsplit(plan.url).hostname in ("localhost", "127.0.0.1", "::1")),
            code=code(),
            ended="it was interrupted",
        )
        run.save(plan.folder)
        for concurrency in plan.concurrency:
            level = await _level(client, facts.engine, dataset, plan, concurrency, bar)
            show(level)
            gone = level.unsent or (level.failed and not await client.alive())
            if gone:
                ended = f"the server went away at concurrency {concurrency}"
            elif concurrency == plan.concurrency[-1]:
                ended = None
            else:
                ended = run.ended
            run = replace(run, levels=(*run.levels, level), ended=ended)
            run.save(plan.folder)
            if gone:
                break
        return run


def _options(plan: Plan, requests: int, client: Client) -> dict[str, Any]:
    """What decides on the numbers; of a file the name only."""
    return {
        "dataset": plan.dataset if plan.dataset in GENERATED else Path(plan.dataset).name,
        "concurrency": list(plan.concurrency),
        "requests": requests,
        "input_len": plan.prompt or INPUT.get(plan.dataset),
        "output_len": plan.output,
        "seed": plan.seed,
        "note": plan.note,
        "ignore_eos": client.options.ignore_eos,
        "usage": "of each chunk" if client.options.each else "of the last chunk, spread evenly",
    }


async def _level(
    client: Client, engine: str, dataset: Dataset, plan: Plan, concurrency: int, bar: Bar
) -> Level:
    await _warm_up(client, dataset.sessions(-concurrency), concurrency, plan.output)
    sessions = dataset.sessions(concurrency)
    before = await counters(client)
    with bar(concurrency, sum(map(len, sessions))) as progress:
        sent = await send_all(
            client, sessions, concurrency, plan.output, lambda _: progress.update(1)
        )
    return measure(concurrency, sent, counted(engine, before, await counters(client)))


async def _warm_up(
    client: Client, sessions: Sequence[Session], concurrency: int, output: int
) -> None:
    """As many requests at once as the level has, with short answers; they are not measured."""
    firsts: list[list[Ask]] = [[session[0]] for session in sessions[:concurrency]]
    await send_all(client, firsts, concurrency, min(output, WARM_UP_OUTPUT))
