# Everything runs in .venv, made on first use with the versions pinned for its Python.
#   make quickstart   install, then train the embedded default (configs/tiny.py) into runs/tiny
#   make test         install the dev extra, then run all tests      (make fast: without the slow ones)
#   make lint types   ruff; mypy                                     (make format: let ruff rewrite)
#   make clean        remove .venv and caches; runs/ stays
# Variables: PYTHON (which Python makes .venv), VENV, STEPS and WORKDIR of the quickstart, TESTS (files to run),
# EXTRAS (what is installed for tests: dev; dev,tasks tests lm-eval's tasks, too; dev,tasks,parity compares with
# transformers).

PYTHON ?= python3
VENV ?= .venv
WORKDIR ?= runs/tiny
STEPS ?=
TESTS ?= tests
EXTRAS ?= dev
PYTEST_FLAGS ?= -n 2

BIN := $(VENV)/bin
CONSTRAINTS = constraints-$$($(BIN)/python -c 'import sys; print("3.11" if sys.version_info < (3, 12) else "3.12")').txt
INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS)
INPUTS := pyproject.toml constraints-3.11.txt constraints-3.12.txt
comma := ,
# Of the dev extra, and of more where EXTRAS names them.
TESTED := $(VENV)/installed-$(subst $(comma),-,$(EXTRAS))

.PHONY: quickstart test fast lint types format clean
.DELETE_ON_ERROR:

quickstart: $(VENV)/installed
	@echo "== training configs/tiny.py into $(WORKDIR)"
	@$(BIN)/python train.py --config=configs/tiny.py --workdir=$(WORKDIR) $(if $(STEPS),--config.train.steps=$(STEPS))

test: $(TESTED)
	$(BIN)/python -m pytest $(PYTEST_FLAGS) $(TESTS)

fast: $(TESTED)
	$(BIN)/python -m pytest -m "not slow" $(PYTEST_FLAGS) $(TESTS)

lint: $(TESTED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(TESTED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(TESTED)
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -prune -exec rm -rf {} +

# The stamps are younger than what was installed from: nothing is installed twice.
$(VENV)/installed: $(INPUTS) | $(BIN)/python
	@echo "== installing into $(VENV) the versions of $(CONSTRAINTS)"
	@$(INSTALL) -e .
	@touch $@

$(TESTED): $(INPUTS) | $(BIN)/python
	@echo "== installing into $(VENV) the versions of $(CONSTRAINTS), with the extras $(EXTRAS)"
	@$(INSTALL) -e '.[$(EXTRAS)]'
	@touch $(VENV)/installed $(VENV)/installed-dev $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $(PYTHON) is missing or older than 3.11; name another: make PYTHON=python3.12 ..." >&2; exit 1; }
	@echo "== making $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV) || \
	  { rm -rf $(VENV); echo "error: $(PYTHON) has no working venv (on Debian: apt install python3-venv)" >&2; exit 1; }
