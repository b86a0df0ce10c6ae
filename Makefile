# For users: demo · test · bench. For developers: quick · lint · format · stub · docs · coverage · gate · sanitize.
# Each target first sets up .venv, so any of them may be the first.
# PYTHON chooses the interpreter (3.11 or newer); TORCH the build of torch, e.g. make TORCH=torch on a CUDA machine
# for the newest one, or TORCH=torch==2.11.0 beside torch-npu. WORKERS: processes that run tests (0: one, in the foreground).

PYTHON ?= python3
TORCH ?= torch==2.13.0
MODEL ?= glimmer/demo
BASE ?= HEAD^
WORKERS ?= 2
BIN = .venv/bin
CSRC = $(wildcard csrc/*.h csrc/*.cpp csrc/*.inc)

.PHONY: demo test quick lint format stub docs coverage bench gate sanitize
.DELETE_ON_ERROR:

demo: .venv/ready
	$(BIN)/glimmer demo $(MODEL)

# Two processes, which share the test files: much of what is tested starts processes and waits for them.
test: .venv/ready
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

# While editing: without the tests that are marked slow. These are the ops of every backend against the reference, the
# model against transformers, what starts processes, and what measures time or memory.
quick: .venv/ready
	$(BIN)/python -m pytest -m "not slow"

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CSRC)

format: .venv/ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CSRC)

# The types of the native extension, for mypy and editors; to be made anew after a change of csrc/bindings.cpp.
stub: .venv/ready
	$(BIN)/python -m nanobind.stubgen -q -m glimmer._native -o glimmer/_native.pyi
	$(BIN)/ruff format --quiet glimmer/_native.pyi

docs: .venv/ready
	$(BIN)/python docs/api.py build/docs

coverage: .venv/ready
	$(BIN)/python -m pytest --cov=glimmer --cov-report=term --cov-report=html:build/coverage

bench: .venv/ready
	$(BIN)/glimmer bench $(MODEL)

# Is anything slower than in commit BASE? Takes a while, and wants a machine that does nothing else.
gate: .venv/ready
	$(BIN)/python benchmarks/gate.py $(BASE) HEAD

# The kernels' tests on a build that stops at undefined behaviour and at any byte outside an array. The package that is
# tested lies in build/sanitize: -S and -P keep Python from finding the one in .venv or this directory first.
# libstdc++ must be there when libasan begins, or nothing can be thrown.
SANITIZED = LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	ASAN_OPTIONS=detect_leaks=0 \
	PYTHONPATH=build/sanitize:$$($(BIN)/python -c 'import site; print(site.getsitepackages()[0])') $(BIN)/python -S -P

sanitize: .venv/ready
	rm -rf build/sanitize
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --target build/sanitize . \
		-C cmake.define.SANITIZE=ON -C build-dir=build/sanitized
	$(SANITIZED) -c 'import glimmer._native'
	$(SANITIZED) -m pytest tests/backends

# torch first and by itself: the package asks for any recent torch, and this decides which build that is.
.venv/ready: pyproject.toml CMakeLists.txt $(wildcard csrc/*)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "glimmer needs Python 3.11 or newer: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check "$(TORCH)"
	$(BIN)/pip install --quiet --disable-pip-version-check -e ".[dev]"
	touch $@
