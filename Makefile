# Everything a user or a developer starts. Needs Python 3.11-3.13, make and a C compiler; the rest is fetched by setup.

# What pip installs torch from; may carry pip's options ("torch==2.13.0 --index-url URL"). Remembered once chosen.
TORCH  ?= $(or $(shell cat .venv/torch 2>/dev/null),torch==2.13.0)
CONFIG ?= configs/cpu_1p1d.yaml
PYTHON ?= $(shell for v in 3.13 3.12 3.11; do python$$v -c '' 2>/dev/null && { echo python$$v; break; }; done)

VENV  := .venv
BIN   := $(VENV)/bin
STAMP := $(VENV)/stamp-$(shell cat requirements.lock pyproject.toml 2>/dev/null | cksum | cut -d' ' -f1)
PIP   := $(BIN)/python -m pip --disable-pip-version-check --no-input

.PHONY: help setup serve test check format bench bench-transfer bench-fetch bench-engine bench-router mutations gpu gpu-transfer gpu-faults sweep lock clean

help:                  ## list what can be made
	@grep -hE '^[a-z-]+:.*##' Makefile | sed -E 's/:[^#]*## /\t/' | expand -t 16

setup: $(STAMP)        ## create .venv with exactly the locked packages; TORCH=... takes another build of torch

# torch first, with the Triton it wants: the build depends on the GPU, so no hash can be locked (docs/decisions/0002-lock.md).
$(STAMP):
	@test -n "$(PYTHON)" || { echo "make setup: found no python3.11, python3.12 or python3.13; name one with PYTHON=..." >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet $(TORCH) triton
	@echo '$(TORCH)' > $(VENV)/torch
	$(PIP) install --quiet --no-deps --require-hashes -r requirements.lock
	$(PIP) install --quiet --no-deps --no-build-isolation --editable .
	@rm -f $(VENV)/stamp-*
	@touch $@

serve: setup           ## start the cluster of CONFIG (default: one prefill and one decode worker on this CPU)
	$(BIN)/python -m cluster up $(CONFIG)

test: setup            ## run the tests; those that need a GPU skip themselves elsewhere
	$(BIN)/python -m pytest -n 2 --dist loadfile tests/unit tests/kernels tests/integration
	$(BIN)/python -m pytest tests/e2e

check: setup           ## formatting, lint and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup          ## let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup           ## measure Tandem colocated, Tandem 1P1D and transformers in one run
	$(BIN)/python -m benchmarks.serving

bench-transfer: setup  ## measure every KV transport beside memcpy and a raw socket
	$(BIN)/python -m benchmarks.transfer

bench-fetch: setup     ## measure conversations with and without fetching from decode
	$(BIN)/python -m benchmarks.conversation

bench-engine: setup    ## measure the engine's steps and kernels beside the device's limits (a GPU: Llama 3.1 8B's shape)
	$(BIN)/python -m benchmarks.engine

bench-router: setup    ## measure what the router costs, per stream and with hundreds of groups
	$(BIN)/python -m benchmarks.router

mutations: setup       ## plant mistakes, one at a time, and see that the tests find each of them
	$(BIN)/python -m tests.mutations

gpu:                   ## on a machine with an NVIDIA GPU: its tests, then bench-engine, all within ten minutes
	PYTHON=$(if $(wildcard $(BIN)/python),$(BIN)/python,python3) tools/gpu.sh

gpu-transfer:          ## there, too: KV between two processes on one GPU over every transport, within eight minutes
	PYTHON=$(if $(wildcard $(BIN)/python),$(BIN)/python,python3) tools/gpu.sh build/gpu transfer

gpu-faults:            ## there, too: workers lost in mid-transfer over nccl and cuda_ipc, then the sweep below
	PYTHON=$(if $(wildcard $(BIN)/python),$(BIN)/python,python3) tools/gpu.sh build/gpu faults

sweep:                 ## there, too: other configurations of the Triton kernels beside the table's, within ten minutes
	$(if $(wildcard $(BIN)/python),$(BIN)/python,python3) -m benchmarks.kernel_sweep

lock:                  ## bring requirements.lock up to date with pyproject.toml (needs uv)
	uv pip compile pyproject.toml --group dev --upgrade --quiet --output-file requirements.lock

clean:                 ## remove the environment and all caches
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis *.egg-info build
