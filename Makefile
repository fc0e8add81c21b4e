# One command each. A fresh machine needs Python >= 3.10, a C++17 compiler and make; everything else goes into .venv.
PYTHON ?= python3
VENV := .venv
# Developer builds compile CUDA for one architecture; PRECOND_CUDA=OFF skips it.
export PRECOND_CUDA_ARCHS ?= 90
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

CPP := $(wildcard csrc/*/* tests/cpp/*.cpp tests/cpp/*.h tests/cpp/rules/*.h tests/cuda_on_host/* tests/machine_code/*.c* bench/*.cu)
TOOLS := torch triton numpy scipy scikit-learn pybind11 ninja cmake setuptools pytest pytest-xdist filelock pytest-benchmark hypothesis expecttest \
	schedulefree gymnasium matplotlib tqdm ruff mypy clang-format build

# Of torchtitan's requirements its optimizers import two; the others (datasets, wandb, tensorboard) are left out.
TRAINERS := transformers accelerate lightning deepspeed tyro spmd-types

.PHONY: setup build test test-all test-integrations lint format bench codegen demo gpu sanitize dist clean

setup: $(VENV)/.ready
$(VENV)/.ready: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -q -c constraints.txt $(TOOLS)
	touch $@

# Installs once; from then on CMake compiles what changed, in build/editable.
build: $(VENV)/.installed
	python setup.py -q build_ext --inplace
$(VENV)/.installed: $(VENV)/.ready setup.py pyproject.toml
	$(VENV)/bin/python -m pip install -q --no-build-isolation --no-deps -e .
	touch $@

# The push tier, a worker on each core.
test: build
	python -m precond
	python -m pytest -n auto --dist loadfile --no-loadscope-reorder -m "not large"
	python -m pytest -q bench -m "not large" --benchmark-enable --benchmark-columns=median,rounds --benchmark-warmup=on

# Everything, the long tests too.
test-all: build
	python -m pytest -n auto --dist loadfile --no-loadscope-reorder
	python -m pytest -q bench --benchmark-enable
	python -m bench theory

# Trainers of other libraries, and examples/: 280 s of processor time, 40 of them for the installation. Here a library that is missing is a failure.
test-integrations: build $(VENV)/.integrations
	PRECOND_NEED_INTEGRATIONS=1 python -m pytest -n auto --dist loadfile tests/integrations
# DeepSpeed's set-up looks at the torch that is installed; its own kernels are not built.
$(VENV)/.integrations: $(VENV)/.ready
	DS_BUILD_OPS=0 $(VENV)/bin/python -m pip install -q -c constraints.txt --no-build-isolation $(TRAINERS)
	$(VENV)/bin/python -m pip install -q -c constraints.txt --no-deps torchtitan
	touch $@

lint: build
	ruff check .
	ruff format --check .
	clang-format --dry-run --Werror $(CPP)
	mypy
	.ci/own-mistakes

format: build
	ruff check --fix -q .
	ruff format -q .
	clang-format -i $(CPP)

bench: build
	python -m bench cpu

codegen: build
	python -m bench codegen

# On a machine with a GPU: builds for its card and proves and measures there, in the Python environment it finds (no .venv).
gpu:
	.ci/gpu/run

demo: build
	python -m bench demo

sanitize: build
	python -m pytest -q tests/test_cpp.py

# sdist -> wheel -> install into a clean environment -> test from another directory.
dist: build
	.ci/package

clean:
	rm -rf build dist demo-out examples-out *.egg-info precond/_C*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -not -path "./$(VENV)/*" -exec rm -rf {} +
