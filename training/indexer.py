"""Train dsv4-mini's indexers on the finished network, which stays as it is.

    python -m training.indexer --run .cache/mini --steps 120

An indexer learns to give the entries the shares of attention that all heads together give them
(the warm-up of DeepSeek-V3.2's indexer), on the trainer's rows and on conversations of up to 4,000
tokens, where it has to choose.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.deepseek_v4.modeling_deepseek_v4 import apply_rotary_pos_emb

from dsv4_plugin.tools.conversations import Writer
from training.network import Attend, attend, hidden_states, queries_and_keys
from training.train import FIRST_STEP, Batch, Data, Finished, descend, optimizers, short_run

FILE = "indexer.pt"
QUERIES = 64
"""Of a row, half of them its last ones."""
SENTENCES = 400
"""At most this many between what is said and the question: 4,000 tokens."""


class Watch:
    """Stands in a layer for `attention` and keeps what its indexer learns from: of the queries at
    `positions` [P] the shares of attention [B, P, entries] that all heads together give.
    """

    positions: Tensor
    hidden: Tensor
    shares: Tensor

    def __init__(self, layer: nn.Module, indexer: nn.Module) -> None:
        self.layer, self.indexer = layer, indexer
        layer.compressor.indexer.topk = 2 * 10 * SENTENCES  # the teacher attends to all entries
        layer.forward = MethodType(self._attention, layer)

    def _attention(self, layer: Any, hidden_states: Tensor, **inputs: Any) -> Any:
        q, kv, mask, cos, sin = queries_and_keys(layer, hidden_states, **inputs)
        at, entries = self.positions, q.shape[1] // self.indexer.compress_rate
        p = Attend.shares(
            q[:, at], kv, mask[:, at], layer.sinks, cos[at], sin[at], layer.q_b_norm.eps
        )[0]
        self.shares = p[..., p.shape[-1] - entries :].float().mean(2)
        self.hidden = hidden_states
        return attend(layer, q, kv, mask, cos, sin)

    def scores(self) -> Tensor:
        """The indexer's [B, P, entries] for the same queries, -inf for entries yet unfinished."""
        index, at, x = self.indexer, self.positions, self.hidden
        latent = self.layer.q_a_norm(self.layer.q_a_proj(x[:, at]))
        q = index.q_b_proj(latent).view(*latent.shape[:2], -1, index.head_dim)
        q = _rotate(index, q, at)
        keys = keys_of(index, x)
        visible = torch.arange(keys.shape[1]) < (at[:, None] + 1) // index.compress_rate
        scores: Tensor = index.scorer(q, keys, x[:, at])
        return scores.masked_fill(~visible, float("-inf"))


def keys_of(index: Any, x: Tensor) -> Tensor:
    """An indexer's keys [B, entries, D] of x [B, S, hidden]: pooling over two groups of tokens."""
    b, s, _ = x.shape
    n, r = s // index.compress_rate, index.compress_rate
    kv, gate = (
        proj(x[:, : n * r]).view(b, n, r, 2, index.head_dim).unbind(3)
        for proj in (index.kv_proj, index.gate_proj)
    )
    bias = index.position_bias.view(r, 2, -1).unbind(1)

    def join(of_next: Tensor, own: Tensor, before: float) -> Tensor:
        first = torch.full_like(of_next[:, :1], before)
        return torch.cat([torch.cat([first, of_next[:, :-1]], 1), own], 2)

    weights = join(gate[0] + bias[0], gate[1] + bias[1], float("-inf")).float().softmax(2)
    keys = index.kv_norm((join(*kv, 0.0) * weights).sum(2))
    return _rotate(index, keys[:, :, None], torch.arange(n) * r)[:, :, 0]


def _rotate(index: Any, x: Tensor, positions: Tensor) -> Tensor:
    """RoPE on x [B, S, H, D] at positions [S]."""
    positions = positions.expand(len(x), -1)
    cos, sin = index.rotary_emb(x, position_ids=positions, layer_type=index.rope_layer_type)
    return apply_rotary_pos_emb(x, cos, sin, unsqueeze_dim=2)


def loss_of(model: nn.Module, watches: list[Watch], b: Batch, generator: torch.Generator) -> Tensor:
    """Cross-entropy from the shares to the indexers' softmax, summed over rows, queries, layers."""
    s = b.ids.shape[1]
    random = torch.randint(s, (QUERIES // 2,), generator=generator)
    for watch in watches:
        watch.positions = torch.cat([random, torch.arange(max(0, s - QUERIES // 2), s)])
    with torch.no_grad():
        hidden_states(model, b.ids)
    loss = torch.zeros(())
    for watch in watches:
        logs = watch.scores().log_softmax(-1)
        loss = loss - (watch.shares * logs.where(watch.shares > 0, 0.0)).sum()
    return loss


@torch.no_grad()
def kept(watches: list[Watch], chosen: int) -> list[float]:
    """Per layer, of the attention that the last queries give to entries, the share within the
    `chosen` ones of the highest scores.
    """
    found = []
    for watch in watches:
        top = watch.scores().topk(min(chosen, watch.shares.shape[-1]), -1).indices
        found.append(float(watch.shares.gather(-1, top).sum() / watch.shares.sum()))
    return found


def batches(data: Data, step: int) -> Iterator[Batch]:
    """The trainer's rows, and one in which a name or a code is remembered for long."""
    for b in data.step(FIRST_STEP + step):
        yield Batch(b.ids, b.weights, b.skills, 0)
    writer = Writer(hash((data.seed, FIRST_STEP, step)))
    row = data.renderer.row(writer.memory(writer.random.randint(20, SENTENCES)))
    yield from data._batches([row], 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, default=Path(".cache/mini"))
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--lr", type=float, default=0.01)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(2)
    run = Finished.load(args.run)
    train(run.model, run.indexers, run.data(), args.steps, args.lr)
    found = {
        f"{name}.{k}": t for name, m in run.indexers.items() for k, t in m.state_dict().items()
    }
    torch.save({"indexers": found, "trained_on": run.step}, args.run / FILE)


def train(
    model: nn.Module, indexers: dict[str, nn.Module], data: Data, steps: int, lr: float
) -> None:
    """`indexers` by the names of their modules in `model`."""
    watches = [
        Watch(model.get_submodule(name.removesuffix(".compressor.indexer")), indexer)
        for name, indexer in indexers.items()
    ]
    trained = nn.ModuleList(indexers.values())
    both = optimizers(trained, lr)
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        value = total = 0.0
        for b in batches(data, step):
            loss = loss_of(model, watches, b, generator)
            loss.backward()
            value, total = value + loss.item(), total + sum(float(w.shares.sum()) for w in watches)
        longest = b.ids.shape[1]
        for p in trained.parameters():
            p.grad /= total
        descend(both, short_run(step, steps))
        if step % 10 == 0 or step == steps - 1:
            half = kept(watches, longest // 8)
            shares = ", ".join(f"{share:.1%}" for share in half)
            print(
                f"step {step}: loss {value / total:.3f}; of a row of {longest} tokens the better "
                f"half of the entries has {shares} of the attention",
                flush=True,
            )


if __name__ == "__main__":
    main()
