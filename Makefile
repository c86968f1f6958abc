# Everything from a fresh clone: `make train` runs the main job, `make test` the tests.
# Variables: PYTHON (interpreter for the virtual environment), VENV (where it goes), ARGS (added to the command),
# WHEEL_PYTHONS (interpreters to build wheels for).

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
WHEEL_PYTHONS ?= $(PYTHON)

BIN := $(VENV)/bin
# Without byte code: most of the files are never imported.
INSTALL := $(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt
TORCH := $(VENV)/.torch
BUILT := $(VENV)/.built
NEEDS := $(VENV)/.needs
DEV := $(VENV)/.dev
DOCS := $(VENV)/docs
PACKAGE := setup.py pyproject.toml $(shell find csrc kernels -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

# Torch's libraries, and CUDA's that come with it.
EXCLUDED := libtorch.so libtorch_cpu.so libtorch_cuda.so libc10.so libc10_cuda.so libcudart.so.12 libcudart.so.13

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help setup train test test-extras lint format types cpp-test cuda-check bench bench-small docs wheel sdist clean

help:
	@echo "make train | test | test-extras | lint | format | types | cpp-test | cuda-check | bench | bench-small | docs | wheel | sdist | clean"

# Prints what the extras need that are named; "package" is the package itself.
define REQUIREMENTS
import sys, tomllib
project = tomllib.load(open("pyproject.toml", "rb"))["project"]
needs = {"package": project["dependencies"], **project["optional-dependencies"]}
def of(extra):
    for line in needs[extra]:
        if line.startswith(project["name"] + "["):
            yield from (need for inner in line[:-1].split("[")[1].split(",") for need in of(inner))
        else:
            yield line
print(*(need for extra in sys.argv[1:] for need in of(extra)), sep="\n")
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
	@$(BIN)/python -c "$$REQUIREMENTS" package >$@.txt
	$(INSTALL) --requirement $@.txt
	@touch $@

$(DEV): $(TORCH) pyproject.toml
	@$(BIN)/python -c "$$REQUIREMENTS" package dev >$@.txt
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

# What needs optional packages: they go into an environment of their own, which has the packages of the first one too, as
# Python would add them there: this package is among them by a .pth file.
EXTRAS := $(VENV)-extras
test-extras: setup
	@test -e $(EXTRAS)/bin/python || $(BIN)/python -m venv $(EXTRAS)
	@$(BIN)/python -c 'import sysconfig; name = "purelib"; print(f"import site; site.addsitedir({sysconfig.get_path(name)!r})")' >$$($(EXTRAS)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/first.pth
	@$(BIN)/python -c "$$REQUIREMENTS" byo >$(EXTRAS)/.needs.txt
	$(EXTRAS)/bin/python -m pip install --quiet --no-compile --constraint constraints.txt --requirement $(EXTRAS)/.needs.txt nbclient ipykernel
	OMP_NUM_THREADS=1 FASTMTL_EXTRAS=1 $(EXTRAS)/bin/python -m pytest -p no:benchmark -q tests/extras $(ARGS)

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

# An environment of its own, without torch: the reference is made from the sources.
$(DOCS)/.made: constraints.txt pyproject.toml
	$(PYTHON) -m venv $(DOCS)
	@$(DOCS)/bin/python -c "$$REQUIREMENTS" docs >$(DOCS)/needs.txt
	$(DOCS)/bin/python -m pip install --quiet --no-compile --constraint constraints.txt --requirement $(DOCS)/needs.txt
	@touch $@

docs: $(DOCS)/.made
	$(DOCS)/bin/mkdocs build --quiet --clean
	$(DOCS)/bin/python docs/tools/check.py build/site

# Wheels for Linux in dist/. The kernels are compiled once, what binds to a version of Python for each. Torch's libraries
# are not put into a wheel: the process has loaded torch's own by the time it needs them.
wheel: setup
	rm -rf build/wheels
	for python in $(WHEEL_PYTHONS); do \
	  $$python -m venv build/wheels/python && build/wheels/python/bin/python -m pip install --quiet --no-compile \
	    --constraint constraints.txt setuptools pybind11 && FASTMTL_BUILD_CPP=1 FASTMTL_BUILD_TORCH=$$($(BIN)/python -c \
	    'import importlib.util as u; print(u.find_spec("torch").submodule_search_locations[0])') \
	  build/wheels/python/bin/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir build/wheels . && \
	  rm -r build/wheels/python || exit 1; \
	done
	for wheel in build/wheels/*.whl; do \
	  PATH=$(abspath $(BIN)):$$PATH $(BIN)/python -m auditwheel repair --wheel-dir dist $(EXCLUDED:%=--exclude %) $$wheel || exit 1; \
	done

sdist: setup
	$(BIN)/python -m build --sdist --no-isolation --outdir dist

clean:
	rm -rf build dist $(VENV) *.egg-info fastmtl/*.so fastmtl/_build.json compile_commands.json .mypy_cache .pytest_cache .ruff_cache .hypothesis
