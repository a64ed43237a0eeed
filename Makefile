# Every command of the project. `make` alone lists them. VENV= and PYTHON= choose where and with what.
PYTHON ?= python3
VENV ?= .venv
# An index of other builds (CPU only, another CUDA) is chosen with pip's own PIP_INDEX_URL or PIP_EXTRA_INDEX_URL.
TORCH ?= "torch>=2.11,<3" "torchvision>=0.26,<1"
# Pins for pip, such as .ci/constraints.txt (what the tests passed with); empty for any version in range.
CONSTRAINTS ?=
ARGS ?=
# For make gpu: a folder of wheels that PYTHON lacks, if any, and the minutes that it may take.
WHEELS ?=
MINUTES ?= 12
# Test processes; each test computes on one thread.
WORKERS ?= 2

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
RUN := $(BIN)/python -m
PINS := $(if $(CONSTRAINTS),--constraint $(CONSTRAINTS))
QUICK := not slow and not gpu and not slurm and not kill

.DEFAULT_GOAL := help
.PHONY: help setup audit headline grid locality bench gpu plant test test-slow test-kill test-slurm lint constraints vulnerabilities clean

help: ## list the commands
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | awk -F'\t' '{printf "  make %-10s %s\n", $$1, $$2}'

setup: $(STAMP) ## install into the environment (VENV=); does nothing when it is up to date

$(STAMP): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(RUN) pip install --quiet --disable-pip-version-check $(PINS) $(TORCH)
	$(RUN) pip install --quiet --disable-pip-version-check $(PINS) --editable ".[dev]"
	@touch $@

audit: $(STAMP) ## audit the embedded benchmark and write its report (ARGS="..." adds overrides)
	$(RUN) dori_lightning +experiment=audit $(ARGS)

headline: $(STAMP) ## make the headline table again and hold it against the recorded claims (an hour; jobs side by side)
	PATH="$(abspath $(BIN)):$$PATH" bash experiments/001-headline-table/run.sh

grid: $(STAMP) ## pruning method x budget x checkpoint, with its table (ARGS="..." adds overrides)
	$(RUN) dori_lightning -m +experiment=pruning_grid $(ARGS)

locality: $(STAMP) ## is memorization local? triggers compared in every place, on the embedded benchmark (15 minutes)
	$(RUN) dori_lightning +experiment=locality $(ARGS)

bench: $(STAMP) ## how fast is this machine at an audit's parts, against plain loops (ARGS="..." adds overrides)
	$(RUN) dori_lightning +experiment=bench $(ARGS)

# On a machine without network and without an environment of its own: PYTHON has torch already. Tests get 30 % of the time.
gpu: export PYTHONPATH := $(CURDIR):$(CURDIR)/build/wheels
gpu: export CUBLAS_WORKSPACE_CONFIG := :4096:8
gpu: ## what only a GPU can tell: tests, then a table of speed and memory (PYTHON=, WHEELS=folder, MINUTES=12, ARGS="...")
	$(if $(WHEELS),$(PYTHON) -m pip install --quiet --no-index --no-deps --upgrade --target build/wheels $(WHEELS)/*.whl)
	status=0; \
	timeout -s INT -k 9 $$(($(MINUTES) * 18)) $(PYTHON) -m pytest -o addopts= -q -ra -m gpu tests/gpu tests/contract || status=$$?; \
	timeout -k 30 $$(($(MINUTES) * 38)) $(PYTHON) -m dori_lightning +experiment=bench_gpu \
		task.seconds=$$(($(MINUTES) * 33)) $(ARGS) || status=$$?; \
	exit $$status

plant: $(STAMP) ## train the embedded benchmark again from its recipe (long)
	$(RUN) dori_lightning task=plant $(ARGS)

test: $(STAMP) ## quick tests
	$(RUN) pytest -n $(WORKERS) -m "$(QUICK)" $(ARGS)

test-slow: $(STAMP) ## slow tests
	$(RUN) pytest -m "slow and not gpu and not slurm and not kill" $(ARGS)

test-kill: $(STAMP) ## kill runs fifty times at random moments, resume them, compare
	$(RUN) pytest -m kill $(ARGS)

test-slurm: $(STAMP) ## a SLURM of two nodes on this machine: sweep, fine-tuning over nodes, preemption, time limit
	$(RUN) pip install --quiet --disable-pip-version-check $(PINS) --editable ".[dev,slurm]"
	$(RUN) pytest -m slurm -rs $(ARGS)

lint: $(STAMP) ## style, types and import directions
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	$(RUN) mypy
	$(BIN)/lint-imports

constraints: $(STAMP) ## write down the installed versions (.ci/constraints.txt), after the tests have passed with them
	$(BIN)/python .ci/constraints.py > .ci/constraints.txt.new
	mv .ci/constraints.txt.new .ci/constraints.txt

vulnerabilities: $(STAMP) ## known vulnerabilities of the installed versions (needs the network; 1: found some, 3: not checked)
	VENV="$(VENV)" .ci/vulnerabilities

clean: ## remove caches and build products; results and the environment stay
	rm -rf build dist .pytest_cache .ruff_cache .mypy_cache .import_linter_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
