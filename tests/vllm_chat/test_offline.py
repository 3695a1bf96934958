"""`LLM.chat`, in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys

from tests.vllm_chat.server import ROOT

PROGRAM = """
import json, sys
from vllm import LLM, SamplingParams
llm = LLM(
    sys.argv[1], dtype="float32", max_model_len=512, kv_cache_memory_bytes=100_000_000,
    enforce_eager=True, max_num_seqs=2, tokenizer_mode="deepseek_v4", disable_log_stats=True,
    logits_processors=["tests.vllm_chat.script:Script"],
)
messages, ids = json.loads(sys.argv[2])
params = SamplingParams(max_tokens=len(ids), extra_args={"script": ids})
(answer,) = llm.chat(messages, params, chat_template_kwargs={"thinking": False}, use_tqdm=False)
print(json.dumps([answer.prompt_token_ids, answer.outputs[0].text]))
"""
MESSAGES = [{"role": "user", "content": "Hello </think> there"}]


def test_llm_chat(tiny, encoder, words):
    arguments = [str(tiny), json.dumps([MESSAGES, words("Good day.")])]
    environ = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    done = subprocess.run(
        ["nice", "-n", "5", sys.executable, "-c", PROGRAM, *arguments],
        check=True, stdout=subprocess.PIPE, text=True, timeout=180, env=environ,
    )  # fmt: skip
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("[[")]
    prompt, text = json.loads(line)
    assert prompt == encoder.encode(MESSAGES, thinking=False).ids
    assert text == "Good day."
