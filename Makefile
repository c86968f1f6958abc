# Everything from a fresh clone: `make train` runs the main job, `make test` the tests.
# Variables: PYTHON (interpreter for the virtual environment), VENV (where it goes), ARGS (added to the command).

PYTHON ?= python3
VENV ?= .venv
ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip
TORCH := $(VENV)/.torch
BUILT := $(VENV)/.built
DEV := $(VENV)/.dev
PACKAGE := setup.py pyproject.toml $(shell find csrc kernels -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help setup train test lint format types cpp-test cuda-check bench bench-small clean

help:
	@echo "make train | test | lint | format | types | cpp-test | cuda-check | bench | bench-small | clean"

# Torch comes first, as the extension is built against the torch of this environment.
$(TORCH): constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and "fastmtl needs Python 3.11 or newer, $(PYTHON) is %d.%d: make PYTHON=python3.12" % v[:2])'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --constraint constraints.txt setuptools pybind11 torch torchvision
	@touch $@

$(BUILT): $(TORCH) $(PACKAGE)
	$(PIP) install --quiet --constraint constraints.txt --no-build-isolation --editable .
	@touch $@

$(DEV): constraints.txt pyproject.toml | $(BUILT)
	$(PIP) install --quiet --constraint constraints.txt --no-build-isolation --editable '.[dev]'
	@touch $@

setup: $(DEV)

train: $(BUILT)
	$(BIN)/fastmtl train --arch mtan --weighting mgda --compile $(ARGS)

# One process for each processor, so that each has one thread; tests of threads ask for more themselves. Slow tests, which
# compile networks or start many processes, are left out: `make test ARGS="-m slow"` runs them, as .ci/run does.
test: $(DEV)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -p no:benchmark -n auto --dist loadfile -m "not slow" $(ARGS)

lint: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache
	find csrc kernels -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' | xargs $(BIN)/clang-format --dry-run -Werror

format: $(DEV)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	find csrc kernels -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' | xargs $(BIN)/clang-format -i

# The checker follows folders, not package_dir: it is shown kernels/ and benchmarks/ where they are installed.
types: $(DEV)
	rm -rf build/types && mkdir -p build/types/fastmtl
	ln -s $(CURDIR)/fastmtl/* $(CURDIR)/kernels $(CURDIR)/benchmarks build/types/fastmtl/
	ln -s $(CURDIR)/tests build/types/tests
	cd build/types && MYPYPATH=. $(abspath $(BIN))/mypy --config-file $(CURDIR)/pyproject.toml --cache-dir $(CURDIR)/.mypy_cache fastmtl tests

cpp-test: $(DEV)
	$(BIN)/cmake -S . -B build/cmake -DPython3_EXECUTABLE=$(abspath $(BIN))/python
	$(BIN)/cmake --build build/cmake --parallel
	$(BIN)/ctest --test-dir build/cmake --output-on-failure

cuda-check: $(DEV)
	$(BIN)/cmake -S . -B build/cmake -DPython3_EXECUTABLE=$(abspath $(BIN))/python
	$(BIN)/cmake --build build/cmake --parallel --target cuda-check

bench: $(DEV)
	$(BIN)/fastmtl bench kernels $(ARGS)

bench-small: $(DEV)
	$(BIN)/python -m pytest benchmarks $(ARGS)

clean:
	rm -rf build dist $(VENV) *.egg-info fastmtl/*.so fastmtl/_build.json compile_commands.json .mypy_cache .pytest_cache .ruff_cache .hypothesis
