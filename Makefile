# sslfast: `make help` lists the targets. Needs Python 3.11 or later, g++ and make; everything else is installed into .venv.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= 2.11.0
TORCHVISION ?= 0.26.0
# A second torch, in an environment of its own: the binary built against TORCH must also run there.
ABI_TORCH ?= 2.13.0
ABI_VENV ?= .venv-abi
# And beside the newest Python that is here.
NEWEST_PYTHON ?= $(shell for v in 3.14 3.13 3.12; do for p in python$$v $(or $(PYENV_ROOT),$(HOME)/.pyenv)/versions/$$v.*/bin/python; do \
  if $$p -c 'import venv, ensurepip' 2>/dev/null; then echo $$p; exit; fi; done; done)
NEWEST_VENV ?= .venv-newest

# Built only where its system headers are; the ffcv loader and its tests are left out elsewhere.
FFCV ?= ffcv==1.0.2 opencv-python==5.0.0.93 numba==0.68.1 llvmlite==0.50.0
FFCV_HEADERS := libturbojpeg0-dev libopencv-dev pkg-config g++

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input
SOURCES := setup.py CMakeLists.txt pyproject.toml $(wildcard csrc/*.h csrc/*.cpp csrc/*/*)
CPP_FILES := $(wildcard csrc/*.h csrc/*.cpp csrc/*/* tests/cuda_emulation/*.cu tests/cuda_emulation/include/*)

.DEFAULT_GOAL := help
.PHONY: help install demo test sanitize lint format docs bench wheel gpu-check clean test-newest-python test-kernels test-others

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

install: $(VENV)/.built $(VENV)/.ffcv ## create .venv, install torch and sslfast, compile the core

$(VENV)/.torch:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "sslfast: $(PYTHON) is not Python 3.11 or later; name one, for example make PYTHON=python3.13"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || \
	  { echo "sslfast: $(PYTHON) cannot create environments; install its venv module (Debian: python3-venv)"; exit 1; }
	$(PIP) install -q torch==$(TORCH) torchvision==$(TORCHVISION)
	@touch $@

$(VENV)/.built: $(VENV)/.torch $(SOURCES)
	$(PIP) install -q "setuptools>=70.1,<81" "setuptools-scm>=8" wheel "cmake>=3.24" ninja
	$(PIP) install -q --no-build-isolation -e ".[train,dali,deepcluster,evaluation,export,parquet,slurm,heif,remote,demo,bench,timm,docs,dev]"
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

# CUDA's libraries, most of torch's size, are the same files for every Python: those of VENV are used.
NEWEST_PIP = $(NEWEST_VENV)/bin/python -m pip --disable-pip-version-check --no-input install -q
$(NEWEST_VENV)/.torch: | $(VENV)/.torch
	$(NEWEST_PYTHON) -m venv $(NEWEST_VENV)
	$(NEWEST_PIP) --no-deps torch==$(TORCH) torchvision==$(TORCHVISION)
	$(NEWEST_PIP) filelock "typing-extensions>=4.10" sympy networkx jinja2 fsspec setuptools "numpy>=1.26" "pillow>=10" "tyro>=0.9" "rich>=13" "tensorboard>=2.15" "pyyaml>=6"
	@for folder in $(abspath $(VENV))/lib/python3*/site-packages/nvidia; do \
	  if [ -d $$folder ]; then ln -sfn $$folder $(NEWEST_VENV)/lib/python3*/site-packages/; fi; done
	@touch $@

demo: install ## pretrain PIRL on real photographs, evaluate beside untrained and raw pixels, draw pictures
	$(BIN)/sslfast demo

test: install lint $(ABI_VENV)/.torch ## lint, type checks, every test, and the binary beside a second torch and the newest Python
	$(ABI_VENV)/bin/python tests/abi_check.py
	@$(MAKE) --no-print-directory test-newest-python
	@mkdir -p build; $(MAKE) --no-print-directory -j2 --keep-going test-kernels test-others; failed=$$?; \
	cat build/test-loaders.log build/test-kernels.log; exit $$failed

# Two processes at a time, about equally long; one shows its progress. Tests of the loaders measure memory, which needs a heap
# that no other test has torn up. Threads that wait must sleep: there are more of them than cores.
KERNEL_TESTS := tests/ops tests/benchmarks tests/adapters tests/models tests/test_wheel.py
PYTEST := env -u MAKEFLAGS OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest
test-kernels:
	@$(PYTEST) tests/loaders >build/test-loaders.log 2>&1; loaders=$$?; \
	$(PYTEST) $(KERNEL_TESTS) >build/test-kernels.log 2>&1 && exit $$loaders
test-others:
	@$(PYTEST) --ignore=tests/loaders $(KERNEL_TESTS:%=--ignore=%)

ifeq ($(NEWEST_PYTHON),)
test-newest-python:
	@echo "sslfast: no Python beside $(PYTHON) is here to try the binary with"
else
test-newest-python: $(NEWEST_VENV)/.torch
	$(NEWEST_VENV)/bin/python tests/abi_check.py --pretrain
endif

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

# cuda is built where nvcc is, for the processor at hand. Its version ends in +cu130, as torch's does.
WHEELS ?= cpu aarch64 cuda
WHEEL_cpu = SSLFAST_CUDA=0
WHEEL_aarch64 = SSLFAST_CROSS=aarch64
WHEEL_cuda = SSLFAST_CUDA=1 SSLFAST_LOCAL_VERSION=cu$$(nvcc --version | sed -n 's/.*release \([0-9]*\)\.\([0-9]*\),.*/\1\2/p')
wheel: install ## manylinux wheels in dist: for this processor (CPU, CUDA) and for aarch64 (CPU, cross-compiled); audited, tried without a compiler; WHEELS=cpu for one of them
	rm -rf build/wheel dist
	@set -e; for kind in $(WHEELS); do $(MAKE) --no-print-directory build-wheel-$$kind; done
	@ls -l dist

build-wheel-%:
	$(WHEEL_$*) PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python setup.py -q build --build-base build/wheel/$* bdist_wheel --dist-dir build/wheel/$*
	$(BIN)/python tests/wheel_check.py build/wheel/$*/*.whl $(if $(filter aarch64,$*),--foreign)

PART ?=
DATA ?=
gpu-check: ## on a GPU machine, offline: build for its card, CUDA tests, benchmarks, sanitizers in three parts of nine minutes (PART=1, 2, 3; DATA=labelled set); results in build/gpu-check
	$(PYTHON) benchmarks/gpu_check.py $(if $(PART),--part $(PART)) $(if $(DATA),--data $(DATA))

clean: ## remove builds and environments
	rm -rf build dist $(VENV) $(ABI_VENV) $(NEWEST_VENV) sslfast/*.so *.egg-info
