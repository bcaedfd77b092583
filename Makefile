# The commands of a working day. CI runs `check`, `docs`, `demo`, `arm` and `test` exactly as they are here.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

# All environments' contents live in one folder: what `demo` and `docs` need (no torch) is a part of what `dev` needs.
DEMO := $(VENV)/.installed-demo
DOCS := $(VENV)/.installed-docs
DEV := $(VENV)/.installed-dev

# As environment variables the constraints also hold for the isolated environment that builds the package. Python compiles
# what it imports; pip would compile all of it.
INSTALL = PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt PIP_DISABLE_PIP_VERSION_CHECK=1 \
	$(BIN)/python -m pip install --quiet --no-compile

# ONNX Runtime contacts its vendor unless told not to.
export ORT_DISABLE_TELEMETRY := 1

.NOTPARALLEL:
.DELETE_ON_ERROR:
.PHONY: help demo docs tables test check arm cluster bench nano ablation clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

demo: $(DEMO) ## install without torch, run the embedded nano bundle, draw demo.png
	$(BIN)/mmemb demo

docs: $(DOCS) ## build the documentation into build/docs, which opens without a server
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict -f docs/mkdocs.yml

tables: $(DEV) ## write the tables of benchmarks/results into the README and the pages
	$(BIN)/python docs/tables.py

test: $(DEV) ## install everything, run the tests
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

check: $(DEV) ## lint, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy & $(BIN)/pyright --pythonpath $(BIN)/python; found=$$?; wait $$! && exit $$found

arm: $(DEV) ## install on an emulated aarch64 CPU, compare its answers with this one's; on Debian
	tests/aarch64/prepare.sh build/aarch64 $(BIN)/python $(CPU)
	$(BIN)/python tests/aarch64/compare.py build/aarch64/python

cluster: $(DEV) ## run the tests that start a Ray cluster (a minute or two)
	$(BIN)/python -m pytest -m cluster

bench: $(DEV) ## run the benchmarks of a CPU (about an hour on 2 cores), make a page of them
	PYTHON=$(BIN)/python benchmarks/cpu.sh

nano: $(DEV) ## retrain the nano model and export it into the package
	$(BIN)/mmemb train nano runs/nano
	$(BIN)/mmemb export runs/nano/control/checkpoint mmemb_deploy/assets/nano --form fused --calibrate digitchain --overwrite

ablation: $(DEV) ## train and measure every row of the ablation table (about an hour and a half on 2 cores)
	$(BIN)/mmemb train ablation runs/nano

clean: ## remove caches and build outputs; .venv and runs/ stay
	rm -rf build dist .mypy_cache .pytest_cache .ruff_cache .benchmarks demo.png
	find mmemb_deploy training export engines benchmarks docs tests -name __pycache__ -type d -prune -exec rm -rf {} +

# pip is the last thing that venv puts in place.
$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "mmemb-deploy needs Python 3.11 or newer, and PYTHON=$(PYTHON) is not:" \
			"$$($(PYTHON) --version 2>&1). Name one that is, for example: make PYTHON=python3.12 demo" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(DEMO): pyproject.toml constraints.txt | $(BIN)/pip
	$(INSTALL) --editable '.[cpu,bench]'
	touch $@

$(DOCS): pyproject.toml constraints.txt | $(BIN)/pip
	$(INSTALL) --editable '.[docs]'
	touch $@

$(DEV): pyproject.toml constraints.txt | $(BIN)/pip
	$(INSTALL) --editable '.[cpu,media,train,export,bench,serve,otel,ray,dev,docs,rtx]'
	touch $(DEMO) $(DOCS) $@
