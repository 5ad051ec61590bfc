PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: setup run test soak check bench

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[demo,dev]'
	touch $@

run: setup
	$(BIN)/loadstone up --demo --models-dir .run/models --data-dir .run/data

test: setup
	$(BIN)/python -m pytest --numprocesses 4 --dist loadfile

soak: setup
	$(BIN)/python -m pytest tests/soak

check: setup
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/unit/test_imports.py

bench: setup
	$(BIN)/python -m bench
