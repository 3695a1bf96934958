"""Train a DSpark drafter for dsv4-mini on the finished network, which stays as it is.

    python -m training.dspark --minutes 40
    python -m training.dspark --minutes 60 --begin training/mini/dspark.safetensors

From the means over the streams behind three layers, three stages learn to propose a block of five
tokens at once. Blocks start at random tokens of the assistant. Of a draft count its cross-entropy
to the text and its distance to the network's own distribution (half the sum of the differences:
the share of samples that would be rejected), earlier drafts more, since the later ones hang on
them; the confidence head learns one minus that distance. Rows and optimizers are the trainer's.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.deepseek_v4 import modeling_deepseek_v4 as v4
from transformers.models.deepseek_v4.configuration_deepseek_v4 import DeepseekV4Config

from dsv4_plugin.tools.mini import COMPACT, CONFIG, DSPARK, DSPARK_CONFIG
from training.names import compact_tensors, restore
from training.network import attend, hidden_states, initialise, make_cheaper
from training.train import FIRST_STEP, Batch, Data, Finished, descend, optimizers, short_run

BLOCKS = 0.25
"""Of the tokens that could start a block, the share that does in a step."""
FADE = 0.8
"""Weight of a draft beside the one before it."""
MIX = (
    (12, ("sum", "effort", "greet", "sum")),
    (10, ("json", "memory", "json", "greet", "json")),
    (7, ("call", "calls", "result", "result")),
)
"""Rows and skills of a step, as the trainer's, with more of what is hard to draft."""


Rope = tuple[Tensor, Tensor]
"""cos and sin [A, S, channels / 2]."""


class Stage(nn.Module):
    """A sliding-window block whose rows see a window of the network's, and one another."""

    def __init__(self, config: DeepseekV4Config, layer: int) -> None:
        super().__init__()
        self.block = v4.DeepseekV4DecoderLayer(config, layer)
        nn.init.zeros_(self.block.self_attn.sinks)
        for module in (self.block.attn_hc, self.block.ffn_hc):
            nn.init.ones_(module.scale)

    def keys(self, x: Tensor, rope: Rope) -> Tensor:
        """x [B, S, D] -> window rows [B, S, head_dim], in the dtype of products."""
        attention = self.block.self_attn
        kv = attention.kv_proj(x)
        rows = v4.apply_rotary_pos_emb(attention.kv_norm(kv)[:, None], *rope)
        return rows[:, 0].to(kv.dtype)


def attention_of_blocks(
    self: v4.DeepseekV4Attention, x: Tensor, context: Tensor, mask: Tensor, rope: Rope
) -> tuple[Tensor, None]:
    """x [A, B, D] of A blocks, context [A, W, head_dim], mask [A, W], rope of the blocks' rows."""
    q = self.q_b_proj(self.q_a_norm(self.q_a_proj(x))).view(*x.shape[:2], -1, self.head_dim)
    own = v4.apply_rotary_pos_emb(self.kv_norm(self.kv_proj(x))[:, None], *rope)[:, 0]
    kv = torch.cat([context, own.to(context.dtype)], 1)
    mask = F.pad(mask, (0, x.shape[1]))[:, None].expand(-1, x.shape[1], -1)
    return attend(self, q, kv, mask, *rope)


class Drafter(nn.Module):
    """Embedding and head are the network's; the noise token has an embedding of its own."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        hf = json.loads((COMPACT / CONFIG).read_text()) | DSPARK_CONFIG
        layers, self.targets = hf["num_hidden_layers"], hf["dspark_target_layer_ids"]
        stages, self.rows = hf["n_mtp_layers"], hf["dspark_block_size"]
        hf |= {"num_hidden_layers": layers + stages, "vocab_size": rows}
        hf["compress_ratios"] = hf["compress_ratios"][:layers] + [0] * stages
        config = DeepseekV4Config(**hf)
        d, eps, rank = config.hidden_size, config.rms_norm_eps, hf["dspark_markov_rank"]
        self.stages = nn.ModuleList([Stage(config, layers + k) for k in range(stages)])
        self.main_proj = nn.Linear(len(self.targets) * d, d, bias=False)
        self.main_norm, self.norm = (v4.DeepseekV4RMSNorm(d, eps) for _ in range(2))
        self.hc_head = v4.DeepseekV4HyperHead(config)
        nn.init.zeros_(self.hc_head.hc_base)
        nn.init.ones_(self.hc_head.hc_scale)
        nn.init.normal_(self.hc_head.hc_fn, std=0.02)
        self.markov_w1, self.markov_w2 = (nn.Embedding(rows, rank) for _ in range(2))
        nn.init.normal_(self.markov_w1.weight, std=0.3)
        nn.init.zeros_(self.markov_w2.weight)
        self.confidence = nn.Linear(d + rank, 1, bias=False)
        nn.init.zeros_(self.confidence.weight)
        self.noise = nn.Parameter(torch.empty(d).normal_(std=0.3))
        initialise(self)
        nn.init.constant_(self.norm.weight, 0.3)
        make_cheaper(self)
        for stage in self.stages:
            attention = stage.block.self_attn
            attention.forward = MethodType(attention_of_blocks, attention)
        self.config = config

    def forward(self, means: Tensor, row: Tensor, p: Tensor, x: Tensor, rope: Any) -> Tensor:
        """means [B, S, targets * D]; of A blocks the row of the batch and the newest known position
        [A], the anchors' embeddings x [A, D] -> y [A, block, D].
        """
        width = self.config.sliding_window
        main = self.main_norm(self.main_proj(means))
        at = p[:, None] + torch.arange(1 - width, 1)
        mask = torch.zeros(at.shape).masked_fill(at < 0, float("-inf"))
        at = at.clamp(min=0) + row[:, None] * means.shape[1]
        everywhere = rope(x, torch.arange(means.shape[1])[None], layer_type="main")
        of_block = rope(x, p[:, None] + 1 + torch.arange(self.rows), layer_type="main")
        now = torch.cat([x[:, None], self.noise.expand(len(x), self.rows - 1, -1)], 1)
        now = now[:, :, None].repeat(1, 1, self.config.hc_mult, 1).float()
        for stage in self.stages:
            context = F.embedding(at, stage.keys(main, everywhere).flatten(0, 1))
            now = stage.block(now, None, context=context, mask=mask, rope=of_block)
        y: Tensor = self.hc_head(now)
        return y

    def heads(self, model: nn.Module, y: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
        """y [A, block, D], the token before each draft [A, block] -> corrected logits
        [A, block, rows + 1], and logits of the confidence [A, block], which teach y nothing.
        """
        e = self.markov_w1(before)
        correction = F.linear(e, self.markov_w2.weight).float()
        logits = logits_of(model, self.norm(y.float())) + F.pad(correction, (0, 1))
        sure = self.confidence(torch.cat([y, e], -1).detach().float())[..., 0].float()
        return logits, sure

    def tensors(self) -> dict[str, Tensor]:
        """Under native names, the rows of tables compact, the noise token's row of the embedding
        as `NOISE`.
        """
        return compact_tensors(self._placed())

    def restore(self, compact: dict[str, Tensor]) -> None:
        """Take the tensors that `tensors` gave."""
        restore(self._placed(), compact)

    def _placed(self) -> dict[str, Tensor]:
        """This module's tensors, each where a checkpoint has it."""
        last = len(self.stages) - 1
        places = {
            "main_": "mtp.0.main_",
            "norm.": f"mtp.{last}.norm.",
            "hc_head.": f"mtp.{last}.hc_head.",
            "markov_": f"mtp.{last}.markov_head.markov_",
            "confidence.": f"mtp.{last}.confidence_head.proj.",
        }
        found = {}
        for name, tensor in self.state_dict().items():
            if name.startswith("stages."):
                name = name.replace("stages.", "mtp.", 1).replace(".block.", ".")
            for start, place in places.items():
                if name.startswith(start):
                    name = place + name.removeprefix(start)
            found["embed.noise" if name == "noise" else name] = tensor
        return found


@torch.no_grad()
def read(model: nn.Module, layers: list[int], ids: Tensor, prefix: int) -> tuple[Tensor, Tensor]:
    """ids [B, S] -> hidden states [B, S - prefix, D], and behind `layers` the means over the
    streams, side by side [B, S, layers * D].
    """
    kept: list[list[Tensor]] = [[] for _ in layers]
    hooks = [
        model.model.layers[layer].register_forward_hook(
            lambda _m, _i, out, found=found: found.append(out.float().mean(2))
        )
        for layer, found in zip(layers, kept, strict=True)
    ]
    hidden = hidden_states(model, ids, prefix)
    for hook in hooks:
        hook.remove()
    # The prefix ran once for all rows.
    whole = [torch.cat([p.expand(len(ids), -1, -1) for p in found], 1) for found in kept]
    return hidden, torch.cat(whole, -1)


@dataclass(frozen=True)
class Blocks:
    """Of a batch's rows: A blocks, the row of each and its newest known position [A]; the token
    before each draft, at positions `at`, the right draft and its weight, all [A, block].
    """

    row: Tensor
    p: Tensor
    at: Tensor
    before: Tensor
    target: Tensor
    weight: Tensor

    @classmethod
    def of(cls, b: Batch, size: int, generator: torch.Generator | None) -> Blocks:
        """Those that can start at a taught token, or of these a random share."""
        starts = F.pad(b.weights[:, 1:-1] == 1, (0, 2))
        starts[:, : b.prefix] = False
        if generator is not None:
            starts &= torch.rand(starts.shape, generator=generator) < BLOCKS
        row, p = starts.nonzero(as_tuple=True)
        at = p[:, None] + 1 + torch.arange(size)
        last = b.ids.shape[1] - 1
        inside, at = at < last, at.clamp(max=last - 1)
        of = row[:, None]
        return cls(row, p, at, b.ids[of, at], b.ids[of, at + 1], b.weights[of, at + 1] * inside)


def loss_of(
    model: nn.Module, drafter: Drafter, b: Batch, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """-> the weighted sum of losses, and of each block how many drafts are right before the first
    wrong one [A].
    """
    hidden, means = read(model, drafter.targets, b.ids, b.prefix)
    blocks = Blocks.of(b, drafter.rows, generator)
    if not len(blocks.p):
        return torch.zeros(()), torch.zeros(0)
    start = model.model.embed_tokens(blocks.before[:, 0])
    y = drafter(means, blocks.row, blocks.p, start, model.model.rotary_emb)
    logits, sure = drafter.heads(model, y, blocks.before)
    with torch.no_grad():
        main = logits_of(model, hidden[blocks.row[:, None], blocks.at - b.prefix]).softmax(-1)
    loss = F.cross_entropy(logits.flatten(0, 1), blocks.target.flatten(), reduction="none")
    distance = (logits.softmax(-1) - main).abs().sum(-1) / 2
    with torch.autocast("cpu", enabled=False):
        kept = 1 - distance.detach().clamp(0, 1)
        doubt = F.binary_cross_entropy_with_logits(sure, kept, reduction="none")
    each = (loss.view_as(distance) + distance + doubt) * blocks.weight
    right = (logits.argmax(-1) == main.argmax(-1)) & (blocks.weight > 0)
    return (each * FADE ** torch.arange(drafter.rows)).sum(), right.long().cumprod(1).sum(1)


def logits_of(model: nn.Module, hidden: Tensor) -> Tensor:
    """hidden [..., D] -> [..., rows + 1], the last for all tokens outside the vocabulary."""
    logits = torch.cat([model.lm_head(hidden), (hidden @ model.unused)[..., None]], -1).float()
    logits[..., -1] += model.log_unused
    return logits


def train(
    model: nn.Module, drafter: Drafter, data: Data, args: argparse.Namespace, first: int
) -> None:
    """At most so many steps, and minutes: the learning rate falls with the nearer. The data is
    that from step `first` on.
    """
    steps, lr, seconds = args.steps, args.lr, 60 * args.minutes
    both, generator = optimizers(drafter, lr), torch.Generator().manual_seed(0)
    began, step, at = time.monotonic(), 0, 0
    while at < steps:
        batches = list(data.step(first + step, MIX))
        total = sum(float(b.weights.sum()) for b in batches)
        value, found = 0.0, []
        for b in batches:
            with torch.autocast("cpu", torch.bfloat16):
                loss, right = loss_of(model, drafter, b, generator)
            if len(right):
                (loss / total).backward()
            value, found = value + loss.item() / total, [*found, right]
        descend(both, short_run(at, steps))
        if step % 20 == 0:
            mean = 1 + float(torch.cat(found).float().mean())
            print(f"step {step}, {at}: loss {value:.3f}, {mean:.2f} tokens a step", flush=True)
        step += 1
        at = max(step, int(steps * (time.monotonic() - began) / seconds))
        if step % 50 == 0:
            save(drafter, args.out)


@torch.no_grad()
def held_out(model: nn.Module, drafter: Drafter, data: Data, count: int = 8) -> None:
    """Tokens per step on rows of the keys that training never saw, per skill."""
    found: dict[str, list[Tensor]] = {}
    for b in data.held_out(count):
        with torch.autocast("cpu", torch.bfloat16):
            found.setdefault(b.skills[0], []).append(loss_of(model, drafter, b, None)[1])
    for skill, right in found.items():
        print(f"{skill}: {1 + float(torch.cat(right).float().mean()):.2f} tokens a step")


def save(drafter: Drafter, path: Path) -> None:
    save_file(drafter.tensors(), path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--minutes", type=float, default=40, help="at most")
    parser.add_argument("--lr", type=float, default=0.02)
    parser.add_argument("--begin", type=Path, help="with the drafter of this file, on other rows")
    parser.add_argument("--out", type=Path, default=COMPACT / DSPARK)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(3)
    run = Finished.shipped()
    drafter, data = Drafter(len(run.vocabulary.ids)), run.data()
    if args.begin:
        drafter.restore(load_file(args.begin))
    train(run.model, drafter, data, args, (2 if args.begin else 1) * FIRST_STEP)
    save(drafter, args.out)
    held_out(run.model, drafter, data)


if __name__ == "__main__":
    main()
