.DEFAULT_GOAL := help
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c

# Every path below is relative, so that a checkout whose path holds spaces works.
VENV ?= .venv
BIN := $(VENV)/bin
PY := $(BIN)/python

# An installed uv is used; without one, pip puts its own copy into .uv (nothing outside this folder is touched).
ifeq ($(shell uv --version 2>/dev/null),)
UV := .uv/bin/uv
else
UV := uv
endif
LOCAL_UV := $(filter .uv/%,$(UV))
# The python at hand before one that uv would download.
export UV_PYTHON_PREFERENCE ?= system
SYNC = $(UV) pip sync --quiet --require-hashes requirements.lock --python
# --python-version: the lock serves every Python from 3.11 on, whichever one runs this.
COMPILE = $(UV) pip compile --quiet --universal --generate-hashes pyproject.toml --all-extras --group dev --group docs \
	--python-version 3.11

.PHONY: help
help: ## Show every target
	@awk -F ':.*## ' '/^##@ / {print "\n" substr($$0, 5)} \
		/^[a-z0-9-]+:.*## / {printf "  \033[1m%-15s\033[0m %s\n", $$1, $$2}' Makefile

##@ Environment

# Moved into place when complete, so that an interrupted download is never taken for an installed uv.
.uv/bin/uv:
	@rm -rf .uv
	python3 -m pip install --quiet --target .uv/partial uv
	@mv .uv/partial/bin .uv/bin; rm -rf .uv/partial

# .partial stands while the environment is being changed: found at the start, the last setup was interrupted,
# a package may be half there, and the environment is built again from nothing (the cache makes that quick).
$(VENV)/.ready: requirements.lock pyproject.toml nslightning/ops/kernels/cpu.cpp nslightning/ops/kernels/nodes.cpp \
		nslightning/ops/kernels/arguments.h \
		nslightning/arithmetic/sequential.cpp | $(LOCAL_UV)
	@if [[ -e $(VENV)/.partial ]]; then rm -rf $(VENV); fi; \
	if [[ -e $@ ]]; then mv $@ $(VENV)/.partial; \
	elif [[ -n "$$(ls -A $(VENV) 2>/dev/null)" ]]; then \
		echo "$(VENV) was not made by 'make setup': remove it, or name another folder with VENV=..." >&2; exit 1; \
	else mkdir -p $(VENV); touch $(VENV)/.partial; $(UV) venv --quiet --allow-existing --python '>=3.11' $(VENV); fi
	$(SYNC) $(PY)
	$(UV) pip install --quiet --python $(PY) --no-deps --no-build-isolation --editable .
	$(PY) -m nslightning.ops.kernels.build
	@mv $(VENV)/.partial $@; touch $@

.PHONY: setup
setup: $(VENV)/.ready ## Create or update the environment from requirements.lock (about a minute)

.PHONY: lock
lock: $(LOCAL_UV) ## Write requirements.lock from pyproject.toml, keeping pins that still fit (UPGRADE=1: the newest)
	$(COMPILE) $(if $(UPGRADE),--upgrade) --output-file requirements.lock

.PHONY: lock-check
lock-check: $(LOCAL_UV) ## Check that requirements.lock is what pyproject.toml asks for
	@mkdir -p build && cp requirements.lock build/compiled.lock
	$(COMPILE) --output-file build/compiled.lock
	@diff <(grep -v '^#' requirements.lock) <(grep -v '^#' build/compiled.lock) >&2 \
	|| { echo "requirements.lock does not fit pyproject.toml (<: as committed, >: as compiled): run 'make lock'" >&2; exit 1; }

##@ Use

.PHONY: demo
demo: setup ## Train on the embedded Fashion-MNIST sample and watch what the Jacobian choice changes (under 3 min)
	$(BIN)/nslightning fit --config configs/quickstart.yaml
	@echo; echo "The same in fp32, for two epochs:"
	$(BIN)/nslightning fit --config configs/quickstart.yaml --name=quickstart-fp32 --trainer.precision=32-true \
		--trainer.max_epochs=2

##@ The papers

SCALE ?= small
# Smoke results are a check, no results: they stay out of results/.
RESULTS ?= $(if $(filter smoke,$(SCALE)),build/results,results)
REPRODUCE = $(BIN)/nslightning figure $(1) --run $(SCALE) --output $(RESULTS) --out build/figures/$(SCALE)

.PHONY: reproduce-fig3
reproduce-fig3: setup ## VGG11 on CIFAR-10, alpha and beta, exact and published rule (SCALE=smoke|small|paper)
	$(call REPRODUCE,fig3)

.PHONY: reproduce-all
reproduce-all: setup ## Every experiment and figure; one figure: make reproduce-NAME (nslightning figure --list)
	$(call REPRODUCE,all)

reproduce-%: setup
	$(call REPRODUCE,$*)

##@ Documentation

# NO_MKDOCS_2_WARNING: the theme would print an advertisement for its successor.
.PHONY: docs
docs: setup ## Build the documentation into build/site, without network; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

.PHONY: docs-serve
docs-serve: setup ## Show the documentation while it is written
	$(BIN)/mkdocs serve

.PHONY: generated
generated: setup ## Write the pages of operations and of messages and the schemas of configs, which come from the code
	$(PY) docs/make_operations.py
	$(PY) docs/make_messages.py
	$(BIN)/nslightning schema config --out configs/schemas/config.json
	$(BIN)/nslightning schema experiment --out configs/schemas/experiment.json

.PHONY: notebooks
notebooks: setup ## Run the notebooks, and write them with their outputs beside their sources
	$(PY) docs/make_notebooks.py

##@ Checks

.PHONY: test
test: setup ## Run the fast tests
	$(BIN)/pytest --numprocesses=auto --dist=worksteal

.PHONY: test-slow
test-slow: setup ## Run the tests that take longer than about twenty seconds each
	$(BIN)/pytest -m slow --numprocesses=auto --dist=worksteal

MUTANTS ?= --sample 100
.PHONY: mutants
mutants: setup ## Change the core modules wrongly, one change at a time: do their tests see it? (MUTANTS='--sample 200 --seed 1')
	$(PY) tests/mutants.py $(MUTANTS)

# The lowest versions that pyproject.toml allows, in an environment of their own; `test` and `lint` keep theirs.
LOWEST_ENV := build/lowest-env
LOWEST = $(UV) pip compile --quiet --resolution lowest-direct pyproject.toml --all-extras --group dev \
	--python-version 3.11
.PHONY: lowest
lowest: $(LOCAL_UV) ## Resolve the lowest versions that pyproject.toml allows (build/lowest.txt)
	@mkdir -p build
	$(LOWEST) --output-file build/lowest.txt

.PHONY: test-lowest
test-lowest: lowest ## Run the fast tests with the lowest versions that pyproject.toml allows
	@rm -rf $(LOWEST_ENV)
	$(UV) venv --quiet --python 3.11 $(LOWEST_ENV)
	$(UV) pip sync --quiet build/lowest.txt --python $(LOWEST_ENV)/bin/python
	$(UV) pip install --quiet --python $(LOWEST_ENV)/bin/python --no-deps --no-build-isolation --editable .
	$(LOWEST_ENV)/bin/python -m nslightning.ops.kernels.build
	$(LOWEST_ENV)/bin/pytest --numprocesses=auto --dist=worksteal -W default  # old versions warn of more

.PHONY: lint
lint: setup ## Check style and formatting (ruff, shellcheck), declared imports (deptry), workflows and issue forms
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/deptry .
	$(BIN)/shellcheck .ci/run benchmarks/on_gpu.sh
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.github-issue-forms .github/ISSUE_TEMPLATE/[!c]*.yml

.PHONY: format
format: setup ## Mend what ruff can mend
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

.PHONY: type
type: setup ## Check types (mypy)
	$(BIN)/mypy

WHEEL_ENV := build/wheel-env
.PHONY: wheel-check
wheel-check: setup ## Build sdist and wheel, install the wheel in a fresh environment, use it outside the checkout
	@rm -rf dist $(WHEEL_ENV)
	$(UV) build --quiet --no-build-isolation --python $(PY) --out-dir dist
	$(UV) venv --quiet --python $(PY) $(WHEEL_ENV)
	$(SYNC) $(WHEEL_ENV)/bin/python
	$(UV) pip install --quiet --python $(WHEEL_ENV)/bin/python --no-deps dist/*.whl
	@bin="$$PWD/$(WHEEL_ENV)/bin"; out=$$(mktemp -d); trap 'rm -rf "$$out"' EXIT; cd "$$out"; \
	export WANDB_MODE=offline; unset PYTHONPATH; set -x; \
	"$$bin/nslightning" --version; \
	"$$bin/python" -m nslightning --help >/dev/null; \
	"$$bin/python" -c 'import nslightning.callbacks, nslightning.configs'; \
	"$$bin/nslightning" fit --config configs/quickstart.yaml --trainer.max_epochs=1 \
		--trainer.limit_train_batches=2 --trainer.limit_val_batches=2
	@rm -rf $(WHEEL_ENV)

.PHONY: check
check: lint type lock-check docs wheel-check ## Everything CI checks besides the tests

##@ Tidying

.PHONY: clean
clean: ## Remove what building and checking left behind (keeps the environment and runs/)
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find $(wildcard benchmarks callbacks configs nslightning tests) -name __pycache__ -type d -prune -exec rm -rf {} +
