# Everything runs in .venv, which the targets build by themselves on a machine with nothing but Python and a package
# index. It is rebuilt in place when what it was installed from changes.
#
# torch: Linux wheels from PyPI bring several gigabytes of CUDA. Where the index offers no CPU wheel of the pinned
# version by itself, ask for one:
#   make quickstart PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"

PYTHON ?= python3
PIP_ARGS ?=
PYTEST_ARGS ?=
# processes of `make test`
WORKERS ?= 2
# options of the quickstart
ARGS ?=

VENV ?= .venv
BIN := $(VENV)/bin
EXTRAS := cli,serve,trl,bnb,plot,eval,test,dev,examples,bench,docs
INSTALLED_FROM := pyproject.toml constraints.txt examples/requirements.txt
# The content and not the time stamp is the key: a checkout or an unpacked archive sets times at will.
STAMP := $(VENV)/.installed-$(shell cat $(INSTALLED_FROM) | cksum | cut -d' ' -f1)

# `make test-oldest`: its torch, the packages of its tests, and the tests. Left out are compiled models, which torch 2.6
# cannot trace, and tests that need newer libraries throughout: diffusers', fused experts of transformers 5, the docs'.
OLDEST_TORCH ?= 2.6.0
OLDEST := trl datasets pytest pytest-xdist hypothesis bitsandbytes typer rich matplotlib starlette uvicorn
OLDEST_TESTS := $(addprefix tests/,test_compat.py test_constraints.py test_registry.py test_report.py adapters calibrate cli \
	dynamics numerics ops planning serving sparsify support sync training tuners) \
	$(addprefix tests/integration/test_,dynamic_training.py trainers.py transformers.py trl.py)

# One thread each: the tests' tensors are tiny, and two workers with a pool each slow one another down.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest
# Neighbours in a file share its fixtures, so each worker begins with a half and takes from the other at the end.
PARALLEL := -n $(WORKERS) --dist worksteal
# the files with tests of a tier: reading all the others takes each worker 20 seconds
TIER = -m "$(1) and not slow" $(shell grep -rl "mark\.$(1)\b" --include="test_*.py" tests)

.PHONY: help venv quickstart test test-oldest suite distributed deepspeed compile subprocess slow gpu test-python coverage lint types docs bench quality \
	quality-table clean
.DEFAULT_GOAL := help

help:
	@echo "make quickstart   train, save, reload and merge a sparse adapter of a real language model (minutes, CPU)"
	@echo "make test         tests of every package and every method"
	@echo "make suite        PEFT's own tests, on every method"
	@echo "make distributed  training and selection on two processes"
	@echo "make deepspeed    ZeRO on two processes, with DeepSpeed beside the environment"
	@echo "make compile      all GPU kernels for two architectures, without a GPU, and compiled models"
	@echo "make subprocess   the installed wheel, the Hub, signals and the site, in interpreters of their own"
	@echo "make slow         whole examples, real models, the rest of PEFT's own tests"
	@echo "make gpu          tests that need a CUDA device"
	@echo "make test-python  make test in an environment of its own: PYTHON=python3.12"
	@echo "make test-oldest  what needs no newer package, with the oldest versions that are supported"
	@echo "make coverage     make test with a report of the lines that no test reaches"
	@echo "make lint         ruff's rules and format, and types"
	@echo "make types        mypy"
	@echo "make docs         the documents as a site, in site/"
	@echo "make bench        the benchmarks"
	@echo "make quality      what methods gain and forget: goes on where it was interrupted, hours"
	@echo "make quality-table  its tables and picture"
	@echo "make clean        remove the virtual environments and the caches"

venv: $(STAMP)

$(STAMP): $(INSTALLED_FROM)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	rm -f $(VENV)/.installed-*
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) -c constraints.txt -e ".[$(EXTRAS)]"
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) --no-deps -r examples/requirements.txt
	touch $@

quickstart: $(STAMP)
	$(BIN)/python -m examples.quickstart $(ARGS)

test: $(STAMP)
	$(PYTEST) $(PARALLEL) $(PYTEST_ARGS)

suite: $(STAMP)
	$(PYTEST) $(call TIER,suite) $(PYTEST_ARGS)

distributed: $(STAMP)
	$(PYTEST) $(call TIER,distributed) $(PYTEST_ARGS)

# DeepSpeed has no wheel: the first run builds one, in a minute. Its tests' all-reduce is gloo's, and nothing is compiled.
DEEPSPEED := $(VENV)/deepspeed
$(DEEPSPEED): $(STAMP)
	DS_BUILD_OPS=0 $(BIN)/python -m pip install --quiet $(PIP_ARGS) --no-deps --target $@ -r tests/deepspeed.txt

deepspeed: $(DEEPSPEED)
	PYTHONPATH=$(CURDIR)/$(DEEPSPEED) DS_ACCELERATOR=cpu $(PYTEST) -m distributed -k deepspeed tests/integration $(PYTEST_ARGS)

compile: $(STAMP)
	$(PYTEST) $(PARALLEL) $(call TIER,compile) $(PYTEST_ARGS)

# a file with its environment, its Hub or its site stays with one worker
subprocess: $(STAMP)
	$(PYTEST) -n $(WORKERS) --dist loadfile $(call TIER,subprocess) $(PYTEST_ARGS)

slow: $(STAMP)
	$(BIN)/python -m pytest -m "slow and not gpu" $(PYTEST_ARGS)

gpu: $(STAMP)
	$(BIN)/python -m pytest -m gpu $(PYTEST_ARGS)

test-python:
	version=$$($(PYTHON) -c "import sys; print('%d.%d' % sys.version_info[:2])") && $(MAKE) test VENV=.venv-$$version

# an environment of its own; where the index offers no CPU build of torch: PIP_ARGS, as above, or another OLDEST_TORCH
test-oldest:
	test -x .venv-oldest/bin/python || $(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet $(PIP_ARGS) -c constraints-oldest.txt -e . torch==$(OLDEST_TORCH) $(OLDEST)
	OMP_NUM_THREADS=1 .venv-oldest/bin/python -m pytest $(PARALLEL) -k "not (compil or graph or traced)" $(OLDEST_TESTS) $(PYTEST_ARGS)

coverage: $(STAMP)
	$(PYTEST) $(PARALLEL) --cov --cov-report=term --cov-report=html $(PYTEST_ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@$(MAKE) --no-print-directory types

types: $(STAMP)
	$(BIN)/mypy

docs: $(STAMP)
	$(BIN)/python -m mkdocs build --strict

bench: $(STAMP)
	$(BIN)/python -m benchmarks.step

quality: $(STAMP)
	$(BIN)/python -m pip install --quiet --no-deps -r benchmarks/quality/requirements.txt
	$(BIN)/python -m benchmarks.quality run $(ARGS)

quality-table: $(STAMP)
	$(BIN)/python -m benchmarks.quality table
	$(BIN)/python -m benchmarks.quality picture --task kjv

clean:
	rm -rf $(VENV) .venv-* site htmlcov .coverage* .pytest_cache .ruff_cache .mypy_cache .hypothesis
