# forgetd: make demo | test | chaos | check | up | bench | clean. `make` alone lists them.
#
# torch: from the default index Linux gets the CUDA build (about 3 GB). Where an index has a build for CPUs alone, name
# it: make demo TORCH_INDEX=URL

PYTHON ?= python3
TORCH_INDEX ?=
VENV := .venv
BIN := $(VENV)/bin
PIP := PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_CONSTRAINT=constraints.txt $(BIN)/pip install --quiet \
	$(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
# Of open-clip-torch the vocabulary of CLIP is read and no code is run: what it depends on is not wanted.
VOCABULARY := --no-deps open-clip-torch
DOCKERFILES := Dockerfile Dockerfile.gpu
COMPOSE_FILES := docker-compose.yml docker-compose.worker.yml
# What `make chaos` runs; a longer one: make chaos CHAOS='--jobs 10000 --faults 1000 --seconds 4300 --pace 0.1'
CHAOS ?= --jobs 200 --faults 120 --seed 1 --pace 3

.DEFAULT_GOAL := help
.PHONY: help demo up test chaos check lint types imports containers bench clean

help: ## list these tasks
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' Makefile

demo: $(VENV)/.run ## forget a real person, end to end, on this machine (no Docker, no root)
	$(BIN)/forgetd demo

up: $(VENV)/.run ## run the whole service on this machine until Ctrl-C
	$(BIN)/forgetd up

# A worker for each core, up to four, each with servers of its own; a file's tests stay together, for what they share.
test: $(VENV)/.dev ## run every test, on the real servers
	OMP_NUM_THREADS=1 $(BIN)/pytest -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

chaos: $(VENV)/.dev ## break everything while jobs run, and audit what is left (8 minutes)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.chaos.acceptance --times 200
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.chaos $(CHAOS)

check: lint types imports containers ## run every linter: style, types, import contracts, container files

lint: $(VENV)/.dev ## style (ruff)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev ## types (mypy, strict)
	$(BIN)/mypy

imports: $(VENV)/.dev ## the arrows between the rooms (import-linter)
	PYTHONPATH=. $(BIN)/lint-imports

containers: $(VENV)/.dev ## Dockerfiles and compose files
	$(BIN)/hadolint $(DOCKERFILES)
	$(BIN)/check-jsonschema --builtin-schema vendor.compose-spec $(COMPOSE_FILES)
	$(BIN)/compose-lint check --quiet --no-env $(COMPOSE_FILES)

bench: $(VENV)/.run ## measure what the service adds to the library, and flow taming against the released recipe
	$(BIN)/python -m benchmarks.overhead
	$(BIN)/python -m benchmarks.taming

clean: ## remove what these tasks made here (virtual environment, caches); never a data folder
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# What it takes to run forgetd, and then what it takes to work on it.
$(VENV)/.run: pyproject.toml constraints.txt | $(VENV)/bin/pip
	@echo "Installing forgetd into $(VENV) (the first time takes some minutes) ..."
	@$(PIP) --editable '.[worker,local,examples]'
	@$(PIP) $(VOCABULARY)
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(VENV)/bin/pip
	@echo "Installing forgetd and its tools into $(VENV) (the first time takes some minutes) ..."
	@$(PIP) --editable '.[worker,local,examples,dev]'
	@$(PIP) $(VOCABULARY)
	@touch $@ $(VENV)/.run

$(VENV)/bin/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "forgetd needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1 || echo missing)." >&2; \
		echo "Name one that is: make PYTHON=python3.12 ..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
