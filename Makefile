# Every target works on a fresh clone with nothing but Python 3.11 or newer; the environment lives in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test check soak bench clean

test: $(VENV)/.dev
	$(BIN)/python -m pytest -m "not soak"

check: $(VENV)/.dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright
	$(BIN)/python -m pytest -q -m "not slow and not soak"

soak: $(VENV)/.dev
	$(BIN)/python -m pytest -m soak

bench: $(VENV)/.dev
	for script in benchmarks/*.py; do $(BIN)/python $$script || exit 1; done

clean:
	rm -rf $(VENV) build demo *.egg-info

$(BIN)/python:
	@echo "Making the environment $(VENV) with $(PYTHON)"
	$(PYTHON) -m venv $(VENV)

$(VENV)/.core: pyproject.toml | $(BIN)/python
	@echo "Installing Puna and its core dependencies into $(VENV)"
	$(BIN)/python -m pip install --quiet --editable .
	@touch $@

$(VENV)/.dev: pyproject.toml | $(BIN)/python
	@echo "Installing Puna with what its tests need (torch and transformers among it) into $(VENV)"
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	@touch $(VENV)/.core $@
