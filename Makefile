# SPDX-License-Identifier: Apache-2.0
PYTHON ?= python3.11
VENV := .venv
BENCH := .venv-bench
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: help install demo test test-slow bench lint docs ledger ledger-check open-table clean

help:  ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

$(STAMP): pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) is not on the PATH; run make PYTHON=python3 with Python 3.10 or newer"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -e '.[report,dev]'
	touch $@

install: $(STAMP)  ## make .venv with everything that the tests and the demo use

demo: $(STAMP)  ## score vitt14_open, train it further on real photographs, open demo/report.html (under 10 minutes on two cores)
	$(BIN)/opendino demo --out demo

test: $(STAMP)  ## every test that takes seconds
	$(BIN)/python -m pytest -m "not slow and not net and not gpu"

test-slow: $(STAMP)  ## the tests that take minutes, and those that need a package registry
	$(BIN)/python -m pytest -m "slow or net"

$(BENCH)/.installed: benchmarks/requirements.txt benchmarks/requirements-lightly-train.txt \
		benchmarks/requirements-timm.txt benchmarks/requirements-transformers.txt pyproject.toml
	test -x $(BENCH)/bin/python || $(PYTHON) -m venv $(BENCH)
	$(BENCH)/bin/pip install --quiet $(foreach f,$(wildcard benchmarks/requirements*.txt),-r $(f)) -e .
	touch $@

bench: $(BENCH)/.installed  ## time forward and training step against peers, in an environment of its own
	$(BENCH)/bin/python benchmarks/run.py

lint: $(STAMP)  ## style, types and import arrows
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/ruff format --check src tests benchmarks
	$(BIN)/mypy

docs: $(STAMP)  ## run the commands of the README and the docs
	$(BIN)/python -m pytest tests/docs

ledger: $(STAMP)  ## write docs/ledger.md from docs/ledger.yaml
	$(BIN)/python benchmarks/ledger.py write

ledger-check: $(STAMP)  ## measure the cheap figures of the docs again; NET=--net: also those that fetch packages
	$(BIN)/python benchmarks/ledger.py check $(NET)

open-table: $(STAMP)  ## build the real sets and score vitt14_open on them (an hour; half of it renders rooms)
	$(BIN)/pip install --quiet -e '.[rooms]'
	$(BIN)/python benchmarks/real_sets/build.py --out data/real-sets
	$(BIN)/python benchmarks/real_sets/table.py --sets data/real-sets --work data/open-table --run vitt14_open

clean:  ## remove the environment and caches
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache
