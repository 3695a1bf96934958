"""Train dsv4-mini's MTP layer on the finished network, which stays as it is.

    python -m training.mtp --run .cache/mini --steps 160

From the last layer's streams at token t and the embedding of token t + 1 it learns to predict
token t + 2. Rows, loss weights and optimizers are the trainer's.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers.models.deepseek_v4 import modeling_deepseek_v4 as v4
from transformers.models.deepseek_v4.configuration_deepseek_v4 import DeepseekV4Config

from dsv4_plugin.tools.mini import COMPACT, CONFIG
from training.network import hidden_states, initialise, make_cheaper
from training.train import (
    FIRST_STEP,
    Batch,
    Data,
    Finished,
    descend,
    optimizers,
    predict,
    short_run,
)

FILE = "mtp.pt"


class Drafter(nn.Module):
    """One more sliding-window block; embedding and head are the network's."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        hf = json.loads((COMPACT / CONFIG).read_text())
        layer = hf["num_hidden_layers"]
        hf |= {"num_hidden_layers": layer + 1, "vocab_size": rows}
        config = DeepseekV4Config(**hf)
        d, eps = config.hidden_size, config.rms_norm_eps
        self.enorm, self.hnorm, self.norm = (v4.DeepseekV4RMSNorm(d, eps) for _ in range(3))
        self.e_proj, self.h_proj = (nn.Linear(d, d, bias=False) for _ in range(2))
        self.block = v4.DeepseekV4DecoderLayer(config, layer)
        self.hc_head = v4.DeepseekV4HyperHead(config)
        for p in (self.block.self_attn.sinks, self.hc_head.hc_base):
            nn.init.zeros_(p)
        for module in (self.block.attn_hc, self.block.ffn_hc):
            nn.init.ones_(module.scale)
        nn.init.ones_(self.hc_head.hc_scale)
        nn.init.normal_(self.hc_head.hc_fn, std=0.02)
        initialise(self)
        nn.init.constant_(self.norm.weight, 0.3)
        make_cheaper(self)

    def forward(self, streams: Tensor, following: Tensor, model: nn.Module) -> Tensor:
        """streams [B, S, R, D], embeddings of the next tokens [B, S, D] -> hidden [B, S, D]."""
        b, s = streams.shape[:2]
        positions = torch.arange(s)
        distance = positions[:, None] - positions
        visible = (distance >= 0) & (distance < model.config.sliding_window)
        mask = torch.zeros(s, s).masked_fill(~visible, float("-inf")).expand(b, 1, -1, -1)
        joined = self.e_proj(self.enorm(following))[:, :, None] + self.h_proj(self.hnorm(streams))
        joined = joined.float()
        rope = model.model.rotary_emb(following, positions.expand(b, -1), layer_type="main")
        out = self.block(
            joined,
            None,
            position_embeddings={"main": rope},
            position_ids=positions.expand(b, -1),
            attention_mask=mask,
        )
        return self.norm(self.hc_head(out))


def loss_of(model: nn.Module, drafter: Drafter, b: Batch) -> tuple[Tensor, Tensor]:
    """The weighted sum of losses, and of the taught tokens that were drafted right."""
    kept: list[Tensor] = []
    hook = model.model.layers[-1].register_forward_hook(lambda _m, _i, out: kept.append(out))
    with torch.no_grad():
        hidden_states(model, b.ids, b.prefix)
        embeddings = model.model.embed_tokens(b.ids[:, b.prefix + 1 : -1])
    hook.remove()
    hidden = drafter(kept[-1][:, :-2], embeddings, model)
    target, weight = b.ids[:, b.prefix + 2 :], b.weights[:, b.prefix + 2 :]
    loss, right = predict(model, hidden, target)
    return (loss * weight).sum(), (right & (weight == 1)).sum()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, default=Path(".cache/mini"))
    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument("--lr", type=float, default=0.02)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(1)
    run = Finished.load(args.run)
    drafter = Drafter(len(run.vocabulary.ids))
    train(run.model, drafter, run.data(), args.steps, args.lr)
    torch.save({"drafter": drafter.state_dict(), "trained_on": run.step}, args.run / FILE)


def train(model: nn.Module, drafter: Drafter, data: Data, steps: int, lr: float) -> None:
    both = optimizers(drafter, lr)
    for step in range(steps):
        batches = list(data.step(FIRST_STEP + step))
        total = sum(float(b.weights.sum()) for b in batches)
        taught = sum(int((b.weights[:, b.prefix + 2 :] == 1).sum()) for b in batches)
        value, right = 0.0, 0
        for b in batches:
            with torch.autocast("cpu", torch.bfloat16):
                loss, hits = loss_of(model, drafter, b)
            (loss / total).backward()
            value, right = value + loss.item() / total, right + int(hits)
        descend(both, short_run(step, steps))
        if step % 10 == 0 or step == steps - 1:
            print(f"step {step}: loss {value:.3f}, {right / taught:.1%} drafted right", flush=True)


if __name__ == "__main__":
    main()
