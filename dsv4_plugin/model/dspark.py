"""DSpark: a few more blocks that draft a whole block of tokens at once.

What they know of the text is a window row per stage and position, made of the main model's streams
at that position alone (`read`): of rows that turn out wrong, nothing else has to be taken back. A
pass takes the token just picked, the anchor, and noise tokens behind it; its rows see one another.
Their logits are then corrected one after the other, by a product that knows the token before.
Embedding and output head are the main model's.

Shapes: T rows, G requests, B rows of a block, R streams, D hidden size, V vocabulary, K the rank of
the Markov head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dsv4_plugin.cache.layer import LayerCache
from dsv4_plugin.cache.step import Step
from dsv4_plugin.config import SWA, ModelConfig
from dsv4_plugin.kernels.packed import plain
from dsv4_plugin.kernels.streams import streams
from dsv4_plugin.model.block import Block, Streams
from dsv4_plugin.model.hyper_connection import HyperHead
from dsv4_plugin.model.norm import RMSNorm
from dsv4_plugin.model.parallel import Parallel
from dsv4_plugin.model.quantised import quantised
from dsv4_plugin.model.transformer import Network


class Weight(nn.Module):
    """Of a small product in float32."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape, dtype=torch.float32), requires_grad=False)


class MarkovHead(nn.Module):
    """What a token says of the next one, whatever came before: a product of low rank."""

    def __init__(self, vocab_size: int, rank: int) -> None:
        super().__init__()
        self.markov_w1, self.markov_w2 = Weight(vocab_size, rank), Weight(vocab_size, rank)

    def embed(self, ids: Tensor) -> Tensor:
        """ids [G] -> float32 [G, K]."""
        return nn.functional.embedding(ids, self.markov_w1.weight)

    def logits(self, e: Tensor) -> Tensor:
        """e [G, K] -> float32 [G, V], to be added."""
        return nn.functional.linear(e, self.markov_w2.weight)


class ConfidenceHead(nn.Module):
    """How likely the main model keeps a draft if it keeps those before it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = Weight(1, width)

    def forward(self, y: Tensor, e: Tensor) -> Tensor:
        """y [G, D] of a row, e [G, K] of the token before its draft -> logits float32 [G]."""
        return nn.functional.linear(torch.cat([y.float(), e], -1), self.proj.weight)[:, 0]


class Stage(Block):
    """A block without compression; the first also reads the main model, the last proposes."""

    main_proj: nn.Module
    main_norm: RMSNorm
    norm: RMSNorm
    hc_head: HyperHead
    markov_head: MarkovHead
    confidence_head: ConfidenceHead

    def __init__(self, config: ModelConfig, parallel: Parallel, number: int) -> None:
        prefix, layer = f"mtp.{number}", config.num_hidden_layers + number
        super().__init__(config.with_draft_layers(), parallel, layer, prefix)
        d, eps, dspark = config.hidden_size, config.rms_norm_eps, config.dspark
        assert dspark is not None
        if number == 0:
            width = len(dspark.target_layer_ids) * d
            self.main_proj = parallel.replicated(width, d, f"{prefix}.main_proj")
            self.main_norm = RMSNorm(d, eps)
        if number == dspark.stages - 1:
            self.norm, self.hc_head = RMSNorm(d, eps), HyperHead(config)
            self.markov_head = MarkovHead(config.vocab_size, dspark.markov_rank)
            self.confidence_head = ConfidenceHead(d + dspark.markov_rank)


@dataclass(frozen=True)
class Proposal:
    """Drafts int64 [G, B], their corrected logits [G, B, V], and how sure of each, logits [G, B]:
    of one knows nothing of its own draft."""

    drafts: Tensor
    logits: Tensor
    confidence: Tensor


class DSpark(Network):
    """Parameters carry the checkpoint's names."""

    def __init__(self, config: ModelConfig, parallel: Parallel) -> None:
        super().__init__()
        assert config.dspark is not None
        self.config, self.dspark = config, config.dspark
        self.ratios = [SWA] * self.dspark.stages
        parallel = quantised(config, parallel)
        self.mtp = nn.ModuleList(
            [Stage(config, parallel, number) for number in range(self.dspark.stages)]
        )

    @property
    def stages(self) -> list[Stage]:
        return [stage for stage in self.mtp if isinstance(stage, Stage)]

    def read(self, means: Tensor, step: Step, caches: Sequence[LayerCache]) -> None:
        """Write the window rows of a step of the main model, from the means over the streams behind
        the target layers, side by side: [T, targets * D]."""
        self.store(self.join(means), step.cis[SWA], step.window_write, caches)

    def join(self, means: Tensor) -> Tensor:
        """What all stages know of the main model: means [T, targets * D] -> [T, D]."""
        first = self.stages[0]
        out: Tensor = first.main_norm(first.main_proj(means))
        return out

    def store(
        self, main: Tensor, cis: Tensor, window_write: Tensor, caches: Sequence[LayerCache]
    ) -> None:
        """Of main [T, D] each stage's window rows, at cis and window_write as a step has them."""
        for stage, cache in zip(self.stages, caches, strict=True):
            stage.attn.write(main, cis, window_write, cache)

    def ids(self, anchor: Tensor) -> Tensor:
        """anchor [G] -> the block's tokens [G, B]."""
        noise = anchor.new_full((len(anchor), self.dspark.block_size - 1), self.noise)
        return torch.cat([anchor[:, None], noise], 1)

    @property
    def noise(self) -> int:
        return self.dspark.noise_token_id

    def forward(
        self, embedding: Tensor, ids: Tensor, step: Step, caches: Sequence[LayerCache]
    ) -> Tensor:
        """The tokens of blocks, ids [T], embedding [T, D] -> y [T, D], not normed. Their rows are
        those of a step whose requests bring blocks (`Step.together`)."""
        now: Streams = None, embedding[:, None].repeat(1, self.config.hc_mult, 1), None
        for stage, cache in zip(self.stages, caches, strict=True):
            now = stage(now, ids, step, cache)
        last = self.stages[-1]
        return plain(streams(*now, last.hc_head.mixer(last.norm, normed=False))[1])

    def normed(self, y: Tensor) -> Tensor:
        """y [T, D] -> hidden states [T, D], ready for the head."""
        out: Tensor = self.stages[-1].norm(y)
        return out

    def propose(
        self, y: Tensor, base: Tensor, anchor: Tensor, pick: Callable[[Tensor], Tensor]
    ) -> Proposal:
        """y [G, B, D], the head's logits base float32 [G, B, V], anchor [G]; pick: logits [G, V] ->
        ids [G]. Of fewer rows than the block has: those drafts alone."""
        last, before = self.stages[-1], anchor
        drafts, logits, confidence = [], [], []
        for i in range(y.shape[1]):
            e = last.markov_head.embed(before)
            corrected = base[:, i] + last.markov_head.logits(e)
            before = pick(corrected)
            drafts.append(before)
            logits.append(corrected)
            confidence.append(last.confidence_head(y[:, i], e))
        return Proposal(torch.stack(drafts, 1), torch.stack(logits, 1), torch.stack(confidence, 1))
