PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready
RUNNABLE := $(VENV)/runnable
INSTALL = $(BIN)/python -m pip install --quiet --constraint requirements.lock
# Otherwise each of the processes that tests and benchmarks start compiles all sources anew: a second or three.
export PYTHONDONTWRITEBYTECODE :=

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-pages test-faults test-slow docker-smoke fuzz chaos golden recipes oracle bench bench-peer bench-scale bench-workers bench-cuda bench-hub bench-idle load science science-quick lint lock vendor screenshots serve clean
PEER := .venv-peer

help:  ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "%-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(READY)  ## Make the virtual environment with everything pinned

$(RUNNABLE): pyproject.toml requirements.lock
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) torch
# Of the thousands of modules of transformers few are used: these are compiled when they are.
	$(INSTALL) --no-compile --editable '.[demo]'
	touch $@

$(READY): $(RUNNABLE)
	$(INSTALL) --editable '.[dev]'
	$(BIN)/python -m merge_core.kernels
	touch $@

# Nobody who looks for the first time waits for kernels to be compiled: torch makes the same bytes.
demo: $(RUNNABLE)  ## Open the page, train small models, merge them by every method, print how good the merges are
	$(if $(wildcard $(READY)),,WEIGHTSMITH_KERNELS=plain) $(BIN)/python -m benchmarks.demo

test: $(READY)  ## Run the tests but for those below; ten minutes on two cores
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadgroup

test-pages: $(READY)  ## Look at every page in a browser, in both themes and on a phone (CI does)
	$(BIN)/python -m tests.browsers
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m 'pages and not slow' --numprocesses 2 --dist loadfile

test-faults: $(READY)  ## Run the tests in which services and workers are killed, hang or lose what they need (CI does)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m 'faults and not slow'

test-slow: $(READY)  ## Run the tests that take minutes: many kills, a little chaos, large searches
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow

docker-smoke: $(READY)  ## Build the images, merge through the composition, kill a worker, compare bytes (needs Docker)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.docker_smoke

chaos: $(READY)  ## Merge while everything that can break does (SEED=…, MERGES=…; 15 minutes)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.chaos $(if $(SEED),--seed $(SEED)) $(if $(MERGES),--merges $(MERGES))

fuzz: $(READY)  ## Ask each operation of the service N=300 things that its OpenAPI document allows
	FUZZ=$(or $(N),300) OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/app/test_schema.py

golden: $(READY)  ## Run the golden cases in DIR
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.golden $(DIR)

recipes: $(READY)  ## Plan the published recipes in DIR on stub checkpoints
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.recipes $(DIR)

oracle: $(READY)  ## Merge tiny models by mergekit (`make bench-peer`, or MERGEKIT=…/mergekit-yaml) and compare
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.oracle $(DIR)

bench: $(READY)  ## Measure merges against cat + cp, plain torch and mergekit (SIZE=small: shorter; OUT=rows.json)
	$(BIN)/python -m benchmarks.bench
	$(BIN)/python -m benchmarks.alignment

bench-peer:  ## Install mergekit in an environment of its own, for `make bench` and `make oracle`
	$(PYTHON) -m venv $(PEER)
	$(PEER)/bin/python -m pip install --quiet --constraint requirements.lock torch
	$(PEER)/bin/python -m pip install --quiet mergekit==0.1.5

bench-scale: $(READY)  ## Measure cost and memory from 0.1 to 8 billion parameters (needs 20 GB of disk)
	$(BIN)/python -m benchmarks.scale

bench-workers: $(READY)  ## Measure what a second worker is worth to one merge (SIZE=small: shorter)
	$(BIN)/python -m benchmarks.workers

bench-cuda: $(READY)  ## Measure merges on a CUDA device against the rate of copies to it
	$(BIN)/python -m benchmarks.cuda

bench-idle: $(READY)  ## Measure what a service costs that nobody asks for anything, on both brokers
	$(BIN)/python -m benchmarks.idle

bench-hub: $(READY)  ## Measure the disk and memory of a merge from a Hub to a Hub (SIZE=large: longer)
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.hub

load: $(READY)  ## Queue 1,000 jobs at once from 16 clients, on each broker; count what is lost, doubled or wrong
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.load

science: $(READY)  ## Reproduce what papers claim, hold it against bars, write benchmarks/science.md (NAMES=…: some; under 30 minutes)
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.science $(NAMES)

science-quick: $(READY)  ## Run a part of `make science` with a seed or two, in five minutes
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.science --quick

lint: $(READY)  ## Check style, types and who imports whom
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

screenshots: $(READY)  ## Take the pictures of the page in docs/
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.screenshots

vendor: $(READY)  ## Renew the npm packages that the page uses, as their list says (needs npm)
	$(BIN)/python -m tests.vendored

lock: $(READY)  ## Renew requirements.lock within what pyproject.toml allows
	$(BIN)/python -m pip freeze --exclude-editable | sed 's/+cpu$$//' > requirements.lock

serve: $(READY)  ## Run the service on this machine
	$(BIN)/weightsmith serve

clean:  ## Remove the virtual environment and caches
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache *.egg-info
