# A machine with git, make and Python 3.11+ needs nothing else: each target sets up .venv by itself.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The versions the figures in docs/ were measured with; pyproject.toml gives the range that is supported.
TORCH := torch==2.14.1 torchvision==0.29.1
STAMP := $(VENV)/.installed

# Threads that spin while they wait starve each other on a busy machine.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: demo test lint clean

demo: $(STAMP)
	rm -rf demo
	$(BIN)/python -m memseg.cli.main demo --out demo

test: $(STAMP) lint
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(STAMP): pyproject.toml Makefile
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $(STAMP)

clean:
	rm -rf $(VENV) demo dist build
