# A fresh clone needs Python 3.11 and make:  make demo  or  make test,  in either order.
# Both make .venv on first use, from constraints.txt, and renew it when pyproject.toml or constraints.txt change.
# Another Python:                make demo PYTHON=/path/to/python3.11
# torch without CUDA, smaller:   PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make demo
PYTHON ?= $(shell command -v python3.11 || command -v python3 || echo python3.11)
# Processes that run the tests; each uses one core and up to a gigabyte.
JOBS ?= 2
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable

.PHONY: help demo test lint format clean

help:
	@echo "make demo    train, compress and measure a small network on this machine"
	@echo "make test    run all tests that take seconds; the rest: $(BIN)/python -m pytest -m slow"
	@echo "make lint    style, types and import contracts"
	@echo "make format  put the code into the one format"
	@echo "make clean   remove what the above made"

demo: $(VENV)/core.stamp
	$(BIN)/edgeprune demo

test: $(VENV)/dev.stamp
	$(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadfile

lint: $(VENV)/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright
	$(BIN)/lint-imports

format: $(VENV)/dev.stamp
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find edgeprune tests examples benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "edgeprune needs Python 3.11 or newer ($(PYTHON) is not): make PYTHON=/path/to/python3.11"; exit 2; }
	@$(PYTHON) -m venv $(VENV) || \
		{ rm -rf $(VENV); echo "$(PYTHON) can't make a virtual environment (on Debian: apt install python3-venv)"; exit 2; }

$(VENV)/core.stamp: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) '.[zoo]'
	@touch $@

$(VENV)/dev.stamp: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) '.[zoo,dev]'
	@touch $@ $(VENV)/core.stamp
