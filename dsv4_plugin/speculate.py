"""Speculative decoding with the MTP layer, in the local engine.

A step runs the last token and its N drafts through the main model, which says at every one of them
what comes next. Drafts are kept as long as they agree; the first disagreement is itself the next
token. What the rejected ones left behind needs no undoing: rows are written again before anything
reads them, and the ring keeps the pooling sums after each of the last N + 1 positions.

The result is the main model's own, greedy or sampled: each token is its pick, never the drafter's.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from dsv4_plugin.cache.step import Step
from dsv4_plugin.engine import Batch, LocalModel, Sampler

log = logging.getLogger("dsv4_plugin")


class Speculator:
    """Generates with N drafts per step; `drafted` and `accepted` count the drafts.

    Raises:
        ValueError: the model was loaded without its MTP layer.
    """

    def __init__(self, model: LocalModel, num_speculative_tokens: int) -> None:
        if model.drafter is None:
            raise ValueError(
                f"num_speculative_tokens is {num_speculative_tokens}; "
                "load the model with mtp=True to have a drafter"
            )
        if num_speculative_tokens < 1:
            raise ValueError(
                f"num_speculative_tokens is {num_speculative_tokens}; it must be 1 or more"
            )
        self.model, self.drafter, self.n = model.model, model.drafter, num_speculative_tokens
        self.layout = model.layout.with_ring_rows(num_speculative_tokens + 1)
        self.drafted = self.accepted = 0

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        sampler: Sampler,
        chunk: int,
        ignore_eos: bool,
    ) -> list[list[int]]:
        lengths = [len(prompt) + max_new_tokens + self.n for prompt in prompts]
        chunk = max(chunk, self.n + 1)
        batch = Batch(self.model, self.layout, lengths, chunk, draft_layers=1)
        eos = self.model.config.eos_token_id
        token, drafts = self._prefill(batch, prompts, sampler)
        out = [[t] for t in token.tolist()]
        running = torch.arange(len(prompts))
        while True:
            going = torch.tensor(
                [
                    len(out[b]) < max_new_tokens and (ignore_eos or out[b][-1] != eos)
                    for b in running.tolist()
                ]
            )
            running, token, drafts = running[going], token[going], drafts[going]
            if not len(running):
                break
            picked, kept, drafts = self._step(batch, running, token, drafts, sampler)
            token = picked.gather(1, kept[:, None])[:, 0]
            for b, row, k in zip(running.tolist(), picked.tolist(), kept.tolist(), strict=True):
                new = row[: min(k + 1, max_new_tokens - len(out[b]))]
                if not ignore_eos and eos in new:
                    new = new[: new.index(eos) + 1]
                out[b] += new
        log.info("MTP: %d of %d drafted tokens were accepted.", self.accepted, self.drafted)
        return out

    def _prefill(
        self, batch: Batch, prompts: Sequence[Sequence[int]], sampler: Sampler
    ) -> tuple[Tensor, Tensor]:
        """Prompts one by one, in chunks -> first tokens [B], drafts [B, N]."""
        tokens, drafts = [], []
        for b, prompt in enumerate(prompts):
            ids, who = torch.tensor(prompt), torch.tensor([b])
            for start in range(0, len(ids), batch.chunk):
                part = ids[start : start + batch.chunk]
                step = batch.step(who, torch.tensor([len(part)]))
                h = self._main(batch, step, part)
                following = ids[start + 1 : start + 1 + len(part)].to(batch.device)
                if len(following) < len(part):
                    token = sampler(self.model.head(self.model.collapse(h[-1:]).float()))
                    following = torch.cat([following, token])
                h = self._draft(batch, step, h, following)
            tokens.append(token)
            drafts.append(self.draft(batch, who, h[-1:]))
        return torch.cat(tokens), torch.cat(drafts)

    def _step(
        self, batch: Batch, running: Tensor, token: Tensor, drafts: Tensor, sampler: Sampler
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The last token [G] and drafts [G, N] of each request -> the main model's picks after each
        of them [G, N + 1], how many drafts hold [G], new drafts [G, N]."""
        ids = torch.cat([token[:, None], drafts], 1)
        step = batch.step(running, torch.full((len(running),), self.n + 1))
        h = self._main(batch, step, ids.flatten())
        picked = sampler(self.model.head(self.model.collapse(h).float())).view_as(ids)
        kept = (picked[:, :-1] == drafts).long().cumprod(1).sum(1)
        batch.lengths[running] -= self.n - kept.cpu()
        self.drafted += drafts.numel()
        self.accepted += int(kept.sum())
        h = self._draft(batch, step, h, picked.flatten()).unflatten(0, ids.shape)
        return picked, kept, self.draft(batch, running, h[torch.arange(len(kept)), kept])

    def draft(self, batch: Batch, running: Tensor, h: Tensor) -> Tensor:
        """The drafter's streams [G, R, D] after its last true token -> N drafts [G, N]."""
        drafts = [self.model.head(self.drafter.collapse(h).float()).argmax(-1)]
        lengths = batch.lengths[running]
        for _ in range(self.n - 1):
            step = batch.step(running, torch.ones_like(running))
            h = self._draft(batch, step, h, drafts[-1])
            drafts.append(self.model.head(self.drafter.collapse(h).float()).argmax(-1))
        batch.lengths[running] = lengths
        return torch.stack(drafts, 1)

    def _main(self, batch: Batch, step: Step, ids: Tensor) -> Tensor:
        ids = ids.to(batch.device)
        return self.model.run(self.model.spread(ids), ids, step, batch.caches[:-1])

    def _draft(self, batch: Batch, step: Step, h: Tensor, following: Tensor) -> Tensor:
        embedding = self.model.embed(following)
        out: Tensor = self.drafter(h, embedding, following, step, batch.caches[-1])
        return out
