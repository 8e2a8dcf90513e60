# Every target makes the environment that it needs. A fresh machine needs Python 3.11 or newer, make
# and a C++ compiler. locks/ says which packages are installed; the settings of pip and uv on the
# machine say where they come from.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
UV_VERSION := 0.13.9

LOCK := $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes \
	--no-header --no-annotate --no-emit-index-url --no-emit-find-links

# Every process of a test imports thousands of modules. Without bytecode it compiles them each time,
# which makes the start of a cluster twice as long.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help env env-ci test test-slow check lint types layers demo serve chaos proto schema train-demo \
	lock lock-deploy clean

help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-12s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

env: $(READY)  ## Make .venv from the locks, or update it (a second when nothing changed)
	@echo "$(VENV) is up to date"

env-ci: $(READY)  ## Add the packages that only some tests need, and that are large
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --only-binary :all: \
		--require-hashes -r locks/ci.txt

# These tests share one real cluster. They run in one process, while no other test runs.
ON_A_CLUSTER := tests/cluster tests/faults
REPORTS := .cache/reports
# pytest exits with 5 if ARGS leave no test to one of the two runs; run_report fails if neither
# has one.
PYTEST := $(BIN)/python -m pytest -p tests.run_report -m "not slow"
OR_NO_TEST := || test $$? -eq 5

test: $(READY)  ## Run all tests but the slow ones (ARGS=... goes to pytest; STRICT=1: skip none)
	rm -rf $(REPORTS)
	$(PYTEST) --report-file $(REPORTS)/1.jsonl -n auto --dist worksteal \
		$(addprefix --ignore=,$(ON_A_CLUSTER)) $(ARGS) $(OR_NO_TEST)
	$(PYTEST) --report-file $(REPORTS)/2.jsonl $(ON_A_CLUSTER) $(ARGS) $(OR_NO_TEST)
	@$(BIN)/python -m tests.run_report $(if $(STRICT),--strict) $(REPORTS)/*.jsonl

test-slow: $(READY)  ## Run the slow tests only (ARGS=... goes to pytest)
	$(BIN)/pytest -m slow $(ARGS)

check: lint types layers test  ## Run all that must pass before a commit

lint: $(READY)  ## Check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)  ## Check types
	$(BIN)/basedpyright

layers: $(READY)  ## Check that packages import downwards only
	$(BIN)/pytest -q tests/unit/test_layering.py

demo: $(READY)  ## Complete two prompts with the demo model
	$(BIN)/milliways generate "The answer to life the universe and everything is of course"
	$(BIN)/milliways generate "Welcome to"

serve: $(READY)  ## Serve the demo model: 3 workers, HTTP on 8000, gRPC on 50051 (ARGS=...)
	$(BIN)/milliways serve $(ARGS)

chaos: $(READY)  ## Kill parts of a cluster under load and compare every token (minutes; ARGS=...)
	$(BIN)/milliways chaos $(ARGS)

proto: $(READY)  ## Generate the stubs in proto/ again
	$(BIN)/python tests/stubs.py proto

schema: $(READY)  ## Write the settings' part of the chart's schema again
	$(BIN)/python -m tests.chart_schema

train-demo: $(READY)  ## Train the demo model again (ARGS=... goes to the trainer)
	$(BIN)/python -m milliways.benchmarks.demo.training.train_demo $(ARGS)

# No headers, index or link options: a lock says what is installed, not where it was made or comes
# from. Fewest forks: every Python gets the same version of a package, and so computes the same bits.
lock: $(READY)  ## Resolve all dependencies again and write locks/ (ARGS=--upgrade: newest versions)
	$(LOCK) --all-extras --group dev --group build --fork-strategy fewest $(ARGS) \
		--output-file locks/requirements.txt pyproject.toml
	$(LOCK) --group ci $(ARGS) --output-file locks/ci.txt
	echo 'uv==$(UV_VERSION)' | $(LOCK) --output-file locks/bootstrap.txt -

# The images also have CUDA for the locked version of JAX, and Google's client for `ray up`.
DEPLOY_LOCK := $(BIN)/uv pip compile -c locks/requirements.txt --quiet --generate-hashes \
	--python-platform x86_64-manylinux_2_28 --python-version 3.11 \
	--no-header --no-annotate --no-emit-index-url --no-emit-find-links

lock-deploy: $(READY)  ## Resolve what the images have besides again, after `make lock`
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

# Wheels only: to build a source distribution, pip would fetch tools that no lock names.
# The stamp is written last, so that `make` repeats a set-up that was interrupted.
$(READY): locks/bootstrap.txt locks/requirements.txt pyproject.toml setup.py $(wildcard model/ops/native/*)
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --only-binary :all: \
		--require-hashes -r locks/bootstrap.txt
	$(BIN)/uv pip sync --quiet --compile-bytecode --python $(BIN)/python --only-binary :all: \
		--require-hashes locks/requirements.txt
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation --editable .
	@touch $@
