# Everything runs in .venv, which the targets build by themselves on a machine with nothing but Python and a package
# index. It is rebuilt in place when what it was installed from changes.
#
# torch: Linux wheels from PyPI bring several gigabytes of CUDA. Where the index offers no CPU wheel of the pinned
# version by itself, ask for one:
#   make quickstart PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"

PYTHON ?= python3
PIP_ARGS ?=
PYTEST_ARGS ?=
# options of the quickstart
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
INSTALLED_FROM := pyproject.toml constraints.txt examples/requirements.txt
# The content and not the time stamp is the key: a checkout or an unpacked archive sets times at will.
STAMP := $(VENV)/.installed-$(shell cat $(INSTALLED_FROM) | cksum | cut -d' ' -f1)

# One thread each: the tests' tensors are tiny, and two workers with a pool each slow one another down.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest

.PHONY: help venv quickstart test test-slow lint bench docs clean
.DEFAULT_GOAL := help

help:
	@echo "make quickstart  train, save, reload and merge a sparse adapter of a real language model (minutes, CPU)"
	@echo "make test        the fast tests"
	@echo "make test-slow   the slow tests: whole examples, real models"
	@echo "make lint        ruff: rules and format"
	@echo "make bench       the benchmarks"
	@echo "make docs        the documents as a site, in site/"
	@echo "make clean       remove the virtual environment and the caches"

venv: $(STAMP)

$(STAMP): $(INSTALLED_FROM)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	rm -f $(VENV)/.installed-*
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) -c constraints.txt -e ".[cli,trl,bnb,plot,test,examples,bench,docs]"
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) --no-deps -r examples/requirements.txt
	touch $@

quickstart: $(STAMP)
	$(BIN)/python -m examples.quickstart $(ARGS)

test: $(STAMP)
	$(PYTEST) -n 2 -m "not slow and not gpu" $(PYTEST_ARGS)

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m "slow and not gpu" $(PYTEST_ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: $(STAMP)
	$(BIN)/python -m benchmarks.step

docs: $(STAMP)
	$(BIN)/python -m mkdocs build --strict

clean:
	rm -rf $(VENV) site .pytest_cache .ruff_cache .hypothesis
