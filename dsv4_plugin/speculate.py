"""Speculative decoding with a checkpoint's drafter, in the local engine.

A step runs the last token and its drafts through the main model, which says at every one of them
what comes next. Drafts are kept as long as they agree; the first disagreement is itself the next
token. What the rejected ones left behind needs no undoing: rows are written again before anything
reads them, and the ring keeps the pooling sums after each of the last N + 1 positions.

The result is the main model's own, greedy or sampled: each token is its pick, never the drafter's.
A drafter only decides what is looked at, and may not look at a token to decide about it.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from dsv4_plugin.batch import Batch, Sampler
from dsv4_plugin.cache.layout import CacheLayout
from dsv4_plugin.cache.step import Step
from dsv4_plugin.model.dspark import DSpark, Proposal
from dsv4_plugin.model.mtp import MTP
from dsv4_plugin.model.transformer import Transformer

log = logging.getLogger("dsv4_plugin")

Drafter = MTP | DSpark


class Drafts(Protocol):
    """How a kind of drafter is driven.

    layers: of the main model, behind which it reads the streams. ahead: positions past the last
    token that a draft may write to.
    """

    layers: tuple[int, ...]
    ahead: int

    def follow(
        self, batch: Batch, step: Step, h: Tensor, means: Tensor, following: Tensor
    ) -> Tensor:
        """A step of the main model: its last streams [T, R, D], means behind `layers`, the token
        after each row [T] -> what drafting behind each row goes on from, [T, ...]."""

    def draft(self, batch: Batch, running: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
        """last [G, ...], of each request's last kept row -> drafts [G, N], and how many of them
        are worth a look [G]."""


class MTPDrafts:
    """One draft by the layer itself, further ones on its own streams and drafts."""

    layers: tuple[int, ...] = ()

    def __init__(self, model: Transformer, drafter: MTP, n: int) -> None:
        self.model, self.drafter, self.n, self.ahead = model, drafter, n, n

    def follow(
        self, batch: Batch, step: Step, h: Tensor, means: Tensor, following: Tensor
    ) -> Tensor:
        embedding = self.model.embed(following)
        out: Tensor = self.drafter(h, embedding, following, step, batch.caches[-1])
        return out

    def draft(self, batch: Batch, running: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
        drafts = [self._pick(last)]
        lengths = batch.lengths[running]
        for _ in range(self.n - 1):
            step = batch.step(running, torch.ones_like(running), "one")
            last = self.follow(batch, step, last, last, drafts[-1])
            drafts.append(self._pick(last))
        batch.lengths[running] = lengths
        return torch.stack(drafts, 1), torch.full((len(running),), self.n)

    def _pick(self, h: Tensor) -> Tensor:
        logits: Tensor = self.model.head(self.drafter.collapse(h))
        return logits.argmax(-1)


class DSparkDrafts:
    """A block at its trained width, of which the first N are taken; cut before the first draft that
    is kept with less than `confidence` probability."""

    def __init__(self, model: Transformer, drafter: DSpark, n: int, confidence: float) -> None:
        width = drafter.dspark.block_size
        if n > width:
            raise ValueError(
                f"num_speculative_tokens is {n}; this checkpoint's drafter proposes {width} tokens "
                f"at once, so allowed are 1 to {width}"
            )
        self.model, self.drafter, self.n, self.confidence = model, drafter, n, confidence
        self.layers, self.ahead = drafter.dspark.target_layer_ids, width

    def pick(self, logits: Tensor) -> Tensor:
        """A draft by its corrected logits [G, V]: whichever, the answer stays the main model's."""
        return logits.argmax(-1)

    def follow(
        self, batch: Batch, step: Step, h: Tensor, means: Tensor, following: Tensor
    ) -> Tensor:
        self.drafter.read(means, step, batch.caches[-len(self.drafter.stages) :])
        return following

    def draft(self, batch: Batch, running: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
        _, found = self.block(batch, running, last)
        sure = found.confidence.sigmoid() >= self.confidence
        return found.drafts, sure.long().cumprod(1).sum(1).cpu()

    def block(self, batch: Batch, running: Tensor, anchor: Tensor) -> tuple[Tensor, Proposal]:
        """anchor [G] -> y [G, N, D], and N drafts."""
        ids = self.drafter.ids(anchor)
        lengths = batch.lengths[running]
        step = batch.step(running, torch.full_like(running, ids.shape[1]), "block")
        batch.lengths[running] = lengths
        flat, caches = ids.flatten(), batch.caches[-len(self.drafter.stages) :]
        y = self.drafter(self.model.embed(flat), flat, step, caches)
        y = y.unflatten(0, ids.shape)[:, : self.n]
        base = self.model.head(self.drafter.normed(y.flatten(0, 1)))
        base = base.unflatten(0, y.shape[:2])
        return y, self.drafter.propose(y, base, anchor, self.pick)


def drafts_of(model: Transformer, drafter: Drafter, n: int, confidence: float) -> Drafts:
    if isinstance(drafter, DSpark):
        return DSparkDrafts(model, drafter, n, confidence)
    if confidence:
        raise ValueError(
            f"confidence is {confidence}; this checkpoint drafts with MTP, which does not say how "
            "sure it is: leave it out"
        )
    return MTPDrafts(model, drafter, n)


class Loaded(Protocol):
    """A model and the drafter of its checkpoint."""

    model: Transformer
    drafter: Drafter | None
    layout: CacheLayout


class Speculator:
    """Generates with up to N drafts per step; `steps`, `drafted` and `accepted` count.

    Raises:
        ValueError: the model was loaded without its drafter, or that cannot do what is asked.
    """

    def __init__(self, model: Loaded, n: int, confidence: float = 0.0) -> None:
        if model.drafter is None:
            raise ValueError(
                f"num_speculative_tokens is {n}; load the model with mtp=True to have a drafter"
            )
        if n < 1:
            raise ValueError(f"num_speculative_tokens is {n}; it must be 1 or more")
        if not 0 <= confidence <= 1:
            raise ValueError(f"confidence is {confidence}; allowed is a probability, 0 to 1")
        self.drafts = drafts_of(model.model, model.drafter, n, confidence)
        self.model, self.n, self.width = model.model, n, len(model.drafter.ratios)
        self.layout = model.layout.with_ring_rows(n + 1)
        self.steps = self.drafted = self.accepted = 0

    def batch(self, lengths: Sequence[int], chunk: int, poison: bool = False) -> Batch:
        """For requests of up to so many tokens."""
        lengths = [length + self.drafts.ahead + 1 for length in lengths]
        chunk = max(chunk, self.drafts.ahead + 1)
        drafting = {"draft_layers": self.width, "draft_rows": self.drafts.ahead}
        return Batch(self.model, self.layout, lengths, chunk, poison, **drafting)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        sampler: Sampler,
        chunk: int,
        ignore_eos: bool,
    ) -> list[list[int]]:
        batch = self.batch([len(prompt) + max_new_tokens for prompt in prompts], chunk)
        eos = self.model.config.eos_token_id
        token, drafts, count = self.prefill(batch, prompts, sampler)
        out = [[t] for t in token.tolist()]
        running = torch.arange(len(prompts))
        while True:
            going = torch.tensor(
                [
                    len(out[b]) < max_new_tokens and (ignore_eos or out[b][-1] != eos)
                    for b in running.tolist()
                ]
            )
            running, token, drafts, count = (t[going] for t in (running, token, drafts, count))
            if not len(running):
                break
            picked, kept, drafts, count = self.step(batch, running, token, drafts, count, sampler)
            token = picked.gather(1, kept[:, None])[:, 0]
            for b, row, k in zip(running.tolist(), picked.tolist(), kept.tolist(), strict=True):
                new = row[: min(k + 1, max_new_tokens - len(out[b]))]
                if not ignore_eos and eos in new:
                    new = new[: new.index(eos) + 1]
                out[b] += new
        kind = "DSpark" if isinstance(self.drafts, DSparkDrafts) else "MTP"
        log.info("%s: %d of %d drafted tokens were accepted.", kind, self.accepted, self.drafted)
        return out

    def prefill(
        self, batch: Batch, prompts: Sequence[Sequence[int]], sampler: Sampler
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Prompts one by one, in chunks -> first tokens [B], drafts [B, N], how many count [B]."""
        tokens, found = [], []
        for b, prompt in enumerate(prompts):
            ids, who = torch.tensor(prompt), torch.tensor([b])
            for start in range(0, len(ids), batch.chunk):
                part = ids[start : start + batch.chunk]
                step = batch.step(who, torch.tensor([len(part)]))
                h, means = self._main(batch, step, part)
                following = ids[start + 1 : start + 1 + len(part)].to(batch.device)
                if len(following) < len(part):
                    token = sampler(self.model.head(self.model.collapse(h[-1:])))
                    following = torch.cat([following, token.to(batch.device)])
                last = self.drafts.follow(batch, step, h, means, following)[-1:]
            tokens.append(token)
            found.append(self.draft(batch, who, last))
        drafts, count = zip(*found, strict=True)
        return torch.cat(tokens), torch.cat(drafts), torch.cat(count)

    def step(
        self,
        batch: Batch,
        running: Tensor,
        token: Tensor,
        drafts: Tensor,
        count: Tensor,
        sampler: Sampler,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The last token [G] and drafts [G, N] of each request, of which `count` [G] are looked at
        -> the main model's picks after each of them [G, N + 1], how many drafts hold [G], new
        drafts [G, N], how many of these count [G]."""
        ids = torch.cat([token[:, None], drafts.to(token.device)], 1)
        looked = torch.arange(self.n + 1) <= count[:, None]
        on_device = looked.to(ids.device)
        step = batch.step(running, count + 1)
        h, means = self._main(batch, step, ids[on_device])
        found = sampler(self.model.head(self.model.collapse(h))).to(ids.device)
        picked = ids.new_full(ids.shape, -1)
        picked[on_device] = found
        agree = (picked[:, :-1] == ids[:, 1:]) & on_device[:, 1:]
        kept = agree.long().cumprod(1).sum(1)
        batch.lengths[running] -= count - kept.cpu()
        self.steps += len(count)
        self.drafted += int(count.sum())
        self.accepted += int(kept.sum())
        rows = self.drafts.follow(batch, step, h, means, found)
        first = torch.nn.functional.pad((count + 1).cumsum(0), (1, 0))[:-1]
        last = rows[first.to(kept.device) + kept]
        return picked, kept, *self.draft(batch, running, last)

    def draft(self, batch: Batch, running: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
        return self.drafts.draft(batch, running, last)

    def _main(self, batch: Batch, step: Step, ids: Tensor) -> tuple[Tensor, Tensor]:
        ids, caches = ids.to(batch.device), batch.caches[: -self.width]
        h = self.model.spread(ids)
        if self.drafts.layers:
            return self.model.run_read(h, ids, step, caches, self.drafts.layers)
        h = self.model.run(h, ids, step, caches)
        return h, h
