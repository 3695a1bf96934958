"""A second SGLang plugin for the test servers: poisoned pools, a broken control, a count.

DSV4_TESTING lists what it does: `poison` fills fresh pools with NaN in every row format; `break`
addresses the pages' carry by request, so that a cached prefix loses its state; `emulate` has
Triton's kernels executed as sm_80 code; `drafts` has the drafter propose what the file
DSV4_DRAFTS says.
"""

import json
import logging
import os
from functools import lru_cache
from pathlib import Path

log = logging.getLogger("sglang.srt.dsv4_testing")
WANTED = os.environ.get("DSV4_TESTING", "").split(",")


def register():
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    from sglang_ext import pool

    mix = "sglang.srt.managers.schedule_batch.ScheduleBatch.mix_with_running"
    HookRegistry.register(mix, count_mixed, HookType.BEFORE)
    if "poison" in WANTED:
        pool.allocate = poisoned(pool.allocate)
    if "break" in WANTED:
        break_carry()
    if "drafts" in WANTED:
        force_drafts(Path(os.environ["DSV4_DRAFTS"]))
    if "emulate" in WANTED:
        from sglang_ext import config

        config.require_driver = lambda: None  # the emulator takes its place later
        load = "sglang.srt.model_loader.loader.DefaultModelLoader.load_weights_only"
        HookRegistry.register(load, emulate, HookType.BEFORE)


def count_mixed(batch, running):
    """Log every batch that mixes prefill and decode (the model sees one batch of extensions)."""
    log.warning("MIXED batch: %d and %d requests", batch.batch_size(), running.batch_size())


def poisoned(allocate):
    return lambda words, device: allocate(words, device).fill_(-1)


def emulate(*args, **kwargs):
    """From the weights on, which are laid out for the chip: SGLang's imports shall find no GPU."""
    from lab.kit.gpu import EmulatedGPU

    EmulatedGPU("sm80").__enter__()


def break_carry():
    from dsv4_plugin.cache import groups

    def by_request(self, ratio, request, page):
        offset = self.layout.page[ratio].parts["carry"].offset if ratio == groups.CSA else 0
        number = self.tables.ring[request] + page * 0
        return number * self.tables.page_stride + offset

    groups._Grouping._carry = by_request


def force_drafts(file):
    """file: a list of [ids of a text, which draft of a chain is wrong (from 0; -1: none)]. A draft
    is found by the place and id of the token before it, so texts must not share those."""
    from sglang.srt.model_executor.forward_context import get_attn_backend

    from sglang_ext.models.deepseek_v4 import DeepseekV4PluginForCausalLMNextN as Drafter

    forward = Drafter.forward

    @lru_cache(maxsize=1)
    def known(written):
        return {
            (i, text[i]): (text[i + 1], wrong)
            for text, wrong in json.loads(written)
            for i in range(len(text) - 1)
        }

    def forced(self, input_ids, positions, forward_batch):
        out = forward(self, input_ids, positions, forward_batch)
        step, ahead = get_attn_backend().forward_metadata, get_attn_backend().ahead
        places, given = (step.position + 1).tolist(), input_ids.tolist()
        rows = range(len(given))
        if len(out.next_token_logits) < len(given):  # a prompt's last rows only
            rows = (step.query_start[1:] - 1).tolist()
        texts = known(file.read_text())
        for logits, row in zip(out.next_token_logits, rows, strict=True):
            draft, wrong = texts.get((places[row], given[row]), (None, -1))
            if draft is not None:
                logits[draft ^ (wrong == ahead)] = 1e6
        return out

    Drafter.forward = forced
