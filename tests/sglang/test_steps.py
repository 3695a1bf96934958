"""Steps as SGLang's EAGLE worker asks for them, in this process: which rows they have, and that
rejected drafts leave nothing behind."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from sglang.srt.model_executor.forward_batch_info import ForwardMode

from dsv4_plugin import load
from dsv4_plugin.tools.make import make_checkpoint
from lab.kit import mode
from lab.kit.gpu import EmulatedGPU
from sglang_ext import backend
from sglang_ext.backend import Backend, DraftSteps
from sglang_ext.config import cache_layout
from tests.conftest import A_LAYER_OF_EACH, SMALL, random_ids

from .test_graphs import PAGE, Engine, Runner, batch

DRAFTS = 3
PROMPTS = [random_ids(n, seed=n).tolist() for n in (120, 250)]
"""They end soon before the end of a page."""


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    directory = tmp_path_factory.mktemp("steps") / "checkpoint"
    make_checkpoint(directory, "tiny", 2, SMALL | A_LAYER_OF_EACH, tokenizer=False)
    found = load(directory, dtype="float32")
    found.layout = cache_layout(found.config, "float32", "auto", PAGE, False, DRAFTS)
    return found


@pytest.fixture
def runner(local, monkeypatch):
    monkeypatch.setattr(backend, "drafts", lambda: DRAFTS)
    return Runner(local)


def verification(rows, lengths):
    """Of texts that the caches have, and N + 1 tokens behind each."""
    found = batch(rows, lengths, [DRAFTS + 1] * len(rows))
    found.forward_mode = ForwardMode.TARGET_VERIFY
    found.spec_info = SimpleNamespace(draft_token_num=DRAFTS + 1)
    found.extend_seq_lens = found.extend_seq_lens_cpu = None
    return found


def places(step):
    return step.position.tolist(), step.seq_lens.tolist(), step.query_start.tolist()


def test_rows_of_each_step(runner):
    """SGLang's lengths are those before the step where drafts are verified or made one by one, and
    those after it where the drafter reads what was verified."""
    serving = Backend(runner)
    serving.init_forward_metadata(verification([2, 0], [150, 7]))
    verified = [150, 151, 152, 153, 7, 8, 9, 10], [154, 11], [0, 4, 8]
    assert places(serving.forward_metadata) == verified
    extended = batch([2, 0], [154, 11], [DRAFTS + 1] * 2)
    extended.forward_mode = ForwardMode.DRAFT_EXTEND_V2
    serving.init_forward_metadata(extended)
    assert places(serving.forward_metadata) == verified

    drafting = DraftSteps(runner, DRAFTS - 1)
    decoded = batch([2, 0], [150, 7])
    decoded.input_ids = None  # not known yet
    drafting.init_forward_metadata(decoded)
    assert [places(each.forward_metadata) for each in drafting.attn_backends] == [
        ([150, 7], [151, 8], [0, 1, 2]),
        ([151, 8], [152, 9], [0, 1, 2]),
    ]


@torch.inference_mode()
def test_rejected_drafts_leave_nothing_behind(local, runner):
    """Two requests in company, over the ends of pages and windows: chains with every number of
    right drafts give the tokens of no drafts, one by one."""
    texts = [[*p, *local.generate([p], 60, ignore_eos=True)[0]] for p in PROMPTS]
    serving = Backend(runner)

    def run(ids, asked):
        serving.init_forward_metadata(asked)
        step, caches = serving.forward_metadata, runner.token_to_kv_pool.layers
        return local.model.head(local.model(ids, step, caches)).argmax(-1)

    lengths = [len(p) for p in PROMPTS]
    for row, prompt in enumerate(PROMPTS):
        said = run(torch.tensor(prompt), batch([row], [len(prompt)], [len(prompt)]))
        assert said[-1] == texts[row][len(prompt)]
    for turn in range(14):
        rights = [turn % (DRAFTS + 1), (turn // 2 + 1) % (DRAFTS + 1)]
        chains = torch.tensor([t[n : n + DRAFTS + 1] for t, n in zip(texts, lengths, strict=True)])
        for chain, right in zip(chains, rights, strict=True):
            chain[right + 1 :] = (chain[right + 1 :] + 1) % local.config.vocab_size
        said = run(chains.flatten(), verification([0, 1], lengths)).view(2, -1)
        for i, right in enumerate(rights):
            kept = said[i, : right + 1].tolist()
            assert kept == texts[i][lengths[i] + 1 :][: right + 1]
            lengths[i] += right + 1


@torch.inference_mode()
@pytest.mark.thorough
def test_emulated_kernels_verify_what_they_decode(tmp_path, monkeypatch):
    """Triton's kernels as sm_80 code, bfloat16 with 8-bit rows: two steps of chains, a draft wrong
    in each, give what steps of one token do."""
    make_checkpoint(tmp_path / "checkpoint", "tiny", 2, SMALL | A_LAYER_OF_EACH, tokenizer=False)
    local = load(tmp_path / "checkpoint", dtype="bfloat16", kv_dtype="fp8")
    local.layout = cache_layout(local.config, "bfloat16", "fp8_e4m3", PAGE, False, DRAFTS)
    mode.kernels(monkeypatch, "triton")
    monkeypatch.setattr(backend, "drafts", lambda: DRAFTS)
    monkeypatch.setattr(Backend, "_warm_up", lambda *args: None)
    n = len(PROMPTS[0])
    with EmulatedGPU("sm80"):
        engine = Engine(local)
        text = [*PROMPTS[0], engine.prompt(0, PROMPTS[0])]
        for _ in range(DRAFTS + 2):
            text += engine.decode([0], [len(text)], text[-1:])
        engine.runner.bind()
        assert engine.prompt(0, PROMPTS[0]) == text[n]
        for right in (1, 2):
            chain = torch.tensor(text[n : n + DRAFTS + 1])
            chain[right + 1 :] = (chain[right + 1 :] + 1) % local.config.vocab_size
            engine.backend.init_forward_metadata(verification([0], [n]))
            said = engine.token(engine.forward(chain)).tolist()
            assert said[: right + 1] == text[n + 1 : n + 2 + right]
            n += right + 1
