"""The metadata of one engine step: which token each row is, and where its rows lie.

The data's way: an engine hands over its block tables, how many tokens each request brings and how
long it then is; `kernels.step.StepBuilder` finds every row's request, position, window slot and
rotary factors, once for all layers. A layer's operations take them together with its caches.

Nothing else tells a first chunk from a later one, a prefix hit from a recomputation, or a mixed
batch from a pure one: chunking, prefix caching, preemption and abort are consequences of it.

Shapes: T rows of the batch, padding included; B requests.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from dsv4_plugin.cache.groups import Groups, group
from dsv4_plugin.cache.layout import CacheLayout
from dsv4_plugin.cache.paged import BlockTables

TILED = 16
"""From this many tokens of a request on, neighbouring rows share tiles of attention."""


@dataclass(frozen=True)
class Step:
    """Rows that are padding have position -1 and request 0; nothing is written for them.

    position, request: int32 [T]. window_write: int64 [T], the word address of each row's window
    row, -1 for none. query_start: int [B + 1], first row of each request; seq_lens: int [B],
    lengths after this step. cis: by ratio, float32 [T, rope_dim], (cos, sin) pairs at the row's
    position; entry_cis: the same at the first position of the window of `ratio` tokens it is in.
    longest_query, longest: most rows, and most tokens, that a request may have (bounds; host).
    together: 0; or of how many rows each request brings a block, which see one another and the
    window before the first of them.
    """

    layout: CacheLayout
    tables: BlockTables
    query_start: Tensor
    seq_lens: Tensor
    position: Tensor
    request: Tensor
    window_write: Tensor
    cis: dict[int, Tensor]
    entry_cis: dict[int, Tensor]
    longest_query: int
    longest: int
    together: int = 0

    @property
    def tiles(self) -> bool:
        """Are rows neighbouring tokens of few requests (prefill)?"""
        return self.longest_query >= TILED

    @cached_property
    def sees(self) -> Tensor:
        """The last position that each row sees: its own, or its block's last; int32 [T]. So a row
        sees the window's rows and those of the block, all of which end there."""
        if not self.together:
            return self.position
        last = self.seq_lens.int()[self.request] - 1
        return last.masked_fill(self.position < 0, -1)

    @cached_property
    def groups(self) -> Groups:
        """The step as CPUs work through it; found when the first layer asks."""
        return group(
            self.layout, self.tables, self.query_start.long(), self.seq_lens.long(), self.entry_cis,
            self.together,
        )  # fmt: skip
