"""Train dsv4-mini on the CPU: seeded, resumable, logged.

    python -m training.train --out .cache/mini --steps 1400

Stop it at any time: the same command goes on from the last checkpoint. `--steps` may change
before its last quarter begins (there the learning rate falls to zero). Each of `--workers`
single-threaded processes computes a share of a step's rows; the sum does not depend on how many.
"""

from __future__ import annotations

import argparse
import csv
import os
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file
from torch import Tensor, nn

from dsv4_plugin.tools.conversations import SKILLS, Writer, held_out
from dsv4_plugin.tools.mini import COMPACT, VOCABULARY, WEIGHTS
from training.data import Renderer, Row, Vocabulary, batch
from training.muon import Muon
from training.names import restore
from training.network import build, hidden_states, leave_out_indexer

SHARE = 204
"""Tokens of the tool preamble that begin every conversation with tools."""
Mix = tuple[tuple[int, tuple[str, ...]], ...]
MIX: dict[int, Mix] = {
    0: (
        (14, ("sum", "sum", "sum", "effort")),
        (12, ("json", "memory", "json", "greet", "json", "memory")),
        (6, ("call", "calls", "result", "call")),
    ),
    800: (
        (12, ("sum", "sum", "effort")),
        (10, ("json", "memory", "memory", "greet", "memory")),
        (7, ("call", "calls", "result", "result")),
    ),
}
"""From a step on: rows and skills of the three groups of a step, short, middle, with tools."""
WARM_UP = 40
DECAY = 0.25
AVERAGE = 0.98
"""Decay per step of the averaged weights, which are what is tested and shipped."""
FIRST_STEP = 1_000_000
"""Of the data for a finished network: rows it was not trained on."""
BALANCE = 0.003
"""Step of the routing bias towards experts that get too few tokens."""


@dataclass
class Batch:
    ids: Tensor
    weights: Tensor
    skills: list[str]
    prefix: int


class Data:
    """The batches of a step: a function of the seed and the step's number alone."""

    def __init__(self, renderer: Renderer, vocabulary: Vocabulary, seed: int) -> None:
        self.renderer, self.vocabulary, self.seed = renderer, vocabulary, seed

    def step(self, step: int, mix: Mix | None = None) -> Iterator[Batch]:
        writer = Writer(hash((self.seed, step)))
        mix = mix or MIX[max(first for first in MIX if first <= step)]
        for group, (rows, skills) in enumerate(mix):
            found = [
                self.renderer.row(writer.conversation(skills[i % len(skills)])) for i in range(rows)
            ]
            yield from self._batches(found, SHARE if group == 2 else 0)

    def held_out(self, count: int) -> Iterator[Batch]:
        for skill in SKILLS:
            rows = [self.renderer.row(c) for c in held_out(skill, count)]
            tools = skill in ("call", "calls", "result")
            yield from self._batches(rows, SHARE if tools else 0)

    def _batches(self, rows: list[Row], prefix: int) -> Iterator[Batch]:
        """Rows of like length together, so that little is padding."""
        rows = sorted(rows, key=lambda row: len(row.ids))
        start = 0
        for end in range(1, len(rows) + 1):
            if end == len(rows) or len(rows[end].ids) - prefix > 32 + 1.4 * (
                len(rows[start].ids) - prefix
            ):
                part = rows[start:end]
                ids, weights = batch(part, self.vocabulary)
                assert not prefix or (ids[:, :prefix] == ids[:1, :prefix]).all()
                yield Batch(ids, weights, [row.skill for row in part], prefix)
                start = end


def loss_of(model: nn.Module, b: Batch) -> tuple[Tensor, Tensor]:
    """The weighted sum of the tokens' losses, and which rows were predicted without a fault."""
    hidden = hidden_states(model, b.ids, b.prefix)[:, :-1]
    target, weight = b.ids[:, b.prefix + 1 :], b.weights[:, b.prefix + 1 :]
    loss, right = predict(model, hidden, target)
    return (loss * weight).sum(), (right | (weight < 1)).all(-1)


def predict(model: nn.Module, hidden: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """hidden [B, S, D] -> the loss of each target [B, S], and whether it is the likeliest token."""
    logits = torch.cat([model.lm_head(hidden), (hidden @ model.unused)[..., None]], -1).float()
    logits[..., -1] += model.log_unused
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none")
    return loss.view(target.shape), logits.detach().argmax(-1) == target


class Trainer:
    def __init__(
        self, out: Path, steps: int, seed: int, lr: float, bf16: bool, rank: int = 0, ranks: int = 1
    ) -> None:
        self.out, self.steps, self.bf16 = out, steps, bf16
        self.rank, self.ranks = rank, ranks
        out.mkdir(parents=True, exist_ok=True)
        renderer = Renderer()
        path = out / "vocabulary.json"
        if not path.exists():
            Vocabulary.collect(renderer).save(path)
        self.vocabulary = Vocabulary.load(path)
        torch.manual_seed(seed)
        self.model = build(self.vocabulary)
        leave_out_indexer(self.model)
        self.data = Data(renderer, self.vocabulary, seed)
        self.optimizers = optimizers(self.model, lr)
        self.loads = _watch_routers(self.model)
        self.step, self.seconds = 0, 0.0
        self.average = {k: v.detach().clone() for k, v in self.model.named_parameters()}
        if (out / "trainer.pt").exists():
            self._resume()

    def run(self, save_every: float, stop_at: float) -> None:
        saved = time.monotonic()
        rows: dict[str, list[float]] = defaultdict(list)
        losses: list[float] = []
        parent = os.getppid()
        while self.step < self.steps and self._agree(
            time.time() < stop_at and os.getppid() == parent
        ):
            began = time.monotonic()
            losses.append(self._step(rows))
            self.seconds += time.monotonic() - began
            if self.rank:
                continue
            if self.step % 10 == 0:
                self._log("train", sum(losses) / len(losses), rows)
                losses.clear()
                rows.clear()
            if self.step % 100 == 0:
                self.evaluate()
            if time.monotonic() - saved > save_every:
                self._save()
                saved = time.monotonic()
        if not self.rank:
            self._save()

    def _agree(self, go_on: bool) -> bool:
        """The first worker decides."""
        flag = torch.tensor(int(go_on))
        if self.ranks > 1:
            dist.broadcast(flag, 0)
        return bool(flag)

    def _step(self, rows: dict[str, list[float]]) -> float:
        factor = min(
            1.0, (self.step + 1) / WARM_UP, (self.steps - self.step) / (DECAY * self.steps)
        )
        batches = list(self.data.step(self.step))
        total = sum(float(b.weights.sum()) for b in batches)
        value = torch.zeros(1)
        for b in sorted(batches, key=lambda b: b.ids.numel())[self.rank :: self.ranks]:
            with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
                loss, right = loss_of(self.model, b)
            (loss / total).backward()
            value += loss.detach() / total
            for skill, ok in zip(b.skills, right.tolist(), strict=True):
                rows[skill].append(ok)
        self._sum_over_workers(value)
        nn.utils.clip_grad_norm_(self.optimizers[1].param_groups[0]["params"], 1.0)
        descend(self.optimizers, factor)
        for router, load in self.loads.items():
            router.e_score_correction_bias += BALANCE * (load.mean() - load).sign()
            load.zero_()
        decay = min(AVERAGE, (self.step + 1) / (self.step + 10))
        for name, p in self.model.named_parameters():
            self.average[name].lerp_(p.detach(), 1 - decay)
        self.step += 1
        return value.item()

    def _sum_over_workers(self, value: Tensor) -> None:
        if self.ranks == 1:
            return
        params = [p for o in self.optimizers for g in o.param_groups for p in g["params"]]
        for p in params:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        flat = torch.cat([*(p.grad.flatten() for p in params), *self.loads.values(), value])
        dist.all_reduce(flat)
        parts = flat.split([*(p.numel() for p in params), *map(len, self.loads.values()), 1])
        for p, part in zip(params, parts, strict=False):
            p.grad.copy_(part.view_as(p))
        for load, part in zip(self.loads.values(), parts[len(params) :], strict=False):
            load.copy_(part)
        value.copy_(parts[-1])

    @torch.no_grad()
    def evaluate(self, count: int = 16) -> None:
        """Held-out rows predicted without a fault, given their own text so far."""
        rows: dict[str, list[float]] = defaultdict(list)
        loss = total = 0.0
        trained = {k: v.detach().clone() for k, v in self.model.named_parameters()}
        self.model.load_state_dict(self.average, strict=False)
        for skill, b in ((b.skills[0], b) for b in self.data.held_out(count)):
            with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
                value, right = loss_of(self.model, b)
            loss, total = loss + value.item(), total + float(b.weights.sum())
            rows[skill] += right.tolist()
        self.model.load_state_dict(trained, strict=False)
        for load in self.loads.values():
            load.zero_()
        self._log("held out", loss / total, rows)

    def _log(self, kind: str, loss: float, rows: dict[str, list[float]]) -> None:
        path = self.out / "metrics.csv"
        new = not path.exists()
        shares = [sum(rows[s]) / len(rows[s]) if rows.get(s) else float("nan") for s in SKILLS]
        with path.open("a", newline="") as file:
            out = csv.writer(file)
            if new:
                out.writerow(["kind", "step", "seconds", "loss", *SKILLS])
            figures = [f"{x:.3f}" for x in (loss, *shares)]
            out.writerow([kind, self.step, round(self.seconds), *figures])

    def _save(self) -> None:
        state = {
            "step": self.step,
            "seconds": self.seconds,
            "model": self.model.state_dict(),
            "average": self.average,
            "optimizers": [o.state_dict() for o in self.optimizers],
        }
        partial = self.out / "trainer.pt.partial"
        torch.save(state, partial)
        os.replace(partial, self.out / "trainer.pt")

    def _resume(self) -> None:
        state = torch.load(self.out / "trainer.pt")
        self.model.load_state_dict(state["model"])
        self.average = state.get("average", self.average)
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step, self.seconds = state["step"], state["seconds"]


def optimizers(model: nn.Module, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the projections, Adam for the rest (embedding, norms, mHC, gates, sinks)."""
    matrices, rest = [], []
    for name, p in model.named_parameters():
        is_matrix = name.endswith(("proj", "proj.weight"))
        (matrices if is_matrix else rest).append(p)
    both = [Muon(matrices, lr), torch.optim.Adam(rest, lr / 6, betas=(0.9, 0.95))]
    for optimizer in both:
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
    return both


def descend(optimizers: list[torch.optim.Optimizer], factor: float) -> None:
    """One step of each, at `factor` of its learning rate; gradients are cleared."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        optimizer.step()
        optimizer.zero_grad()


@dataclass
class Finished:
    """A run's averaged weights in a network that stays as it is, its indexers taken out."""

    model: nn.Module
    indexers: dict[str, nn.Module]
    vocabulary: Vocabulary
    step: int

    @classmethod
    def load(cls, run: Path) -> Finished:
        state = torch.load(run / "trainer.pt")
        vocabulary = Vocabulary.load(run / "vocabulary.json")
        model = build(vocabulary)
        indexers = leave_out_indexer(model)
        model.load_state_dict(state["model"] | state["average"])
        return cls(model.requires_grad_(False), indexers, vocabulary, state["step"])

    @classmethod
    def shipped(cls) -> Finished:
        """The weights of training/mini, which need no run."""
        vocabulary = Vocabulary.load(COMPACT / VOCABULARY)
        model = build(vocabulary)
        indexers = leave_out_indexer(model)
        restore(model.state_dict(), load_file(COMPACT / WEIGHTS))
        return cls(model.requires_grad_(False), indexers, vocabulary, 0)

    def data(self) -> Data:
        return Data(Renderer(), self.vocabulary, seed=0)


def short_run(step: int, steps: int) -> float:
    """The learning rate's factor: up for 10 steps, down through the second half."""
    return min(1.0, (step + 1) / 10, 2 * (steps - step) / steps)


def _watch_routers(model: nn.Module) -> dict[nn.Module, Tensor]:
    """How many tokens each expert got since the last step, per router that chooses."""
    loads = {}
    for layer in model.model.layers:
        router = layer.mlp.gate
        if not hasattr(router, "tid2eid"):
            loads[router] = load = torch.zeros(router.num_experts)

            def count(_m: nn.Module, _i: Any, out: Any, load: Tensor = load) -> None:
                load += torch.bincount(out[2].flatten(), minlength=len(load))

            router.register_forward_hook(count)
    return loads


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(".cache/mini"))
    parser.add_argument("--steps", type=int, default=1400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lr", type=float, default=0.02, help="Muon's; Adam's is a sixth")
    parser.add_argument("--float32", action="store_true", help="no bfloat16 in the products")
    parser.add_argument("--minutes", type=float, default=180, help="stop after this long")
    parser.add_argument("--save-every", type=float, default=120, help="seconds")
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    if args.workers == 1:
        _work(0, args, "")
    else:
        with tempfile.TemporaryDirectory() as folder:
            mp.spawn(_work, (args, f"file://{folder}/meeting"), nprocs=args.workers)


def _work(rank: int, args: argparse.Namespace, meeting: str) -> None:
    torch.set_num_threads(1)
    if args.workers > 1:
        dist.init_process_group(
            "gloo", init_method=meeting, rank=rank, world_size=args.workers,
            timeout=timedelta(hours=2),
        )  # fmt: skip
    trainer = Trainer(
        args.out, args.steps, args.seed, args.lr, not args.float32, rank, args.workers
    )
    trainer.run(args.save_every, time.time() + 60 * args.minutes)


if __name__ == "__main__":
    main()
