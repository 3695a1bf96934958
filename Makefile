# make env     the vLLM environment, built once per set of pins (see pyproject.toml);
#              make env-sglang builds SGLang's
# make demo    checkpoint, `vllm serve`, conversations; make demo-sglang: the same in SGLang
# make test    linters, types, the short set of tests; make test PARTS="core chat" runs two of its parts
# make test-all  everything; goes on where it was stopped
# TORCH_INDEX  optional: a wheel index that has CPU builds of torch, where PyPI's is a CUDA build

PYTHON ?= python3
VLLM := .venv-vllm
PIP = $(1)/bin/python -m pip --disable-pip-version-check --quiet
# setuptools warns of every editable installation that it is one.
EDITABLE = PYTHONWARNINGS=ignore $(call PIP,$(1)) install --no-deps --editable .
SGLANG := .venv-sglang
PARTS :=
PINS := $(shell sed '/^\[tool/,$$d' pyproject.toml | cat - env/vllm/pyproject.toml | sha256sum | cut -c1-16)
STAMP := $(VLLM)/.built-$(PINS)
SGLANG_STAMP := $(SGLANG)/.built-$(PINS)
TORCH = $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) --group torch-cpu
CHECKPOINTS := .cache/checkpoints

.PHONY: env env-sglang demo demo-sglang test test-all test-gpu lint bench bench-serve bench-slice bench-kv bench-chat eval train-mini compare-engines compare-mini kernels-report vllm-0.33 clean

env: $(STAMP)

env-sglang: $(SGLANG_STAMP)

$(STAMP):
	rm -rf $(VLLM)
	$(PYTHON) -m venv $(VLLM)
	$(call PIP,$(VLLM)) install 'pip>=25.1'
	$(call PIP,$(VLLM)) install $(TORCH)
	$(call PIP,$(VLLM)) install --group torch-cpu --group env-vllm
	$(call PIP,$(VLLM)) uninstall --yes torchvision torchaudio torchcodec
	$(call PIP,$(VLLM)) install --no-deps ./env/vllm
	$(call EDITABLE,$(VLLM))
	touch $@

# The small install: SGLang without its CUDA packages.
$(SGLANG_STAMP):
	rm -rf $(SGLANG)
	$(PYTHON) -m venv $(SGLANG)
	$(call PIP,$(SGLANG)) install 'pip>=25.1'
	$(call PIP,$(SGLANG)) install $(TORCH)
	$(call PIP,$(SGLANG)) install --group torch-cpu --group env-sglang
	$(call PIP,$(SGLANG)) install --no-deps --group env-sglang-engine
	$(call EDITABLE,$(SGLANG))
	touch $@

$(CHECKPOINTS)/%: $(STAMP)
	$(VLLM)/bin/dsv4 checkpoint make --preset $* --out $@

# Made anew when the trained weights change.
$(CHECKPOINTS)/mini-dspark: training/mini/dspark.safetensors
$(CHECKPOINTS)/mini $(CHECKPOINTS)/mini-dspark: training/mini/compact.safetensors training/mini/config.json | $(STAMP)
	rm -rf $@
	$(VLLM)/bin/dsv4 checkpoint make --preset $(@F) --out $@

demo: $(CHECKPOINTS)/mini
	$(VLLM)/bin/python -m benchmarks.demo $<

demo-sglang: $(CHECKPOINTS)/mini $(SGLANG_STAMP)
	$(SGLANG)/bin/python -m benchmarks.demo --engine sglang $<

# Parts, as many at once as there are cores; `python -m tests.run --help` names them.
test: $(STAMP) $(SGLANG_STAMP)
	$(VLLM)/bin/python -m tests.run $(PARTS)

test-all: $(STAMP) $(SGLANG_STAMP)
	$(VLLM)/bin/python -m tests.run --all $(PARTS)

lint: $(STAMP)
	$(VLLM)/bin/ruff check .
	$(VLLM)/bin/ruff format --check .
	$(VLLM)/bin/mypy
	$(VLLM)/bin/lint-imports

bench: $(CHECKPOINTS)/bench $(CHECKPOINTS)/mini $(CHECKPOINTS)/mini-dspark $(SGLANG_STAMP)
	$(VLLM)/bin/python -m benchmarks.serving $< --sglang $(SGLANG)/bin/python
	OMP_NUM_THREADS=1 $(VLLM)/bin/python -m benchmarks.drafts $(CHECKPOINTS)/mini $(CHECKPOINTS)/mini-dspark

# Both engines' servers of dsv4-mini, measured by `dsv4 bench`; NATIVE=1: the engines' own V4 too.
bench-serve: $(CHECKPOINTS)/mini $(SGLANG_STAMP)
	$(VLLM)/bin/python -m benchmarks.bench_serve $< --sglang $(SGLANG)/bin/python $(if $(NATIVE),--native)

kernels-report: $(STAMP)
	OMP_NUM_THREADS=1 $(VLLM)/bin/python -m benchmarks.kernels_report

# Three real Flash layers with all experts, 12 GiB on disk: not made unless asked for.
$(CHECKPOINTS)/slice-fp8-fp4: $(STAMP)
	$(VLLM)/bin/dsv4 checkpoint make --preset slice --format fp8-fp4 --experts 256 --out $@

bench-slice: $(CHECKPOINTS)/slice-fp8-fp4
	$(VLLM)/bin/python -m benchmarks.slice $<

bench-kv: $(CHECKPOINTS)/bench
	$(VLLM)/bin/python -m benchmarks.kv_formats $<

# dsv4-mini: accuracy per skill, engine and format; training (goes on where it stopped).
eval: $(CHECKPOINTS)/mini $(CHECKPOINTS)/mini-dspark $(SGLANG_STAMP)
	$(VLLM)/bin/python -m benchmarks.accuracy $< --sglang $(SGLANG)/bin/python

train-mini: $(STAMP)
	$(VLLM)/bin/python -m training.train --out .cache/mini

bench-chat: $(STAMP)
	$(VLLM)/bin/python -m benchmarks.chat

# 200 chat requests to both engines: ids and parsed messages have to be equal.
compare-engines: $(CHECKPOINTS)/tiny $(SGLANG_STAMP)
	$(VLLM)/bin/python -m tests.compare_engines $< \
		--vllm $(VLLM)/bin/python --sglang $(SGLANG)/bin/python

# 100 held-out conversations in float32: transformers' ids from every engine.
compare-mini: $(CHECKPOINTS)/mini $(SGLANG_STAMP)
	$(VLLM)/bin/python -m tests.compare_mini $< --sglang $(SGLANG)/bin/python

# Where there is a GPU: the kernels' tests, gpu-check, dsv4-mini's answers; gpu-test.json.
test-gpu:
	$(or $(VIRTUAL_ENV),$(VLLM))/bin/python -m tests.on_card

# vLLM 0.33's Python files (330 MB to fetch), for the tests of its configuration on GPUs.
vllm-0.33: $(STAMP)
	$(VLLM)/bin/python -m tests.vllm033.get

# Beside the environment's own: put first in PYTHONPATH.
.cache/triton-%: $(STAMP)
	$(call PIP,$(VLLM)) install --no-deps --target $@.part triton==$*
	mv $@.part $@

clean:
	rm -rf .cache $(VLLM) $(SGLANG)
