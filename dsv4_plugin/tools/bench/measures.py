"""From timed answers to a level's numbers. Times are seconds, rates per second."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from dsv4_plugin.tools.bench.client import Answer, Load, Sent
from dsv4_plugin.tools.bench.server import Counted

BUSY = 0.8
"""Share of a core from which on the client counts as the bottleneck."""
LATE = 0.005
"""Seconds by which the event loop may be late in one of twenty looks, or a tenth of the median
inter-token latency where that is more."""


@dataclass(frozen=True)
class Spread:
    """Of many times, in seconds."""

    mean: float
    p50: float
    p95: float
    p99: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread | None:
        """None where there are no values."""
        if not values:
            return None
        found = sorted(values)
        points = (percentile(found, share) for share in (0.5, 0.95, 0.99))
        return cls(sum(found) / len(found), *points)


def percentile(ordered: Sequence[float], share: float) -> float:
    """Between the two values that it falls between, in proportion (numpy's `linear`)."""
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


@dataclass(frozen=True)
class Level:
    """What was measured at one concurrency.

    Args:
        requests: asked for; completed + failed + unsent.
        errors: of the failed, message -> how many.
        seconds: from the first request to the end of the last.
        prompt_tokens, output_tokens: of completed requests, by the server's usage.
        ttft: time to first token. itl: inter-token latency, for each token after those of the first
            chunk; tokens that come in one chunk share its time. tpot: time per output token of a
            request, from its first to its last token. e2e: from sending to the last token.
        counted: by the engine.
        cpu: share of a core that the client used. lag: seconds by which its event loop was late at
            most, in 19 of 20 looks.
        marks: why these numbers are to be taken with care.
    """

    concurrency: int
    requests: int
    completed: int
    failed: int
    unsent: int
    errors: dict[str, int]
    seconds: float
    prompt_tokens: int
    output_tokens: int
    output_rate: float
    total_rate: float
    ttft: Spread | None
    itl: Spread | None
    tpot: Spread | None
    e2e: Spread | None
    cpu: float
    lag: float
    counted: Counted = field(default_factory=Counted)
    marks: list[str] = field(default_factory=list)


def measure(concurrency: int, sent: Sent, counted: Counted) -> Level:
    """A level's numbers. Failed requests are counted; rates and times are of completed ones."""
    good = [answer for answer in sent.answers if answer.error is None]
    errors = Counter(answer.error for answer in sent.answers if answer.error is not None)
    seconds = _seconds(sent.answers)
    prompt, output = sum(a.prompt for a in good), sum(a.output for a in good)
    itl = Spread.of([gap for answer in good for gap in gaps(answer)])
    lag = percentile(sorted(sent.load.lags), 0.95) if sent.load.lags else 0.0
    failed = len(sent.answers) - len(good)
    return Level(
        concurrency=concurrency,
        requests=len(sent.answers) + sent.unsent,
        completed=len(good),
        failed=failed,
        unsent=sent.unsent,
        errors=dict(errors.most_common()),
        seconds=seconds,
        prompt_tokens=prompt,
        output_tokens=output,
        output_rate=output / seconds if seconds else 0.0,
        total_rate=(prompt + output) / seconds if seconds else 0.0,
        ttft=Spread.of([a.arrivals[0][0] - a.sent for a in good]),
        itl=itl,
        tpot=Spread.of([_last(a) / (a.output - 1) for a in good if a.output > 1]),
        e2e=Spread.of([a.arrivals[-1][0] - a.sent for a in good]),
        counted=counted,
        cpu=sent.load.cpu,
        lag=lag,
        marks=[*_client_marks(sent.load, lag, itl), *_failure_marks(failed, sent.unsent)],
    )


def gaps(answer: Answer) -> list[float]:
    """Seconds before each token after those of the first chunk.

    Tokens that come together share the time since the chunk before.
    """
    found: list[float] = []
    for (before, so_far), (now, tokens) in zip(answer.arrivals, answer.arrivals[1:], strict=False):
        new = tokens - so_far
        found += [(now - before) / new] * new if new else []
    return found


def _seconds(answers: Sequence[Answer]) -> float:
    if not answers:
        return 0.0
    return max(a.ended for a in answers) - min(a.sent for a in answers)


def _last(answer: Answer) -> float:
    return answer.arrivals[-1][0] - answer.arrivals[0][0]


def _client_marks(load: Load, lag: float, itl: Spread | None) -> list[str]:
    allowed = max(LATE, itl.p50 / 10 if itl else 0.0)
    marks = []
    if load.cpu > BUSY:
        marks.append(f"the client was the bottleneck: it used {load.cpu:.0%} of a core")
    if lag > allowed:
        marks.append(
            f"the client was the bottleneck: its event loop was {lag * 1000:.1f} ms late "
            f"(allowed: {allowed * 1000:.1f})"
        )
    return marks


def _failure_marks(failed: int, unsent: int) -> list[str]:
    marks = [f"{failed:,} requests failed"] if failed else []
    return marks + ([f"{unsent:,} requests were not sent"] if unsent else [])
