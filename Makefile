# make env     the vLLM environment, built once per set of pins (see pyproject.toml)
# make demo    checkpoint, `vllm serve`, one streamed chat
# make test    linters, types, tests
# TORCH_INDEX  optional: a wheel index that has CPU builds of torch, where PyPI's is a CUDA build

PYTHON ?= python3
VLLM := .venv-vllm
PIP = $(1)/bin/python -m pip --disable-pip-version-check --quiet
STAMP := $(VLLM)/.built-$(shell sha256sum pyproject.toml | cut -c1-16)
CHECKPOINTS := .cache/checkpoints

.PHONY: env demo test lint unit bench bench-chat fuzz clean

env: $(STAMP)

$(STAMP): pyproject.toml
	rm -rf $(VLLM)
	$(PYTHON) -m venv $(VLLM)
	$(call PIP,$(VLLM)) install 'pip>=25.1'
	$(call PIP,$(VLLM)) install $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) --group torch-cpu
	$(call PIP,$(VLLM)) install --group torch-cpu --group env-vllm
	$(call PIP,$(VLLM)) uninstall --yes torchvision torchaudio torchcodec
	$(call PIP,$(VLLM)) install --no-deps ./env/vllm
	$(call PIP,$(VLLM)) install --no-deps --editable .
	touch $@

$(CHECKPOINTS)/%: $(STAMP)
	$(VLLM)/bin/dsv4 checkpoint make --preset $* --out $@

demo: $(CHECKPOINTS)/tiny
	$(VLLM)/bin/python -m benchmarks.demo $<

test: lint unit

lint: $(STAMP)
	$(VLLM)/bin/ruff check .
	$(VLLM)/bin/ruff format --check .
	$(VLLM)/bin/mypy
	$(VLLM)/bin/lint-imports

unit: $(STAMP)
	$(VLLM)/bin/python -m pytest

bench: $(CHECKPOINTS)/bench
	$(VLLM)/bin/python -m benchmarks.serving $<

bench-chat: $(STAMP)
	$(VLLM)/bin/python -m benchmarks.chat

fuzz: $(STAMP)
	$(VLLM)/bin/python -m tests.chat.fuzz --cases 100000

clean:
	rm -rf .cache $(VLLM)
