# Two commands on a fresh clone: `make train` and `make test`. Each installs what it needs in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: train ablation recall-study test test-slow lint kernels clean

$(VENV)/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	touch $@

$(VENV)/.developed: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[dev]"
	touch $@

train: $(VENV)/.installed  ## a first model: MQAR on the CPU, about a minute
	$(BIN)/python train.py

ablation: $(VENV)/.developed  ## mixers compared, with seeds, intervals and a report; no download
	-$(BIN)/python train.py -m experiment=ablation_mqar hydra.sweep.dir=outputs/ablation/mqar
	-$(BIN)/python train.py -m experiment=ablation_text hydra.sweep.dir=outputs/ablation/text
	$(BIN)/python compare.py runs=outputs/ablation

recall-study: $(VENV)/.installed  ## five mixers on MQAR, 3 seeds, 2 learning rates: half an hour on two cores
	$(BIN)/python recall_study.py

test: $(VENV)/.developed  ## everything but the tests marked slow or gpu
	$(BIN)/python -m pytest -n 2 -m "not slow and not gpu"

test-slow: $(VENV)/.developed  ## the long and the timing tests, one process
	$(BIN)/python -m pytest -m "slow and not gpu"

kernels: $(VENV)/.installed  ## docs/kernels.md: registers and spills of the Triton kernels, no GPU needed
	$(BIN)/python -m benchmarks.static

lint: $(VENV)/.developed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/pyright --pythonpath $(BIN)/python

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis
