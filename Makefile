# sslfast: `make help` lists the targets. Needs Python 3.11 or 3.12 with headers, g++ and make; everything else is installed into .venv.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= 2.11.0
TORCHVISION ?= 0.26.0
# A second torch, in an environment of its own: the binary built against TORCH must also run there.
ABI_TORCH ?= 2.13.0
ABI_VENV ?= .venv-abi

# Built only where its system headers are; the ffcv loader and its tests are left out elsewhere.
FFCV ?= ffcv==1.0.2 opencv-python==5.0.0.93 numba==0.68.1 llvmlite==0.50.0
FFCV_HEADERS := libturbojpeg0-dev libopencv-dev pkg-config g++

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input
SOURCES := setup.py CMakeLists.txt pyproject.toml $(wildcard csrc/*.h csrc/*.cpp csrc/*/*)
CPP_FILES := $(wildcard csrc/*.h csrc/*.cpp csrc/*/* tests/cuda_emulation/*.cu tests/cuda_emulation/include/*)

.DEFAULT_GOAL := help
.PHONY: help install demo test sanitize lint format docs bench gpu-check clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

install: $(VENV)/.built $(VENV)/.ffcv ## create .venv, install torch and sslfast, compile the core

$(VENV)/.torch:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' || \
	  { echo "sslfast: $(PYTHON) is not Python 3.11 or 3.12; name one, for example make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || \
	  { echo "sslfast: $(PYTHON) cannot create environments; install its venv module (Debian: python3-venv)"; exit 1; }
	$(PIP) install -q torch==$(TORCH) torchvision==$(TORCHVISION)
	@touch $@

$(VENV)/.built: $(VENV)/.torch $(SOURCES)
	$(PIP) install -q "setuptools>=65,<81" wheel "cmake>=3.24" ninja "pybind11>=2.12"
	$(PIP) install -q --no-build-isolation -e ".[train,dali,deepcluster,evaluation,export,parquet,demo,bench,docs,dev]"
	$(INSTALL_FFCV)
	@$(BIN)/sslfast info
	@touch $@

# Headers that are installed later are found by the next `make install`.
$(VENV)/.ffcv: | $(VENV)/.built
	$(INSTALL_FFCV)

define INSTALL_FFCV
@if pkg-config --exists opencv4 libturbojpeg 2>/dev/null; then \
  $(PIP) install -q $(FFCV) torch==$(TORCH) torchvision==$(TORCHVISION) && touch $(VENV)/.ffcv; \
else echo "sslfast: the ffcv loader is left out: apt-get install -y $(FFCV_HEADERS) && make install"; fi
endef

$(ABI_VENV)/.torch:
	$(PYTHON) -m venv $(ABI_VENV)
	$(ABI_VENV)/bin/python -m pip --disable-pip-version-check --no-input install -q torch==$(ABI_TORCH) numpy
	@touch $@

demo: install ## pretrain PIRL on real photographs, evaluate beside untrained and raw pixels, draw pictures
	$(BIN)/sslfast demo

test: install lint $(ABI_VENV)/.torch ## lint, type checks, every test, and the binary beside a second torch
	$(BIN)/python -m pytest
	$(ABI_VENV)/bin/python tests/abi_check.py

sanitize: install ## search for memory errors and undefined behaviour in the CPU ops for longer than `make test` does
	SSLFAST_SANITIZED_FUZZ=5000 $(BIN)/python -m pytest tests/ops/test_sanitizers.py

lint: install ## ruff, clang-format and mypy, changing nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CPP_FILES)
	$(BIN)/mypy

format: install ## rewrite Python and C++ files in the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP_FILES)

docs: install ## the documentation site in build/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

bench: install ## time every op beside its plain torch form
	$(BIN)/python -m pytest benchmarks --benchmark-enable --benchmark-json=build/benchmarks.json

PART ?=
DATA ?=
gpu-check: ## on a GPU machine, offline: build for its card, CUDA tests, benchmarks, sanitizers in three parts of nine minutes (PART=1, 2, 3; DATA=labelled set); results in build/gpu-check
	$(PYTHON) benchmarks/gpu_check.py $(if $(PART),--part $(PART)) $(if $(DATA),--data $(DATA))

clean: ## remove builds and environments
	rm -rf build dist $(VENV) $(ABI_VENV) sslfast/*.so *.egg-info
