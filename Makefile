# The commands of this project; `make help` lists them. Every target sets up what it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
export HF_HUB_OFFLINE ?= 1
export OMP_WAIT_POLICY ?= PASSIVE
# a hundred processes of the tests would otherwise compile the package each
export PYTHONDONTWRITEBYTECODE :=
export TORCHINDUCTOR_CACHE_DIR ?= $(CURDIR)/.cache/inductor

.PHONY: help setup demo check test test-slow bench clean
.DEFAULT_GOAL := help

help: ## List the commands
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

setup: $(STAMP) ## Make .venv and install the pinned packages

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "normtune needs Python 3.11 or newer; run: make PYTHON=python3.11"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch -c constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]' -c constraints.txt
	@touch $(STAMP)

demo: $(STAMP) ## The main job: a text LLM learns to see (about 3 minutes on two cores)
	$(BIN)/normtune demo

check: $(STAMP) ## Lint, types and the quick tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest -m 'not slow and not heavy' -n 2

test: $(STAMP) ## Everything that a change must pass
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest -n 2

test-slow: $(STAMP) ## The tests that take minutes
	$(BIN)/pytest -m slow -n 2

bench: $(STAMP) ## Measure the demo, the step, the strategies, banks and the server; write benchmarks/results/ and the README's tables
	$(BIN)/python -m benchmarks.demo
	$(BIN)/python -m benchmarks.step --readme
	$(BIN)/python -m benchmarks.step --threads 1
	$(BIN)/python -m benchmarks.compare
	$(BIN)/python -m benchmarks.bank --docs
	$(BIN)/python -m benchmarks.serve --docs

clean: ## Remove .venv and caches
	rm -rf $(VENV) .cache .pytest_cache .mypy_cache .ruff_cache .hypothesis
