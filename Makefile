# `make demo` and `make test` set up what they need; `make` lists the rest.

SHELL := /bin/bash
.DEFAULT_GOAL := help

export PATH := $(PATH):/usr/sbin:/sbin
export PYTHONNOUSERSITE := 1

# Programs started below are not part of this make: its job server and options are not theirs.
RUN := env -u MAKEFLAGS -u MFLAGS -u MAKELEVEL
BIN := .venv/bin

# Extra arguments: make test ARGS='-k fold', make bench ARGS=...
ARGS =

.PHONY: help setup setup-demo demo test lint bench soak clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 16

setup: ## install what the demo and the tests need (Debian packages, .venv)
	@scripts/setup --profile test

setup-demo:
	@scripts/setup --profile demo

demo: setup-demo ## train a small model through LIFL on this machine
	@$(RUN) $(BIN)/python bench/demo.py $(ARGS)

lint: setup ## ruff, mypy and the import contracts
	@$(RUN) $(BIN)/ruff check .
	@$(RUN) $(BIN)/ruff format --check .
	@$(RUN) $(BIN)/mypy
	@$(RUN) $(BIN)/lint-imports

test: lint ## lint, then every test
	@$(RUN) $(BIN)/python -m pytest --numprocesses 3 --dist loadscope $(ARGS)

bench: setup ## measure every promised figure beside its goal
	@$(RUN) $(BIN)/python bench/run.py $(ARGS)

soak: setup ## run rounds for a long time and watch for leaks
	@$(RUN) $(BIN)/python bench/soak.py $(ARGS)

clean: ## remove caches and build output (keeps .venv and benchmark results)
	@rm -rf build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	@find . -path ./.venv -prune -o -path ./.git -prune -o -type d \
		\( -name __pycache__ -o -name '*.egg-info' \) -prune -exec rm -rf {} +
