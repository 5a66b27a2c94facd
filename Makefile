# make demo   every strategy on a real model and real text: results/demo/
# make test   all tests
# make lint   linters, formatter and type checker
# make fast   the tests that run before each commit

PYTHON ?= python3
# On a machine with an NVIDIA GPU this is the CUDA build; override it to choose another.
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test fast lint format clean

demo: $(VENV)/.installed
	$(BIN)/kvfold bench demo --contexts 2048 --batch-sizes 1 --repeats 3 --out results/demo

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n 2

fast: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n 2 -m "not slow and not model"

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "kvfold needs Python 3.11 or newer: make PYTHON=python3.11 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt "$(TORCH)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) results outputs build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
