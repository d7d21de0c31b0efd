# The one entry point. `make` alone lists the targets; `make demo` needs nothing but python3, python3-venv and make.

PYTHON ?= python3
# The interpreter that makes the virtual environment (once; after `make clean` another one can be named).
VENV ?= .venv
VMM_DEMO_MIB ?= 256
# ARGS goes to pytest: `make test ARGS="tests/wire -x"`.
ARGS ?=

BIN := $(VENV)/bin
COMPILE := $(BIN)/uv pip compile --no-config --quiet --universal --python-version 3.11 \
	--generate-hashes --no-annotate --no-header $(if $(UPGRADE),--upgrade) pyproject.toml --group build

export PYTHON VENV
.DEFAULT_GOAL := help
.PHONY: help setup demo demo-qemu test lint type contracts check check-long model faults compat fixtures bench docs lock fmt clean fuzz base dev fuzzers

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' Makefile

setup: dev ## create .venv with everything for development, from the hashed lock

demo: base ## migrate a running guest between two daemons on this machine (VMM_DEMO_MIB=256)
	@$(BIN)/vmmigrate demo --mib $(VMM_DEMO_MIB)

demo-qemu: base ## move a small Linux in QEMU there and back, under load (ARGS="--mib 512"); as root it installs QEMU
	@$(BIN)/python -m tools.demo_linux $(ARGS)

test: dev ## the tests that take at most 5 minutes
	@$(BIN)/pytest -m "not slow" $(ARGS)

lint: dev ## ruff, formatting, what no committed file may hold, and that nothing released changed
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --check --quiet . || { echo "not formatted; run 'make fmt'"; $(BIN)/ruff format --check .; }
	@$(BIN)/python -m tools.check_tree
	@$(BIN)/python -m tools.check_frozen

type: dev ## mypy, strict
	@$(BIN)/mypy

contracts: dev ## who may import whom
	@$(BIN)/lint-imports --no-logo

# VMM_CHECK: a skipped test that is marked `required` fails (tests/conftest.py). pytest comes last: CI reads its last line.
check: lint type contracts ## everything that has to hold before a commit, at most 25 minutes; CI runs this
	@VMM_CHECK=1 $(BIN)/pytest $(ARGS)

check-long: lint type contracts ## the same with many more generated examples and 200 migrations under fire; by hand
	@VMM_CHECK=1 VMM_LONG=1 $(BIN)/pytest $(ARGS)

model: dev ## explore the ownership rules under an adversary, two failures deep (ARGS="--failures 3 --chain ab")
	@set -e; if [ -n "$(ARGS)" ]; then $(BIN)/python -m tools.model $(ARGS); else \
		for chain in ab aba abc again; do $(BIN)/python -m tools.model --failures 2 --chain $$chain; done; fi

faults: dev ## strike at every message boundary of real migrations with every fault (ARGS="--fault stall --every 3")
	@$(BIN)/python -m tools.faults $(ARGS)

compat: dev ## only the tests that read golden files
	@$(BIN)/pytest -k "golden or frozen or conformance" $(ARGS)

fixtures: dev ## write golden frames and schemas of the newest versions; released ones never change
	@$(BIN)/python -m tools.frame_fixtures --rewrite-head
	@$(BIN)/python -m tools.payload_fixtures --rewrite-head
	@$(BIN)/python -m tools.sealed_vectors --rewrite-head
	@$(BIN)/python -m tools.spec_schemas

bench: base ## run every benchmark; prints ratios measured in one run
	@set -e; for bench in $(sort $(wildcard bench/*.py)); do echo "== $$bench"; $(BIN)/python "$$bench"; done

fuzz: fuzzers ## fuzz every decoder and the live API (FUZZ_SECONDS=60 for each; ARGS="messages api" for some)
	@$(BIN)/python -m tools.fuzz $(ARGS)

docs: dev ## redraw the phase diagram in ARCHITECTURE.md, and tables in docs/
	@$(BIN)/python -m tools.phase_diagram
	@$(BIN)/python -m tools.document_tables

# The larger lock first: the smaller one then takes its pins, so that one environment can grow from one to the other.
lock: dev ## write the lock files anew from pyproject.toml (UPGRADE=1 takes newer releases)
	@$(COMPILE) --extra test --extra dev --output-file requirements-dev.lock
	@$(COMPILE) --constraints requirements-dev.lock --output-file requirements.lock
	@$(COMPILE) --constraints requirements-dev.lock --extra test --extra dev --extra fuzz \
		--output-file requirements-fuzz.lock

fmt: dev ## format, and repair what ruff can repair
	@$(BIN)/ruff check --fix --quiet . ; $(BIN)/ruff format .

clean: ## remove .venv, caches and build output
	@rm -rf $(VENV) build dist *.egg-info .coverage .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

base dev:
	@tools/venv $@

fuzzers:
	@tools/venv fuzz
