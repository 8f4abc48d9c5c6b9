# Every target does its own set-up in a virtual environment inside this folder. `make help` lists them.
#   PYTHON=/path/to/python  use this interpreter instead of the first of python3.10 to 3.13 that is found
#   ARGS="..."              more arguments for t2irl train, pytest, build_assets.py or bench.py

VENV ?= .venv
DEV_VENV ?= .venv-dev
BIN := $(VENV)/bin
DEV_BIN := $(DEV_VENV)/bin
PIP_INSTALL := -m pip install --quiet --disable-pip-version-check
CANDIDATES := $(or $(PYTHON),python3.11 python3.12 python3.13 python3.10 python3 python)
# Prints the interpreter if it is a Python that this package supports and can make virtual environments.
PROBE := import sys, venv, ensurepip; sys.exit(1) if not (3, 10) <= sys.version_info[:2] <= (3, 13) else print(sys.executable)

# The node that comes with pyright's wheel is used and nothing is looked up on the network.
export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1

.DEFAULT_GOAL := help
.PHONY: help demo test lint types format assets bench clean

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | while IFS="$$(printf '\t')" read -r name text; do printf '  make %-8s %s\n' "$$name" "$$text"; done

demo: $(VENV)/.installed ## train the embedded model on the CPU; results in runs/demo
	$(BIN)/t2irl train configs/tiny/demo.yaml $(ARGS)

test: $(DEV_VENV)/.installed ## run all tests
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(DEV_BIN)/python -m pytest --numprocesses logical --maxprocesses 8 --dist worksteal $(ARGS)

lint: $(DEV_VENV)/.installed ## style, formatting and spelling
	$(DEV_BIN)/ruff check .
	$(DEV_BIN)/ruff format --check .
	$(DEV_BIN)/codespell

format: $(DEV_VENV)/.installed ## mend what `lint` can mend by itself
	$(DEV_BIN)/ruff check --fix .
	$(DEV_BIN)/ruff format .

types: $(DEV_VENV)/.installed ## type checker
	$(DEV_BIN)/pyright --pythonpath $(DEV_BIN)/python

assets: $(VENV)/.installed ## train the models in assets/ from scratch (about an hour on two cores)
	$(BIN)/python scripts/build_assets.py $(ARGS)

bench: $(VENV)/.installed ## seconds by stage, next to the bare denoiser calls they need
	$(BIN)/python scripts/bench.py $(ARGS)

clean: ## remove the virtual environments and caches; runs/ and assets/ stay
	rm -rf $(VENV) $(DEV_VENV) build/lib *.egg-info .pytest_cache .ruff_cache .hypothesis
	find t2irl reward_models scripts tests -name __pycache__ -type d -prune -exec rm -rf {} +

# The package is installed in place, so only a change of pyproject.toml asks for a new installation.
$(VENV)/.installed: WHAT := .
$(DEV_VENV)/.installed: WHAT := .[dev]
$(VENV)/.installed $(DEV_VENV)/.installed: pyproject.toml
	@set -e; found=; \
	for candidate in $(CANDIDATES); do \
		found=$$("$$candidate" -c '$(PROBE)' 2>/dev/null) && break || found=; \
	done; \
	if [ -z "$$found" ]; then \
		echo "error: none of [$(CANDIDATES)] is a Python 3.10 to 3.13 with venv and pip." >&2; \
		echo "       Install one (on Debian and Ubuntu: python3 and python3-venv), or name it: make $(MAKECMDGOALS) PYTHON=/path/to/python" >&2; \
		exit 1; \
	fi; \
	echo "Installing t2irl into $(@D) with $$found (once; PyTorch is large, this can take some minutes)"; \
	"$$found" -m venv $(@D); \
	$(@D)/bin/python $(PIP_INSTALL) -e '$(WHAT)'; \
	touch $@; \
	echo "Installed $$($(@D)/bin/python -m pip list --disable-pip-version-check --format=freeze 2>/dev/null | wc -l) packages into $(@D)"
