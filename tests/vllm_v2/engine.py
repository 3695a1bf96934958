"""A small engine that drafts on the V2 runner, and a watch on what its drafter proposes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tests.vllm.engine import poison

NEW = 24


@contextmanager
def engine(checkpoint: Path, method: str, n: int, pool: int = 60, **options: Any) -> Iterator[Any]:
    from vllm import LLM

    given: dict[str, Any] = {
        "dtype": "float32",
        "max_model_len": 512,
        "max_num_seqs": 4,
        "max_num_batched_tokens": 96,
        "kv_cache_memory_bytes": 100 << 20,
        "enforce_eager": True,
    }
    llm = LLM(
        str(checkpoint),
        skip_tokenizer_init=True,
        num_gpu_blocks_override=pool,
        disable_log_stats=False,
        speculative_config={"method": method, "num_speculative_tokens": n},
        **(given | options),
    )
    assert type(runner(llm)).__module__ == "vllm.v1.worker.cpu.model_runner"
    llm.apply_model(poison)
    yield llm
    llm.llm_engine.engine_core.shutdown()


def runner(llm: Any) -> Any:
    return llm.llm_engine.model_executor.driver_worker.worker.model_runner


def generate(llm: Any, prompts: list[list[int]], new: int = NEW, **more: Any) -> list[list[int]]:
    from vllm import SamplingParams

    given = {"temperature": 0.0, "max_tokens": new, "ignore_eos": True, "detokenize": False}
    asked = [{"prompt_token_ids": prompt} for prompt in prompts]
    found = llm.generate(asked, SamplingParams(**(given | more)), use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in found]


def counted(llm: Any) -> dict[str, float]:
    """So far: drafts, accepted ones, tokens of prompts that the prefix cache had, preemptions."""
    names = {
        "spec_decode_num_draft_tokens": "drafted",
        "spec_decode_num_accepted_tokens": "accepted",
        "prefix_cache_hits": "hits",
        "num_preemptions": "preemptions",
    }
    found = {m.name.removeprefix("vllm:"): m for m in llm.get_metrics()}
    return {short: found[name].value for name, short in names.items()}


@dataclass(frozen=True)
class Proposed:
    """Of a request's text so far, its anchor last: the drafts after it."""

    text: list[int]
    drafts: list[int]


class Watch:
    """Stands before the speculator's `propose`: keeps what it proposes; `truth` and `wrong`, where
    given, replace it by the text that is known to come, wrong from that draft on."""

    def __init__(self, llm: Any, monkeypatch: Any) -> None:
        self.runner, self.found = runner(llm), []
        self.truth: list[list[int]] | None = None
        self.wrong = 0
        self.propose = self.runner.speculator.propose
        monkeypatch.setattr(self.runner.speculator, "propose", self)

    def __call__(self, batch: Any, *given: Any, **named: Any) -> torch.Tensor:
        drafts = self.propose(batch, *given, **named)
        if named.get("dummy_run"):
            return drafts
        states, sampled, rejected = self.runner.req_states, given[4], given[5]
        for i, slot in enumerate(batch.idx_mapping.tolist()):
            known = int(batch.seq_lens[i]) - int(rejected[i])
            if not sampled[i]:
                continue  # in the middle of a prompt
            text = states.all_token_ids.gpu[slot][: known + 1].tolist()
            self.found.append(Proposed(text, drafts[i].tolist()))
            if self.truth is not None:
                (whole,) = (t for t in self.truth if t[: len(text)] == text)
                after = whole[len(text) :][: drafts.shape[1]]
                drafts[i, : len(after)] = torch.tensor(after)
                drafts[i, self.wrong :] = (drafts[i, self.wrong :] + 1) % 512
        return drafts
