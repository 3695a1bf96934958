"""A block of DSpark as published, by loops over lists of keys, from a checkpoint's tensors.

Only mHC and the routed experts are the project's own definitions. Everything is float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from dsv4_plugin.config import ModelConfig
from dsv4_plugin.kernels.experts.reference import experts
from dsv4_plugin.kernels.gate.reference import gate
from dsv4_plugin.kernels.streams import Mixer, spread
from dsv4_plugin.kernels.streams.reference import streams


@dataclass(frozen=True)
class Block:
    """y [B, D], the head's logits [B, V], corrected ones [B, V], drafts [B], confidence [B]."""

    y: Tensor
    base: Tensor
    logits: Tensor
    drafts: list[int]
    confidence: Tensor


class Oracle:
    def __init__(self, directory: Path) -> None:
        self.config = ModelConfig.from_pretrained(directory)
        assert self.config.dspark is not None
        self.dspark = self.config.dspark
        self.last = self.dspark.stages - 1
        self.tensors: dict[str, Tensor] = {}
        for file in directory.glob("*.safetensors"):
            for name, tensor in load_file(file).items():
                self.tensors[name] = tensor if name.endswith("tid2eid") else tensor.float()

    def main(self, means: Tensor) -> Tensor:
        """[T, targets * D] -> [T, D]."""
        w = self.tensors
        return norm(means @ w["mtp.0.main_proj.weight"].T, w["mtp.0.main_norm.weight"])

    def row(self, stage: int, x: Tensor, position: int) -> Tensor:
        """The key of x [D] at a position: [d]."""
        name = f"mtp.{stage}.attn"
        kv = norm(x @ self.tensors[f"{name}.wkv.weight"].T, self.tensors[f"{name}.kv_norm.weight"])
        return turn(kv, position, self.config.qk_rope_head_dim)

    def block(self, main: Tensor, anchor: int) -> Block:
        """main [p + 1, D], of every position; the anchor is the token at p + 1."""
        c, w, p = self.config, self.tensors, len(main) - 1
        ids = [anchor] + [self.dspark.noise_token_id] * (self.dspark.block_size - 1)
        h = torch.stack([w["embed.weight"][i] for i in ids])[:, None].repeat(1, c.hc_mult, 1)
        for stage in range(self.dspark.stages):
            name = f"mtp.{stage}"
            _, x, by = streams(None, h, None, self.mixer(f"{name}.hc_attn", f"{name}.attn_norm"))
            h = spread(self.attention(stage, x, main, p), h, by)
            _, x, by = streams(None, h, None, self.mixer(f"{name}.hc_ffn", f"{name}.ffn_norm"))
            h = spread(self.experts(name, x), h, by)
        name = f"mtp.{self.last}"
        pre = self.head_weights(h, f"{name}.hc_head")
        y = (pre[..., None] * h).sum(1)
        base = norm(y, w[f"{name}.norm.weight"]) @ w["head.weight"].T
        logits, drafts, confidence = [], [], []
        before = anchor
        for i in range(len(ids)):
            e = w[f"{name}.markov_head.markov_w1.weight"][before]
            logits.append(base[i] + w[f"{name}.markov_head.markov_w2.weight"] @ e)
            confidence.append(w[f"{name}.confidence_head.proj.weight"][0] @ torch.cat([y[i], e]))
            before = int(logits[-1].argmax())
            drafts.append(before)
        return Block(y, base, torch.stack(logits), drafts, torch.stack(confidence))

    def attention(self, stage: int, x: Tensor, main: Tensor, p: int) -> Tensor:
        c, name = self.config, f"mtp.{stage}.attn"
        w = {n.removeprefix(f"{name}."): t for n, t in self.tensors.items() if n.startswith(name)}
        keys = [self.row(stage, main[t], t) for t in range(max(0, p - c.sliding_window + 1), p + 1)]
        keys += [self.row(stage, x[i], p + 1 + i) for i in range(len(x))]
        rows = []
        for i in range(len(x)):
            position = p + 1 + i
            q = norm(x[i] @ w["wq_a.weight"].T, w["q_norm.weight"]) @ w["wq_b.weight"].T
            heads = []
            for h, one in enumerate(q.view(c.num_attention_heads, c.head_dim)):
                one = turn(norm(one), position, c.qk_rope_head_dim)
                scores = torch.stack([one @ key for key in keys]) * c.head_dim**-0.5
                weight = torch.cat([scores, w["attn_sink"][h : h + 1]]).softmax(0)[:-1]
                out = sum(a * key for a, key in zip(weight, keys, strict=True))
                heads.append(turn(out, -position, c.qk_rope_head_dim))
            groups = torch.cat(heads).view(c.o_groups, -1)
            wo_a = w["wo_a.weight"].view(c.o_groups, c.o_lora_rank, -1)
            z = torch.cat([part @ group for part, group in zip(wo_a, groups, strict=True)])
            rows.append(z @ w["wo_b.weight"].T)
        return torch.stack(rows)

    def experts(self, name: str, x: Tensor) -> Tensor:
        c, w = self.config, self.tensors
        logits = x @ w[f"{name}.ffn.gate.weight"].T
        ids, weight = gate(
            logits, c.num_experts_per_tok, c.routed_scaling_factor, w[f"{name}.ffn.gate.bias"],
            None, torch.zeros(len(x), dtype=torch.int64), torch.zeros(len(x), dtype=torch.int64),
        )  # fmt: skip

        def stack(which: str, prefix: str, numbers: list[str]) -> Tensor:
            return torch.stack([w[f"{name}.ffn.{prefix}{n}.{which}.weight"].T for n in numbers])

        numbers = [str(n) for n in range(c.n_routed_experts)]
        w13 = torch.cat([stack("w1", "experts.", numbers), stack("w3", "experts.", numbers)], -1)
        routed = experts(x, ids, weight, w13, stack("w2", "experts.", numbers), c.swiglu_limit)
        one = torch.zeros(len(x), 1, dtype=torch.int64)
        w13 = torch.cat(
            [stack("w1", "shared_experts", [""]), stack("w3", "shared_experts", [""])], -1
        )
        w2 = stack("w2", "shared_experts", [""])
        return routed + experts(x, one, torch.ones(len(x), 1), w13, w2, c.swiglu_limit)

    def head_weights(self, h: Tensor, name: str) -> Tensor:
        flat = h.flatten(1)
        m = flat @ self.tensors[f"{name}_fn"].T * flat.square().mean(1, True).add(1e-6).rsqrt()
        m = m * self.tensors[f"{name}_scale"] + self.tensors[f"{name}_base"]
        return m.sigmoid() + self.config.hc_eps

    def mixer(self, name: str, after: str) -> Mixer:
        c, w, r = self.config, self.tensors, self.config.hc_mult
        counts = torch.tensor([r, r, r * r])
        scale = w[f"{name}_scale"].repeat_interleave(counts)
        weights = w[f"{name}_fn"], w[f"{name}_base"], scale, w[f"{after}.weight"]
        return Mixer(*weights, c.hc_sinkhorn_iters, c.hc_eps, c.rms_norm_eps)


def norm(x: Tensor, weight: Tensor | float = 1.0) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight


def turn(x: Tensor, position: int, rope: int) -> Tensor:
    """RoPE without YaRN of the last dims of x [d], pairs side by side."""
    frequency = 10000.0 ** -(torch.arange(0, rope, 2) / rope)
    angle = position * frequency
    a, b = x[-rope::2], x[1 - rope :: 2]
    turned = torch.stack([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1)
    return torch.cat([x[:-rope], turned.flatten()])
