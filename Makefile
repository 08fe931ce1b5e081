# make demo   train a small model from scratch, align it, show the report (about ten minutes)
# make test   the tests (about ten minutes)    make slow   the long ones too
# make test-browser   the ranking app in headless Chromium; needs Debian's packages chromium and
#                     chromium-driver:  apt-get install chromium chromium-driver
# make lint   ruff and mypy                    make bench  against the peers, writes docs/benchmarks.md
# make faults  kill a small line at 70 moments and resume it, writes docs/faults.md (half an hour)
# make sweep  nine tiny models of three sizes and three lengths, and a law fitted to them (twelve minutes)
# make mutants  break the arithmetic of PPO and of the reward losses bit by bit, writes docs/mutants.md
#
# Each needs Python >= 3.11, make and git only: .venv is made on the first call, and again only when
# pyproject.toml or constraints.txt change.

PYTHON ?= python3
STAMP := .venv/.installed
BIN := .venv/bin
# two tests at a time, one thread each: faster on two cores than the other way round
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

.PHONY: demo test slow test-browser bench faults sweep mutants lint clean

demo: $(STAMP)
	$(BIN)/prefline run configs/demo.yaml

test: $(STAMP)
	$(PYTEST)

slow: $(STAMP)
	$(PYTEST) -m "not browser"

test-browser: $(STAMP)
	@command -v chromium >/dev/null && command -v chromedriver >/dev/null || \
	  { echo "error: the browser tests need Debian's packages:" \
	    "apt-get install chromium chromium-driver" >&2; exit 1; }
	$(PYTEST) -m browser tests/browser || \
	  { echo "a browser on a busy machine may be too slow: what failed is tried once more, alone"; \
	    $(PYTEST) -n 0 -m browser tests/browser --last-failed; }

bench: $(STAMP)
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m tests.benchmarks --page docs/benchmarks.md

faults: $(STAMP)
	$(BIN)/python -m tests.faults --page docs/faults.md

sweep: $(STAMP)
	for one in 32:2.4e-2 64:1.2e-2 128:6e-3; do size=$${one%:*}; for steps in 800 1600 3200; do \
	  $(BIN)/prefline run configs/sweep.yaml run.name=sweep-$$size-$$steps \
	    model.hidden_size=$$size pretrain.lr=$${one#*:} pretrain.steps=$$steps || exit; done; done
	$(BIN)/prefline plan --fit runs/sweep-*

mutants: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.mutants

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	  { echo "error: prefline needs Python 3.11 or newer; '$(PYTHON)' is" \
	    "$$($(PYTHON) --version 2>&1 || echo missing). Try: make PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $(STAMP)

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache build dist
