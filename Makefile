# make demo   creates the environment and runs the main job
# make test   creates the environment and passes the tests
PYTHON ?= python3
VENV   ?= .venv
# Test processes; each has one torch thread.
TESTERS ?= 2
BIN    := $(VENV)/bin
export OMP_NUM_THREADS ?= 1
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: env demo sweep-demo test kernels-old-triton lint types check docs wheel clean

env: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

demo: env
	env -u OMP_NUM_THREADS $(BIN)/msq demo

# The demo world's Table 3: 60 heads, killed with -9 and resumed, again through dask.
sweep-demo: env
	$(BIN)/python benchmarks/sweep_demo.py --work sweep-demo --write

test: env
	$(BIN)/python -m pytest -n $(TESTERS) --dist loadfile --no-loadscope-reorder
	TRITON_INTERPRET=1 $(BIN)/python -m pytest tests/interpreted

# The kernels compiled by the oldest Triton that they are held to, beside the newest in `test`.
OLD_TRITON := $(VENV)/triton-3.6.0
$(OLD_TRITON): | $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --no-deps --target $@ triton==3.6.0

kernels-old-triton: $(OLD_TRITON)
	PYTHONPATH=$(OLD_TRITON) $(BIN)/python -m pytest tests/test_kernel_compile.py

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: env
	$(BIN)/mypy

check: lint types test

docs: env
	$(BIN)/python -m typer msq.cli utils docs --name msq --title "msq on the command line" \
	  --output docs/cli.md

wheel: env
	$(BIN)/python -m build --wheel

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache demo
