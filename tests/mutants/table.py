"""Mistakes put into the code one at a time: each has to make a test of the short set fail."""

# ruff: noqa: E501  (MUTANTS is a table)

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """In `file`, `old` becomes `new`; tests/{test}.py must fail, of its tests those that `only`
    names (pytest's -k). compiled: kernels run as emulated sm80 code, not interpreted; engine: in
    whose environment."""

    name: str
    file: str
    old: str
    new: str
    test: str
    only: str = ""
    compiled: bool = False
    engine: str = "vllm"


KERNELS = "dsv4_plugin/kernels"
DEVICE, BITS, ARRIVAL = (f"{KERNELS}/{name}.py" for name in ("device", "bits", "arrival"))
STEP, QKV, COMPRESS, STREAMS, GATE, EXPERTS, PACKED, ATTENTION, INDEX, SWIGLU = (
    f"{KERNELS}/{name}/kernel.py"
    for name in [
        "step",
        "qkv",
        "compress",
        "streams",
        "gate",
        "experts",
        "packed",
        "attention",
        "index",
        "swiglu",
    ]
)
FP8 = f"{KERNELS}/packed/fp8.py"
PROGRAMMATIC = f"{KERNELS}/programmatic.py"
ATTENTION_KEYS, UNPACK = f"{KERNELS}/attention/keys.py", f"{KERNELS}/attention/unpack.py"
INDEX_TOPK = f"{KERNELS}/index/topk.py"
BLOCK, TRANSFORMER, DSPARK = (
    f"dsv4_plugin/model/{name}.py" for name in ("block", "transformer", "dspark")
)
PRODUCT, LINEAR = f"{KERNELS}/experts/product.py", f"{KERNELS}/linear/kernel.py"
GROUPS, CPU_ATTENTION = "dsv4_plugin/cache/groups.py", "dsv4_plugin/kernels/attention/cpu.py"
FILES, SPECULATE = "dsv4_plugin/checkpoint/files.py", "dsv4_plugin/speculate.py"
RENDER, ENCODER = "dsv4_plugin/chat/render.py", "dsv4_plugin/chat/encoder.py"
MACHINE, TRIAL = "dsv4_plugin/chat/machine.py", "dsv4_plugin/chat/trial.py"
VLLM_CACHE, VLLM_ACTIVE = "vllm_ext/cache.py", "vllm_ext/active.py"
PARALLEL, VLLM_PARALLEL = "dsv4_plugin/model/parallel.py", "vllm_ext/parallel.py"
SGLANG_ACTIVE, SGLANG_BACKEND, SGLANG_CHAINS = (
    f"sglang_ext/{name}.py" for name in ("active", "backend", "chains")
)
BENCH_CLIENT, MEASURES, DATASETS = (
    f"dsv4_plugin/tools/bench/{name}.py" for name in ("client", "measures", "datasets")
)

MUTANTS = [
    # Masks and guards
    Mutant("padding rows get a position", STEP, "tl.where(real, position, -1)", "position", "triton/test_step"),
    Mutant("rows past the end are placed", STEP, "inside & (request <", "inside | (request <", "triton/test_step"),
    Mutant("holes get an address", STEP, "number >= 0, address, -1", "number >= -9, address, -1", "triton/test_step"),
    Mutant("rows without a slot are written", QKV, "if row >= 0:", "if row >= -1:", "triton/test_qkv"),
    Mutant("heads past the last", QKV, "inside = (at < D) & (first + i < H)", "inside = (at < D) & (first + i <= H)", "triton/test_qkv"),
    Mutant("the ring is read in every window", COMPRESS, "kept = used & middle\n        top", "kept = used & (middle | True)\n        top", "triton/test_compress", "hca"),
    Mutant("columns past the last", STREAMS, "inside = (n < N)[None, :] & (d < D)[:, None]", "inside = (n < N)[None, :] & (d < D + 9)[:, None]", "triton/test_streams"),
    Mutant("a share's tile past its end", STREAMS, "stop = tl.minimum(begin + rows, end)", "stop = begin + rows", "triton/test_streams", "batch"),
    Mutant("experts past the last compete", GATE, "tl.where(e < E, (ordered", "tl.where(e < E + 1, (ordered", "triton/test_gate"),
    Mutant("rows of no pair are stored", PRODUCT, "gate, mask=real[:, None] &", "gate, mask=(pair[:, None] >= 0) &", "triton/test_experts", "nobody or one_expert"),
    Mutant("rows of nobody are added", EXPERTS, "here += ((id >= 0) & (id < E),)", "here += (id < E,)", "triton/test_experts", "nobody"),
    Mutant("outputs past the last", PRODUCT, "inside = n < N\n", "inside = n < N + 9\n", "triton/test_experts", "packed_experts and fp8"),
    Mutant("entries that a row does not see are chosen", INDEX_TOPK, "seen = tl.minimum((tl.load(position + t) + 1) // RATIO, n)", "seen = n", "triton/test_index", "topk"),
    Mutant("no guard for a tile that nobody sees", ATTENTION, "m = tl.maximum(tl.ceil(tl.max(s, 1) * scale), LOWEST)", "m = tl.ceil(tl.max(s, 1) * scale)", "triton/test_attention", "decode"),
    Mutant("entries that do not exist yet are seen", ATTENTION, "seen = (pos + 1) // RATIO\n", "seen = (pos + RATIO) // RATIO\n", "triton/test_attention", "prefill"),
    # Off by one
    Mutant("the window is one too long", ATTENTION, "front = tl.minimum(pos + 1, SPAN)", "front = tl.minimum(pos + 1, SPAN + 1)", "triton/test_attention", "prefill"),
    Mutant("an entry closes a token late", COMPRESS, "mask=begin + R <= end", "mask=begin + R < end", "triton/test_compress", "csa"),
    Mutant("an entry without a page is written", COMPRESS, "if number >= 0:", "if begin + R <= end:", "triton/test_compress", "without_a_page"),
    Mutant("early windows are too few", COMPRESS, "early = begin + HALVES", "early = begin + HALVES - 1", "triton/test_compress", "csa"),
    Mutant("the ring's row after, not before", COMPRESS, "(first + RING_ROWS - 1) % RING_ROWS", "first % RING_ROWS", "triton/test_compress", "drafts"),
    Mutant("one choice too few", GATE, "for i in tl.static_range(K):", "for i in tl.static_range(K - 1):", "triton/test_gate"),
    Mutant("one Sinkhorn turn too few", STREAMS, "for _ in range(1, iters):", "for _ in range(2, iters):", "triton/test_streams", "2-4-72"),
    Mutant("requests past the first look", STEP, "tl.range(0, requests, ENDS", "tl.range(0, ENDS, ENDS", "triton/test_step"),
    Mutant("a block too few", EXPERTS, "+ (M - 1)) // M", "+ (M - 2)) // M", "triton/test_experts", "place"),
    Mutant("blocks of the expert before", EXPERTS, "first = tl.sum(tl.where(number < e,", "first = tl.sum(tl.where(number < e - 1,", "triton/test_experts", "place"),
    # Wrong index
    Mutant("scales start a word late", DEVICE, "word = PLAIN // 4 + (D - PLAIN) // 2 + tl", "word = PLAIN // 4 + (D - PLAIN) // 2 + 1 + tl", "triton/test_qkv"),
    Mutant("the angles of the next pair", DEVICE, "tl.load(cis + at - PLAIN, mask", "tl.load(cis + at - PLAIN + 2, mask", "triton/test_qkv"),
    Mutant("rows and columns of the mixing change places", STREAMS, "r[None, None, :] * R + r[None, :, None]", "r[None, :, None] * R + r[None, None, :]", "triton/test_streams", "2-4-72"),
    Mutant("the other half is pooled", COMPRESS, "token += (HALVES - 1) * C", "token += 0 * C", "triton/test_compress", "csa"),
    Mutant("ties go to the higher entry", GATE, "| (EXPERTS - 1 - e)", "| e", "triton/test_gate"),
    Mutant("the key's scale is dropped", INDEX, "1) * scale\n", "1) * 256.0\n", "triton/test_index", "scores"),
    Mutant("nibbles change places", PRODUCT, "even = tl.join(tl.join(k0, k4)", "even = tl.join(tl.join(k4, k0)", "triton/test_experts", "every_code_of_int4"),
    Mutant("the scale of the next block", PRODUCT, "n[:, None] * COUNT + block[None, :]", "n[:, None] * COUNT + 0 * block[None, :]", "triton/test_experts", "every_code_of_int4"),
    Mutant("the first scale of a word", PRODUCT, "part = first % EACH + tl.arange(0, BLOCKS)", "part = tl.arange(0, BLOCKS)", "triton/test_int4", "words"),
    Mutant("one scale for all rows", FP8, "scale = (w_scale + row * BLOCKS)[:, None]", "scale = (w_scale + row // 128 * BLOCKS)[:, None]", "triton/test_packed", "grouped"),
    Mutant("what is rounded is not of the model's dtype", STREAMS, "        y = y.to(h.dtype.element_ty).to(tl.float32)\n        store", "        store", "triton/test_packed", "sublayer"),
    Mutant("codes lie as in the checkpoint", FP8, "codes.view(rows, -1, 2, 32, 2).permute(0, 1, 3, 4, 2).reshape(rows, -1)", "codes.clone()", "triton/test_packed", "every_code and bits"),
    Mutant("a row's scale is its first block's", FP8, "by = tl.load(x_scale + i)", "by = tl.load(x_scale)", "triton/test_packed", "test_product and codes"),
    Mutant("torch reads codes as they lie", "dsv4_plugin/kernels/packed/__init__.py", "if self.bits:", "if False:", "triton/test_packed", "torch_reads"),
    Mutant("the second weight's rows are as long as the first's", FP8, "tl.where(later, N - first, first)", "first", "triton/test_packed", "two_weights"),
    Mutant("weights of the first choice", PRODUCT, "tl.load(weight + pair,", "tl.load(weight + pair // PAIRS * PAIRS,", "triton/test_experts", "plain"),
    Mutant("inputs in the order of another format", PRODUCT, "word * (EACH // HALF) + j // HALF", "word + j // HALF * (BLOCK // EACH)", "triton/test_experts", "packed_experts and fp4"),
    Mutant("of the first pairs those of nobody count", EXPERTS, "mask=(head >= 0) & (head < E))", "mask=head < EXPERTS)", "triton/test_experts", "place"),
    Mutant("a block is not filled up", EXPERTS, "mask=rest < last * M)", "mask=rest < last * M - 1)", "triton/test_experts", "place"),
    Mutant("pairs of nobody count", EXPERTS, "mask=(id >= 0) & (id < E))", "mask=id < EXPERTS)", "triton/test_experts", "place"),
    Mutant("an expert's next pairs begin anew", EXPERTS, "next_row = _put(row_of, next_row,", "next_row = _put(row_of, first * M,", "triton/test_experts", "place"),
    Mutant("scales of the wrong blocks", ATTENTION_KEYS, "(u // 8 % 4 * 8)", "(u // 8 % 2 * 8)", "triton/test_attention", "decode"),
    Mutant("choices of another row", ATTENTION, "chosen += t * choices", "chosen += 0 * t", "triton/test_attention", "decode"),
    Mutant("quarters are counted on, past the last", ATTENTION, "dim = (first ^ i) * W + w", "dim = (first + i) * W + w", "triton/test_attention", "decode"),
    # Arithmetic that is nearly right
    Mutant("the sink is left out", ATTENTION, "_fold(tl.exp2(at - m), alpha, l_i, beta)", "_fold(0.0 * at, alpha, l_i, beta)", "triton/test_attention", "prefill"),
    Mutant("what is far below the maximum weighs more", ATTENTION, "tl.where(n < -64.0, 0.0, bits.to", "tl.where(n < -999.0, 0.0, 2e18 * bits.to", "triton/test_attention", "far"),
    Mutant("a scale by multiplication", BITS, "(bits & 0x7FFFFF) > 0x600000", "(bits & 0x7FFFFF) >= 0x600000", "triton/test_kit"),
    Mutant("a sign comes from the next code", BITS, "(words & -0x7FFF8000) | ((words >> DOWN)", "((words >> 1) & -0x7FFF8000) | ((words >> DOWN)", "triton/test_experts", "packed_experts and fp4"),
    Mutant("zeros of int4 are not -8", BITS, "0x3F803F80, -0x3CF73CF8)", "0x3F803F80, -0x3CF83CF8)", "triton/test_experts", "every_code_of_int4"),
    Mutant("pairs change places", BITS, "tl.join(low, high), (pairs", "tl.join(high, low), (pairs", "triton/test_packed", "every_code and bits"),
    Mutant("ties of e4m3 away from zero", BITS, "size + 0x7FFFF + ((size >> 20) & 1)", "size + 0x80000", "triton/test_kit"),
    Mutant("no rounding to the model's dtype", QKV, "(x.to(tl.float32) * rms * w).to(kind).to(tl.float32)", "x.to(tl.float32) * rms * w", "triton/test_qkv", "real"),
    Mutant("multiply-adds are fused", QKV, "enable_fp_fusion=False", "enable_fp_fusion=True", "triton/test_qkv", "real", compiled=True),
    Mutant("a carry is not packed", COMPRESS, "top = tl.where(stored, lse, top + log(safe))", "top = tl.where(stored, lse, top)", "triton/test_compress", "csa"),
    Mutant("segments after a carry do not wait", COMPRESS, "begin += (filler < requests).to(tl.int32)", "begin += 0", "triton/test_compress", "filled"),
    Mutant("segments after a carry are left out", COMPRESS, "(opens % PAGE == 0) & (opens <= end)", "(opens < 0)", "triton/test_compress", "filled"),
    Mutant("only one segment after a carry is taken", COMPRESS, "& (who > after)", "& (who > 9 * after + 9)", "triton/test_compress", "filled"),
    Mutant("the weights' middle part is dropped", STREAMS, "(w - middle.to(tl.float32)).to(KIND), middle, high", "(w - middle.to(tl.float32)).to(KIND), high", "triton/test_streams", "4096 or 264"),
    Mutant("a share's last chunk is left out", STREAMS, "for i in tl.static_range(1, PER):", "for i in tl.static_range(1, PER - 1):", "triton/test_streams", "4096"),
    Mutant("sums of the slab before", STREAMS, "to = partial + (t - first) * chunks * WIDTH\n            _multiply", "to = partial + t * chunks * WIDTH\n            _multiply", "triton/test_streams", "batch"),
    Mutant("squares are summed as outputs", STREAMS, "squares += asked[2 * i + 1]", "squares += tl.max(asked[2 * i], 2)[:, :, None]", "triton/test_streams", "4096"),
    Mutant("a stream joins with the next one's weight", STREAMS, "mixing + tk * R + j", "mixing + tk * R + (j + 1) % R", "triton/test_streams", "2-4-72"),
    Mutant("the limit bounds the gate below too", PRODUCT, "gate = tl.minimum(gate.to(tl.float32), limit)", "gate = tl.maximum(tl.minimum(gate.to(tl.float32), limit), -limit)", "triton/test_experts", "plain"),
    Mutant("the limit bounds the shared expert's gate below too", SWIGLU, "gate = tl.minimum(gate, limit)", "gate = tl.maximum(tl.minimum(gate, limit), -limit)", "triton/test_swiglu"),
    Mutant("padding chooses experts", GATE, "ids = tl.where(real, ids, -1)", "ids = tl.where(real, ids, ids)", "triton/test_gate"),
    Mutant("the tensor's scale is dropped", PRODUCT, "gate *= unit1", "gate *= 1.0", "triton/test_experts", "packed_experts and nvfp4"),
    Mutant("the last piece is left out", ARRIVAL, "for piece in tl.static_range(1, PIECES):", "for piece in tl.static_range(1, PIECES - 1):", "triton/test_experts", "company"),
    Mutant("a piece begins a step late", PRODUCT, "_opened(i % STEPS == 0, gate_before", "_opened(i % STEPS == 1, gate_before", "triton/test_experts", "company"),
    Mutant("a float32 weight's middle part is dropped", LINEAR, "torch.stack(found[::-1])", "torch.stack([found[-1], found[0]])", "triton/test_linear"),
    Mutant("a piece of a float32 product is left out", ARRIVAL, "for piece in tl.static_range(1, PIECES):", "for piece in tl.static_range(2, PIECES):", "triton/test_linear"),
    Mutant("a float32 product's pieces are not made apart", LINEAR, "before = tl.where(i % STEPS == 0,", "before = tl.where(i < 0,", "triton/test_linear", "company"),
    Mutant("of steps together the first counts twice", LINEAR, "at = (i * TOGETHER + j) * DEPTH", "at = i * TOGETHER * DEPTH", "triton/test_linear", "company"),
    # Between programs
    Mutant("an expert's tiles share a counter", PRODUCT, "counter + tl.program_id(1) * tl.num_programs(0) + block", "counter + block", "triton/test_experts", "company"),
    Mutant("the last but one goes on", ARRIVAL, "== programs - 1", "== tl.maximum(programs - 2, 0)", "triton/test_arrival"),
    Mutant("a kernel does not wait for the launch before", GATE, "    follow()\n", "", "triton/test_programmatic", "follows"),
    Mutant("a product that asks for its weights does not wait", LINEAR, "    follow()\n", "", "triton/test_programmatic", "follows"),
    Mutant("a row more is asked for", PROGRAMMATIC, "(row < rows)", "(row <= rows)", "triton/test_programmatic", "asked", compiled=True),
    Mutant("a row ends 16 bytes early", PROGRAMMATIC, "(begin + width * BYTES) & -16", "(begin + width * BYTES - 16) & -16", "triton/test_programmatic", "asked", compiled=True),
    Mutant("what is asked for reaches beyond a row", PROGRAMMATIC, "(begin + width * BYTES) & -16", "(begin + width * BYTES + 15) & -16", "triton/test_programmatic", "asked", compiled=True),
    Mutant("every thread asks for its row", PROGRAMMATIC, "(i % SHARE == 0) & ", "", "triton/test_programmatic", "asked", compiled=True),
    Mutant("the second weight of a SwiGLU is not asked for", FP8, "(group + half)", "group", "triton/test_programmatic", "asked", compiled=True),
    Mutant("every row tile asks for the weight", FP8, "tl.where(row_tile == 0, tl.minimum(N - n, W), 0)", "tl.minimum(N - n, W)", "triton/test_programmatic", "asked", compiled=True),
    Mutant("the least part of a float32 weight is asked for alone", LINEAR, "w + (p * N + ", "w + (", "triton/test_programmatic", "asked", compiled=True),
    Mutant("streams but the first are not asked for", STREAMS, "== 0, N * R, 0)", "== 0, N, 0)", "triton/test_programmatic", "asked", compiled=True),
    Mutant("inputs are asked for with the weights", PACKED, "prefetch(scale + first", "prefetch(x, count, 0, 64, W)\n    prefetch(scale + first", "triton/test_programmatic", "asked", compiled=True),
    Mutant("counters are not put back", ARRIVAL, "tl.store(counter, 0)", "pass", "triton/test_arrival"),
    Mutant("no barrier before an arrival", ARRIVAL, "    tl.debug_barrier()  # one", "    # one", "triton/test_arrival"),
    Mutant("an arrival orders nothing", ARRIVAL, 'sem="acq_rel"', 'sem="relaxed"', "triton/test_arrival"),
    Mutant("the last piece adds the others to its own", FP8, "        one = in_order(mine + at, SIZE, PIECES)\n", "        others = in_order(mine + at, SIZE, PIECES) - tl.load(mine + piece * SIZE + at)\n        one += others\n", "triton/test_packed", "test_pieces"),
    Mutant("output tiles share a counter", FP8, "slot = group * tl.num_programs(0) + tl.program_id(0)", "slot = group", "triton/test_packed", "company"),
    Mutant("pieces follow from the rows", FP8, "columns = triton.cdiv(n, tiles_of.few.outputs) * groups", "columns = triton.cdiv(n, tiles_of.few.outputs) * groups * rows", "triton/test_packed", "company"),
    Mutant("all gather the first request's keys", INDEX, "at = who * padded + entry", "at = entry", "triton/test_index", "gathered"),
    Mutant("an entry less is gathered", INDEX, "n = (tl.load(lengths + who) // ratio)", "n = (tl.load(lengths + who) // ratio - 1)", "triton/test_index", "gathered"),
    Mutant("more ties are taken than there is room for", INDEX_TOPK, "(tied & (ties < room))", "(tied & (ties <= room))", "triton/test_index", "test_topk"),
    Mutant("ties leave no room", INDEX_TOPK, "tl.where(alone, 0, K - above)", "tl.where(alone, 0, K)", "triton/test_index", "test_topk"),
    Mutant("what is below the best K is chosen with them", INDEX_TOPK, "tl.where(reach == K, low - 1, low)", "low - 1", "triton/test_index", "test_topk"),
    Mutant("the least of fewer groups than are chosen", INDEX_TOPK, "GROUPS: tl.constexpr = min(KP, BLOCK)", "GROUPS: tl.constexpr = min(KP // 2, BLOCK)", "triton/test_index", "test_topk"),
    Mutant("a block's best go where the block before has its", INDEX_TOPK, "place = t * next_stride + p * K", "place = t * next_stride + p // 2 * K", "triton/test_index", "in_rounds"),
    Mutant("the last block of a round is lost", INDEX_TOPK, "seen = seen // FULL * K + tl.minimum(seen % FULL, K)", "seen = seen // FULL * K", "triton/test_index", "in_rounds"),
    Mutant("rows chosen in the first round are chosen again", INDEX_TOPK, "is_chosen = seen <= FULL", "is_chosen = seen < 0", "triton/test_index", "in_rounds"),
    Mutant("cells are folded from the last on", ATTENTION, "place = cell * H", "place = (first + end - 1 - cell) * H", "triton/test_attention", "order"),
    Mutant("dealt tiles know no pieces", ATTENTION, "DEALT=dealt", "DEALT=False", "triton/test_attention", "order"),
    Mutant("a cell more than there is", ATTENTION, "end = tl.minimum(first + PIECE, cells)", "end = first + PIECE", "triton/test_attention", "order"),
    Mutant("the tile after the next is taken for the next", ATTENTION, "_part(tile + 1, end, pos, front, seen, KEYS)\n        index", "_part(tile + 2, end, pos, front, seen, KEYS)\n        index", "triton/test_attention", "prefill"),
    Mutant("the next tile lies in this one's blocks", ATTENTION, "        block = find_blocks", "        find_blocks", "triton/test_attention", "prefill"),
    # Unpacked rows
    Mutant("a chunk's window is unpacked a row late", UNPACK, "length - count - (SPAN - 1), 0", "length - count - (SPAN - 2), 0", "triton/test_attention", "bits and positions0"),
    Mutant("unpacked rows of two requests overlap", UNPACK, "to_window += tl.sum(near + seen)", "to_window += tl.sum(near + seen) - 1", "triton/test_attention", "bits and positions0"),
    Mutant("a text begins where its unpacked rows do", UNPACK, "to_window - first + before", "to_window + before", "triton/test_attention", "bits and positions0"),
    Mutant("a tile is written past a request's rows", UNPACK, "real = (i < left)[:, None] &", "real = (i < left + 1)[:, None] &", "triton/test_attention", "bits and positions2"),
    Mutant("unpacked entries begin among the window's", UNPACK, "to_entries = to_window + front", "to_entries = to_window + front - 1", "triton/test_attention", "bits and positions2"),
    Mutant("rows are unpacked where there is no room", UNPACK, "& (to_entries + seen <= room)", "", "triton/test_attention", "beyond"),
    Mutant("requests without rows are unpacked", UNPACK, "pays = pays & (count > 0)", "pays = pays | (count < 0)", "triton/test_attention", "bits and positions0"),
    Mutant("all requests are unpacked with the prompts", UNPACK, "0.0 if fits else least,", "0.0,", "triton/test_attention", "only and positions0"),
    Mutant("decoded rows among prompts are left out", ATTENTION, "[] if plain.all else [replace(lies, take=0)]", "[]", "triton/test_attention", "only and positions0"),
    Mutant("decoded rows among prompts are taken for unpacked", ATTENTION, "-1 if plain.all else 1", "-1", "triton/test_attention", "taken"),
    Mutant("one request's entries are counted", UNPACK, "n + requests * (span - 1 + most)", "n + requests * (span - 1) + most", "triton/test_attention", "when", compiled=True),
    Mutant("decoded rows are unpacked", ATTENTION, "if fp8 and step.tiles and", "if fp8 and", "triton/test_attention", "taken"),
    Mutant("only steps of prompts are warmed up with many rows", "dsv4_plugin/warmup.py", "*((n, 1) for n in ways),", "", "triton/test_warmup", "pages", compiled=True),
    # Graphs
    Mutant("attention is captured with its metadata", BLOCK, "self.attend = parallel.breaking(self.attn.forward)", "self.attend = self.attn.forward", "triton/test_vllm", compiled=True),
    # Addresses
    Mutant("int32 page addresses", COMPRESS, "begin + R <= end, other=-1).to(tl.int64)", "begin + R <= end, other=-1)", "triton/test_compress", "gigabytes"),
    Mutant("int32 addresses of experts", PRODUCT, "e = tl.load(expert_of + block).to(tl.int64)", "e = tl.load(expert_of + block)", "triton/test_experts", "gigabytes"),
    Mutant("int32 window addresses", STEP, "mask=real, other=-1).to(tl.int64)", "mask=real, other=-1)", "triton/test_step"),
    Mutant("int32 block addresses", ATTENTION_KEYS, "block.to(tl.int64) * stride", "block * stride", "triton/test_attention", "gigabytes"),
    Mutant("int32 key addresses", DEVICE, "(place <= last), other=-1).to(tl.int64)", "(place <= last), other=-1)", "triton/test_index", "gigabytes"),
    # The network on CPUs
    Mutant("decoding misses the entry that it closes", GROUPS, "visible = (position + 1) // ratio", "visible = position // ratio", "core/test_exact", "ragged"),
    Mutant("a page goes on with its own carry", GROUPS, "position[paging] // size - 1)", "position[paging] // size)", "core/test_exact", "chunks and 1"),
    Mutant("the window of a span is a row short", GROUPS, "max(0, p0 - self.window + 1), total", "max(0, p0 - self.window + 2), total", "core/test_exact", "chunks and 64"),
    Mutant("the sink is left out on CPUs", CPU_ATTENTION, "[..., -1] = sink", "[..., -1] = -1e30", "core/test_ops"),
    Mutant("rejected drafts stay", SPECULATE, "batch.lengths[running] -= count - kept.cpu()", "pass", "core/test_mtp", "wrong"),
    # DSpark
    Mutant("a block is seeded a position early", SPECULATE, 'step = batch.step(running, torch.full_like(running, ids.shape[1]), "block")', 'batch.lengths[running] -= 1\n        step = batch.step(running, torch.full_like(running, ids.shape[1]), "block")', "core/test_dspark", "a_block"),
    Mutant("streams are normed before their mean", TRANSFORMER, "spread(*now).float().mean(1)", "torch.nn.functional.rms_norm(spread(*now).float(), h.shape[-1:]).mean(1)", "core/test_dspark", "a_block"),
    Mutant("streams are read before the layer", TRANSFORMER, "            now = block(now, input_ids, step, cache)\n            if means", "            before, now = now, block(now, input_ids, step, cache)\n            if means and int(layer) in means:\n                means[int(layer)] = spread(*before).float().mean(1).to(h.dtype)\n            elif means", "core/test_dspark", "a_block"),
    Mutant("the collapsed state is read, not the mean", TRANSFORMER, "spread(*now).float().mean(1).to(h.dtype)", "plain(streams(*now, block.hc_attn.mixer(block.attn_norm))[1])", "core/test_dspark", "a_block"),
    Mutant("rows of a block see those before them only", GROUPS, "last = seq_lens[request] - 1", "last = seq_lens[request] - count[request] + rows - query_start[request]", "core/test_dspark", "see_one_another"),
    Mutant("a block sees a row less of the window", GROUPS, "self.window = layout.sliding_window + together", "self.window = layout.sliding_window + max(0, together - 1)", "core/test_dspark", "visible"),
    Mutant("noise takes the anchor's place", DSPARK, "torch.cat([anchor[:, None], noise], 1)", "torch.cat([noise, anchor[:, None]], 1)", "core/test_dspark", "a_block"),
    Mutant("the anchor corrects nothing", DSPARK, "corrected = base[:, i] + last.markov_head.logits(e)", "corrected = base[:, i] + (i > 0) * last.markov_head.logits(e)", "core/test_dspark", "a_block"),
    Mutant("confidence knows its own draft", DSPARK, "last.confidence_head(y[:, i], e)", "last.confidence_head(y[:, i], last.markov_head.embed(before))", "core/test_dspark", "test_confidence"),
    Mutant("a block goes on behind a doubt", SPECULATE, "sure.long().cumprod(1).sum(1).cpu()", "sure.long().sum(1).cpu()", "core/test_dspark", "first_doubt"),
    Mutant("drafts narrow the block", DSPARK, "self.dspark.block_size - 1)", "self.dspark.block_size - 2)", "core/test_dspark", "a_block"),
    Mutant("window layers turn as compressed ones do", "dsv4_plugin/kernels/step/__init__.py", "kinds = [SWA] + [CSA]", "kinds = [CSA] + [CSA]", "core/test_dspark", "a_block"),
    Mutant("stages are always three", "dsv4_plugin/checkpoint/names.py", "stages=1 + max(stages)", "stages=3", "core/test_dspark", "how_many"),
    Mutant("a stage's tensor too many is passed over", FILES, "(mtp or not name.startswith(MTP))", "not name.startswith(MTP)", "core/test_dspark", "too_many"),
    Mutant("shared experts of stages are passed over", "dsv4_plugin/checkpoint/load.py", "if give(model, path, weight):", 'if (path.startswith("mtp.") and ".shared_" in path) or give(model, path, weight):', "core/test_dspark", "loaded_once"),
    Mutant("a draft behind a wrong one is kept", SPECULATE, "kept = agree.long().cumprod(1).sum(1)", "kept = agree.long().sum(1)", "core/test_dspark", "forced"),
    Mutant("a draft is kept unseen", SPECULATE, "agree = (picked[:, :-1] == ids[:, 1:]) & on_device[:, 1:]", "agree = ((picked[:, :-1] == ids[:, 1:]) | (ids[:, 1:] == 0)) & on_device[:, 1:]", "core/test_dspark", "sampled_answers"),
    Mutant("kernels see a block as a text", ATTENTION, "step.sees[rows], (cells_m", "step.position[rows], (cells_m", "triton/test_attention", "blocks"),
    Mutant("the drafter's head is normed", STREAMS, "NORM=not plain", "NORM=True", "triton/test_streams", "plain"),
    Mutant("a file's end is not checked", FILES, "if size != end:", "if size < first:", "core/test_bad_input"),
    # Checkpoints of others
    Mutant("a group's second product is the first's", "dsv4_plugin/model/quantised.py", "[product(x[:, i], Int4Matrix(*part))", "[product(x[:, 0], Int4Matrix(*part))", "core/test_gptq", "values"),
    Mutant("scales of either sign are damage", "dsv4_plugin/checkpoint/values.py", 'if not name.endswith(".scales"):', "if name:", "core/test_gptq", "sign"),
    Mutant("any zeros will do", "dsv4_plugin/checkpoint/values.py", "(tensor == word).all()", "(tensor == tensor).all()", "core/test_gptq", "tensors_that"),
    Mutant("float16 scales are read as bfloat16", "dsv4_plugin/model/quantised.py", "param.data = param.data.view(tensor.dtype)\n        param.data.copy_", "param.data.copy_", "core/test_gptq", "network"),
    Mutant("wo_b's columns are not repeated in GPTQ's layout", "dsv4_plugin/model/quantised.py", "return cut(tensor.t()).t()", "return tensor", "core/test_gptq", "split_inside"),
    Mutant("FP8 compressors lose their scales", "dsv4_plugin/checkpoint/unpack.py", "return e4m3_values(codes) * wide", "return e4m3_values(codes) * wide.sign()", "core/test_compressed", "first_uploads"),
    Mutant("V4.1's grammar has V4's parameters", "dsv4_plugin/chat/grammar.py", '" ": "deepseek_v4_1_xml"', '" ": "deepseek_xml"', "vllm_chat/test_v41", "spelling"),
    Mutant("V4.1's images are dropped", "vllm_ext/chat_renderer.py", "any(map(_has_images, messages))", "not messages", "vllm_chat/test_v41", "images"),
    # The bench
    Mutant("chunks are counted as tokens", BENCH_CLIENT, "self.arrivals.append((now, tokens))", "self.arrivals.append((now, len(self.arrivals) + 1))", "core/test_bench", "tokens"),
    Mutant("failed requests are dropped", MEASURES, "requests=len(sent.answers) + sent.unsent", "requests=len(good) + sent.unsent", "core/test_bench", "counted"),
    Mutant("a cut stream counts as whole", BENCH_CLIENT, "if self.error is None and not self.done:", "if self.error is None and self.done is None:", "core/test_bench", "counted"),
    Mutant("levels ask the same", DATASETS, 'Random(f"{seed}/{level}/{session}")', 'Random(f"{seed}/{session}")', "core/test_bench", "levels_have"),
    # The tuner
    Mutant("other bits pass where they have to be the same", "benchmarks/tune.py", "if op.sums is None:", "if not op.sums:", "triton/test_tune", "bits"),
    Mutant("variants that launch otherwise are not timed", "benchmarks/tune.py", "compiled.launches == known[AS_IT_IS].launches", "compiled.launches != known[AS_IT_IS].launches", "triton/test_tune", "launches"),
    # Chat
    Mutant("text may forge a turn", ENCODER, "state.update(added_tokens=[], ", "state.update(", "chat/test_security"),
    Mutant("system texts run together", RENDER, '"\\n\\n".join(turn.content for turn in system', '"".join(turn.content for turn in system', "chat/test_encoder"),
    Mutant("text arguments are written as JSON", RENDER, "self.text(value if is_text else ", "self.text(", "chat/test_encoder"),
    Mutant("one sign is enough for a call", MACHINE, "sum(signs) >= 2", "sum(signs) >= 1", "chat/test_parser"),
    Mutant("the first parameter always makes a call", TRIAL, "return not self.in_reasoning and not self.amid_line", "return True", "chat/test_parser"),
    # Adapters
    Mutant("requests with one prefix share a ring in vLLM", VLLM_CACHE, "ring=metadata[self.ring.prefix]", "ring=metadata[self.page.prefix]", "vllm/test_engine"),
    Mutant("rows of vLLM's blocks see those before them only", "vllm_ext/dspark.py", "together = True", "together = False", "vllm_v2/test_dspark", "proposed", compiled=True),
    Mutant("vLLM's drafter reads the streams a layer late", "vllm_ext/model.py", "tuple(layer - 1 for", "tuple(layer - 2 for", "vllm_v2/test_dspark", "proposed", compiled=True),
    Mutant("a page of each prefix is computed again for DSpark", "vllm_ext/config.py", "disable_eagle_block_drop = True", "disable_eagle_block_drop = False", "vllm_v2/test_dspark", "proposed", compiled=True),
    Mutant("another plugin goes unnoticed in vLLM", VLLM_ACTIVE, "if found[what] != wanted:", "if not found[what]:", "vllm/test_registration"),
    Mutant("a data-parallel rank loads every expert", PARALLEL, "return 0 <= own < self.count and give(", "return give(", "parallel/test_ranks", "data_parallel"),
    Mutant("data-parallel ranks take the first one's rows", VLLM_PARALLEL, "first = group.rank_in_group * most", "first = 0", "parallel/test_ranks", "data_parallel"),
    Mutant("what the cache had counts as compiled", "dsv4_plugin/warmup.py", "if not cache_hit:", "if src is not None:", "triton/test_warmup", compiled=True),
    Mutant("a forced end tells nobody in SGLang", "sglang_ext/hooks.py", "for rid in list(self.rid_to_state):", "for rid in ():", "sglang/test_registration", "forced", engine="sglang"),
    Mutant("SGLang keeps right drafts behind a wrong one", SGLANG_CHAINS, ".cumprod(1).sum(1)", ".sum(1)", "sglang/test_chains", "kept", compiled=True, engine="sglang"),
    Mutant("SGLang's samples are another request's", SGLANG_CHAINS, "values.repeat_interleave(n, 0)", "values.repeat_interleave(n, 0).flip(0)", "sglang/test_chains", "samples", compiled=True, engine="sglang"),
    Mutant("new slots of SGLang's start a token early", SGLANG_CHAINS, "req_to_token[request, start:end]", "req_to_token[request, start - 1 : end - 1]", "sglang/test_chains", "new_slots", compiled=True, engine="sglang"),
    Mutant("verified drafts take the places before them in SGLang", SGLANG_BACKEND, "query = ahead = batch.spec_info.draft_token_num", "query = batch.spec_info.draft_token_num", "sglang/test_steps", compiled=True, engine="sglang"),
    Mutant("all of SGLang's drafts are of one place", SGLANG_BACKEND, "Backend(runner, ahead + 1)", "Backend(runner, 1)", "sglang/test_steps", "rows", compiled=True, engine="sglang"),
    Mutant("SGLang's rings are as without drafts", "sglang_ext/config.py", "num_speculative_tokens=num_speculative_tokens", "num_speculative_tokens=0", "sglang/test_steps", "rejected", compiled=True, engine="sglang"),
    Mutant("nobody counts SGLang's drafter's windows", "sglang_ext/pool.py", "window += 4 * model.layout.window.words", "pass", "sglang/test_registration", "pool_takes", engine="sglang"),
    Mutant("any drafter will do for SGLang's MTP", "sglang_ext/config.py", "if config.dspark is not None:", "if config is None:", "sglang/test_registration", "checkpoint_s", engine="sglang"),
    Mutant("a hook that is not there goes unnoticed in SGLang", SGLANG_ACTIVE, "if target not in HookRegistry._patched]", "if not target]", "sglang/test_registration", engine="sglang"),
]  # fmt: skip
