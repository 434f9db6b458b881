# Everything runs in .venv, which the first target that needs it creates.

PYTHON ?= python3
# The build of torch that a new .venv gets. A GPU machine may want another: `make demo TORCH=torch`.
TORCH ?= torch==2.13.0

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

RESULTS := benchmarks/results
# `make report` begins no cell of a quality table later than this; cells of earlier runs are kept.
REPORT_SECONDS ?= 600

# The Python, the results, the time limit and the stages (all, where none is named) of the GPU check.
GPUCHECK_PYTHON ?= python3
GPUCHECK_OUT ?= build/gpucheck
GPUCHECK_SECONDS ?= 540
GPUCHECK_STAGES ?=

SANITIZE := -fsanitize=address,undefined -fno-sanitize-recover=undefined

CXX_FILES := $(shell find csrc tests/native tests/gpuless benchmarks/gpucheck -name '*.h' -o -name '*.c' -o -name '*.cpp' -o -name '*.cu' 2>/dev/null)

.DEFAULT_GOAL := help
.PHONY: help report demo test test-gpu test-sanitize test-faults lint docs bench gpucheck gpucheck-prepare format clean
# Two targets at once would run two pips in the same environment.
.NOTPARALLEL:

help: ## List the targets
	@awk -F ': .*## ' '/^[a-z-]+:.* ## / { printf "  make %-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/.installed ## Draw digits and fashion items with the bundled models into demo/
	$(BIN)/fastddim demo --out demo

test: $(VENV)/.installed-dev ## Run the tests
	$(BIN)/pytest

test-gpu: $(VENV)/.installed-dev ## Run the tests that need a GPU
	$(BIN)/pytest -m gpu

test-sanitize: $(VENV)/.installed-dev ## Run the kernel's tests under AddressSanitizer and UBSan
	rm -rf build/sanitize
# Instrumented code makes GCC see uninitialised variables where there are none.
	CFLAGS="$(SANITIZE) -g -Wno-maybe-uninitialized" LDFLAGS="$(SANITIZE)" \
		$(PIP) install --no-build-isolation --no-deps --target build/sanitize .
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" \
		ASAN_OPTIONS=detect_leaks=0 PYTHONPATH=build/sanitize \
		$(BIN)/pytest tests/test_update.py tests/test_ops.py

test-faults: $(VENV)/.installed-dev ## Kill and break runs of many samples, and count what is lost
	$(BIN)/python tests/faults/run.py

lint: $(VENV)/.installed-dev ## Check format, style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
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
	$(BIN)/pytest benchmarks -s --results $(RESULTS)
	$(BIN)/python benchmarks/figures.py
	$(BIN)/python benchmarks/tables.py

clean: ## Remove build products and caches, but not .venv
	rm -rf build dist demo *.egg-info .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -path ./$(VENV) -prune -o -name __pycache__ -exec rm -rf {} +

# torch comes first and on its own: it decides what the package is built against, and the package's
# own requirement would take whichever build of torch is the newest.
$(VENV)/.torch:
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(PIP) install "setuptools>=77" ninja "$(TORCH)"
	touch $@

$(VENV)/.installed: $(VENV)/.torch pyproject.toml setup.py $(CXX_FILES)
	$(PIP) install --no-build-isolation -e .
	touch $@

$(VENV)/.installed-report: $(VENV)/.installed-dev
	$(PIP) install --no-build-isolation -e ".[quality,report]"
	touch $@

# The peers come without what they require: it is for training, and would bring another torch along.
$(VENV)/.installed-dev: $(VENV)/.torch pyproject.toml setup.py tests/integrations/peers.txt $(CXX_FILES)
	$(PIP) install --no-build-isolation -e ".[test,lint]"
	$(PIP) install --no-deps -r tests/integrations/peers.txt
	touch $(VENV)/.installed $@

$(VENV)/.installed-docs: $(VENV)/.torch pyproject.toml setup.py $(CXX_FILES)
	$(PIP) install --no-build-isolation -e ".[docs]"
	touch $(VENV)/.installed $@
