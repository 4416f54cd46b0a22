# Two commands on a fresh clone: `make train` and `make test`. Each makes .venv when it is missing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: train recall-study test test-slow lint kernels clean

$(VENV)/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[dev]"
	touch $@

train: $(VENV)/.installed  ## a first model: MQAR on the CPU, about a minute
	$(BIN)/python train.py

recall-study: $(VENV)/.installed  ## five mixers on MQAR, 3 seeds, 2 learning rates: half an hour on two cores
	$(BIN)/python recall_study.py

test: $(VENV)/.installed  ## everything but the tests marked slow or gpu
	$(BIN)/python -m pytest -n 2 -m "not slow and not gpu"

test-slow: $(VENV)/.installed  ## the long and the timing tests, one process
	$(BIN)/python -m pytest -m "slow and not gpu"

kernels: $(VENV)/.installed  ## docs/kernels.md: registers and spills of the Triton kernels, no GPU needed
	$(BIN)/python -m benchmarks.static

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/pyright --pythonpath $(BIN)/python

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis
