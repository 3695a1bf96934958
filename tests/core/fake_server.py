"""A server with OpenAI's API that streams what a test says, when it says it."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web


class Clock:
    """Seconds that pass only when a fake server lets them; it counts who looks."""

    def __init__(self) -> None:
        self.now, self.looks = 0.0, 0

    def __call__(self) -> float:
        self.looks += 1
        return self.now


@dataclass
class Fake:
    """`with Fake(...) as fake`: a server in a thread.

    Args:
        chunks: (seconds before it, tokens in it) of every answer.
        each: puts usage into every chunk, as it is asked to.
        refuses: fields that it answers with 400.
        broken: says how a request fails, by its number: "500", "error" (in the stream), "cut" (no
            [DONE]), "die" (then and on all later ones the connection closes), or None.
        clock: what it moves on, instead of sleeping. Requests must come one at a time.
        metrics: the text of /metrics, if any.
        pages: further pages of JSON.
    """

    chunks: tuple[tuple[float, int], ...] = ((0.0, 1), (0.0, 1), (0.0, 1))
    each: bool = True
    usage: bool = True
    prompt: int = 7
    refuses: tuple[str, ...] = ()
    broken: Callable[[int], str | None] = lambda _: None
    clock: Clock | None = None
    limit: int | None = 4096
    metrics: Callable[[int], str] | None = None
    pages: dict[str, Any] = field(default_factory=dict)

    def __enter__(self) -> Fake:
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.in_flight = self.most_in_flight = 0
        self.dead = False
        self.loop = asyncio.new_event_loop()
        ready = threading.Event()
        self.thread = threading.Thread(target=self._serve, args=(ready,))
        self.thread.start()
        assert ready.wait(30)
        return self

    def __exit__(self, *exception: object) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()

    def _serve(self, ready: threading.Event) -> None:
        app = web.Application(client_max_size=1 << 28)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/{page}", self._page)
        app.router.add_post("/v1/completions", self._answer)
        app.router.add_post("/v1/chat/completions", self._answer)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        self.loop.run_until_complete(runner.setup())
        site = web.TCPSite(runner, "127.0.0.1", 0)
        self.loop.run_until_complete(site.start())
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
        ready.set()
        self.loop.run_forever()
        self.loop.run_until_complete(runner.cleanup())
        self.loop.close()

    async def _models(self, request: web.Request) -> web.StreamResponse:
        if self.dead:
            request.transport.abort()
        return web.json_response({"data": [{"id": "fake", "max_model_len": self.limit}]})

    async def _page(self, request: web.Request) -> web.StreamResponse:
        page = request.match_info["page"]
        if self.dead:
            request.transport.abort()
        if page == "metrics" and self.metrics:
            return web.Response(text=self.metrics(len(self.asked)))
        if page in self.pages:
            return web.json_response(self.pages[page])
        raise web.HTTPNotFound

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        number = len(self.asked)
        self.asked.append((request.path, body))
        named = body.keys() | body["stream_options"].keys()
        if refused := named & set(self.refuses):
            return web.json_response({"error": f"no {refused}"}, status=400)
        how = self.broken(number)
        if self.dead:
            request.transport.abort()
        self.dead = self.dead or how == "die"
        if how == "500":
            return web.Response(text="out of\nmemory", status=500)
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            return await self._stream(request, body, how)
        finally:
            self.in_flight -= 1

    async def _stream(
        self, request: web.Request, body: dict[str, Any], how: str | None
    ) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        looks = self.clock.looks if self.clock else 0
        each = self.each and body["stream_options"].get("continuous_usage_stats", False)
        tokens = 0
        events: list[tuple[float, dict[str, Any]]] = [(0.0, {"choices": [{"delta": {}}]})]
        for seconds, new in self.chunks:
            tokens += new
            choice = {"text": "x"} if "prompt" in body else {"delta": {"content": "x"}}
            usage = {"usage": self._usage(tokens)} if each else {}
            events.append((seconds, {"choices": [choice], **usage}))
        if self.usage:
            events.append((0.0, {"choices": [], "usage": self._usage(tokens)}))
        for i, (seconds, event) in enumerate(events):
            if self.clock:
                while self.clock.looks < looks + i:
                    await asyncio.sleep(0.0005)
                self.clock.now += seconds
            elif seconds:
                await asyncio.sleep(seconds)
            await response.write(b"data: " + json.dumps(event).encode() + b"\n\n")
            if self.dead and i == 1:
                await asyncio.sleep(0.01)
                request.transport.abort()
            if how == "error" and i == 1:
                event = {"error": {"message": "the engine is ill"}}
                await response.write(b"data: " + json.dumps(event).encode() + b"\n\n")
                break
        if how != "cut":
            await response.write(b"data: [DONE]\n\n")
        return response

    def _usage(self, tokens: int) -> dict[str, int]:
        return {"prompt_tokens": self.prompt, "completion_tokens": tokens}
