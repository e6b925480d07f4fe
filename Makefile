# Every target does its own set-up: all that is needed is Python 3.11 or newer, with pip.
# ARGS="..." is passed on, for example: make test ARGS="tests/growth -k gates"

PYTHON ?= $(shell for python in python3.11 python3 python3.12 python3.13 python3.14; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	&& echo $$python && break; done)
BIN := .venv/bin
STAMP := .venv/up-to-date

export OMP_NUM_THREADS := 1

.DEFAULT_GOAL := help
.PHONY: help venv demo test check docs bench bench-growth bench-peers bench-ranks bench-run \
	bench-registry bench-preloading mutants torture

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' Makefile

venv: $(STAMP) ## Create .venv with everything that the demo, the tests and the checks need

$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Esper needs Python 3.11 or newer, and none was found;" \
		"install one, or name it: make venv PYTHON=/path/to/python" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "PYTHON=$(PYTHON) cannot be run or is older than 3.11, which Esper needs" >&2; exit 1; }
	@if $(PYTHON) -c 'import ensurepip' 2>/dev/null; then $(PYTHON) -m venv .venv; else \
		$(PYTHON) -m venv --without-pip .venv \
		&& $(PYTHON) -m pip --python $(BIN)/python install --quiet pip; fi
	$(BIN)/python -m pip install --quiet --upgrade 'pip>=25.1'
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[demo,server,postgres,s3,sign,metrics,redis,otlp]' --group dev
	@touch $@

demo: venv ## Grow a real network on real data, and see what it brought (about 3 minutes)
	$(BIN)/esper demo $(ARGS)

test: venv ## Run every test but the torture tests
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m 'not torture' $(ARGS)

check: venv ## Lint, types, imports, spelling, and the tests that are fast
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/codespell
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m 'not slow and not torture and not gpu' $(ARGS)

docs: venv ## Build the documents and the reference of the public names into site/
	$(BIN)/python -m pip install --quiet -c constraints.txt --group docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict $(ARGS)

bench: venv ## Measure what Esper costs beside its peers; writes benchmarks/results/ and docs/benchmarks.md
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[demo,bench]'
	$(BIN)/python benchmarks/run.py $(ARGS)

bench-run: venv ## Measure what Esper costs a whole run, and which room takes it; writes docs/benchmarks.md
	$(BIN)/python benchmarks/whole_run.py $(ARGS)

bench-ranks: venv ## Measure what ranks take to agree and to share kernels; writes benchmarks/results/ranks/
	$(BIN)/python benchmarks/rank_rows.py $(ARGS)

bench-registry: venv ## Measure what a registry's server takes in a second; writes benchmarks/results/registry/
	$(BIN)/python benchmarks/registry_rows.py $(ARGS)

bench-growth: venv ## Measure what growing brings, in hours, going on where it stopped; writes docs/growth.md
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[demo,bench]'
	$(BIN)/python benchmarks/growth/run.py $(ARGS)

bench-peers: venv ## Run what peers' users complain of on them and on Esper; writes docs/peers.md
	$(BIN)/python benchmarks/beside/run.py $(ARGS)

bench-preloading: venv ## Measure how many of a registry's kernels are at hand when they are asked for
	$(BIN)/python benchmarks/preloading.py $(ARGS)

mutants: venv ## Change what decides a little: do the tests notice? writes benchmarks/results/mutants/
	$(BIN)/python benchmarks/mutants.py $(ARGS)

torture: venv ## Run the tests that take minutes to hours
	$(BIN)/python -m pytest -m torture --timeout 0 -o faulthandler_timeout=0 $(ARGS)
