# Everything runs in .venv, which is made on first use and brought up to date when pyproject.toml or the lock changes.
# Needs make, git and Python 3.11 or newer.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-builtin-rules

PYTHON ?= python3
ARGS ?=
# Test processes at a time; each starts processes of its own.
JOBS ?= 2
# Folders of wheels to prefer over the registry's, for instance a CPU build of torch, which is a tenth the size.
WHEELS ?= $(wildcard ../*/wheels)

BIN := .venv/bin
EXTRAS := train operator text-minilm quickstart dev
comma := ,
empty :=
space := $(empty) $(empty)

# Use the Python that is here; one that was fetched would not be the one that was asked for.
export UV_PYTHON_DOWNLOADS := never

# Python keeps what it compiles: without that, each of the hundreds of processes that the tests start compiles torch.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help
help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

pytest = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder --durations 20

.PHONY: test
test: lint  ## Lint, then all tests: unit, integration, on a real API server, on a real cluster
	@# Kubernetes is built from its sources on first use, beside the first tests.
	nice $(BIN)/python tests/cluster/build.py & trap "kill $$! 2>/dev/null || true" EXIT; \
		$(pytest) tests/unit tests/integration tests/cluster tests/control_plane $(ARGS)

.PHONY: check
check: lint  ## Lint, then the unit tests
	$(pytest) tests/unit $(ARGS)

.PHONY: lint
lint: .venv/.installed  ## Formatting, ruff, mypy --strict and the direction of imports
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/lint-imports

.PHONY: format
format: .venv/.installed  ## Format the code and apply ruff's safe fixes
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

.PHONY: quickstart
quickstart: .venv/.installed  ## Train and sample a small model on this machine (ARGS="--help" lists options)
	$(BIN)/python -m opensora.quickstart $(ARGS)

# CPU and CUDA builds of torch differ in what they need, so neither torch nor the CUDA packages are locked;
# pyproject.toml pins torch, and torch pins those.
.PHONY: cluster
cluster: .venv/.installed  ## A throw-away Kubernetes of two nodes on this machine (ARGS="--detach", ARGS="--down")
	$(BIN)/python tests/cluster/up.py $(ARGS)

.PHONY: generate
generate: .venv/.installed  ## Write CRDs, RBAC and reference pages anew
	$(BIN)/python -m opensora.config.describe --write
	$(BIN)/python -m opensora_operator.crd
	$(BIN)/python -m opensora_operator.packaging
	$(BIN)/python -m osctl.reference

.PHONY: lock
lock: $(BIN)/uv  ## Write requirements.lock anew (ARGS="--upgrade" takes newer versions)
	$(BIN)/uv pip compile pyproject.toml --quiet --universal --python-version 3.11 $(EXTRAS:%=--extra %) \
		--no-emit-package torch --no-header --no-emit-index-url --no-emit-find-links --output-file requirements.lock $(ARGS)
	{ echo '# Written by `make lock`; without torch, which pyproject.toml pins, and its CUDA packages.'; \
		awk '/^# The following packages were excluded/ { exit } \
			/^[^ ]/ { cuda = /^(nvidia-|cuda-|triton)/ } !cuda' requirements.lock; } > requirements.lock.new
	mv requirements.lock.new requirements.lock

.PHONY: clean
clean:  ## Remove .venv, caches and builds; runs and their outputs stay
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/.installed: pyproject.toml requirements.lock | $(BIN)/uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python --constraint requirements.lock \
		$(WHEELS:%=--find-links %) --editable '.[$(subst $(space),$(comma),$(EXTRAS))]'
	touch $@

$(BIN)/uv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "Python 3.11 or newer is needed; '$(PYTHON)' is not. Name another: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
		if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
			apt-get update -qq && apt-get install -y -qq python3-venv; \
		else \
			echo "Python's venv module is missing. On Debian and Ubuntu: sudo apt-get install python3-venv" >&2; exit 1; \
		fi; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
