# Every target works on a fresh clone with nothing but Python 3.11 or newer; the environment lives in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Two pytests, each with up to 5 GB of memory, which take whole files in turn.
IN_PARALLEL := -n 2 --dist loadfile --no-loadscope-reorder

# XLA on CPU allocates its temporaries at every step; glibc would map and unmap them each time.
TUNED_MALLOC := GLIBC_TUNABLES=glibc.malloc.arena_max=1:glibc.malloc.mmap_threshold=20000000000:glibc.malloc.trim_threshold=20000000000

.PHONY: demo test check lint types fast-tests soak bench clean

# A LLaMA from scratch, on data it makes itself: train it, carry it through the formats, check it, let it answer.
demo: $(VENV)/.core
	@echo "== Training a tiny LLaMA to reverse and sort words; everything it writes goes to demo/"
	$(TUNED_MALLOC) $(BIN)/python -m train.demo run.output_dir=demo/run
	@echo "== Converting it to Orbax, and back to a Hugging Face folder"
	$(BIN)/python -m convert model demo/run/final demo/orbax --to orbax --overwrite
	$(BIN)/python -m convert model demo/orbax demo/hf --to hf --overwrite
	@echo "== Comparing every tensor, and the logits"
	$(BIN)/python -m convert verify demo/run/final demo/hf
	@echo "== Asking it"
	$(BIN)/python -m infer generate demo/hf --max-new-tokens 8 --prompt "sort jihgf = " --prompt "reverse abcde = "

test: $(VENV)/.dev
	$(BIN)/python -m pytest $(IN_PARALLEL) -m "not soak"

# Lint, types and the fast tests, side by side.
check: $(VENV)/.dev
	$(MAKE) --no-print-directory --jobs 3 lint types fast-tests

lint types fast-tests: $(VENV)/.dev

lint:
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types:
	$(BIN)/pyright

fast-tests:
	$(BIN)/python -m pytest -q $(IN_PARALLEL) -m "not slow and not soak"

soak: $(VENV)/.dev
	$(BIN)/python -m pytest -m soak

bench: $(VENV)/.dev
	for name in decode train quantized lora checkpoint convert; do $(BIN)/python benchmarks/$$name.py || exit 1; done

clean:
	rm -rf $(VENV) build demo *.egg-info

$(BIN)/python:
	@echo "Making the environment $(VENV) with $(PYTHON)"
	$(PYTHON) -m venv $(VENV)

$(VENV)/.core: pyproject.toml | $(BIN)/python
	@echo "Installing Puna and its core dependencies into $(VENV)"
	$(BIN)/python -m pip install --quiet --no-compile --editable .
	@touch $@

$(VENV)/.dev: pyproject.toml | $(BIN)/python
	@echo "Installing Puna with what its tests need (torch and transformers among it) into $(VENV)"
	$(BIN)/python -m pip install --quiet --no-compile --editable ".[dev]"
	@touch $(VENV)/.core $@
