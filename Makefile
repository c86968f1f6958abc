# Everything from a fresh clone: `make train` runs the main job, `make test` the tests.
# Variables: PYTHON (interpreter for the virtual environment), VENV (where it goes), ARGS (added to the command).

PYTHON ?= python3
VENV ?= .venv
ARGS ?=

BIN := $(VENV)/bin
# Without byte code: most of the files are never imported.
INSTALL := $(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt
TORCH := $(VENV)/.torch
BUILT := $(VENV)/.built
NEEDS := $(VENV)/.needs
DEV := $(VENV)/.dev
PACKAGE := setup.py pyproject.toml $(shell find csrc kernels -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help setup train test lint format types cpp-test cuda-check bench bench-small clean

help:
	@echo "make train | test | lint | format | types | cpp-test | cuda-check | bench | bench-small | clean"

# Prints what the package needs, and what its extras do that are named.
define REQUIREMENTS
import sys, tomllib
project = tomllib.load(open("pyproject.toml", "rb"))["project"]
def of(extra):
    for line in project["optional-dependencies"][extra]:
        if line.startswith(project["name"] + "["):
            yield from (need for inner in line[:-1].split("[")[1].split(",") for need in of(inner))
        else:
            yield line
print(*project["dependencies"], *(need for extra in sys.argv[1:] for need in of(extra)), sep="\n")
endef
export REQUIREMENTS

# Torch comes first, as the extension is built against the torch of this environment.
$(TORCH): constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and "fastmtl needs Python 3.11 or newer, $(PYTHON) is %d.%d: make PYTHON=python3.12" % v[:2])'
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) setuptools pybind11 torch torchvision
	@touch $@

$(BUILT): $(TORCH) $(PACKAGE)
	$(INSTALL) --no-build-isolation --no-deps --editable .
	@touch $@

$(NEEDS): $(TORCH) pyproject.toml
	@$(BIN)/python -c "$$REQUIREMENTS" >$@.txt
	$(INSTALL) --requirement $@.txt
	@touch $@

$(DEV): $(TORCH) pyproject.toml
	@$(BIN)/python -c "$$REQUIREMENTS" dev >$@.txt
	$(INSTALL) --requirement $@.txt
	@touch $@

# What is missing, both at once: packages are installed while the kernels are compiled.
prepare = $(MAKE) --no-print-directory --question $(1) || $(MAKE) --no-print-directory --jobs=2 $(1)

setup:
	@$(call prepare,$(BUILT) $(DEV))

train:
	@$(call prepare,$(BUILT) $(NEEDS))
	$(BIN)/fastmtl train --arch mtan --weighting mgda --compile $(ARGS)

# One process for each processor, so that each has one thread; tests of threads ask for more themselves. Slow tests, which
# compile networks or start many processes, are left out: `make test ARGS="-m slow"` runs them, as .ci/run does.
test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -p no:benchmark -n auto --dist loadfile --no-loadscope-reorder -m "not slow" $(ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache
	find csrc kernels -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' | xargs $(BIN)/clang-format --dry-run -Werror

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	find csrc kernels -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' | xargs $(BIN)/clang-format -i

# The checker follows folders, not package_dir: it is shown kernels/ and benchmarks/ where they are installed.
types: setup
	rm -rf build/types && mkdir -p build/types/fastmtl
	ln -s $(CURDIR)/fastmtl/* $(CURDIR)/kernels $(CURDIR)/benchmarks build/types/fastmtl/
	ln -s $(CURDIR)/tests build/types/tests
	cd build/types && MYPYPATH=. $(abspath $(BIN))/mypy --config-file $(CURDIR)/pyproject.toml --cache-dir $(CURDIR)/.mypy_cache fastmtl tests

cpp-test: setup
	$(BIN)/cmake -S . -B build/cmake -DPython3_EXECUTABLE=$(abspath $(BIN))/python
	$(BIN)/cmake --build build/cmake --parallel
	$(BIN)/ctest --test-dir build/cmake --output-on-failure --parallel

cuda-check: setup
	$(BIN)/cmake -S . -B build/cmake -DPython3_EXECUTABLE=$(abspath $(BIN))/python
	$(BIN)/cmake --build build/cmake --parallel --target cuda-check

bench: setup
	$(BIN)/fastmtl bench kernels $(ARGS)

bench-small: setup
	$(BIN)/python -m pytest benchmarks $(ARGS)

clean:
	rm -rf build dist $(VENV) *.egg-info fastmtl/*.so fastmtl/_build.json compile_commands.json .mypy_cache .pytest_cache .ruff_cache .hypothesis
