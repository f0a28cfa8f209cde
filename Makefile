# Every target works on a fresh clone: it makes its own .venv first.
PYTHON ?= python3
BIN := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: rehearse test soak check bench install clean

install: .venv/installed

# Compiled once: without it each kernel spends seconds on its imports.
.venv/installed: requirements.lock pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python --requirement requirements.lock
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --editable .
	$(BIN)/python -m compileall -q -j 0 .venv/lib runbook_lib rehearsal || true
	touch $@

rehearse: install
	$(BIN)/runbook rehearse

test: install
	sh rehearsal/install-debian.sh
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# Some hours. It can be stopped: what has a result in SOAK is not run again.
SOAK ?= .soak
soak: install
	$(BIN)/python -m pytest -m soak
	$(BIN)/python -m pytest --ledger postgresql
	$(BIN)/python -m pytest -m hypothesis --hypothesis-profile=soak
	$(BIN)/python -m tests.soak --state $(SOAK)

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: install
	$(BIN)/python benchmarks/judge_nab.py

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis
