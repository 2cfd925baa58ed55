# The commands of the project; `make` alone lists them. SET=gpu makes the environment of a GPU machine.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help setup quickstart check lint format types test test-long bench pins clean

SET ?= cpu
BIN := .venv/bin
# ninja is there, with which DeepSpeed compiles an operator when it is first used.
export PATH := $(CURDIR)/$(BIN):$(PATH)

# Tests: one thread a process, no hub, no usage reports, and a Ray that asks for a token which nothing else knows.
TEST_ENV := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 RAY_USAGE_STATS_ENABLED=0 VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1 \
	RAY_AUTH_MODE=token RAY_AUTH_TOKEN=$$(head -c 32 /dev/urandom | od -An -vtx1 | tr -d ' \n')
PYTEST := $(TEST_ENV) $(BIN)/python -m pytest

help: ## list the commands
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 14

setup: ## make .venv with everything in it; does nothing when that is done
	@for python in $(PYTHON) python3.11 python3.12; do \
		if $$python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' 2>/dev/null; then \
			exec $$python requirements/install.py $(SET); \
		fi; \
	done; \
	echo "setup: no Python 3.11 or 3.12 was found; install one, or name it: make setup PYTHON=/path/to/python3.11" >&2; exit 1

quickstart: setup ## the three stages on this machine, with the embedded model and data
	@$(BIN)/rlhf-cluster run recipe=quickstart

check: lint types ## lint, types, unit tests, the loop on fakes, the house rules
	@$(PYTEST) -n 2 --dist loadfile -m "not long" tests/unit tests/loop tests/test_house.py

lint: setup
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --quiet --check . || { $(BIN)/ruff format --diff .; exit 1; }

format: setup ## lay the code out as lint wants it
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

types: setup
	@$(BIN)/mypy

test: check ## check, then the contract, deploy and cluster tests
	@$(PYTEST) -m "not long" tests/contract tests/deploy tests/cluster

test-long: setup ## the tests that take minutes
	@$(PYTEST) -m long tests

bench: setup ## what it costs, each question beside something else: benchmarks/RESULTS.md (about three hours)
	@for question in throughput learner generation publish stream driver scale grpo asynchronous; do \
		OMP_NUM_THREADS=1 $(BIN)/python benchmarks/$$question.py || exit 1; \
	done

pins: setup ## resolve requirements/*.txt anew from pyproject.toml, keeping the pins that still fit
	@resolve="$(BIN)/uv pip compile --quiet --no-header --no-annotate --python-version 3.11 --override requirements/without.txt"; \
	links=$$(printf '%s' "$${PIP_FIND_LINKS:+--find-links $$PIP_FIND_LINKS}"); \
	$$resolve pyproject.toml requirements/model.in --extra cpu --override requirements/without-cpu.txt $$links \
		--no-emit-package torch -o requirements/cpu.txt; \
	$$resolve pyproject.toml requirements/model.in --extra gpu -o requirements/gpu.txt; \
	$$resolve --group dev --constraints requirements/cpu.txt --override requirements/without-dev.txt -o requirements/dev.txt

clean: ## remove .venv and the tools' caches (runs/ stays)
	rm -rf .venv .venv.discarded .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
