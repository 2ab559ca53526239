# Every target does its own setup: a bare checkout and Python 3.11 or newer are enough.
# PYTHON=python3.12 make test   chooses the interpreter of the environment.

PYTHON  ?= python3
VENV    := .venv
BIN     := $(VENV)/bin
STAMP   := $(VENV)/.installed
BENCH   := build/bench
REFERENCE := build/reference
ISOLATED  := build/isolated

PROJECTS := pyproject.toml $(wildcard plugins/*/pyproject.toml)
# Plugins that others depend on come first, the metapackage last: older pips find an unpublished requirement only if it
# was named before.
FIRST    := plugins/alignprop-clip plugins/alignprop-counting
LAST     := plugins/alignprop
PLUGINS  := $(FIRST) $(filter-out $(FIRST) $(LAST),$(patsubst %/pyproject.toml,%,$(wildcard plugins/*/pyproject.toml))) $(LAST)
SOURCES  := alignprop_core $(wildcard $(addsuffix /src,$(PLUGINS)))

# One OpenMP thread per test: on two busy cores, threads that wait for each other turn 0.1 s into 13 s.
# Bytecode is kept, also where a container's image turns that off: hundreds of processes would compile the core again.
TEST_ENV := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONDONTWRITEBYTECODE=
# One process per processor, at most eight: a process with a model takes one to two GB. WORKERS=0 uses a single process,
# which a debugger needs. The tests of a file run in one process, long files first (tests/conftest.py).
WORKERS  ?= logical
PYTEST   := $(TEST_ENV) $(BIN)/python -m pytest -n $(WORKERS) --maxprocesses 8 --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help demo test test-all lint docs bench bench-gpu clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-9s %s\n", $$1, $$2}' Makefile

demo: $(STAMP) ## fine-tune the starter model and show images before and after
	$(BIN)/alignprop demo

test: $(STAMP) $(REFERENCE)/.installed ## run the tests, without the slow ones
	$(PYTEST) -m "not slow"

test-all: $(STAMP) $(REFERENCE)/.installed $(ISOLATED)/.installed ## run every test, including slow ones and installs from the registry
	$(PYTEST)

lint: $(STAMP) ## check style, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy $(SOURCES) $(wildcard plugins/*/scripts/*.py) plugins/alignprop-jpeg/tests/jpeg_accuracy.py

docs: $(STAMP) ## write the generated tables, build the documentation into site/
	$(BIN)/python tools/docs/generate.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: $(BENCH)/.installed ## time a training step against TRL's; writes docs/results/trl_step.md
	$(BENCH)/bin/python tests/bench/trl_step.py --output docs/results/trl_step.md

bench-gpu: $(BENCH)/.installed ## compare training steps on a CUDA GPU; writes docs/results/gpu_step.md
	mkdir -p build && rm -f build/gpu_step.jsonl
	$(BENCH)/bin/python -m tests.bench.gpu_step --profile --json build/gpu_step.jsonl \
		--output docs/results/gpu_step.md --plot docs/results/gpu_step

clean: ## remove the environment and everything that was built
	rm -rf $(VENV) build dist site .mypy_cache .pytest_cache .ruff_cache

# The environment: the core and every plugin, editable, in one command, so that a plugin finds its unpublished core.
# Made again when a pyproject.toml changes or a plugin arrives.
$(STAMP): $(PROJECTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "alignprop needs Python 3.11 or newer; name one: PYTHON=python3.12 make ..."; exit 2; }
	@echo "Installing into $(VENV): a few minutes the first time, most of it torch."
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -e ".[dev,docs]" $(foreach plugin,$(PLUGINS),-e "./$(plugin)[dev]")
	@touch $@

# The original hpsv2, which alignprop-hpsv2's scores are compared with: its pins (protobuf<4, pytest==7.2.0) fit no
# environment of today, so it is installed beside ours without its dependencies (docs/decisions/0003-hpsv2-reference.md).
$(REFERENCE)/.installed: $(STAMP)
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target $(REFERENCE) hpsv2==1.2.0 clint==0.5.1 args==0.1.0
	@touch $@

# The same package as its users install it: with its pins, in an environment of its own. Its wheel lacks a file that
# open_clip has.
$(ISOLATED)/.installed: $(STAMP)
	rm -rf $(ISOLATED)
	$(BIN)/alignprop rewards isolate ./examples/isolated/original_hpsv2.py:OriginalHpsv2 --share --with hpsv2==1.2.0 \
		--into $(ISOLATED)/hpsv2
	cp $(VENV)/lib/python3*/site-packages/open_clip/bpe_simple_vocab_16e6.txt.gz \
		$(ISOLATED)/hpsv2/lib/python3*/site-packages/hpsv2/src/open_clip/
	@touch $@

# TRL has an environment of its own, which also sees the packages of the first one.
$(BENCH)/.installed: $(STAMP) tests/bench/requirements.txt
	test -x $(BENCH)/bin/python || $(PYTHON) -m venv $(BENCH)
	$(BENCH)/bin/python -c 'import site, sys; from pathlib import Path; \
		own, main = (Path(site.getsitepackages([p])[0]) for p in (sys.prefix, sys.argv[1])); \
		(own / "main.pth").write_text(f"import site; site.addsitedir({str(main)!r})\n")' "$(CURDIR)/$(VENV)"
	$(BENCH)/bin/python -m pip install --quiet -r tests/bench/requirements.txt
	@touch $@
