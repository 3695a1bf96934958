"""A second SGLang plugin for the test servers: poisoned pools, a broken control, a count.

DSV4_TESTING lists what it does: `poison` fills fresh pools with NaN in every row format; `break`
addresses the pages' carry by request, so that a cached prefix loses its state; `emulate` has
Triton's kernels executed as sm_80 code.
"""

import logging
import os

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
