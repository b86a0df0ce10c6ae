# make demo · make test · make lint · make bench: each first sets up .venv, so any of them may be the first.
# PYTHON chooses the interpreter (3.11 or newer); TORCH the build of torch, e.g. make TORCH=torch on a CUDA machine
# for the newest one, or TORCH=torch==2.11.0 beside torch-npu.

PYTHON ?= python3
TORCH ?= torch==2.13.0
MODEL ?= glimmer/demo
BIN = .venv/bin

.PHONY: demo test lint bench
.DELETE_ON_ERROR:

demo: .venv/ready
	$(BIN)/glimmer demo $(MODEL)

test: .venv/ready
	$(BIN)/python -m pytest

lint: .venv/ready
	$(BIN)/ruff check .

bench: .venv/ready
	$(BIN)/glimmer bench $(MODEL)

# torch first and by itself: the package asks for any recent torch, and this decides which build that is.
.venv/ready: pyproject.toml CMakeLists.txt $(wildcard csrc/*)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "glimmer needs Python 3.11 or newer: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check "$(TORCH)"
	$(BIN)/pip install --quiet --disable-pip-version-check -e ".[test]"
	touch $@
