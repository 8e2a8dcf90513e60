# Every target makes the environment it needs: a fresh machine with Python 3.11 or newer, make and
# a C++ compiler is enough. Where packages come from is the machine's business (its pip and uv
# settings); which ones, exactly, is that of locks/.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
UV_VERSION := 0.13.9

LOCK := $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes \
	--no-header --no-annotate --no-emit-index-url --no-emit-find-links

.DEFAULT_GOAL := help
.PHONY: help env test test-slow check lint types layers demo serve chaos proto train-demo lock \
	lock-deploy clean

help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-12s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

env: $(READY)  ## Make or update .venv from the locks (a second when nothing changed)
	@echo "$(VENV) is up to date"

# Those that share one real cluster run by themselves, in one process, when the machine is free.
ON_A_CLUSTER := tests/cluster tests/faults

test: $(READY)  ## Run the tests, all but the slow ones (ARGS=... goes to pytest)
	$(BIN)/pytest -m "not slow" -n auto $(addprefix --ignore=,$(ON_A_CLUSTER)) $(ARGS)
	$(BIN)/pytest -m "not slow" $(ON_A_CLUSTER) $(ARGS)

test-slow: $(READY)  ## Run the slow tests only
	$(BIN)/pytest -m slow $(ARGS)

check: lint types layers test  ## All that must pass before a commit

lint: $(READY)  ## Check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)  ## Check types
	$(BIN)/basedpyright

layers: $(READY)  ## Check who imports whom
	$(BIN)/pytest -q tests/unit/test_layering.py

demo: $(READY)  ## Complete two prompts with the demo model
	$(BIN)/milliways generate "The answer to life the universe and everything is of course"
	$(BIN)/milliways generate "Welcome to"

serve: $(READY)  ## Start a cluster of the demo model: 3 workers, HTTP 8000, gRPC 50051 (ARGS=...)
	$(BIN)/milliways serve $(ARGS)

chaos: $(READY)  ## Break a cluster under load, compare every token: minutes (ARGS=...)
	$(BIN)/milliways chaos $(ARGS)

proto: $(READY)  ## Generate the stubs of proto/ anew
	$(BIN)/python tests/stubs.py proto

train-demo: $(READY)  ## Train the demo model afresh (ARGS=... goes to the trainer)
	$(BIN)/python -m milliways.benchmarks.demo.training.train_demo $(ARGS)

# Without headers, index or link options: a lock says what, not where it was made or fetched.
# Fewest forks: one version of each package on every Python, so the same bits on every Python.
lock: $(READY)  ## Resolve all dependencies anew and write locks/ (ARGS=--upgrade to move versions)
	$(LOCK) --all-extras --group dev --group build --fork-strategy fewest $(ARGS) \
		--output-file locks/requirements.txt pyproject.toml
	echo 'uv==$(UV_VERSION)' | $(LOCK) --output-file locks/bootstrap.txt -

# What the images have besides: CUDA for JAX as it is locked, and Google's client for `ray up`.
DEPLOY_LOCK := $(BIN)/uv pip compile -c locks/requirements.txt --quiet --generate-hashes \
	--python-platform x86_64-manylinux_2_28 --python-version 3.11 \
	--no-header --no-annotate --no-emit-index-url --no-emit-find-links

lock-deploy: $(READY)  ## Resolve the images' additions anew, after `make lock`
	sed -n 's/^jax==\([0-9.]*\).*/jax[cuda12]==\1/p' locks/requirements.txt | $(DEPLOY_LOCK) - \
		| awk '/^[a-z]/ { kept = /^(jax-cuda12-|nvidia-)/ } kept' > $(VENV)/cuda.txt
	$(DEPLOY_LOCK) pyproject.toml --group build > $(VENV)/image.txt
	echo google-api-python-client | $(DEPLOY_LOCK) - | awk '/^[a-z]/ { split($$1, name, "==") } \
		NR == FNR { there[name[1]]; next } !(name[1] in there)' $(VENV)/image.txt - \
		> $(VENV)/google.txt
	mv $(VENV)/cuda.txt deploy/cuda-requirements.txt
	mv $(VENV)/google.txt deploy/ray-up/requirements.txt

clean:  ## Remove the environment, caches and build products
	rm -rf $(VENV) .cache .pytest_cache .ruff_cache .hypothesis build dist *.egg-info model/ops/_kernels*
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Wheels only: building a source distribution would fetch tools that no lock names.
# Last comes the stamp, so that an interrupted set-up is taken up again.
$(READY): locks/bootstrap.txt locks/requirements.txt pyproject.toml setup.py $(wildcard model/ops/native/*)
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed; say PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --only-binary :all: \
		--require-hashes -r locks/bootstrap.txt
	$(BIN)/uv pip sync --quiet --python $(BIN)/python --only-binary :all: --require-hashes \
		locks/requirements.txt
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation --editable .
	@touch $@
