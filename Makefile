# Everything runs in a virtual environment that the targets make themselves: `make demo` in a fresh clone is enough.
# Another interpreter gets an environment of its own: `make test PYTHON=python3.12` works in .venv-3.12, beside .venv.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:

PYTHON := python3
WORKERS ?= 2
DEMOS := baseline dummy deepstack

ifeq ($(PYTHON),python3)
VENV := .venv
else
VERSION := $(shell "$(PYTHON)" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
$(if $(VERSION),,$(error $(PYTHON) does not run; name an interpreter of Python 3.11 to 3.13, e.g. make PYTHON=python3.12))
VENV := .venv-$(VERSION)
endif
RUN := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed

# Compiled programs are kept between runs and between the targets.
export JAX_COMPILATION_CACHE_DIR ?= $(CURDIR)/.cache/jax
# So are compiled modules, whatever the shell says: the tests start hundreds of processes, and pip compiles none of the environment's.
unexport PYTHONDONTWRITEBYTECODE
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_NO_INPUT := 1

# One worker per file, since fixtures of a file (a small trained model) are built once per worker; in the order of their names,
# which leaves the short files of tests/unit to the end, where xdist's own order leaves the few long tests. The ci profile of hypothesis
# draws the same examples in every run and knows no deadline, so that a busy machine cannot fail a test; plain pytest draws new ones.
PYTEST = $(RUN) -m pytest -q -n $(WORKERS) --dist loadfile --no-loadscope-reorder --hypothesis-profile=$(DRAWS)
DRAWS := ci

.PHONY: help venv demo demo-control readme recipe $(DEMOS:%=demo-%) test test-quick test-all test-real fuzz lint constraints format clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

venv: $(INSTALLED) ## create or update the environment; every target below does so when needed

$(INSTALLED): requirements.txt pyproject.toml setup.py
	@"$(PYTHON)" -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v < (3, 14) else \
		"error: $(PYTHON) is Python %d.%d, expected 3.11 to 3.13; name another with make PYTHON=python3.11" % v)'
	@echo "installing into $(VENV) (once; some minutes on a slow line)"
	@"$(PYTHON)" -m venv $(VENV)
	@$(RUN) -m pip install -qq --no-compile --editable '.[dev]'
	@touch $@

demo: $(DEMOS:%=demo-%) ## train baseline, dummy stack and DeepStack from nothing and show the difference; continues where it was stopped
	$(RUN) -m benchmarks.demo_report runs/demo

$(DEMOS:%=demo-%): demo-%: $(INSTALLED)
	$(RUN) -m deepstack_jax.train --config=configs/demo.py:$* --workdir=runs/demo/$*

demo-control: $(INSTALLED) ## the demo's digits drawn plainly: now the low-res baseline reads them too
	$(RUN) -m deepstack_jax.train --config=configs/demo.py:baseline,legible --workdir=runs/demo/legible
	$(RUN) -m benchmarks.demo_report runs/demo

readme: demo demo-control ## run the demo and write its table and pictures into README.md
	$(RUN) -m benchmarks.readme_table runs/demo

NAME ?= llava15

recipe: $(INSTALLED) ## NAME=llava15 (or another of configs/): both stages, evaluation and export in small, on synthetic weights and data
	$(RUN) -m benchmarks.tiny_recipe $(NAME)

test test-quick test-all test-real fuzz: export JAX_PLATFORMS ?= cpu

test: $(INSTALLED) ## the test suite without the tests that take minutes
	$(PYTEST) -m 'not slow' $(ARGS)

test-quick: $(INSTALLED) ## the part marked `quick`, which CI also runs on the newest Python
	$(PYTEST) -m 'quick and not slow' $(ARGS)

test-all: $(INSTALLED) ## every test
	$(PYTEST) $(ARGS)

test-real: $(INSTALLED) ## a real language model out of a package of the package index: logits, text and loss as transformers', adapters that learn
	$(PYTEST) tests/real $(ARGS)

fuzz: DRAWS := fuzz
fuzz: $(INSTALLED) ## hostile files drawn at random, for as long as it takes: thousands of each kind, new ones in every run
	$(PYTEST) tests/fuzz $(ARGS)

lint: $(INSTALLED) ## ruff (rules and format), pyright, and the linters of shell scripts and of the Dockerfile
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m pyright --pythonpath $(RUN)
	$(VENV)/bin/shellcheck --external-sources launch/*.sh launch/slurm.sbatch
	$(VENV)/bin/hadolint launch/Dockerfile

constraints: $(INSTALLED) ## write constraints.txt from .venv and .venv-3.12 (make venv PYTHON=python3.12), after the tests passed in both
	$(RUN) launch/constraints.py .venv/bin/python .venv-3.12/bin/python

format: $(INSTALLED) ## format the code and fix what ruff can fix
	$(RUN) -m ruff check --fix-only --quiet .
	$(RUN) -m ruff format .

clean: ## delete environments, caches and build products; runs/ stays
	rm -rf .venv .venv-* .cache .pytest_cache .ruff_cache .hypothesis build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
