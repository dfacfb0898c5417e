# Every target works on a fresh clone with nothing but Python 3.11 or newer. The environment lives in .venv; that of
# `make ... PYTHON=python3.12` in .venv-3.12, beside it.
PYTHON ?= python3
VENV := .venv$(if $(filter-out file,$(origin PYTHON)),-$(patsubst python%,%,$(notdir $(PYTHON))))
BIN := $(VENV)/bin
# The interpreter itself. pyenv's stand-in for one that is not switched on refuses to run, but pyenv knows where it is.
INTERPRETER = $(shell $(PYTHON) -c 'import sys; print(sys.executable)' 2>/dev/null || \
	pyenv whence --path $(PYTHON) 2>/dev/null | tail -n 1)
FOUND = $(or $(INTERPRETER),$(error no Python answers to "$(PYTHON)": install it, or name another with PYTHON=))
# What tests ran with, where requirements/ has it for this Python; another Python takes the newest of everything.
version = $(shell $(1) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
lock = $(addprefix --constraint ,$(wildcard requirements/test-$(call version,$(1)).txt))
# Two pytests, each with up to 5 GB of memory, which take whole files in turn.
IN_PARALLEL := -n 2 --dist loadfile --no-loadscope-reorder

# Each of the many processes of a test run would compile JAX's modules for itself where the shell forbids to keep them.
export PYTHONDONTWRITEBYTECODE :=

# XLA on CPU allocates its temporaries at every step; glibc would map and unmap them each time.
TUNED_MALLOC := GLIBC_TUNABLES=glibc.malloc.arena_max=1:glibc.malloc.mmap_threshold=20000000000:glibc.malloc.trim_threshold=20000000000

.PHONY: recipes demo test check lint types fast-tests soak bench figures settings docs wheel-check gpu-check interpreter which lock clean

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
	$(BIN)/python -m pytest $(IN_PARALLEL) -m "not soak and not recipe and not gpu_program"

# One of the pipelines of configs/recipes, whole, at a size that two cores run in minutes: make recipe-alpaca, and so on.
recipe-%: $(VENV)/.dev
	PY=$(BIN)/python bash configs/recipes/$*/run.sh

# All of them, with checks of what they made.
recipes: $(VENV)/.dev
	$(BIN)/python -m pytest -o faulthandler_timeout=0 tests/test_recipes.py

# Lint, types and the fast tests, side by side.
check: $(VENV)/.dev
	$(MAKE) --no-print-directory --jobs 3 lint types fast-tests

lint types fast-tests: $(VENV)/.dev

lint:
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types:
	$(BIN)/pyright --pythonpath $(BIN)/python

fast-tests:
	$(BIN)/python -m pytest -q $(IN_PARALLEL) -m "not slow and not soak and not recipe and not gpu_program"

# What XLA compiles for an H100, checked without one, on Python 3.12: some 3 GB of packages and 20 minutes.
gpu-check: .venv-gpu/.gpu
	PUNA_GPU_CHECK=benchmarks/results/gpu_check.json .venv-gpu/bin/python -m pytest -m gpu_program tests/test_gpu_programs.py

soak: $(VENV)/.dev
	$(BIN)/python -m pytest -m soak -o faulthandler_timeout=0

# The CPU set, each beside its peers. Those that are not tests' own come last on the path: all run on the same JAX.
bench: $(VENV)/.dev build/peers/.installed
	export PYTHONPATH=$$PWD/build/peers/first; \
	for name in decode train jax_peer quantized lora checkpoint convert speculative serve; do $(BIN)/python benchmarks/$$name.py || exit 1; done
	$(BIN)/python benchmarks/figures.py

# docs/figures.md, from what the benchmarks wrote.
figures:
	$(FOUND) benchmarks/figures.py

# docs/settings.md, from the docstrings of the settings.
settings: $(VENV)/.core
	$(BIN)/python -m train settings --markdown > docs/settings.md

# The site of docs/ in build/site, in an environment of its own; a link that leads nowhere, or a docstring that names an
# argument that is not there, is an error.
docs: .venv-docs/.installed
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict

# The wheel as a stranger has it: built, installed into an empty environment, used from another folder.
wheel-check:
	.ci/wheel-check $(FOUND) $(call lock,$(FOUND))

# Succeeds where PYTHON can be run.
interpreter:
	test -n "$(INTERPRETER)"

# Where PYTHON is.
which:
	@echo $(FOUND)

# Writes requirements/test-VERSION.txt anew: the versions that a fresh environment gets today. The part of a version
# after "+" names one build of it (torch's for CPUs alone), not what is in it.
lock:
	rm -rf build/lock && $(FOUND) -m venv build/lock
	build/lock/bin/python -m pip install --quiet --no-compile ".[dev]"
	build/lock/bin/python -m pip freeze --exclude puna | sed 's/+.*//' \
		> requirements/test-$(call version,$(FOUND)).txt

clean:
	rm -rf .venv .venv-* build demo *.egg-info

.venv-gpu/.gpu: pyproject.toml
	$(MAKE) --no-print-directory interpreter PYTHON=python3.12
	$(shell $(MAKE) --no-print-directory --silent which PYTHON=python3.12) -m venv .venv-gpu
	.venv-gpu/bin/python -m pip install --quiet --no-compile --editable ".[gpu-plan]" pytest
	@touch $@

build/peers/.installed:
	$(FOUND) -m pip install --quiet --no-compile --target build/peers google-tunix
	$(FOUND) -m pip install --quiet --no-compile --no-deps --target build/peers/first xllamacpp
	@touch $@

$(BIN)/python:
	@echo "Making the environment $(VENV) with $(FOUND)"
	$(FOUND) -m venv $(VENV)

# What the site needs alone: pages are made from the source, which is not imported.
.venv-docs/.installed: pyproject.toml
	$(FOUND) -m venv .venv-docs
	.venv-docs/bin/python -m pip install --quiet --no-compile $$($(FOUND) -c 'import tomllib; \
		print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"])')
	@touch $@

$(VENV)/.core: pyproject.toml $(wildcard requirements/*.txt) | $(BIN)/python
	@echo "Installing Puna and its core dependencies into $(VENV)"
	$(BIN)/python -m pip install --quiet --no-compile $(call lock,$(BIN)/python) --editable .
	@touch $@

$(VENV)/.dev: pyproject.toml $(wildcard requirements/*.txt) | $(BIN)/python
	@echo "Installing Puna with what its tests need (torch and transformers among it) into $(VENV)"
	$(BIN)/python -m pip install --quiet --no-compile $(call lock,$(BIN)/python) --editable ".[dev]"
	@touch $(VENV)/.core $@
