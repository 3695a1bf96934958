"""Single operations against recorded inputs and outputs of the authors' kernels (a public port)."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from dsv4_plugin.config import CSA, SWA, ModelConfig, Yarn
from dsv4_plugin.kernels.attention.cpu import Keys, attend
from dsv4_plugin.kernels.compress import sums
from dsv4_plugin.kernels.experts import packed_experts
from dsv4_plugin.kernels.index.cpu import hadamard, scores
from dsv4_plugin.kernels.norm import rms_norm
from dsv4_plugin.kernels.packed import FP4Matrix, FP8Matrix, product, round_rows
from dsv4_plugin.kernels.rope import frequencies, rotate_
from dsv4_plugin.kernels.streams import spread, streams
from dsv4_plugin.kernels.streams.cpu import sinkhorn
from dsv4_plugin.kernels.swiglu import swiglu
from dsv4_plugin.model.gate import Gate
from dsv4_plugin.model.hyper_connection import HyperConnection
from dsv4_plugin.model.norm import RMSNorm
from dsv4_plugin.model.parallel import GroupedLinear
from dsv4_plugin.quant.e4m3 import e4m3_values, encode_ue8m0, round_e4m3
from dsv4_plugin.tools.kernel_work import flash
from lab.paths import SHARED, needs_shared
from tests.tolerances import BF16_SUM, OP_FP32, QUANTISED

UNITS = SHARED / "golden" / "units"
pytestmark = needs_shared


def unit(name: str) -> dict[str, torch.Tensor]:
    return load_file(UNITS / f"unit_{name}.safetensors")


def close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = OP_FP32) -> None:
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()


def config(**fields) -> ModelConfig:
    return replace(flash([CSA]), **fields)


def raw(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.uint8)


def test_fp8_product():
    u = unit("fp8_gemm")
    x = e4m3_values(raw(u["A_fp8"])) * u["a_s"].repeat_interleave(128, 1)
    close(product(x, FP8Matrix(raw(u["B_fp8"]), u["b_s"])), u["C_ref"])


def test_fp4_product():
    u = unit("fp4_gemm")
    x = e4m3_values(raw(u["A_fp8"])) * u["a_s"].repeat_interleave(128, 1)
    close(product(x, FP4Matrix(u["B_fp4"], encode_ue8m0(u["b_s"]))), u["C_ref"])


def test_moe():
    """Gate, FP4 experts and the FP8 shared expert, with activations rounded."""
    u = unit("moe")
    x, k = u["x"], int(u["dims"][4])
    gate = Gate(
        config(
            hidden_size=256, n_routed_experts=8, num_experts_per_tok=k,
            routed_scaling_factor=float(u["rs"]),
        ),
        hash_routed=False,
    )  # fmt: skip
    gate.weight.data, gate.bias.data = u["gate_w"], u["bias"]
    limit = float(u["lim"])

    stacks = [FP4Matrix(u[w], encode_ue8m0(u[f"{w}s"])) for w in ("w1", "w3", "w2")]
    ids, weight = gate(x, *torch.zeros(2, len(x), dtype=torch.int64))
    routed = packed_experts(x, ids, weight, *stacks, limit, rounding=True)
    w1, w3, w2 = (FP8Matrix(raw(u[f"s{w}"]), u[f"s{w}s"]) for w in ("w1", "w3", "w2"))
    rounded = round_rows(x)
    h = swiglu(product(rounded, w1), product(rounded, w3), limit, torch.float32)
    found = routed + product(round_rows(h), w2)
    assert (found - u["y_ref"]).norm() / u["y_ref"].norm() < QUANTISED


def test_hadamard():
    u = unit("hadamard")
    close(u["x"] @ hadamard(128, u["x"].device), u["y"])


def test_rms_norm():
    u = unit("rmsnorm")
    close(rms_norm(u["x"], u["weight"], float(u["eps"])), u["y_w"])
    close(rms_norm(u["x"], torch.ones(512), float(u["eps"])), u["y_now"])


def pairs(cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    return torch.stack([cos, sin], -1).flatten(-2)


def test_rope():
    u = unit("rope")
    cis = pairs(u["cos"], u["sin"])
    close(rotate_(u["x"].clone(), cis), u["y_fwd"])
    close(rotate_(u["x"].clone(), cis, back=True), u["y_inv"])


def test_yarn():
    u = unit("yarn")
    both = config(yarn=Yarn(16.0, 65536, 32, 1))
    for ratio, name in ((SWA, "off"), (CSA, "yarn")):
        angle = torch.arange(64)[:, None] * frequencies(both, ratio)
        close(angle.cos(), u[f"cos_{name}"])
        close(angle.sin(), u[f"sin_{name}"])


def test_router():
    u = unit("router")
    gate = Gate(
        config(
            hidden_size=256, n_routed_experts=8, num_experts_per_tok=2,
            routed_scaling_factor=float(u["route_scale"]),
        ),
        hash_routed=False,
    )  # fmt: skip
    gate.weight.data, gate.bias.data = u["gate_w"], u["bias"]
    ids, weight = gate(u["x"], *torch.zeros(2, 16, dtype=torch.int64))
    order, expected = ids.argsort(-1), u["indices_ref"].long().argsort(-1)
    assert torch.equal(ids.gather(1, order), u["indices_ref"].long().gather(1, expected))
    close(weight.gather(1, order), u["weights_ref"].gather(1, expected))


def test_hyper_connection():
    u = unit("hc")
    hc = HyperConnection(config(hidden_size=64, hc_sinkhorn_iters=20))
    hc.fn.data, hc.base.data, hc.scale.data = u["hc_fn"], u["hc_base"], u["hc_scale"]
    hc.finalize_weights()
    plain = RMSNorm(64, 1e-6)  # of the sublayer behind the collapse; its weight is 1
    _, y, by = streams(None, u["x"], None, hc.mixer(plain))
    close(y, rms_norm(u["y_pre"], plain.weight, 1e-6))
    close(by.post, u["post"])
    close(by.mixing.transpose(1, 2), u["comb"])
    close(spread(u["x_new"], u["x"], by), u["y_post"])


def test_sinkhorn():
    u = unit("hc_sinkhorn")
    scale, base, m = u["hc_scale"], u["hc_base"], u["mixes"]
    found = sinkhorn((m[:, 8:] * scale[2] + base[8:]).view(-1, 4, 4), 20, 1e-6)
    close(found.transpose(1, 2), u["comb"])


def test_index_scores():
    u = unit("index_score")
    close(scores(u["q"], u["weights"], u["kv"]), u["score"])


def test_grouped_output():
    u = unit("ogroup_gemm")
    layer = GroupedLinear(2, 128, 16, torch.float32)
    layer.weight.data = u["wo_a"].flatten(0, 1)
    layer.finalize_weights()
    close(layer(u["o"]).view(8, 2, 16), u["out_ref"])


def test_sparse_attention():
    u = unit("sparse_attn")
    chosen = u["topk_idxs"][0].long()
    keys = Keys(u["kv"][0][chosen.clamp(min=0)], chosen < 0)
    q = u["q"][0] * u["scale"]
    found = torch.empty_like(q)
    attend(q, u["attn_sink"], [keys], found)
    close(found, u["o_ref"][0], BF16_SUM)  # recorded in bfloat16


@pytest.mark.parametrize("name", ["compressor", "compressor_overlap"])
def test_pooling(name):
    """HCA's way (one half) and CSA's overlapping windows (two halves)."""
    u = unit(name)
    r = 4
    if name == "compressor":
        kv, score = u["x"] @ u["wkv"].t(), u["x"] @ u["wgate"].t()
        score = score.view(-1, r, score.shape[-1]) + u["ape"]
        states = sums.of_windows(kv.view(-1, r, 1, kv.shape[-1]), score.unsqueeze(2))
        close(sums.mean(states)[:, 0], u["pooled"])
        return
    kv, score = u["kv"].view(-1, r, 2, 64), u["score"].view(-1, r, 2, 64)
    score = score + u["ape"].view(r, 2, 64)
    states = sums.of_windows(kv, score)
    states[1:, 1] = sums.merge(states[:-1, 0], states[1:, 1])
    close(sums.mean(states)[:, 1], u["pooled"])


def test_compressor_to_the_stored_row():
    """Products, overlapping pooling, norm, RoPE, and fp8 codes bit for bit."""
    u = unit("compressor_full")
    halves = (-1, 4, 2, 128)
    kv, score = (u["x"] @ u["wkv"].t()).view(halves), (u["x"] @ u["wgate"].t()).view(halves)
    states = sums.of_windows(kv, score + u["ape"].view(4, 2, 128))
    states[1:, 1] = sums.merge(states[:-1, 0], states[1:, 1])
    entry = rms_norm(sums.mean(states)[:, 1], u["norm_w"], 1e-6)
    entry = rotate_(entry.clone(), pairs(u["cos"], u["sin"]))
    assert torch.equal(round_e4m3(entry[:, :64], 64), u["out"][:, :64])
    close(entry[:, 64:], u["out"][:, 64:])
