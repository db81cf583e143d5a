# The verbs that people and CI use. Nothing here needs root.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
DEV := .venv/.ready-dev

.PHONY: run test test-all check audit bench docs results-pages second-model clean

run: $(READY)
	$(BIN)/posmask run studies/quick.toml --jobs 2

# Small tests, side by side on up to four cores.
PYTEST := $(BIN)/pytest -n auto --maxprocesses 4

test: $(DEV)
	$(PYTEST) -m "not slow"

test-all: $(DEV)
	$(PYTEST)

check: $(DEV)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

# Known vulnerabilities of all that constraints.txt pins, as PyPI tells them; where it cannot be asked, one line says so.
audit: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt pip-audit
	$(BIN)/python .ci/audit.py constraints.txt

# Against its peers, each set up in .bench/: about an hour, or QUICK=1 for the main ratios in minutes.
bench: $(DEV)
	$(BIN)/python benchmarks/bench.py $(if $(QUICK),--quick) $(GROUPS)

# The documentation as a site in site/; a link that leads nowhere stops it.
docs: $(DEV)
	$(PIP) --editable '.[dev,docs]'
	$(BIN)/jupyter nbconvert --log-level ERROR --to markdown --output-dir docs docs/tutorial.ipynb
	$(BIN)/zensical build --clean --strict

# The page of each study in docs/results, in runs/results-pages/.
results-pages: $(READY)
	mkdir -p runs/results-pages
	for study in $(patsubst docs/results/%/results.csv.zst,%,$(wildcard docs/results/*/results.csv.zst)); do \
	  $(BIN)/posmask report docs/results/$$study --out runs/results-pages/$$study.html || exit 1; done

# A small GPT-2 trained on the embedded texts, for `posmask run studies/key.toml --set model.name=runs/gpt2`: an hour or two.
second-model: $(READY)
	$(BIN)/python studies/second_model.py runs/gpt2

ifneq ($(wildcard $(READY)),)
$(info Using the environment in .venv (remove it to start afresh).)
endif

# pip, not uv or poetry: constraints.txt pins the CPU build of torch.
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

$(READY): pyproject.toml constraints.txt
	@echo "Setting up .venv: about 1.7 GB of packages the first time."
	$(PYTHON) -m venv .venv
	$(PIP) --editable .
	@touch $@

$(DEV): $(READY)
	@echo "Adding what tests, checks and benchmarks need: about 0.9 GB the first time."
	$(PIP) --editable '.[dev]'
	@touch $@

clean:
	rm -rf .venv .bench runs
