# make quickstart   train a DDPM on handwritten digits and sample it, from nothing
# make test         lint, types and all tests but the slow ones
# make test-slow    the tests that take minutes
# make chaos        kills, signals, bad disks and bad data, counted: at most 80 minutes on 2 cores
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
WORKERS ?= 2

.PHONY: quickstart test test-slow chaos lint format clean
.DELETE_ON_ERROR:

quickstart: $(VENV)/.installed
	$(BIN)/fastddpm train --preset digits --run runs/digits
	$(BIN)/fastddpm sample runs/digits --steps 250 --out samples/digits

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) -m "not slow"

test-slow: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m slow

chaos: $(VENV)/.installed-dev
	$(BIN)/python -m benchmarks.chaos

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(VENV)/bin/python pyproject.toml constraints.txt
	$(PIP) --editable '.[digits]'
	touch $@

$(VENV)/.installed-dev: $(VENV)/bin/python pyproject.toml constraints.txt
	$(PIP) --editable '.[dev]'
	touch $(VENV)/.installed $@

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis
