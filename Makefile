# make quickstart | make test | make test-slow | make torture | make kernels | make lint | make venv
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
REQUIREMENTS := requirements.txt requirements-dev.txt constraints.txt

.PHONY: venv quickstart test test-slow torture kernels lint

# Installed once, and again only when the requirements change.
venv: $(VENV)/.installed

$(VENV)/.installed: $(REQUIREMENTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed, and $(PYTHON) is older or missing: make PYTHON=python3.11 ..." >&2; exit 2; }
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@echo "installing the requirements into $(VENV) (once; a CUDA build of PyTorch takes several GB)"
	@$(PY) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt -c constraints.txt
	@touch $@

quickstart: venv
	$(PY) tools/quickstart.py

test: venv
	$(PY) -m pytest -n auto --dist loadfile --no-loadscope-reorder

test-slow: venv
	$(PY) -m pytest -m slow --timeout 3600

# The full numbers of docs/reliability.md.
torture: venv
	OMP_NUM_THREADS=1 $(PY) benchmarks/fuzz_recipes.py
	OMP_NUM_THREADS=1 $(PY) -W ignore benchmarks/fuzz_checkpoints.py
	OMP_NUM_THREADS=1 $(PY) benchmarks/torture.py

# Every tile by the installed Triton; one of each op by the oldest that requirements.txt allows (it comes with torch 2.8) and by
# one between (torch 2.11).
kernels: venv
	$(PY) benchmarks/aot.py
	$(PY) benchmarks/aot.py --quick --triton 3.4.0 3.6.0

lint: venv
	$(PY) -m ruff check .
	$(PY) -m mypy
