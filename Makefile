# Commands for people and CI; none needs root.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
DEV := .venv/.ready-dev

.PHONY: run test test-all check audit bench gpu-bench docs results-pages second-model clean

run: $(READY)
	$(BIN)/posmask run studies/quick.toml --jobs 2

# Tests run in parallel on up to four cores. Each worker starts with a contiguous part of them, so that most fixtures of
# a file are made once, and one that has finished takes over tests of another.
PYTEST := $(BIN)/pytest -n auto --maxprocesses 4 --dist worksteal

test: $(DEV)
	$(PYTEST) -m "not slow"

test-all: $(DEV)
	$(PYTEST)

check: $(DEV)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

# Known vulnerabilities, according to PyPI, of all packages in constraints.txt; prints one line if PyPI is not reachable.
audit: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt pip-audit
	$(BIN)/python .ci/audit.py constraints.txt

# Benchmarks against other packages, which are installed in .bench/: about an hour, or minutes with QUICK=1 (main ratios).
bench: $(DEV)
	$(BIN)/python benchmarks/bench.py $(if $(QUICK),--quick) $(GROUPS)

# Measure a training step on a CUDA GPU, in at most 8 minutes; REHEARSE=1 runs the script without one, at tiny shapes.
gpu-bench: $(DEV)
	$(BIN)/python benchmarks/gpu.py $(if $(REHEARSE),--rehearse)

# Build the documentation in site/; a broken link is an error.
docs: $(DEV)
	$(PIP) --editable '.[dev,docs]'
	$(BIN)/jupyter nbconvert --log-level ERROR --to markdown --output-dir docs docs/tutorial.ipynb docs/audit-notebook.ipynb
	$(MAKE) results-pages
	$(BIN)/zensical build --clean --strict

# Write the page of each study in docs/results to docs/pages/.
results-pages: $(READY)
	mkdir -p docs/pages
	for study in $(patsubst docs/results/%/results.csv.zst,%,$(wildcard docs/results/*/results.csv.zst)); do \
	  $(BIN)/posmask report docs/results/$$study --out docs/pages/$$study.html || exit 1; done

# Train a small GPT-2 on the embedded texts for `posmask run studies/key.toml --set model.name=runs/gpt2`: an hour or two.
second-model: $(READY)
	$(BIN)/python studies/second_model.py runs/gpt2

ifneq ($(wildcard $(READY)),)
$(info Using the environment in .venv; remove it to set up again.)
endif

# pip, not uv or poetry: constraints.txt pins the CPU build of torch.
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

$(READY): pyproject.toml constraints.txt
	@echo "Setting up .venv: about 1.7 GB of packages the first time."
	$(PYTHON) -m venv .venv
	$(PIP) --editable .
	@touch $@

$(DEV): $(READY)
	@echo "Adding packages for tests, checks and benchmarks: about 1.9 GB the first time."
	$(PIP) --editable '.[dev]'
	@touch $@

clean:
	rm -rf .venv .bench runs
