PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# the CPU build where the index has one; `make TORCH=torch` takes what the index gives
TORCH ?= torch==2.13.0
EXTRAS := dev
RUN := HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

.DEFAULT_GOAL := help
.PHONY: help install quickstart smoke test check format clean

help:  ## show what there is to make
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

install: $(VENV)/installed  ## set up .venv with everything that tests and the quickstart need

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$(TORCH)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[$(EXTRAS)]"
	@touch $@

quickstart: install  ## train a small Uni-X that draws, looks and answers, and write runs/quickstart/report.html
	$(RUN) $(BIN)/uni-x quickstart

smoke: install  ## the same in a minute, with next to no training
	$(RUN) $(BIN)/uni-x quickstart --smoke

test: install check  ## run every check and every test
	$(RUN) $(BIN)/python -m pytest

check: install  ## lint and check types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install  ## format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove the environment and caches
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache
