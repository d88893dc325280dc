# The first Python of 3.11 or newer; `make PYTHON=/path/to/python demo` chooses another.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
MINDSPORE_VENV := .venv-mindspore

.PHONY: help install demo test test-mindspore test-slow test-lessons faults faults-mindspore check format bench clean

help:
	@echo "make demo     install, then run the whole factory on embedded data"
	@echo "make test     install, then run the tests (CPU, no network)"
	@echo "make test-mindspore  the tests of the MindSpore engine, in an environment of its own (.venv-mindspore)"
	@echo "make test-slow  the tests that take tens of seconds each (CI runs them too)"
	@echo "make test-lessons  teach the embedded models in all four ways and hold them to their scores (10 minutes)"
	@echo "make faults   the full tier of faults made on purpose, and docs/faults.md (some hours, F3 most of them)"
	@echo "make faults-mindspore  the same in runs of the MindSpore engine, and docs/faults-mindspore.md"
	@echo "make check    format, lint and type checks"
	@echo "make format   rewrite files in the house format"
	@echo "make bench    ratios against diffusers, interleaved in one process"

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed and none was found on PATH."; exit 4; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@

demo: install
	$(BIN)/cogvideox demo

test: install
	$(BIN)/pytest -n 2

# MindSpore wants an older numpy than the rest is tested with, and its engine needs no torch.
test-mindspore: $(MINDSPORE_VENV)/.installed
	$(MINDSPORE_VENV)/bin/pytest -n 2 --dist loadfile tests/mindspore_engine

$(MINDSPORE_VENV)/.installed: pyproject.toml constraints-mindspore.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed and none was found on PATH."; exit 4; }
	$(PYTHON) -m venv $(MINDSPORE_VENV)
	$(MINDSPORE_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r constraints-mindspore.txt
	$(MINDSPORE_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	@touch $@

test-slow: install
	$(BIN)/pytest -n 2 -m slow

test-lessons: install
	$(BIN)/pytest -n 2 -m "slow or long" tests/tiny/test_lessons.py

faults: install
	$(BIN)/python -m tests.faults --tier full --json docs/faults.json --markdown docs/faults.md

faults-mindspore: $(MINDSPORE_VENV)/.installed
	$(MINDSPORE_VENV)/bin/python -m tests.faults --engine mindspore --tier full \
		--json docs/faults-mindspore.json --markdown docs/faults-mindspore.md

check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/basedpyright
	@find cogvideox_factory -name '*.py' | xargs cat | wc -l | xargs echo "lines in cogvideox_factory:"

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: install
	$(BIN)/python -m benchmarks

clean:
	rm -rf $(VENV) $(MINDSPORE_VENV) .pytest_cache .ruff_cache .hypothesis
