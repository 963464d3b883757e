# `make demo` and `make test` do all the set-up on a machine with Python 3.11 and make.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
export OMP_NUM_THREADS := 1

.PHONY: help demo demo-flower test check fmt docs test-slow clean

help:
	@echo "make demo       compare five methods on real digits (some minutes, set-up included)"
	@echo "make demo-flower  three sites and a server as processes, two of them killed (some ten minutes)"
	@echo "make test       check, then all quick tests"
	@echo "make check      format, lint, types, import law"
	@echo "make fmt        format and fix what can be fixed"
	@echo "make docs       write the catalog of methods anew"
	@echo "make test-slow  the tests that take minutes"
	@echo "make clean      remove caches and the environment; runs are kept"

demo: $(BIN)/.installed
	$(BIN)/idiolect compare --methods local fedavg fedavg_ft fedbn fedfsa --seeds 0 1 2 \
	  --data digits --clients 10 --split "dirichlet(0.5)" --shift "rotation(45) + contrast(0.5)" \
	  --rounds 20 --lr 0.2 --evaluate-every 5

demo-flower: $(BIN)/.installed-flower
	$(BIN)/python examples/hospitals/demo.py

test: check
	$(BIN)/python -m pytest -n 2

check: $(BIN)/.installed-dev
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/lint-imports

fmt: $(BIN)/.installed-dev
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

docs: $(BIN)/.installed-dev
	$(BIN)/python docs/catalog.py

test-slow: $(BIN)/.installed-dev
	$(BIN)/python -m pytest -m slow

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "idiolect needs Python 3.11: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv

$(BIN)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet -c constraints.txt -e .
	touch $@

$(BIN)/.installed-flower: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[flower]'
	touch $@ $(BIN)/.installed

$(BIN)/.installed-dev: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev,data,flower]'
	touch $@ $(BIN)/.installed $(BIN)/.installed-flower
