# Everything a newcomer types. `make quickstart` and `make test` need Python 3.11+ and make, nothing else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: help venv quickstart notebooks docs bench test test-slow test-oldest lint format clean

help: ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/'

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@

venv: $(VENV)/.installed ## the environment, in .venv

quickstart: venv ## the whole of unCLIP on shapes: train every part, compare, report (nine minutes on 2 cores)
	$(BIN)/unclip reproduce --config configs/reproduce/shapes.yaml --run runs/quickstart --jobs 2

notebooks: venv ## run the notebooks again and keep their outputs; UNCLIP_RUN=… names a run other than the package's own
	$(BIN)/python notebooks/run.py

docs: venv ## the documentation site, into docs/_build/html; an unknown name or a broken link fails
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	$(BIN)/python -m sphinx -b html -W -n --keep-going -c docs . docs/_build/html

# Peers live in an environment of their own. dalle2-pytorch names packages that it does not import and an old open_clip:
# it comes without them, and what it does import is listed here.
BENCH := .venv-bench
PEERS := 'diffusers>=0.42,<0.43' einops ema-pytorch accelerate pytorch-warmup kornia resize-right \
	rotary-embedding-torch vector-quantize-pytorch x-clip coca-pytorch

$(BENCH)/.installed: pyproject.toml
	$(PYTHON) -m venv $(BENCH)
	$(BENCH)/bin/python -m pip install --quiet --upgrade pip
	$(BENCH)/bin/python -m pip install --quiet --editable '.[stream]' $(PEERS)
	$(BENCH)/bin/python -m pip install --quiet --no-deps dalle2-pytorch==1.15.6
	@touch $@

bench: $(BENCH)/.installed ## measure against diffusers, dalle2-pytorch and torchmetrics, into results/benchmarks (some 20 minutes)
	$(BENCH)/bin/python -W ignore benchmarks/run.py

test: venv lint ## what CI runs: ruff, mypy and the tests, on two cores
	$(BIN)/python -m pytest -q -n 2 --dist loadfile

test-slow: venv ## what takes longer, with the trackers W&B and MLflow, the documentation site, and the page in a browser
	$(BIN)/python -m pip install --quiet --editable '.[dev,trackers,docs,play-test]'
	$(BIN)/python -m pytest -q -m slow || [ $$? -eq 5 ] # 5: no test is marked slow

# uv can choose the oldest releases that pyproject.toml allows; pip cannot.
OLDEST := .venv-oldest

$(OLDEST)/.installed: pyproject.toml
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet uv
	$(OLDEST)/bin/uv pip install --quiet --python $(OLDEST) --resolution lowest-direct --editable '.[dev]'
	@touch $@

test-oldest: $(OLDEST)/.installed ## the tests with the oldest releases of everything that the package needs
	$(OLDEST)/bin/python -m pytest -q -n 2 --dist loadfile

lint: venv ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: venv ## let ruff rewrite the layout
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## the environment and caches; runs/ and data/ stay
	rm -rf $(VENV) $(BENCH) $(OLDEST) docs/_build docs/_reference .pytest_cache .mypy_cache .ruff_cache
