.DEFAULT_GOAL := help
SHELL := /bin/bash
VENV ?= .venv
BIN := $(VENV)/bin
PY := $(BIN)/python
# An installed uv is used; without one, pip puts its own copy into .uv (nothing outside this folder is touched).
UV := $(or $(shell command -v uv 2>/dev/null),.uv/bin/uv)

.PHONY: help
help: ## Show every target
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  \033[1m%-14s\033[0m %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.uv/bin/uv:
	python3 -m pip install --quiet --target .uv uv

$(VENV)/.ready: requirements.lock pyproject.toml | $(UV)
	$(UV) venv --quiet --allow-existing --python '>=3.11' $(VENV)
	$(UV) pip sync --quiet --python $(PY) --require-hashes requirements.lock
	$(UV) pip install --quiet --python $(PY) --no-deps --no-build-isolation --editable .
	@touch $@

.PHONY: setup
setup: $(VENV)/.ready ## Create the environment from requirements.lock (about 30 s)
