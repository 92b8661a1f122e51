# `make quickstart` and `make test` do all of their own set-up in .venv; only Python >= 3.11 is needed.
PYTHON ?= $(shell for p in python3.12 python3.11 python3; do $$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null && echo $$p && break; done)
BIN = .venv/bin
# the proxies are small: BLAS threads beside those of XLA only get in each other's way
export OPENBLAS_NUM_THREADS ?= 1

.PHONY: quickstart test lint clean

# the stamp is newer than the requirements once they are installed
.venv/.ready: requirements.txt requirements-dev.txt pyproject.toml
	@test -n "$(PYTHON)" || { echo "Python 3.11 or 3.12 is needed: make PYTHON=/path/to/python3.11" >&2; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -r requirements-dev.txt
	$(BIN)/python -m pip install --quiet --no-deps -e .
	@touch $@

quickstart: .venv/.ready
	$(BIN)/python experiments/quickstart.py $(ARGS)

# a worker that crashed is not replaced: xdist 3.8 may then wait for ever (its issue 784)
test: .venv/.ready
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --max-worker-restart 0 $(ARGS)

lint: .venv/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf .venv out
