# Every target sets itself up in the virtual environment .venv of this clone; a second run finds it ready.
# Needed beforehand: Python 3.11 or newer (constraints.txt wants it), make and git. PYTHON=... picks another interpreter.

PYTHON ?= $(shell python3.11 -c '' 2>/dev/null && echo python3.11 || echo python3)
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/pip install -q --disable-pip-version-check -c constraints.txt

# No target needs the Hugging Face hub: whatever asks for it fails at once instead of waiting.
export HF_HUB_OFFLINE := 1

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help quickstart bench example-text example-images example-equations docs test lint clean

help:  ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-18s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# Threads that wait must not spin: on busy cores that made the same run several times slower.
quickstart: export OMP_WAIT_POLICY := PASSIVE
quickstart: $(VENV)/.recipes  ## Train a small classifier with iEF
	$(BIN)/lightning-ief fit --config recipes/quickstart.yaml

bench: $(VENV)/.bench  ## Time and memory against SGD and peers: writes docs/benchmarks.md, takes hours
	$(BIN)/python -m benchmarks all

example-text: $(VENV)/.bench  ## MiniLM with LoRA on movie reviews with iEF, AdamW and others: takes hours
	$(BIN)/python -m benchmarks movie-reviews

example-images: $(VENV)/.bench  ## A small ViT on Fashion-MNIST, then LoRA with iEF, AdamW and others: takes hours
	$(BIN)/python -m benchmarks fashion-vit

example-equations: $(VENV)/.bench  ## Equations solved to six digits with iEF, beside Adam, AdamW, L-BFGS: half an hour
	$(BIN)/python -m benchmarks equations

docs: $(VENV)/.dev  ## Build the documentation into build/docs
	$(BIN)/sphinx-build -q -W --keep-going docs build/docs

test: export OMP_NUM_THREADS := 1
test: lint  ## Everything CI runs: lint, tests and doctests, the wheel
	$(BIN)/pytest -n 2 --dist worksteal
	$(BIN)/python .ci/wheel

lint: $(VENV)/.dev  ## Style, docstrings and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

clean:  ## Remove the virtual environment, builds and caches
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.recipes: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) -e '.[recipes]'
	@touch $@

# Each of these comes on top of the ones before, so that its stamp stands for theirs too.
$(VENV)/.bench: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) -e '.[bench]'
	@touch $(VENV)/.recipes $@

$(VENV)/.dev: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) -e '.[dev]'
	@touch $(VENV)/.recipes $(VENV)/.bench $@
