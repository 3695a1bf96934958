"""Layers whose weights stay as the checkpoint packs them: FP8 linears; FP4, NVFP4, int4 or FP8
experts.

As in the authors' inference/kernel.py, the inputs of FP8 and MXFP4 products are rounded to e4m3 in
blocks of 128; `wo_a`, NVFP4 and int4 experts take theirs as they are. Who makes the inputs rounds
them, where it can (`takes_rounded`). Weights are moved as raw bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from dsv4_plugin.config import FP8_BLOCK, INT4, Experts, ModelConfig
from dsv4_plugin.kernels.experts import packed_experts
from dsv4_plugin.kernels.packed import (
    Both,
    FP4Matrix,
    FP8Matrix,
    Inputs,
    Int4Matrix,
    Matrix,
    NVFP4Matrix,
    arranged,
    gated_product,
    grouped_product,
    product,
    products,
    round_rows,
)
from dsv4_plugin.kernels.swiglu import swiglu
from dsv4_plugin.model.loading import give_below, shard
from dsv4_plugin.model.parallel import GroupedLinear, MakeExperts, OutputGroups, Parallel
from dsv4_plugin.quant.e4m3 import decode_ue8m0
from dsv4_plugin.quant.int4 import from_gptq


class QuantisedParallel:
    """Another `Parallel`, but with packed layers where the checkpoint packs them."""

    def __init__(self, config: ModelConfig, plain: Parallel) -> None:
        self.config, self.plain = config, plain
        self.rank, self.size, self.dtype = plain.rank, plain.size, plain.dtype
        self.embedding, self.head, self.all_reduce = plain.embedding, plain.head, plain.all_reduce
        self.breaking = plain.breaking

    def column(self, n_in: int, n_out: int, prefix: str) -> nn.Module:
        if not self._packs(prefix):
            return self.plain.column(n_in, n_out, prefix)
        return self._linear(n_in, n_out, prefix, 0)

    def row(self, n_in: int, n_out: int, prefix: str, reduce: bool = True) -> nn.Module:
        if not self._packs(prefix):
            return self.plain.row(n_in, n_out, prefix, reduce)
        layer = self._linear(n_in, n_out, prefix, 1)
        layer.reduce = self.all_reduce if reduce else None
        return layer

    def replicated(self, n_in: int, n_out: int, prefix: str) -> nn.Module:
        if not self._packs(prefix):
            return self.plain.replicated(n_in, n_out, prefix)
        return self._linear(n_in, n_out, prefix)

    def _packs(self, prefix: str) -> bool:
        return self.config.is_fp8(prefix) or self.config.is_int4(prefix)

    def _linear(
        self, n_in: int, n_out: int, prefix: str, split: int | None = None
    ) -> QuantisedLinear | Int4Linear:
        if self.config.is_int4(prefix):
            return Int4Linear(self, n_in, n_out, prefix, split, self.config.int4_block)
        return QuantisedLinear(self, n_in, n_out, prefix, split, self.config.rounds_fp8_inputs)

    def experts(self, prefix: str, make: MakeExperts | None = None) -> nn.Module:
        stored = self.config.experts_of(prefix)
        if stored == "plain":
            return self.plain.experts(prefix, make)

        def packed_experts(config: ModelConfig, rank: int, size: int) -> nn.Module:
            return QuantisedExperts(config, stored, rank, size)

        return self.plain.experts(prefix, make or packed_experts)


def quantised(config: ModelConfig, parallel: Parallel) -> Parallel:
    """The layers that a checkpoint asks for, on an engine's ranks."""
    return parallel if config.experts == "plain" else QuantisedParallel(config, parallel)


def grouped_linear(
    parallel: Parallel, groups: OutputGroups, dim: int, n_out: int, prefix: str, rounded: bool
) -> nn.Module:
    """wo_a for heads of `dim`: [T, G, in] -> [T, G * out]. rounded: what follows takes these."""
    if isinstance(parallel, QuantisedParallel) and parallel.config.is_fp8(prefix):
        return QuantisedGroupedLinear(groups, dim, n_out, prefix, rounded)
    if isinstance(parallel, QuantisedParallel) and parallel.config.is_int4(prefix):
        return Int4GroupedLinear(groups, dim, n_out, prefix, parallel.config.int4_block)
    return GroupedLinear(groups.parts, groups.unit * dim, n_out, parallel.dtype, groups.wo_a)


def raw(tensor: Tensor) -> Tensor:
    """A tensor of one-byte values as uint8, bit for bit."""
    return tensor.view(torch.uint8)


def fp8_scale(tensor: Tensor) -> Tensor:
    """An FP8 weight's scales, stored as UE8M0 bytes or float32, as float32."""
    return decode_ue8m0(raw(tensor)) if tensor.element_size() == 1 else tensor.float()


def packed(*shape: int, dtype: torch.dtype = torch.uint8) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False)


def blocks(n: int) -> int:
    return -(-n // FP8_BLOCK)


def part_of(n: int, size: int, unit: int, what: str) -> int:
    """A rank's share of n values. Raises ValueError where it would cut a block of `unit`."""
    if n % size or (size > 1 and n // size % unit):
        raise ValueError(
            f"{size} tensor-parallel ranks cannot share {what} evenly: it has {n} values in blocks "
            f"of {unit} with one scale each"
        )
    return n // size


class QuantisedLinear(nn.Module):
    """y = x W^T with an FP8 weight in 128 x 128 blocks; `split` is the dim shared over ranks."""

    def __init__(
        self,
        parallel: Parallel,
        n_in: int,
        n_out: int,
        prefix: str,
        split: int | None = None,
        rounds: bool = True,
    ) -> None:
        super().__init__()
        self.rank, self.split, self.rounds = parallel.rank, split, rounds
        shape = [n_out, n_in]
        if split is not None:
            shape[split] = part_of(shape[split], parallel.size, FP8_BLOCK, f"{prefix}.weight")
        self.weight = packed(*shape)
        self.scale = packed(*(blocks(n) for n in shape), dtype=torch.float32)
        self.reduce: Callable[[Tensor], Tensor] | None = None
        self.matrix: FP8Matrix | None = None

    def take(self, name: str, tensor: Tensor) -> bool:
        """The full weight [out, in], or its scales."""
        if self.split is not None:
            own = self.get_parameter(name).shape[self.split]
            tensor = shard(tensor, self.split, self.rank, own)
        return give_below(self, name, raw(tensor) if name == "weight" else fp8_scale(tensor))

    def finalize_weights(self) -> None:
        """After loading: as this device multiplies it."""
        self.hold(arranged(self.stored(), self.rounds))

    def stored(self) -> FP8Matrix:
        return self.matrix or FP8Matrix(self.weight.data, self.scale.data)

    def hold(self, matrix: FP8Matrix) -> None:
        """The same weight, as it will be multiplied."""
        self.matrix, self.weight.data, self.scale.data = matrix, matrix.codes, matrix.scale

    def forward(self, x: Inputs | Both) -> Tensor:
        """x [T, in], rounded here if it is not."""
        y = product(rounded(x, self), self.stored())
        return y if self.reduce is None else self.reduce(y)


def takes_rounded(*linears: nn.Module) -> bool:
    """Are these products of rounded inputs?"""
    return all(isinstance(linear, QuantisedLinear) and linear.rounds for linear in linears)


def rounded(x: Inputs | Both, linear: nn.Module) -> Inputs:
    """x [T, in] as the linear takes it."""
    if isinstance(x, Both):
        return x.rounded if takes_rounded(linear) else x.plain
    return round_rows(x) if isinstance(x, Tensor) and takes_rounded(linear) else x


class Beside:
    """Two linears of the same input, made of loaded ones. FP8 weights of whole blocks lie on top of
    each other from now on, and are multiplied at once."""

    matrix: FP8Matrix | None = None

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        self.linears = first, second
        if isinstance(first, QuantisedLinear) and isinstance(second, QuantisedLinear):
            pair = [first.stored(), second.stored()]
            self.outputs = pair[0].shape[0], pair[1].shape[0]
            if takes_rounded(first, second) and self.outputs[0] % FP8_BLOCK == 0:
                codes = torch.cat([matrix.codes for matrix in pair])
                self.matrix = FP8Matrix(codes, torch.cat([matrix.scale for matrix in pair]))
        self.arrange()

    def arrange(self) -> None:
        """As this device multiplies them; a second time nothing is left to do."""
        if self.matrix is None or self.matrix.inputs:
            return
        self.matrix = arranged(self.matrix, rounded=True)
        first, second = self.linears
        assert isinstance(first, QuantisedLinear)
        assert isinstance(second, QuantisedLinear)
        first.hold(self.matrix.part(0, self.outputs[0]))
        second.hold(self.matrix.part(self.outputs[0], sum(self.outputs)))

    def __call__(self, x: Inputs | Both) -> tuple[Tensor, Tensor]:
        """x [T, in] -> the products [T, out] with both."""
        first, second = self.linears
        if self.matrix is None:
            return first(rounded(x, first)), second(rounded(x, second))
        return products(rounded(x, first), self.matrix, self.outputs)


class Gated(Beside):
    """The clamped SwiGLU of an expert's w1 and w3. rounded: what follows takes these rows so."""

    def __init__(self, w1: nn.Module, w3: nn.Module, limit: float, rounded: bool) -> None:
        super().__init__(w1, w3)
        self.limit, self.rounded = limit, rounded

    def swiglu(self, x: Inputs | Both) -> Inputs:
        """x [T, in] -> [T, F]."""
        if self.matrix is not None:
            x = rounded(x, self.linears[0])
            return gated_product(x, self.matrix, self.limit, self.rounded)
        return swiglu(*self(x), self.limit, x.dtype)


class QuantisedGroupedLinear(nn.Module):
    """wo_a: [T, G, in] -> [T, G * out]. A rank's parts of groups may begin anywhere in a block of
    rows, so the scale is kept for every row."""

    def __init__(
        self, groups: OutputGroups, dim: int, n_out: int, prefix: str, rounded: bool
    ) -> None:
        super().__init__()
        self.rounded = rounded
        self.groups, self.n_out, n_in = groups, n_out, groups.unit * dim
        if groups.parts_of_group > 1 and n_in % FP8_BLOCK:
            raise ValueError(
                f"{groups.size} tensor-parallel ranks would cut {prefix}.weight into columns of "
                f"{n_in}, which are no whole blocks of {FP8_BLOCK}"
            )
        rows = groups.parts * n_out
        self.weight = packed(rows, n_in)
        self.scale = packed(rows, blocks(n_in), dtype=torch.float32)
        self.matrix: FP8Matrix | None = None

    def take(self, name: str, tensor: Tensor) -> bool:
        """The full weight [G * out, in], or its scales."""
        if name == "weight":
            return give_below(self, name, self.groups.wo_a(raw(tensor)))
        rows = fp8_scale(tensor).repeat_interleave(FP8_BLOCK, 0)
        return give_below(self, name, self.groups.wo_a(rows[: self.groups.groups * self.n_out]))

    def finalize_weights(self) -> None:
        """After loading: as this device multiplies it."""
        self.matrix = arranged(self.stored(), rounded=False)
        self.weight.data = self.matrix.codes

    def stored(self) -> FP8Matrix:
        return self.matrix or FP8Matrix(self.weight.data, self.scale.data, height=1)

    def forward(self, x: Tensor) -> Inputs:
        return grouped_product(x, self.stored(), self.rounded)


class Int4Linear(nn.Module):
    """y = x W^T with an int4 weight of GPTQ's layout; `split` is the dim shared over ranks.

    qweight: bytes [out, in / 2]; scales [out, in / block].
    """

    def __init__(
        self, parallel: Parallel, n_in: int, n_out: int, prefix: str, split: int | None, block: int
    ) -> None:
        super().__init__()
        self.rank, self.split = parallel.rank, split
        shape = [n_out, n_in]
        if split is not None:
            unit = block if split == 1 else 1
            shape[split] = part_of(shape[split], parallel.size, unit, f"{prefix}.qweight")
        self.qweight = packed(shape[0], shape[1] // 2)
        self.scales = packed(shape[0], shape[1] // block, dtype=torch.bfloat16)
        self.reduce: Callable[[Tensor], Tensor] | None = None

    def take(self, name: str, tensor: Tensor) -> bool:
        """A full tensor of GPTQ's: qweight [in / 8, out], scales [in / block, out], and what only
        has to be known."""
        if name not in ("qweight", "scales"):
            return name in ("qzeros", "g_idx")
        param = self.get_parameter(name)
        if self.split is not None:
            part = param.shape[self.split]
            if self.split == 1 and name == "qweight":
                part //= 4
            tensor = shard(tensor, 1 - self.split, self.rank, part)
        take_gptq(param, tensor)
        return True

    def forward(self, x: Tensor) -> Tensor:
        y = product(x, Int4Matrix(self.qweight, self.scales))
        return y if self.reduce is None else self.reduce(y)


def by_rows(name: str, cut: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
    """cut, of a tensor with a row per output, applied to one that may lie as GPTQ's do."""
    if name.endswith((".qweight", ".scales")):
        return cut(tensor.t()).t()
    return cut(tensor)


def take_gptq(param: nn.Parameter, tensor: Tensor) -> None:
    """A weight's words, or its scales: those stay in the dtype they come in, float16 or
    bfloat16."""
    if param.dtype == torch.uint8:
        param.data.copy_(from_gptq(tensor))
    else:
        param.data = param.data.view(tensor.dtype)
        param.data.copy_(tensor.t())


class Int4GroupedLinear(nn.Module):
    """wo_a in int4: [T, G, in] -> [T, G * out], a product for each group."""

    def __init__(self, groups: OutputGroups, dim: int, n_out: int, prefix: str, block: int) -> None:
        super().__init__()
        self.groups, n_in = groups, groups.unit * dim
        if n_in % block:
            raise ValueError(
                f"{groups.size} tensor-parallel ranks would cut {prefix}.qweight into columns of "
                f"{n_in}, which are no whole blocks of {block}"
            )
        rows = groups.parts * n_out
        self.qweight = packed(rows, n_in // 2)
        self.scales = packed(rows, n_in // block, dtype=torch.bfloat16)

    def take(self, name: str, tensor: Tensor) -> bool:
        if name not in ("qweight", "scales"):
            return name in ("qzeros", "g_idx")
        take_gptq(self.get_parameter(name), self.groups.wo_a(tensor.t()).t())
        return True

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[1]
        parts = zip(self.qweight.chunk(n), self.scales.chunk(n), strict=True)
        return torch.cat([product(x[:, i], Int4Matrix(*part)) for i, part in enumerate(parts)], -1)


class QuantisedExperts(nn.Module):
    """All experts of a layer, each split over ranks by width, packed as in the checkpoint."""

    def __init__(self, config: ModelConfig, stored: Experts, rank: int = 0, size: int = 1) -> None:
        super().__init__()
        self.rank, self.limit, self.stored = rank, config.swiglu_limit, stored
        n, d = config.n_routed_experts, config.hidden_size
        self.block = config.block_of(stored)
        self._scaled: set[str] = set()
        unit = FP8_BLOCK if stored == "fp8" else self.block
        f = part_of(config.moe_intermediate_size, size, unit, "moe_intermediate_size")
        for name, (n_out, n_in) in {"w1": (f, d), "w3": (f, d), "w2": (d, f)}.items():
            for part, param in _parts(stored, n, n_out, n_in, self.block):
                self.register_parameter(f"{name}_{part}", param)

    def take(self, name: str, tensor: Tensor) -> bool:
        """name: `17.w1.weight`, `17.w1.scale`, or what else `names.stored_as` has for a matrix."""
        expert, matrix, part = name.split(".")
        if part in ("qweight", "scales"):
            return self._take_gptq(int(expert), matrix, part, tensor)
        if part in ("input_scale", "input_global_scale", "weight_shape", "qzeros", "g_idx"):
            return True  # of the activations, which NVFP4 products take as they are; known
        if part == "weight_global_scale":  # the reciprocal of NVFP4's own
            part, tensor = "weight_scale_2", 1 / tensor
        if part == "weight_packed":
            part, tensor = "weight", raw(tensor)
        param = self.get_parameter(f"{matrix}_{part}")[int(expert)]
        if param.dim():
            split = 1 if matrix == "w2" else 0
            tensor = shard(tensor, split, self.rank, param.shape[split])
        else:
            tensor = tensor.reshape(())
        if param.dtype != torch.bfloat16:
            tensor = raw(tensor) if param.dtype == torch.uint8 else fp8_scale(tensor)
        param.copy_(tensor)
        return True

    def _take_gptq(self, expert: int, matrix: str, part: str, tensor: Tensor) -> bool:
        """qweight [in / 8, out] or scales [in / block, out], of all ranks."""
        name = f"{matrix}_{'weight' if part == 'qweight' else 'weight_scale'}"
        param = self.get_parameter(name)
        if part == "scales" and tensor.dtype != param.dtype:
            if name in self._scaled:
                raise ValueError(f"{expert}.{matrix}.scales are not of the dtype of other experts'")
            param.data = param.data.view(tensor.dtype)
        self._scaled.add(name)
        split = 0 if matrix == "w2" else 1
        own = param.shape[2 - split] // (4 if split == 0 and part == "qweight" else 1)
        tensor = shard(tensor, split, self.rank, own)
        param[expert].copy_(from_gptq(tensor) if part == "qweight" else tensor.t())
        return True

    def weights(self) -> tuple[Matrix, Matrix, Matrix]:
        """w1, w3 and w2, of all experts each."""
        return self._matrix("w1"), self._matrix("w3"), self._matrix("w2")

    def _matrix(self, name: str) -> Matrix:
        def part(which: str) -> Tensor:
            return self.get_parameter(f"{name}_{which}")

        if self.stored == "fp4":
            return FP4Matrix(part("weight"), part("scale"))
        if self.stored == "fp8":
            return FP8Matrix(part("weight"), part("scale"))
        if self.stored in INT4:
            return Int4Matrix(part("weight"), part("weight_scale"))
        return NVFP4Matrix(part("weight"), part("weight_scale"), part("weight_scale_2"))

    def forward(self, x: Tensor, ids: Tensor, weight: Tensor, also: Tensor | None = None) -> Tensor:
        rounding = self.stored in ("fp4", "fp8")
        return packed_experts(x, ids, weight, *self.weights(), self.limit, rounding, also)


def _parts(
    stored: Experts, n: int, n_out: int, n_in: int, block: int
) -> Iterator[tuple[str, nn.Parameter]]:
    """The tensors of n experts' matrices [out, in], by the authors' and NVIDIA's names."""
    if stored == "fp8":
        yield "weight", packed(n, n_out, n_in)
        yield "scale", packed(n, blocks(n_out), blocks(n_in), dtype=torch.float32)
        return
    yield "weight", packed(n, n_out, n_in // 2)
    scale = "scale" if stored == "fp4" else "weight_scale"
    dtype = torch.bfloat16 if stored in INT4 else torch.uint8
    yield scale, packed(n, n_out, n_in // block, dtype=dtype)
    if stored in ("nvfp4", "ct-nvfp4"):
        yield "weight_scale_2", packed(n, dtype=torch.float32)
