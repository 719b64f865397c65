# Every target does its own set-up: on a fresh Debian 12 with Python 3.11 each of them is the only command to type.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: install quickstart test lint bench clean

install: $(STAMP)

# Installed once, and again when what is to be installed has changed.
$(STAMP): setup.py tools/install.sh $(wildcard tools/install_ffcv.sh)
	bash tools/install.sh $(PYTHON) $(VENV)
	touch $@

quickstart: $(STAMP)
	$(BIN)/privimage run configs/quickstart.yaml

test: $(STAMP)
ifdef TESTS
	$(BIN)/python -m pytest $(TESTS)
else
	$(BIN)/python -m pytest -n 4 --dist loadfile --no-loadscope-reorder tests/slurm tests/end_to_end tests/distributed tests/privacy tests/unit
endif

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	bash tools/shellcheck.sh

bench: $(STAMP)
	$(BIN)/python benchmarks/loaders.py
	$(BIN)/python benchmarks/private_step.py
	$(BIN)/python benchmarks/convolutions.py
	$(BIN)/python benchmarks/neighbours.py
	$(BIN)/python benchmarks/scaling.py

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
