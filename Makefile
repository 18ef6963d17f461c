# One command to a working system: `make run`. One that proves it: `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
export RECSYS_DATA ?= ../shared/data
ARGS ?=
.DEFAULT_GOAL := help
.PHONY: help setup setup-dev system run lab test test-all lint gpu-plan gpu-check readme export clean

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(VENV)/.ready ## build .venv with the pinned versions
setup-dev: $(VENV)/.ready-dev

$(VENV)/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "recsys needs Python 3.11 or newer, and $(PYTHON) is $$($(PYTHON) --version 2>&1 | tail -1); install one and say: make $(firstword $(MAKECMDGOALS)) PYTHON=python3.11"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "Python's venv module is missing; on Debian or Ubuntu: apt-get install python3-venv"; exit 1; }
	@free=$$(df -Pk . | awk 'NR==2 {print int($$4/1024)}'); [ "$$free" -ge 4000 ] || { echo "about 4 GB of disk are needed to set up, and $$free MB are free here"; exit 1; }
	@[ -x $(BIN)/python ] || $(PYTHON) -m venv $(VENV)
	@echo "installing (some minutes, once) ..."
	@$(PIP) 'torch==2.13.0' $(if $(TORCH_INDEX),--index-url '$(TORCH_INDEX)') # first and by itself, so that the resolver keeps this build
	@$(PIP) -e .
	@touch $@

$(VENV)/.ready-dev: $(VENV)/.ready
	@$(PIP) -e '.[dev]'
	@touch $@

system: ## install what the tests need from Debian's packages, where this user may
	@sh tests/system.sh

run: setup ## the whole system: make run, or make run DATA=events.parquet FORMAT=parquet
	@$(BIN)/recsys up $(if $(DATA),--data '$(DATA)' --format '$(or $(FORMAT),$(error FORMAT is missing: make run DATA=path FORMAT=name))',--demo) $(ARGS)

lab: setup ## JupyterLab on the notebooks
	@RECSYS_HOME=$${RECSYS_HOME:-$$(pwd)/.recsys} $(BIN)/jupyter lab --ServerApp.root_dir="$$(pwd)" --LabApp.default_url=/lab/tree/nbs

lint: setup-dev ## ruff and mypy
	@$(BIN)/ruff check .
	@$(BIN)/mypy

test: setup-dev system lint ## what CI checks, the same way
	@$(BIN)/python -m pytest -m 'not long' -n 2 --dist loadfile --no-loadscope-reorder --cov=recsys --cov-report=term:skip-covered --durations=15

test-all: setup-dev system lint gpu-plan ## the long counts too, and the plans for a GPU
	@$(BIN)/python -m pytest --hypothesis-profile=random -n 2 --dist loadfile --no-loadscope-reorder --cov=recsys --cov-report=term:skip-covered --durations=30

.venv-gpu/.ready: constraints-gpu.txt
	@free=$$(df -Pk . | awk 'NR==2 {print int($$4/1024)}'); [ "$$free" -ge 2500 ] || { echo "about 2.5 GB of disk are needed for .venv-gpu, and $$free MB are free here"; exit 1; }
	@[ -x .venv-gpu/bin/python ] || $(PYTHON) -m venv .venv-gpu
	@echo "installing cudf-polars for planning (about 420 MB, once) ..."
	@.venv-gpu/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r constraints-gpu.txt || { \
	  echo "gpu-plan: not run. The wheels of constraints-gpu.txt are not to be had from this package index (they exist for Linux only)"; exit 1; }
	@touch $@

gpu-plan: .venv-gpu/.ready ## would a GPU run every transformation whole? Needs no GPU
	@.venv-gpu/bin/python tests/gpu_plan.py

gpu-check: ## on a machine with a GPU: equality, seconds and GB/s of every transformation
	@$(or $(wildcard $(BIN)/python),$(PYTHON)) benchmarks/gpu_check.py $(ARGS)

export: setup-dev ## notebooks -> package, cleaned; and the README
	@$(BIN)/nbdev-export && $(BIN)/nbdev-clean && $(MAKE) --no-print-directory readme

readme: setup-dev
	@$(BIN)/python tests/readme.py

clean: ## everything that can be made again; the state in .recsys stays
	@rm -rf $(VENV) .venv-gpu dist .coverage .pytest_cache .mypy_cache .ruff_cache .hypothesis reports/runs reports/screenshots
