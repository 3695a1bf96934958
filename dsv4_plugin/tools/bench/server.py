"""What a server tells of itself: model, versions, settings, counters."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from dsv4_plugin.json_file import parse_json, shown
from dsv4_plugin.tools.bench.client import Client, Unusable

SETTINGS = (
    "attention_backend", "chunked_prefill_size", "context_length", "device",
    "disable_cuda_graph", "disable_radix_cache", "dp_size", "dtype", "enable_dp_attention",
    "ep_size", "kv_cache_dtype", "max_running_requests", "max_total_tokens",
    "mem_fraction_static", "page_size", "quantization", "speculative_algorithm",
    "speculative_num_draft_tokens", "tp_size",
)  # fmt: skip
"""Of SGLang's: those that decide on speed, and no paths or keys."""

COUNTERS = {
    "vllm": {
        "prefix_tokens": "vllm:prefix_cache_queries_total",
        "prefix_hits": "vllm:prefix_cache_hits_total",
        "preemptions": "vllm:num_preemptions_total",
        "drafted": "vllm:spec_decode_num_draft_tokens_total",
        "accepted": "vllm:spec_decode_num_accepted_tokens_total",
    },
    "sglang": {
        "prefix_tokens": "sglang:prompt_tokens_total",
        "prefix_hits": "sglang:cached_tokens_total",
        "preemptions": "sglang:num_retracted_requests_total",
        "acceptance": "sglang:spec_accept_rate",
    },
}
"""Engine -> what it counts -> the name in /metrics; `acceptance` is a share, no counter."""


@dataclass(frozen=True)
class Facts:
    """What is known of a server.

    Args:
        engine: "vllm", "sglang", or "" for another.
        version: of the engine, or "".
        model: the name that requests have to give.
        limit: most tokens of prompt and answer, or None: by the model, and by SGLang's pool.
        settings: of the engine, where it tells them.
    """

    engine: str
    version: str
    model: str
    limit: int | None
    settings: dict[str, Any] = field(default_factory=dict)


async def model_of(client: Client) -> tuple[str, int | None]:
    """The first model's name, and the most tokens it takes. Raises Unusable."""
    url = f"{client.url}/models"
    try:
        async with client.http.get(url) as response:
            status, text = response.status, await response.text(errors="replace")
    except aiohttp.InvalidURL:
        raise Unusable(f"{client.url} is no address") from None
    except (aiohttp.ClientError, TimeoutError, OSError) as error:
        raise Unusable(f"{client.url} cannot be reached: {error or 'no answer'}") from None
    if status != 200:
        raise Unusable(f"{url} answered {status}: {' '.join(text.split())[:300]}")
    match parse_json(text, url):
        case {"data": [{"id": str(name), **rest}, *_]}:
            limit = rest.get("max_model_len")
            return name, limit if isinstance(limit, int) else None
        case listing:
            raise Unusable(f"{url} is {shown(listing)}; it must list a model")


async def facts_of(client: Client, model: str, limit: int | None) -> Facts:
    """Engine, version and settings, as far as the server tells them."""
    if isinstance(found := await _json(client, "server_info"), dict) and "tp_size" in found:
        settings = {name: found[name] for name in SETTINGS if found.get(name) is not None}
        rooms = [limit, *(found.get(f"max_total_{what}") for what in ("tokens", "num_tokens"))]
        limit = min((room for room in rooms if isinstance(room, int)), default=None)
        return Facts("sglang", str(found.get("version", "")), model, limit, settings)
    metrics = await counters(client)
    engine = "vllm" if any(name.startswith("vllm:") for name in metrics) else ""
    match await _json(client, "version"):
        case {"version": str(version)}:
            return Facts(engine or "vllm", version, model, limit)
    return Facts(engine, "", model, limit)


async def counters(client: Client) -> dict[str, float]:
    """Every metric, summed over its labels; empty where the server has none."""
    sums: dict[str, float] = {}
    text = await _text(client, "metrics") or ""
    for name, value in re.findall(r"^([\w:]+)(?:\{.*\})? (\S+)", text, re.MULTILINE):
        try:
            sums[name] = sums.get(name, 0.0) + float(value)
        except ValueError:
            continue  # a page that is no list of metrics
    return sums


@dataclass(frozen=True)
class Counted:
    """What the engine counted during a level; None where it does not say.

    Args:
        prefix_tokens: of prompts, that were looked for in the prefix cache.
        prefix_hits: of these, that were found.
        preemptions: requests that were taken out to make room (SGLang: retractions).
        drafted, accepted: draft tokens.
        acceptance: share of the drafts that held.
    """

    prefix_tokens: int | None = None
    prefix_hits: int | None = None
    preemptions: int | None = None
    drafted: int | None = None
    accepted: int | None = None
    acceptance: float | None = None

    @property
    def hit_rate(self) -> float | None:
        """Share of the prompts' tokens that the prefix cache had."""
        if not self.prefix_tokens or self.prefix_hits is None:
            return None
        return self.prefix_hits / self.prefix_tokens


def counted(engine: str, before: dict[str, float], after: dict[str, float]) -> Counted:
    """The difference between two looks at the counters."""
    names = COUNTERS.get(engine, {})
    known = {what: name for what, name in names.items() if name in after}
    acceptance = after[known.pop("acceptance")] if "acceptance" in known else None
    found = {what: round(after[name] - before.get(name, 0.0)) for what, name in known.items()}
    if "prefix_tokens" in found:  # SGLang has no counter of hits before the first one
        found.setdefault("prefix_hits", 0)
    if drafted := found.get("drafted"):
        acceptance = found["accepted"] / drafted
    return Counted(**found, acceptance=acceptance)


async def _json(client: Client, path: str) -> Any:
    text = await _text(client, path)
    try:
        return None if text is None else parse_json(text, path)
    except ValueError:
        return None


async def _text(client: Client, path: str) -> str | None:
    """A page beside the API, None where there is none."""
    root = re.sub(r"/v\d+$", "", client.url)
    timeout = aiohttp.ClientTimeout(total=30)
    try:
        async with client.http.get(f"{root}/{path}", timeout=timeout) as response:
            return await response.text(errors="replace") if response.status == 200 else None
    except (aiohttp.ClientError, TimeoutError, OSError):
        return None
