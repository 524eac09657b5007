# Everything a checkout needs. Only Python >= 3.11, pip and make must be there already.
# Another interpreter: `make test PYTHON=python3.12`. Another place for the environment: VENV=...
# pip is configured by its own environment variables and files; nothing is overridden here.

PYTHON ?= python3
VENV ?= .venv
# Two workers of one thread each (see tests/conftest.py) suit two cores; raise it on more.
WORKERS ?= 2

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# A file's tests share costly fixtures (a fetched model, a short training), so they stay together.
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test test-all parity support reliability lint types docs format clean

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

# torch goes in first, alone and pinned, so that no other requirement chooses its build.
$(VENV)/.torch: constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(v < (3, 11) and f"moduli needs Python >= 3.11, and $(PYTHON) is {v[0]}.{v[1]}; choose one with make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install torch -c constraints.txt
	@touch $@

$(VENV)/.runtime: $(VENV)/.torch pyproject.toml
	$(PIP) install -e . -c constraints.txt
	@touch $@

$(VENV)/.dev: $(VENV)/.torch pyproject.toml
	$(PIP) install -e '.[dev]' -c constraints.txt
	@touch $@ $(VENV)/.runtime

# Beside the environment, not in it: torchao complains on every import where its own kernels do not
# load, and every other test should see what a user without it sees.
$(VENV)/.quant: $(VENV)/.dev
	$(PIP) install --no-deps --target $(VENV)/quant torchao -c constraints.txt
	@touch $@

# Beside the environment too: a third of a gigabyte, and without a GPU only its interpreter is used.
# It exists for Linux only, and builds of torch for CUDA bring the version that suits them.
$(VENV)/.triton: $(VENV)/.dev
	$(BIN)/python -c 'import sys; from importlib.util import find_spec; sys.exit(sys.platform == "linux" and not find_spec("triton"))' || $(PIP) install --no-deps --target $(VENV)/triton triton==3.9.0
	@touch $@

# For one test; it brings two dozen packages.
$(VENV)/.lm-eval: $(VENV)/.dev
	$(PIP) install -e '.[dev,lm-eval]' -c constraints.txt
	@touch $@

demo: $(VENV)/.runtime ## the main job on a real model and real data; report in runs/demo/
	$(BIN)/moduli demo

test: $(VENV)/.dev ## the test suite without what is slow or needs a GPU
	$(PYTEST) -m 'not slow and not gpu'

test-all: $(VENV)/.dev $(VENV)/.quant $(VENV)/.triton $(VENV)/.lm-eval ## every test; those that need a GPU are skipped without one
	$(PYTEST)
	PYTHONPATH=$(VENV)/quant $(PYTEST) tests/stacks/test_quantised.py
	PYTHONPATH=$(VENV)/triton $(PYTEST) tests/experts/test_triton.py tests/models/stick_breaking/test_triton.py

parity: $(VENV)/.dev ## the stored reference cases alone, one line per case
	$(BIN)/python -m tests.parity tests/parity/data

support: $(VENV)/.dev ## check every family with every method; rewrites the table in docs/guide/support.md
	OMP_NUM_THREADS=1 $(BIN)/python -W ignore -m tests.support

# RELIABILITY="--runs 40 --kills 5" does fewer.
reliability: $(VENV)/.dev ## 200 small runs, killed 20 times, must end like a study left in peace
	OMP_NUM_THREADS=1 $(BIN)/python -W ignore -m tests.reliability.killed_study $(RELIABILITY)

lint: $(VENV)/.dev ## ruff: rules and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev ## mypy in strict mode over src/
	$(BIN)/mypy

# The variable silences an announcement of the theme's authors, which is no warning about our pages.
docs: $(VENV)/.dev ## build the documentation into site/; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

format: $(VENV)/.dev ## rewrite the sources the way ruff wants them
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove what was built, but neither the environment nor runs/
	rm -rf build dist site .mypy_cache .ruff_cache .pytest_cache .hypothesis
