"""int4 in GPTQ's layout, as AutoRound writes it too: values by an independent decoder, whatever the
checkpoint left as it was; what is not certain is refused by name."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from dsv4_plugin import load, serving
from dsv4_plugin.checkpoint.files import read_headers
from dsv4_plugin.config import INT4_BLOCKS, ModelConfig
from dsv4_plugin.kernels.packed import Int4Matrix, product
from dsv4_plugin.quant.int4 import decode_int4, from_gptq, quantise_int4, to_gptq
from dsv4_plugin.tools.make import make_checkpoint
from tests.conftest import A_LAYER_OF_EACH, SMALL, random_ids
from tests.core.gptq import decoded
from tests.parallel.ranks import Ranks
from tests.parallel.test_quantised_ranks import ALIGNED
from tests.parallel.test_ranks import error, whole_logits
from tests.tolerances import BF16_SUM, LOGITS_STD, OP_FP32

IDS = random_ids(150, seed=3)
SIZES = SMALL | A_LAYER_OF_EACH | {"num_nextn_predict_layers": 1}
SHARED = SIZES | {"moe_intermediate_size": 128, "o_lora_rank": 64}
"""Two ranks get whole blocks."""
E, W = "layers.1.ffn.experts.3.w2", "layers.0.attn.wq_a"
EIGHTS = -0x77777778


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gptq") / "made"
    make_checkpoint(folder, "tiny", 1, SIZES, tokenizer=False, fmt="gptq")
    return folder


def changed(source, folder, change=lambda tensors: None, **fields):
    """A copy of a one-shard checkpoint, without its index; fields: of quantization_config."""
    folder.mkdir()
    tensors = load_file(next(source.glob("*.safetensors")))
    change(tensors)
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "model.safetensors")
    hf = json.loads((source / "config.json").read_text())
    hf["quantization_config"] = {**hf["quantization_config"], **fields}
    (folder / "config.json").write_text(json.dumps(hf))
    return folder


def modules(tensors):
    return [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]


def take(tensors, module):
    return [tensors.pop(f"{module}.{part}") for part in ("qweight", "qzeros", "scales")]


def unpack(tensors, *which):
    for module in modules(tensors):
        if not which or any(name in module for name in which):
            tensors[f"{module}.weight"] = decoded(*take(tensors, module))


def repack(tensors, module, block, zero=EIGHTS):
    """A plain weight as int4, with bfloat16 scales and, by default, zeros of the second form."""
    data, scale = quantise_int4(tensors.pop(f"{module}.weight"), block)
    zeros = torch.full((scale.shape[1], len(data) // 8), zero, dtype=torch.int32)
    parts = {"qweight": to_gptq(data), "qzeros": zeros, "scales": scale.t()}
    tensors.update({f"{module}.{part}": tensor for part, tensor in parts.items()})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("block", INT4_BLOCKS)
def test_values(block, dtype):
    """Any code, negative scales too; and the way back."""
    g = torch.Generator().manual_seed(block)
    qweight = torch.randint(-(1 << 31), 1 << 31, (32, 96), generator=g, dtype=torch.int32)
    scales = torch.randn(256 // block, 96, generator=g).to(dtype)
    for zero in (0x77777777, EIGHTS):
        qzeros = torch.full((256 // block, 12), zero, dtype=torch.int32)
        expected = decoded(qweight, qzeros, scales)
        matrix = Int4Matrix(from_gptq(qweight), scales.t().contiguous())
        assert torch.equal(decode_int4(matrix.data, matrix.scale), expected)
        assert torch.equal(matrix.rows(0, 96, torch.float32), expected)
        assert torch.equal(matrix.rows(0, 96, torch.bfloat16).float(), expected.bfloat16().float())
    assert torch.equal(to_gptq(matrix.data), qweight)
    x = torch.randn(5, 256, generator=g)
    for given, tolerance in ((x, OP_FP32), (x.bfloat16(), BF16_SUM)):
        found, exact = product(given, matrix), given.float() @ expected.t()
        assert (found - exact).abs().max() < tolerance * exact.abs().max()


def plain_twin(source, folder):
    """Unpacked to float32."""
    copy = changed(source, folder, unpack)
    hf = json.loads((copy / "config.json").read_text())
    del hf["quantization_config"]
    (copy / "config.json").write_text(json.dumps(hf))
    return copy


def near(found, expected):
    return error(found, expected) < LOGITS_STD


def test_the_network_is_that_of_the_values(made, tmp_path):
    """Nothing else is rounded: inputs and float16 scales are taken as they are."""

    def fine_scales(tensors):
        for module in modules(tensors):
            tensors[f"{module}.scales"] *= 1.003

    made = changed(made, tmp_path / "fine", fine_scales)
    found, plain = load(made, "float32"), load(plain_twin(made, tmp_path / "plain"), "float32")
    assert near(found.logits(IDS), plain.logits(IDS))
    assert found.model.weight_bytes.packed > 0.9 * plain.model.weight_bytes.plain / 8 * 0.5


def test_scales_of_either_sign(made, tmp_path):
    """AutoRound turns a block round where its largest value is positive."""

    def turn(tensors):
        for module in modules(tensors):
            tensors[f"{module}.scales"][0] *= -1

    copy = changed(made, tmp_path / "copy", turn)
    plain = load(plain_twin(copy, tmp_path / "plain"), "float32").logits(IDS)
    assert near(load(copy, "float32").logits(IDS), plain)
    assert not near(load(made, "float32").logits(IDS), plain)


LEFT_ALONE = ("attn.wq_b", "attn.wo_a", "layers.2.ffn.shared_experts")


def test_what_was_left_alone_is_told_by_its_tensors(made, tmp_path):
    """Whatever the config says of it, and wherever it is."""
    copy = changed(made, tmp_path / "copy", lambda t: unpack(t, *LEFT_ALONE), extra_config={"x": 1})
    model = load(copy, "float32")
    assert near(model.logits(IDS), load(made, "float32").logits(IDS))
    layers = [type(layer.ffn.shared_experts.w1).__name__ for layer in model.model.layers.values()]
    assert layers == ["Int4Linear", "Int4Linear", "Linear"]


@pytest.mark.parametrize("size", [1, 2])
def test_small_products_may_be_packed(tmp_path, size):
    """Compressors and indexers of some uploads are; the network holds them plain."""
    made = tmp_path / "made"
    make_checkpoint(made, "tiny", 1, SHARED, tokenizer=False, fmt="gptq")
    names = ("compressor.wkv", "compressor.wgate", "indexer.wq_b", "indexer.weights_proj")

    def pack_them(tensors):
        for name in [n.removesuffix(".weight") for n in tensors if n.endswith(".weight")]:
            if name.endswith(names):
                repack(tensors, name, 64)

    packed = changed(made, tmp_path / "packed", pack_them)
    plain = changed(packed, tmp_path / "plain", lambda t: unpack(t, *names))
    ids = random_ids(500, seed=5)
    ranks = Ranks(size)
    found = whole_logits(ranks, ranks.load(packed), ids)
    expected = load(plain, "float32").logits(ids)
    assert near(found, expected)
    assert not near(load(made, "float32").logits(ids), expected)


def test_other_scales_zeros_and_orders(made, tmp_path):
    """bfloat16 scales, zeros written as 8, and the order of inputs where it says nothing."""

    def rewrite(tensors):
        for module in modules(tensors):
            groups, n_out = tensors[f"{module}.scales"].shape
            n_in = 8 * len(tensors[f"{module}.qweight"])
            tensors[f"{module}.scales"] = tensors[f"{module}.scales"].bfloat16()
            tensors[f"{module}.qzeros"] = torch.full((groups, n_out // 8), EIGHTS).int()
            tensors[f"{module}.g_idx"] = torch.arange(n_in).int() // (n_in // groups)

    def round_scales(tensors):
        for module in modules(tensors):
            tensors[f"{module}.scales"] = tensors[f"{module}.scales"].bfloat16().half()

    copy = changed(made, tmp_path / "copy", rewrite, quant_method="gptq", desc_act=False)
    expected = load(changed(made, tmp_path / "rounded", round_scales), "float32").logits(IDS)
    assert near(load(copy, "float32").logits(IDS), expected)


def test_draft_layers(made, tmp_path):
    """Plain as they are made; packed in other checkpoints, without a change to the answers."""

    def pack_drafts(tensors):
        for name in [n.removesuffix(".weight") for n in tensors if n.startswith("mtp.0.")]:
            if ".w" in name or name.endswith("_proj"):
                repack(tensors, name, 64)

    copy = changed(made, tmp_path / "copy", pack_drafts)
    for folder in (made, copy):
        model = load(folder, mtp=True)
        answer = model.generate([[1, 2, 3]], 6, ignore_eos=True)
        assert model.generate([[1, 2, 3]], 6, ignore_eos=True, num_speculative_tokens=1) == answer
    assert type(model.drafter.mtp[0].e_proj).__name__ == "Int4Linear"
    assert type(model.drafter.mtp[0].ffn.experts).__name__ == "QuantisedExperts"


@pytest.mark.parametrize("expert_parallel", [False, True])
def test_ranks(tmp_path, expert_parallel):
    make_checkpoint(tmp_path / "made", "tiny", 1, SHARED, tokenizer=False, fmt="gptq")
    ranks, ids = Ranks(2), random_ids(500, seed=5)
    found = whole_logits(ranks, ranks.load(tmp_path / "made", expert_parallel), ids)
    assert near(found, load(tmp_path / "made", "float32").logits(ids))
    with pytest.raises(
        ValueError, match=r"4 tensor-parallel ranks cannot share .* evenly: it has 128 values"
    ):
        Ranks(4).load(tmp_path / "made", expert_parallel)


def test_a_group_split_inside(tmp_path):
    """Four heads in two groups over four ranks: wo_a's columns are cut, wo_b's are repeated."""
    wide = ALIGNED | {"moe_intermediate_size": 512}
    make_checkpoint(tmp_path / "wide", "tiny", 6, wide, tokenizer=False, fmt="gptq")
    ranks, ids = Ranks(4), random_ids(320, seed=3)
    found = whole_logits(ranks, ranks.load(tmp_path / "wide"), ids)
    assert near(found, load(tmp_path / "wide", "float32").logits(ids))


def test_scales_of_two_dtypes_are_refused(made, tmp_path):
    name = f"{E}.scales"
    copy = changed(made, tmp_path / "copy", lambda t: t.update({name: t[name].bfloat16()}))
    with pytest.raises(ValueError, match=f"{name} is BF16, other experts' are F16"):
        load(copy)


@pytest.mark.parametrize(
    ("damage", "pattern"),
    [
        (lambda t: t.pop(f"{E}.qzeros"), f"{E}.qzeros is missing"),
        (lambda t: t.pop(f"{W}.scales"), f"{W}.scales is missing"),
        (lambda t: t[f"{E}.qzeros"][0, 0].add_(1), f"{E}.qzeros has zeros other than 8"),
        (
            lambda t: t.update({f"{W}.g_idx": torch.arange(128).flip(0).int() // 64}),
            f"{W}.g_idx orders the inputs otherwise",
        ),
        (
            lambda t: t.update({f"{W}.scales": t[f"{W}.scales"].float()}),
            f"{W}.scales is F32, config.json \\(int4 in GPTQ's layout\\) asks for F16 or BF16",
        ),
        (
            lambda t: t.update({f"{W}.qweight": t[f"{W}.qweight"].t()}),
            rf"{W}.qweight has shape \[64, 16\], config.json asks for \[16, 64\]",
        ),
        (lambda t: t[f"{W}.scales"][0].fill_(float("nan")), "64 scales that are not finite"),
        (lambda t: t[f"{W}.scales"].zero_(), f"{W}.scales has nothing but zeros"),
        (
            lambda t: repack(t, "layers.0.ffn.gate", 64),
            "layers.0.ffn.gate.weight is missing",
        ),
        (lambda t: repack(t, "head", 64), "head.weight is missing"),
        (
            lambda t: t.update(
                {"layers.1.attn.compressor.wkv.qweight": torch.zeros(16, 128).int()}
            ),
            r"layers.1.attn.compressor.wkv.qzeros is missing; .*wkv.scales is missing",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_refused(made, tmp_path, damage, pattern):
    copy = changed(made, tmp_path / "copy", damage)
    with pytest.raises(ValueError, match=pattern) as info:
        load(copy)
    assert "\n" not in str(info.value)


@pytest.mark.parametrize(
    ("fields", "pattern"),
    [
        ({"bits": 8}, "bits is 8; allowed is 4"),
        ({"bits": None}, "lacks bits; allowed is 4"),
        ({"sym": False}, "sym is False; allowed is True"),
        ({"desc_act": True}, "desc_act is True; allowed is False"),
        ({"group_size": -1}, "group_size is -1; allowed are 128, 64 and 32"),
        ({"group_size": None}, "group_size is None; allowed are 128, 64 and 32"),
        ({"packing_format": "auto_round:auto_awq"}, "packing_format is 'auto_round:auto_awq'; all"),
        ({"data_type": "mx_fp"}, "data_type is 'mx_fp'; allowed is 'int'"),
        ({"act_bits": 4}, "act_bits is 4; allowed are 16 and 32"),
        ({"quant_method": "awq"}, "quant_method is 'awq'; allowed are 'fp8', 'compressed-tensors'"),
    ],
)
def test_configs_that_do_not_fit_are_refused(made, tmp_path, fields, pattern):
    copy = tmp_path / "copy"
    shutil.copytree(made, copy)
    hf = json.loads((copy / "config.json").read_text())
    hf["quantization_config"] |= fields
    (copy / "config.json").write_text(json.dumps(hf))
    with pytest.raises(ValueError, match=rf"quantization_config\.?.*{pattern}") as info:
        load(copy)
    assert "\n" not in str(info.value)


def test_what_is_int4_is_known_by_the_index(made, tmp_path, monkeypatch):
    """Of a hub name, before anything is downloaded; of a folder, by its headers; nothing of one
    without weights."""
    known = serving.int4_modules(str(made))
    assert {"layers.0.attn.wo_a", "layers.2.ffn.shared_experts.w2"} < known
    assert len(known) == 3 * 8
    index = tmp_path / "index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(read_headers(made), "x")}))
    monkeypatch.setattr("transformers.utils.hub.cached_file", lambda *_, **__: str(index))
    assert serving.int4_modules("somebody/int4") == known
    monkeypatch.setattr("transformers.utils.hub.cached_file", lambda *_, **__: None)
    assert serving.int4_modules("somebody/else") is None
    (tmp_path / "empty").mkdir()
    assert serving.int4_modules(str(tmp_path / "empty")) is None
    config = ModelConfig.from_pretrained(made)
    assert serving.with_int4(config, str(made)).int4_modules == known
    without = str(tmp_path / "empty")
    assert serving.with_int4(config, without).is_int4("layers.0.attn.wo_a")
