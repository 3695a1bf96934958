"""What fewer bits in the KV cache cost: a cache format's logits against those of bfloat16 rows.

Random ids through the local engine; top-1 agreement and the mean KL divergence (nats) of each
token's distribution, over the tokens after the first 250.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dsv4_plugin import load
from dsv4_plugin.batch import Batch
from dsv4_plugin.cache.layout import CacheLayout
from dsv4_plugin.model.transformer import Transformer

FORMATS = (("bfloat16", "auto"), ("fp8", "auto"), ("fp8", "fp4"))
"""(kv_dtype, index_dtype); the first is what the others are compared with."""


CHUNK = 250


@dataclass
class Comparison:
    """Sums over tokens, of one format against the first."""

    agreed: int = 0
    kl: float = 0.0
    tokens: int = 0

    def add(self, base: Tensor, found: Tensor) -> None:
        """Log-probabilities [n, vocab] of both."""
        self.agreed += int((found.argmax(-1) == base.argmax(-1)).sum())
        self.kl += float((base.exp() * (base - found)).sum())
        self.tokens += len(base)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--tokens", type=int, default=3000)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    args = parser.parse_args()
    local = load(args.checkpoint, dtype=args.dtype)
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(0, local.config.vocab_size, (args.tokens,), generator=g)
    layouts = [CacheLayout.of(local.config, kv, index_dtype=key) for kv, key in FORMATS]
    results = compare(local.model, ids, layouts)
    print(f"{'rows':12}{'keys':8}{'B/token':>9}{'top-1':>9}{'KL':>10}")
    for (kv, key), layout, result in zip(FORMATS, layouts, results, strict=True):
        grown = layout.growth(local.config.compress_ratios)
        top1, kl = result.agreed / result.tokens, result.kl / result.tokens
        print(f"{kv:12}{key:8}{grown:>9.0f}{top1:>9.2%}{kl:>10.5f}")


@torch.inference_mode()
def compare(model: Transformer, ids: Tensor, layouts: list[CacheLayout]) -> list[Comparison]:
    """All formats side by side, CHUNK tokens at a time."""
    batches = [Batch(model, layout, [len(ids)], CHUNK) for layout in layouts]
    results = [Comparison() for _ in layouts]
    for part in ids.split(CHUNK):
        outputs = [model.head(batch.run([(0, part)])).log_softmax(-1) for batch in batches]
        for result, found in zip(results, outputs, strict=True):
            if int(batches[0].lengths[0]) > CHUNK:
                result.add(outputs[0], found)
    return results


if __name__ == "__main__":
    main()
