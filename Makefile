# make train    set up, train a small language model on two CPU cores, print a sample
# make test     set up, build, run the C++ and the Python tests
# Another torch, Python or place: make test TORCH='torch==2.11.0' PYTHON=python3.12 VENV=/tmp/venv
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
FORMATTERS = clang-format==23.1.5 ruff==0.17.6

BIN := $(abspath $(VENV))/bin
SOURCES := $(shell find cpp cuda python -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' \
  -o -name '*.py' -o -name CMakeLists.txt) CMakeLists.txt setup.py pyproject.toml
# The environment's own cmake and ninja come first.
export PATH := $(BIN):$(PATH)
# The environment made here gets CUDA kernels where there is a GPU to run them (and nvcc to compile them).
export BASED_CUDA ?= $(if $(wildcard /dev/nvidia0),AUTO,OFF)

.PHONY: train test test-cpp test-python test-sanitize cuda install gtest format check-format clean

train: install
	$(BIN)/python -m based_model.train

test: test-cpp test-python

test-cpp: $(VENV)/.tools gtest
	cmake --preset release -G Ninja
	cmake --build --preset release
	ctest --preset release

test-python: install
	$(BIN)/python -m pytest

test-sanitize: $(VENV)/.tools gtest
	cmake --preset sanitize -G Ninja
	cmake --build --preset sanitize
	ctest --preset sanitize

# Compiles every CUDA kernel; needs nvcc, but no GPU.
cuda: $(VENV)/.tools
	cmake -B build/cuda -G Ninja -DBASED_CUDA=ON -DBASED_BUILD_TESTS=OFF
	cmake --build build/cuda

install: $(VENV)/.installed

$(VENV)/.tools:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q "$(TORCH)" "setuptools>=64" cmake ninja pybind11
	touch $@

$(VENV)/.installed: $(VENV)/.tools $(SOURCES)
	$(BIN)/pip install -q --no-build-isolation ".[train,test]"
	$(BIN)/pip install -q --no-build-isolation --force-reinstall --no-deps .
	touch $@

# GoogleTest from the distribution where that is possible; otherwise CMake fetches it.
gtest:
	@[ -e /usr/include/gtest/gtest.h ] || [ "$$(id -u)" != 0 ] || ! command -v apt-get >/dev/null || \
	  { apt-get update -q && apt-get install -q -y --no-install-recommends libgtest-dev; } >/dev/null

format: $(VENV)/.formatters
	git ls-files '*.h' '*.cpp' '*.cu' '*.cuh' | xargs $(BIN)/clang-format -i
	$(BIN)/ruff check -q --fix . && $(BIN)/ruff format -q .

check-format: $(VENV)/.formatters
	git ls-files '*.h' '*.cpp' '*.cu' '*.cuh' | xargs $(BIN)/clang-format --dry-run -Werror
	$(BIN)/ruff check -q . && $(BIN)/ruff format -q --check .

$(VENV)/.formatters: $(VENV)/.tools
	$(BIN)/pip install -q $(FORMATTERS)
	touch $@

clean:
	rm -rf build $(VENV)
