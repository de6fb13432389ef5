# Every target sets up what it needs on a fresh machine with Python >= 3.11. `make` alone runs what CI runs.
PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
BIN := $(VENV)/bin
READY := $(VENV)/.ready-$(shell cat pyproject.toml $(CONSTRAINTS) | cksum | cut -d' ' -f1)

.PHONY: all check test demo bench docs gpu wheel clean
all: check test wheel

$(READY):
	@$(PYTHON) -c 'import sys; sys.exit("tempering needs Python >= 3.11; this is " + sys.version.split()[0] + \
	". Give another one: make PYTHON=python3.12") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c $(CONSTRAINTS) torch numpy
	$(BIN)/python -m pip install --quiet -c $(CONSTRAINTS) -e ".[dev]"
	@rm -f $(VENV)/.ready-*; touch $@

check: $(READY)  ## lint, format, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

test: $(READY)  ## the tests
	$(BIN)/python -m pytest

demo: $(READY)  ## a teacher and students on the bundled digits, a table and a report
	$(BIN)/tempering demo

wheel: $(READY)  ## builds the wheel, installs it into an empty environment, runs it
	rm -rf build dist
	$(BIN)/python -m build --wheel --no-isolation --outdir dist . > /dev/null
	rm -rf build/empty && $(PYTHON) -m venv build/empty
	build/empty/bin/python -m pip install --quiet -c $(CONSTRAINTS) torch numpy
	build/empty/bin/python -m pip install --quiet -c $(CONSTRAINTS) dist/*.whl
	cd build && empty/bin/tempering --help > /dev/null && empty/bin/tempering list > /dev/null
	rm -rf build/empty

clean:
	rm -rf build dist .pytest_cache .ruff_cache *.egg-info
