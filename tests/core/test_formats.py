"""Every published variant: layouts, making, loading packed, answering; damaged ones are refused."""

from __future__ import annotations

import json
import logging
import shutil
from random import Random

import pytest
import torch
from safetensors.torch import load_file, save_file

from dsv4_plugin import load
from dsv4_plugin.checkpoint.files import INDEX, read_headers
from dsv4_plugin.checkpoint.names import (
    EXPERT,
    image_tensors,
    is_for_images,
    stored_as,
    stored_tensors,
)
from dsv4_plugin.config import HF_QUANT, ModelConfig
from dsv4_plugin.kernels.experts import packed_experts
from dsv4_plugin.kernels.experts.reference import experts as experts_reference
from dsv4_plugin.kernels.norm import rms_norm
from dsv4_plugin.kernels.packed import FP4Matrix, FP8Matrix, NVFP4Matrix, product
from dsv4_plugin.quant.e2m1 import decode_mxfp4, decode_nvfp4
from dsv4_plugin.quant.e4m3 import e4m3_values
from dsv4_plugin.quant.int4 import decode_int4
from dsv4_plugin.tools.cli import main
from dsv4_plugin.tools.convert import CONVERSIONS, convert_checkpoint
from dsv4_plugin.tools.formats import FORMATS, VISION, format_fields
from dsv4_plugin.tools.inspect import VARIANTS
from dsv4_plugin.tools.make import PRESETS, made_tensors, make_checkpoint
from lab.paths import SHARED, needs_shared
from tests.conftest import A_LAYER_OF_EACH, SMALL, random_ids
from tests.core.gptq import decoded as from_gptq
from tests.tolerances import BF16_SUM, LOGITS_STD, OP_FP32

LAYOUTS = SHARED / "tensor_layouts.json"
CONFIGS = {
    "DeepSeek-V4-Flash": "DeepSeek-V4-Flash.config.json",
    "DeepSeek-V4-Pro": "DeepSeek-V4-Pro.config.json",
    "DeepSeek-V4-Flash-Base": "DeepSeek-V4-Flash-Base.config.json",
    "DeepSeek-V4-Flash-NVFP4": "DeepSeek-V4-Flash-NVFP4.config.synthesised.json",
    "DeepSeek-V4-Flash-0731": "DeepSeek-V4-Flash-0731.config.reconstructed.json",
}
QUANTISED = [fmt for fmt in FORMATS if fmt != "bf16"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A small checkpoint of every format."""
    folder = tmp_path_factory.mktemp("formats")
    for fmt in FORMATS:
        make_checkpoint(folder / fmt, "tiny", 1, SMALL, tokenizer=False, fmt=fmt)
    return folder


def published(name: str) -> dict:
    return json.loads((SHARED / "configs" / CONFIGS[name]).read_text())


def written(config: ModelConfig, parameters) -> dict[str, list]:
    """name -> [dtype, shape] of what the makers write."""
    out = {}
    for name, shape in parameters.items():
        stored = stored_as(config, name, shape)
        out |= {part: [s.dtypes[0], list(s.shape)] for part, s in stored.items()}
    return out


@needs_shared
@pytest.mark.parametrize("name", CONFIGS)
def test_published_layouts(name):
    """Names, dtypes and shapes of the layers that the recorded layout has, for expert 0 of each."""
    hf = published(name)
    config = ModelConfig.from_hf(hf)
    found = written(config, made_tensors(config, hf))
    layout = json.loads(LAYOUTS.read_text())[name]

    def compared(names) -> set[str]:
        kept = set()
        for tensor in names:
            expert = EXPERT.fullmatch(tensor)
            prefix, _, rest = tensor.partition(".")
            layer = rest.partition(".")[0]
            listed = prefix != "layers" or layer in ("0", "2", "3", "4")
            if listed and (expert is None or expert[2] == "0"):
                kept.add(tensor)
        return kept

    assert compared(found) == compared(layout)
    assert {t: found[t] for t in compared(found)} == {t: layout[t] for t in compared(layout)}


@needs_shared
@pytest.mark.parametrize(
    ("fmt", "name"), [("fp8-fp4", "Flash"), ("nvfp4", "Flash-NVFP4"), ("base", "Flash-Base")]
)
def test_the_slice_is_of_the_published_layout(fmt, name):
    """slice's SWA, CSA and HCA layers against Flash's layers 0, 2 and 3 (hash-routed or not)."""
    hf = {"num_nextn_predict_layers": 0} | PRESETS["slice"] | {"n_routed_experts": 256}
    flash = published("DeepSeek-V4-Flash")
    config = ModelConfig.from_hf(flash | hf | format_fields(fmt, flash | hf))
    found = written(config, made_tensors(config, hf))
    layout = json.loads(LAYOUTS.read_text())[f"DeepSeek-V4-{name}"]
    for mine, theirs in (("0", "0"), ("1", "2"), ("2", "3")):
        for tensor, form in layout.items():
            if tensor.startswith(f"layers.{theirs}.") and "gate." not in tensor:
                assert found[tensor.replace(f"layers.{theirs}.", f"layers.{mine}.")] == form


@pytest.mark.parametrize("fmt", FORMATS)
def test_what_is_written_is_what_is_planned(made, fmt):
    config = ModelConfig.from_pretrained(made / fmt)
    hf = json.loads((made / fmt / "config.json").read_text())
    headers = read_headers(made / fmt)
    found = {name: [info.dtype, list(info.shape)] for name, info in headers.items()}
    assert found == written(config, made_tensors(config, hf))


@pytest.mark.parametrize("fmt", QUANTISED)
def test_every_variant_answers_and_stays_packed(made, fmt, caplog):
    with caplog.at_level(logging.INFO, "dsv4_plugin"):
        model = load(made / fmt)
    out = model.generate([[1, 2, 3], random_ids(200, seed=1).tolist()], 4, ignore_eos=True)
    assert [len(o) for o in out] == [4, 4]
    packed = model.model.weight_bytes.packed
    stored = stored_tensors(model.config)
    one_byte = sum(
        torch.Size(s.shape).numel() * (4 if s.dtypes[0] == "I32" else 1)
        for s in stored.values()
        if s.dtypes[0] in ("F8_E4M3", "F8_E8M0", "I8", "U8", "I32")
    )
    assert 0.95 * one_byte < packed <= one_byte
    assert f"{packed / 2**30:.2f} GiB of them packed" in caplog.text
    assert ("3 draft stages" in caplog.text) == (fmt in ("0731", "vision"))
    images = 7 + 2 * 8 + 4 + 5 + 1  # tower, its blocks, embeddings, biases of the main layers
    said = f"Vision-Exp is served for text: {images} tensors for images are skipped"
    assert (said in caplog.text) == (fmt == "vision")


def test_the_draft_stages_do_not_change_the_model(made):
    """0731 and fp8-fp4 share their seed; only the draft stages differ."""
    ids = random_ids(150, seed=2)
    assert torch.equal(load(made / "0731").logits(ids), load(made / "fp8-fp4").logits(ids))


@needs_shared
def test_what_vision_exp_adds():
    """316 tensors beside those of 0731, at the published sizes."""
    hf = published("DeepSeek-V4-Flash-0731")
    sizes = {"vision_n_layers": 32, "vision_dim": 1024, "vision_inter_dim": 2816}
    hf |= VISION | sizes
    config = ModelConfig.from_hf(hf)
    tensors = image_tensors(config, hf)
    assert len(tensors) == 316
    assert all(is_for_images(config, name) for name in tensors)
    found = written(config, tensors)
    assert found["vision.patch_embed.proj.weight"] == ["BF16", [1024, 588]]
    assert found["vision.blocks.31.attn.wqkv.bias"] == ["BF16", [3072]]
    assert found["vision.blocks.31.mlp.w1.weight"] == ["BF16", [5632, 1024]]
    assert found["aligner.w1.weight"] == ["BF16", [4096, 9216]]
    assert found["layers.42.ffn.gate.bias_vl"] == ["F32", [256]]
    assert found["mtp.2.ffn.gate.bias_vl"] == ["F32", [256]]
    assert found["layers.2.ffn.gate.bias"] == ["F32", [256]]
    needed = [*stored_tensors(config), "mtp.0.ffn.gate.bias", "mtp.0.main_proj.weight"]
    assert not [name for name in needed if is_for_images(config, name)]


def test_vision_exp_is_0731_for_text(made, tmp_path):
    """Bit for bit, whatever the tensors for images hold; without vision_n_layers they are
    unexpected."""
    make_checkpoint(
        tmp_path / "0731", "tiny", 1, SMALL | {"rms_norm_eps": 1e-20}, tokenizer=False, fmt="0731"
    )
    ids = random_ids(150, seed=2)
    logits = load(made / "vision").logits(ids)
    assert torch.equal(logits, load(tmp_path / "0731").logits(ids))
    assert not torch.equal(logits, load(made / "0731").logits(ids))

    def other_biases(tensors):
        for name in tensors:
            if name.endswith("bias_vl") or name == "layers.0.ffn.gate.bias":
                tensors[name] = torch.full_like(tensors[name], float("nan"))

    copy = broken(made / "vision", tmp_path, other_biases)
    assert torch.equal(logits, load(copy).logits(ids))
    hf = json.loads((copy / "config.json").read_text()) | {"vision_n_layers": 0}
    (copy / "config.json").write_text(json.dumps(hf))
    with pytest.raises(ValueError, match=r"is unexpected; .* \(and \d+ more\)"):
        load(copy)


@pytest.mark.parametrize("eps", [1e-6, 1e-20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_zeros_stay_zeros(dtype, eps):
    x = torch.zeros(3, 64, dtype=dtype)
    x[1] = 1e-9
    found = rms_norm(x, torch.ones(64), eps).float()
    assert (found[::2] == 0).all()
    assert (found[1] - 1e-9 * (1e-18 + eps) ** -0.5).abs().max() < 1e-2


def test_variants_are_told_by_either_file(made, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(made / "nvfp4", copy)
    hf = json.loads((copy / "config.json").read_text())
    for name in ("moe_quant_algo", "quant_algo", "quantized_layers"):
        del hf["quantization_config"][name]
    (copy / "config.json").write_text(json.dumps(hf))
    assert ModelConfig.from_pretrained(copy).experts == "nvfp4"
    load(copy)
    (copy / HF_QUANT).unlink()
    with pytest.raises(
        ValueError, match=r"experts.0.w1.scale is F8_E4M3, .*FP4 experts.* asks for F8_E8M0"
    ):
        load(copy)


def test_the_first_release_does_not_name_its_experts(made, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(made / "fp8-fp4", copy)
    hf = json.loads((copy / "config.json").read_text())
    del hf["expert_dtype"]
    (copy / "config.json").write_text(json.dumps(hf))
    assert ModelConfig.from_pretrained(copy).experts == "fp4"


def matrices(n_out: int, n_in: int):
    """Packed matrices with random bytes and their exact values."""
    g = torch.Generator().manual_seed(n_out + n_in)

    def byte(low, high, *shape):
        return torch.randint(low, high, shape, generator=g, dtype=torch.uint8)

    codes = byte(0, 256, n_out, n_in)
    codes[codes & 0x7F == 0x7F] = 0
    blocks = -(-n_out // 128), -(-n_in // 128)
    scale = torch.rand(blocks, generator=g) / 100
    wide = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)[:n_out, :n_in]
    yield FP8Matrix(codes, scale), e4m3_values(codes) * wide
    data, scales = byte(0, 256, n_out, n_in // 2), byte(110, 125, n_out, n_in // 32)
    yield FP4Matrix(data, scales), decode_mxfp4(data, scales)
    scales, top = byte(0, 0x7F, n_out, n_in // 16), torch.tensor(3e-5)
    yield NVFP4Matrix(data, scales, top), decode_nvfp4(data, scales, top)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("n_out", "n_in"), [(2048, 4096), (512, 7168), (130, 96), (32, 64), (4096, 512)]
)
def test_packed_products(n_out, n_in, dtype):
    """Whole tiles, several tiles, ragged blocks; sums are float32, bfloat16 results are rounded."""
    for packed, weight in matrices(n_out, n_in):
        x = torch.randn(5, n_in).to(dtype)
        expected = x.float() @ weight.t()
        found = product(x, packed)
        assert found.dtype == dtype
        tolerance = OP_FP32 if dtype == torch.float32 else BF16_SUM
        assert (found - expected).abs().max() < tolerance * expected.abs().max()
        rows = packed.rows(0, n_out, torch.float32)
        assert torch.allclose(rows, weight, rtol=1e-6, atol=1e-12)


def test_packed_experts():
    """Some experts idle, some with many tokens, pairs that belong to nobody here (-1)."""
    matrix, values = list(matrices(64, 64))[1]
    stack = FP4Matrix(*(t.expand(4, -1, -1) for t in (matrix.data, matrix.scale)))
    w13, down = torch.cat([values, values]).t().expand(4, -1, -1), values.t().expand(4, -1, -1)
    x, weight = torch.randn(9, 64), torch.rand(9, 2)
    ids = torch.tensor([[0, 2], [2, 0], [0, 3]] * 3)
    expected = experts_reference(x, ids, weight, w13, down, 10.0)

    def run(ids):
        return packed_experts(x, ids, weight, stack, stack, stack, 10.0, rounding=False)

    assert (run(ids) - expected).abs().max() < OP_FP32 * expected.abs().max()
    without = experts_reference(x, ids, weight * (ids != 2), w13, down, 10.0)
    found = run(ids.masked_fill(ids == 2, -1))
    assert (found - without).abs().max() < OP_FP32 * without.abs().max()


@pytest.mark.parametrize("fmt", CONVERSIONS)
def test_conversion_round_trip(tmp_path, fmt, capsys):
    """Every packed weight, dequantised plainly, is within its format's step of the original, what
    is not packed is unchanged, and the result is whole, loads and drafts."""
    source, out = tmp_path / "source", tmp_path / "out"
    drafting = SMALL | {"num_nextn_predict_layers": 1}
    make_checkpoint(source, "tiny", 1, drafting, tokenizer=False)
    config = convert_checkpoint(source, out, fmt)
    experts = {"fp8-fp4": "fp4", "base": "fp8", "ct-w4a16": "w4a16"}
    assert config.experts == experts.get(fmt, fmt)
    assert (out / HF_QUANT).exists() == (fmt == "nvfp4")
    before = load_file(next(source.glob("*.safetensors")))
    after = load_file(next(out.glob("*.safetensors")))
    for name, weight in before.items():
        stored = [after.pop(part) for part in stored_as(config, name, tuple(weight.shape))]
        if len(stored) == 1:
            assert torch.equal(stored[0], weight)
            continue
        values, steps = dequantised(*stored, reciprocal=fmt == "ct-nvfp4")
        assert ((values - weight.float()).abs() <= steps).all(), name
    assert not after
    assert main(["checkpoint", "inspect", str(out)]) == 0
    text = capsys.readouterr().out
    assert VARIANTS[config.experts] in text
    assert "complete" in text
    model = load(out, mtp=True)
    plain = model.generate([[1, 2]], 6, ignore_eos=True)
    assert model.generate([[1, 2]], 6, ignore_eos=True, num_speculative_tokens=1) == plain


def dequantised(data, scale, top=None, activations=None, reciprocal=False):
    """A packed weight's float32 values [out, in], and how far rounding may have moved each."""
    if data.dtype == torch.float8_e4m3fn:
        wide = scale.float().repeat_interleave(128, 0).repeat_interleave(128, 1)
        wide = wide[: data.shape[0], : data.shape[1]]
        values = data.float() * wide
        return values, values.abs() / 15 + wide * 2.0**-10
    if data.dtype == torch.int32 and scale.dtype == torch.int32:
        return from_gptq(data, scale, top), top.float().t().repeat_interleave(
            8 * len(data) // len(top), 1
        ) * (0.5 + 7.5 / 256)
    if data.dtype == torch.int32:
        assert top.tolist() == [len(data), data.shape[1] * 8]
        wide = scale.float().repeat_interleave(data.shape[1] * 8 // scale.shape[1], 1)
        # Half a step, and what the scale's own rounding moves 7 steps by; 7.5 becomes 7.
        return decode_int4(data.view(torch.uint8), scale), wide * (0.5 + 7.5 / 256)
    magnitudes = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    pairs = data.view(torch.uint8).long()
    values = torch.cat([magnitudes, -magnitudes])[torch.stack([pairs % 16, pairs // 16], -1)]
    step = scale.float().repeat_interleave(data.shape[1] * 2 // scale.shape[1], 1)
    if reciprocal:
        assert top.shape == (1,)
        step /= top
    elif top is not None:
        assert top.shape == activations.shape == ()
        assert activations == 1
        step *= top
    return values.flatten(-2) * step, step * (1 + 1e-6)  # half of the widest gap, from 4 to 6


def test_only_plain_checkpoints_are_converted(made, tmp_path):
    with pytest.raises(ValueError, match=r"is quantised \(fp4 experts\)"):
        convert_checkpoint(made / "fp8-fp4", tmp_path / "out", "fp8-fp4")
    with pytest.raises(ValueError, match="format is '0731'; allowed are fp8-fp4, base, nvfp4"):
        convert_checkpoint(made / "bf16", tmp_path / "out", "0731")
    with pytest.raises(ValueError, match="format is 'int4'; allowed are bf16"):
        make_checkpoint(tmp_path / "out", "tiny", fmt="int4")
    assert not (tmp_path / "out").exists()


def test_inspect(made, capsys, tmp_path):
    assert main(["checkpoint", "inspect", str(made / "0731")]) == 0
    text = capsys.readouterr().out
    assert "FP8 with FP4 experts, generation 0731" in text
    assert "5 (1 SWA, 2 CSA, 2 HCA), 1 hash-routed" in text
    assert "draft stages" in text
    assert "complete" in text
    assert main(["checkpoint", "inspect", str(made / "vision")]) == 0
    text = capsys.readouterr().out
    assert "generation 0731, Vision-Exp (served for text)" in text
    assert "images (skipped)" in text
    assert "complete" in text
    plain = sum(
        t.numel() for t in load_file(made / "bf16" / "model-00001-of-00001.safetensors").values()
    )
    main(["checkpoint", "inspect", str(made / "bf16")])
    config = ModelConfig.from_pretrained(made / "bf16")
    table = config.vocab_size * config.num_experts_per_tok
    assert f"{plain - table:,}" in capsys.readouterr().out
    copy = broken(made / "fp8-fp4", tmp_path, lambda tensors: tensors.pop("norm.weight"))
    main(["checkpoint", "inspect", str(copy)])
    assert "1 problems:\n  norm.weight is missing" in capsys.readouterr().out


def broken(source, tmp_path, damage):
    """A copy of a one-shard checkpoint with its tensors changed by damage(tensors)."""
    copy = tmp_path / "broken"
    shutil.copytree(source, copy)
    shard = next(copy.glob("*.safetensors"))
    tensors = load_file(shard)
    damage(tensors)
    save_file(tensors, shard)
    return copy


@pytest.mark.parametrize("experts", [33, 104, 132, 144, 160, 216])
def test_any_number_of_experts(tmp_path, experts, reference):
    """As pruned checkpoints have them, 4 per token; the hash table may name one twice."""
    hf = SMALL | A_LAYER_OF_EACH | {"n_routed_experts": experts, "num_experts_per_tok": 4}
    hf |= {"hidden_size": 64, "moe_intermediate_size": 32}
    make_checkpoint(tmp_path / "made", "tiny", 1, hf, tokenizer=False)

    def repeat(tensors):
        table = tensors["layers.0.ffn.gate.tid2eid"]
        table[::2, 1] = table[::2, 3]
        table[1::8] = experts - 1

    copy = broken(tmp_path / "made", tmp_path, repeat)
    ids = random_ids(160, seed=experts)
    expected = reference(copy, ids)
    found = load(copy, "float32").logits(ids)
    assert (found - expected).abs().max() < LOGITS_STD * expected.std()
    assert not torch.equal(found, load(tmp_path / "made", "float32").logits(ids))


@pytest.mark.parametrize("fmt", ["fp8-fp4", "nvfp4"])
def test_scales_may_lie_in_other_files(made, tmp_path, fmt):
    """In any order: repackers cut a file where it is full."""
    copy = tmp_path / "cut"
    shutil.copytree(made / fmt, copy)
    (copy / INDEX).unlink()
    shard = next(copy.glob("*.safetensors"))
    tensors = load_file(shard)
    shard.unlink()
    names = sorted(tensors, reverse=True)
    Random(1).shuffle(names)
    for i in range(3):
        part = {name: tensors[name] for name in names[i::3]}
        save_file(part, copy / f"model-{i}.safetensors")
    ids = random_ids(60, seed=1)
    assert torch.equal(load(copy).logits(ids), load(made / fmt).logits(ids))


def test_other_numbers_of_experts_are_named_first(made, tmp_path):
    """One layer's gate, all gates, and a table that names an expert that was pruned."""
    name = "layers.2.ffn.gate.weight"
    copy = broken(made / "fp8-fp4", tmp_path, lambda t: t.update({name: t[name][:7].contiguous()}))
    with pytest.raises(ValueError, match=rf"{name} is of 7 experts, n_routed_experts is 8"):
        load(copy)
    shutil.rmtree(copy)
    copy = broken(made / "fp8-fp4", tmp_path, lambda t: None)
    hf = json.loads((copy / "config.json").read_text()) | {"n_routed_experts": 6}
    (copy / "config.json").write_text(json.dumps(hf))
    with pytest.raises(ValueError, match=r"json: layers.0.ffn.gate.weight is of 8 experts, n_rou"):
        load(copy)
    shutil.rmtree(copy)
    table = "layers.0.ffn.gate.tid2eid"
    copy = broken(made / "fp8-fp4", tmp_path, lambda t: t[table][5].fill_(8))
    with pytest.raises(ValueError, match=rf"{table} names expert 8; n_routed_experts is 8, so"):
        load(copy)


W = "layers.0.attn.wq_a.weight"
S = "layers.0.attn.wq_a.scale"
E = "layers.1.ffn.experts.3.w2"


@pytest.mark.parametrize(
    ("damage", "pattern"),
    [
        (lambda t: t.pop(S), f"{S} is missing"),
        (lambda t: t.pop(f"{E}.weight"), f"{E}.weight is missing"),
        (lambda t: t.update({W: t[W].float()}), rf"{W} is F32, .*FP8 with FP4.* asks for F8_E4M3"),
        (lambda t: t.update({f"{E}.scale": t[f"{E}.scale"].float()}), "scale is F32, .*F8_E8M0"),
        (
            lambda t: t.update({S: torch.ones(1, 2)}),
            rf"{S} has shape \[1, 2\], config.json asks for \[1, 1\]",
        ),
        (
            lambda t: t.update({f"{E}.weight": t[f"{E}.weight"][:, :-1].clone()}),
            rf"{E}.weight has shape \[128, 31\], config.json asks for \[128, 32\]",
        ),
        (
            lambda t: t.update({"layers.0.attn.wq_a.weight_scale_inv": torch.ones(1)}),
            r"layers.0.attn.wq_a.(scale|weight_scale_inv) and .* are the same tensor; allowed is o",
        ),
        (lambda t: t.update({"layers.0.attn.wq_a.zeros": torch.ones(1)}), "zeros is unexpected"),
    ],
)
def test_damaged_tensors_are_named(made, tmp_path, damage, pattern):
    copy = broken(made / "fp8-fp4", tmp_path, damage)
    with pytest.raises(ValueError, match=pattern) as info:
        load(copy)
    assert "\n" not in str(info.value)


@pytest.mark.parametrize(
    ("fmt", "fields", "pattern"),
    [
        ("fp8-fp4", {"expert_dtype": "fp8"}, r"w1.weight is I8, .*FP8 experts.* asks for F8_E4M3"),
        ("base", {"expert_dtype": "fp4"}, r"w1.weight is F8_E4M3, .*FP4 experts.* I8 or U8"),
        ("nvfp4", {"expert_dtype": "fp8"}, "expert_dtype is 'fp8'; NVFP4 experts are 'fp4'"),
        ("fp8-fp4", {"quantization_config": None}, r"is F8_E4M3, .*no quantization_config"),
    ],
)
def test_wrong_flags_are_refused(made, tmp_path, fmt, fields, pattern):
    copy = tmp_path / "copy"
    shutil.copytree(made / fmt, copy)
    (copy / HF_QUANT).unlink(missing_ok=True)
    hf = json.loads((copy / "config.json").read_text()) | fields
    (copy / "config.json").write_text(json.dumps(hf))
    with pytest.raises(ValueError, match=pattern):
        load(copy)


def test_missing_and_truncated_shards(made, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(made / "fp8-fp4", copy)
    shard = next(copy.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(ValueError, match="is truncated"):
        load(copy)
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=f"is missing; {INDEX} names it"):
        load(copy)
