# Everything runs in .venv, which the first target that needs it creates.

PYTHON ?= python3
# The build of torch that a new .venv gets. A GPU machine may want another: `make demo TORCH=torch`.
TORCH ?= torch==2.13.0
# The Triton of the tests where torch brings none, as its CPU build does not.
TRITON ?= triton==3.7.1

VENV := .venv
EDITABLE := -e
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# pip compiles what it installs file by file, which takes a minute of one core; this takes them all.
# A file that is for another Python is left out, as pip leaves it.
INSTALL := $(PIP) install --no-compile
COMPILE := $(BIN)/python -m compileall -q -q -j 0 $(VENV)/lib || true

RESULTS := benchmarks/results
# The file that `make test` writes versions and counts into, if any.
RECORD :=
# As many workers as this process has cores, each with one thread; in pytest, a file's tests share what
# it builds, and files are in the order of tests/conftest.py.
WORKERS ?= $(shell $(BIN)/python -c "import os; print(len(os.sched_getaffinity(0)))")
RUN_TESTS = $(BIN)/pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(if $(RECORD),--record=$(RECORD))
# `make report` begins no cell of a quality table later than this; cells of earlier runs are kept.
REPORT_SECONDS ?= 600

# The benchmark that `make bench-compare` runs, how often for each commit, and its cases (all, where
# none is named).
BENCH ?= bench_step
ROUNDS ?= 5
CASES ?=

# The Python, the results, the time limit and the stages (all, where none is named) of the GPU check.
GPUCHECK_PYTHON ?= python3
GPUCHECK_OUT ?= build/gpucheck
GPUCHECK_SECONDS ?= 540
GPUCHECK_STAGES ?=

SANITIZE := -fsanitize=address,undefined -fno-sanitize-recover=undefined

CXX_FILES := $(shell find csrc tests/native tests/support/gpuless benchmarks/gpucheck -name '*.h' -o -name '*.c' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' 2>/dev/null)

.DEFAULT_GOAL := help
.PHONY: help report demo test test-deep test-oldest test-newest test-compat test-compat-oldest test-compat-newest run-compat test-gpu test-sanitize test-faults lint docs bench bench-compare third-party gpucheck gpucheck-prepare format clean
# Two targets at once would run two pips in the same environment.
.NOTPARALLEL:

help: ## List the targets
	@awk -F ': .*## ' '/^[a-z-]+:.* ## / { printf "  make %-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/.installed ## Draw digits and fashion items with the bundled models into demo/
	$(BIN)/fastddim demo --out demo

test: $(VENV)/.installed-dev ## Run the tests
	$(RUN_TESTS)

test-deep: $(VENV)/.installed-dev ## Run the tests with those that take long
	$(RUN_TESTS) --deep

test-oldest: ## Run the tests with the oldest torch that is supported, in .venv-oldest
	$(call test-with,.venv-oldest,3.12 3.10,torch==2.11.0)

test-newest: ## Run the tests with the newest torch that has been tried, in .venv-newest
	$(call test-with,.venv-newest,3.13 3.12,torch==2.14.1)

test-compat: test-compat-oldest test-compat-newest ## Run the drop-ins' tests with the oldest and the newest diffusers, in .venv-compat-*

test-compat-oldest:
	$(call compat-with,.venv-compat-oldest,diffusers==0.36.0)

test-compat-newest:
	$(call compat-with,.venv-compat-newest,diffusers==0.42.1)

test-gpu: $(VENV)/.installed-dev ## Run the tests that need a GPU
	$(BIN)/pytest -m gpu

test-sanitize: $(VENV)/.installed-dev ## Run the kernel's tests under AddressSanitizer and UBSan
	rm -rf build/sanitize
# Instrumented code makes GCC see uninitialised variables where there are none.
	CFLAGS="$(SANITIZE) -g -Wno-maybe-uninitialized" LDFLAGS="$(SANITIZE)" \
		$(PIP) install --no-build-isolation --no-deps --target build/sanitize .
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" \
		ASAN_OPTIONS=detect_leaks=0 PYTHONPATH=build/sanitize \
		$(BIN)/pytest --deep tests/test_update.py tests/test_ops.py

test-faults: $(VENV)/.installed-dev ## Kill and break runs of many samples, and count what is lost
	$(BIN)/python tests/faults/run.py

lint: $(VENV)/.installed-dev ## Check format, style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --num-workers $(WORKERS)
ifneq ($(CXX_FILES),)
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)
endif

format: $(VENV)/.installed-dev ## Format the code in place
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
ifneq ($(CXX_FILES),)
	$(BIN)/clang-format -i $(CXX_FILES)
endif

docs: $(VENV)/.installed-docs ## Build the documentation into build/site
	$(BIN)/mkdocs build --strict

bench: $(VENV)/.installed-dev ## Run the benchmarks
	$(BIN)/pytest benchmarks -s --results $(RESULTS)

bench-compare: $(VENV)/.installed-dev ## Compare the ratios of a benchmark, BENCH, with those of another commit, BASE
	$(BIN)/python benchmarks/compare.py $(or $(BASE),$(error BASE: expected a commit, got none)) \
		--bench $(BENCH) --rounds $(ROUNDS) $(if $(CASES),-k "$(CASES)")

# Neither target makes an environment: the one is for a Python like that of the GPU machine, the other
# for that machine, which may have no network. docs/gpu.md says more.
gpucheck-prepare: ## Prepare the GPU check, on a machine with network
	PYTHONPATH=benchmarks $(GPUCHECK_PYTHON) -m gpucheck.prepare

gpucheck: ## Run the GPU check, on a machine with a GPU
	GPUCHECK_PYTHON=$(GPUCHECK_PYTHON) bash benchmarks/gpucheck/run.sh \
		$(GPUCHECK_OUT) $(GPUCHECK_SECONDS) "$(GPUCHECK_STAGES)"

report: $(VENV)/.installed-report ## Measure all that the README shows, and fill its tables and pictures
	$(BIN)/python benchmarks/quality/grid.py digits --count 10000 --long --seconds $(REPORT_SECONDS)
	$(BIN)/python benchmarks/quality/grid.py fashion --count 2000 --long --seconds $(REPORT_SECONDS)
	$(BIN)/python benchmarks/paper/few_steps.py
	$(BIN)/python benchmarks/policies/success.py
	$(BIN)/pytest benchmarks -s --results $(RESULTS)
	$(BIN)/python benchmarks/figures.py
	$(BIN)/python benchmarks/tables.py

# The wheel states no licence, so it is installed and nothing of it is kept; it comes without what it
# requires, for only the weights in it are read.
third-party: $(VENV)/.installed-dev ## Sample nine networks of galaxies from PyPI, in an hour, or minutes where results are there
	$(PIP) install --no-deps --upgrade --target build/third-party galaxygrad==0.2.1
	$(BIN)/python benchmarks/third_party/report.py
	$(BIN)/python benchmarks/tables.py

# The tests in an environment of their own, with a Python that is there of the versions named. The
# package is installed there and not linked to, since a checkout holds one build of the extension.
define test-with
	rm -rf $(1)/.installed-dev build/lib*
	$(MAKE) test-deep VENV=$(1) EDITABLE= PYTHON=$(or $(call python-of,$(2)),$(PYTHON)) TORCH=$(3)
endef
python-of = $(shell for version in $(1); do \
	for python in python$$version "$${PYENV_ROOT:-$$HOME/.pyenv}"/versions/$$version.*/bin/python; do \
		"$$python" -c "" 2> /dev/null && echo "$$python" && exit; \
	done; done)

# An environment with no more than these tests need, in which pip finds the releases of what diffusers
# requires that go with it.
COMPAT_TESTS := $(addprefix tests/integrations/test_,diffusers.py diffusers_noise.py \
	diffusers_timesteps.py diffusers_tuned.py hooks.py migrating.py \
	pipelines.py processors.py timestep_types.py) tests/test_schedule.py
COMPAT_NEEDS := einops hypothesis matplotlib pytest pytest-xdist pyyaml scipy transformers

define compat-with
	rm -rf $(1)/.installed-compat build/lib*
	$(MAKE) $(1)/.installed-compat VENV=$(1) DIFFUSERS=$(2)
	$(MAKE) run-compat VENV=$(1)
endef

run-compat:
	$(RUN_TESTS) $(COMPAT_TESTS)

clean: ## Remove build products and caches, but not .venv
	rm -rf build dist demo *.egg-info .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -path ./$(VENV) -prune -o -name __pycache__ -exec rm -rf {} +

# torch comes first and on its own: it decides what the package is built against, and the package's
# own requirement would take whichever build of torch is the newest.
$(VENV)/.torch:
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(INSTALL) "setuptools>=77" ninja "$(TORCH)"
	$(COMPILE)
	touch $@

$(VENV)/.installed: $(VENV)/.torch pyproject.toml setup.py $(CXX_FILES)
	$(PIP) install --no-build-isolation $(EDITABLE) .
	touch $@

$(VENV)/.installed-report: $(VENV)/.installed-dev
	$(PIP) install --no-build-isolation $(EDITABLE) ".[quality,report]"
	touch $@

# The peers come without what they require: it is for training, and would bring another torch along.
$(VENV)/.installed-dev: $(VENV)/.torch pyproject.toml setup.py tests/support/dropins/peers.txt $(CXX_FILES)
	$(BIN)/python -c "import triton" 2> /dev/null || $(INSTALL) "$(TRITON)"
	$(INSTALL) --no-build-isolation $(EDITABLE) ".[test,lint,docs]"
	$(INSTALL) --no-deps -r tests/support/dropins/peers.txt
	$(COMPILE)
	touch $(VENV)/.installed $@

$(VENV)/.installed-compat: $(VENV)/.torch pyproject.toml setup.py tests/support/dropins/peers.txt $(CXX_FILES)
	$(PIP) install --no-build-isolation . "$(DIFFUSERS)" $(COMPAT_NEEDS)
	$(PIP) install --no-deps -r tests/support/dropins/peers.txt
	touch $@

$(VENV)/.installed-docs: $(VENV)/.torch pyproject.toml setup.py $(CXX_FILES)
	$(PIP) install --no-build-isolation $(EDITABLE) ".[docs]"
	touch $(VENV)/.installed $@
