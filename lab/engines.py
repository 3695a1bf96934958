"""Greedy answers from every engine, each in a process of its own: prompts of ids in, ids out.

`ask` starts this module with an engine's own Python; an engine starts once and has all prompts at
hand, to batch them as it likes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lab.paths import ROOT, STUBS

EOS = 1
LONGEST = 8192
"""Most tokens of a prompt and its answer."""
PAGE = 128
"""The shortest, so that tool preambles are found in the prefix cache."""
AT_ONCE = 64
"""Requests in flight."""
CHUNK = 1024
"""Most prompt tokens of a step."""


@dataclass(frozen=True)
class Setting:
    """Number formats, in the core's words, and drafts per step."""

    dtype: str = "bfloat16"
    kv_dtype: str = "auto"
    index_dtype: str = "auto"
    drafts: int = 0


@dataclass(frozen=True)
class Answers:
    """ids, up to eos, in the prompts' order; with drafts: the share of them that held, and the mean
    of a request's tokens in a step."""

    ids: list[list[int]]
    accepted: float | None = None
    per_step: float | None = None


def ask(
    engine: str,
    checkpoint: Path,
    setting: Setting,
    prompts: list[list[int]],
    most: int,
    python: str = sys.executable,
    threads: int = 0,
) -> Answers:
    """Greedy answers of at most `most` tokens.

    Args:
        engine: one of ENGINES.
        python: the interpreter that has it.
        threads: that it computes with; 0 leaves it to OMP_NUM_THREADS.

    Raises:
        RuntimeError: the engine failed; with the end of what it printed.
    """
    environment = {"DSV4_MODEL": "plugin"} | os.environ
    environment |= {
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join([*([str(STUBS)] if engine == "sglang" else ()), str(ROOT)]),
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }
    if threads:
        environment["OMP_NUM_THREADS"] = str(threads)
    with tempfile.TemporaryDirectory(prefix="engines-") as folder:
        asked, answered, log = (Path(folder) / name for name in ("asked", "answered", "log"))
        asked.write_text(json.dumps({"setting": asdict(setting), "prompts": prompts, "most": most}))
        command = [python, "-m", "lab.engines", engine, str(checkpoint.resolve())]
        with log.open("w") as out:
            done = subprocess.run(
                [*command, str(asked), str(answered)],
                stdout=out, stderr=out, env=environment, check=False,
            )  # fmt: skip
        if done.returncode or not answered.exists():
            printed = log.read_text(errors="replace")[-3000:]
            raise RuntimeError(f"{engine} ended with exit code {done.returncode}:\n{printed}")
        return Answers(**json.loads(answered.read_text()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("engine", choices=ENGINES)
    parser.add_argument("checkpoint")
    parser.add_argument("asked", type=Path)
    parser.add_argument("answered", type=Path)
    args = parser.parse_args()
    asked = json.loads(args.asked.read_text())
    setting = Setting(**asked["setting"])
    answers = ENGINES[args.engine](args.checkpoint, setting, asked["prompts"], asked["most"])
    args.answered.write_text(json.dumps(asdict(answers)))


def _transformers(
    checkpoint: str, setting: Setting, prompts: list[list[int]], most: int
) -> Answers:
    """One prompt at a time, as transformers computes by default."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=setting.dtype).eval()
    found = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=most, do_sample=False,
            eos_token_id=EOS, pad_token_id=EOS,
        )  # fmt: skip
        found.append(out[0, len(prompt) :].tolist())
    return Answers(found)


def _local(checkpoint: str, setting: Setting, prompts: list[list[int]], most: int) -> Answers:
    import torch

    from dsv4_plugin import load
    from dsv4_plugin.batch import Sampler
    from dsv4_plugin.speculate import Speculator

    mtp = setting.drafts > 0
    model = load(checkpoint, setting.dtype, setting.kv_dtype, setting.index_dtype, mtp)
    speculator = Speculator(model, setting.drafts) if mtp else None
    found: list[list[int]] = [[] for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for start in range(0, len(order), AT_ONCE):
        some = order[start : start + AT_ONCE]
        asked = [prompts[i] for i in some]
        if speculator is None:
            answers = model.generate(asked, most, chunk=CHUNK)
        else:
            with torch.inference_mode():
                answers = speculator.generate(asked, most, Sampler(0.0, None), CHUNK, False)
        for i, answer in zip(some, answers, strict=True):
            found[i] = answer
    if speculator is None:
        return Answers(found)
    accepted = speculator.accepted
    return Answers(found, accepted / speculator.drafted, 1 + accepted / speculator.steps)


def _vllm(checkpoint: str, setting: Setting, prompts: list[list[int]], most: int) -> Answers:
    from vllm import LLM, SamplingParams

    more: dict[str, Any] = {}
    if setting.index_dtype == "fp4":
        more["attention_config"] = {"indexer_kv_dtype": "mxfp4"}
    if setting.drafts:
        drafts = {"method": "mtp", "num_speculative_tokens": setting.drafts}
        more |= {"speculative_config": drafts, "disable_log_stats": False}
    engine = LLM(
        checkpoint,
        dtype=setting.dtype,
        kv_cache_dtype=setting.kv_dtype,
        max_model_len=LONGEST,
        max_num_batched_tokens=CHUNK,
        max_num_seqs=AT_ONCE,
        block_size=PAGE,
        kv_cache_memory_bytes=1 << 30,
        skip_tokenizer_init=True,
        enforce_eager=True,
        **more,
    )
    params = SamplingParams(temperature=0, max_tokens=most, stop_token_ids=[EOS], detokenize=False)
    inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
    found = [list(o.outputs[0].token_ids) for o in engine.generate(inputs, params)]
    if not setting.drafts:
        return Answers(found)
    counted = {m.name.removeprefix("vllm:spec_decode_num_"): m for m in engine.get_metrics()}
    names = ("accepted_tokens", "draft_tokens", "drafts")
    accepted, drafted, steps = (counted[name].value for name in names)
    return Answers(found, accepted / drafted, 1 + accepted / steps)


def _sglang(checkpoint: str, setting: Setting, prompts: list[list[int]], most: int) -> Answers:
    from sglang import Engine

    drafts: dict[str, Any] = {}
    if setting.drafts:
        drafts = {"speculative_algorithm": "EAGLE", "speculative_num_steps": setting.drafts}
    engine = Engine(
        model_path=checkpoint,
        device="cpu",
        dtype=setting.dtype,
        kv_cache_dtype={"fp8": "fp8_e4m3"}.get(setting.kv_dtype, setting.kv_dtype),
        enable_deepseek_v4_fp4_indexer=setting.index_dtype == "fp4",
        context_length=LONGEST,
        page_size=PAGE,
        chunked_prefill_size=CHUNK,
        max_total_tokens=1 << 16,
        max_running_requests=AT_ONCE,
        skip_tokenizer_init=True,
        log_level="warning",
        **drafts,
    )
    sampling = {"temperature": 0, "max_new_tokens": most, "stop_token_ids": [EOS]}
    answers = engine.generate(input_ids=prompts, sampling_params=sampling)
    engine.shutdown()
    found = [answer["output_ids"] for answer in answers]
    if not setting.drafts:
        return Answers(found)
    names = "spec_num_correct_drafts", "spec_num_proposed_drafts", "spec_verify_ct"
    accepted, drafted, steps = (sum(a["meta_info"][name] for a in answers) for name in names)
    return Answers(found, accepted / drafted, 1 + accepted / steps)


ENGINES = {"transformers": _transformers, "local": _local, "vllm": _vllm, "sglang": _sglang}

if __name__ == "__main__":
    main()
