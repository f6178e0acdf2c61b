# Everything a fresh machine needs: Python 3.11 or newer and this file. `make help` lists the targets.
# PYTHON=... chooses the interpreter, WORKERS=... the test processes, RUN=... where the demo writes.

VENV := .venv
BIN := $(VENV)/bin
RUN := runs/demo
WORKERS := 2
# One thread per test process: several that each take every core only wait for one another.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow mutants bench lint lock clean

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | awk -F '\t' '{printf "  make %-10s %s\n", $$1, $$2}'

demo: $(VENV)/core.stamp ## find nuclei with the model in the package, fine-tune it for a minute, and write a report
	rm -rf $(RUN)
	$(BIN)/maskwright predict nuclei src/maskwright/data/sample/val --output $(RUN)/predictions
	@echo "Overlays: $(CURDIR)/$(RUN)/predictions"
	@echo
	$(BIN)/maskwright train demo --output $(RUN)
	$(BIN)/maskwright evaluate $(RUN)/best.safetensors demo
	@echo
	@echo "Report:   $(CURDIR)/$(RUN)/report.html"
	@echo "Overlays: $(CURDIR)/$(RUN)/predictions"

test: $(VENV)/dev.stamp ## the quick tests: offline, on the CPU
	$(PYTEST) -n $(WORKERS) -m "not slow"

test-slow: $(VENV)/dev.stamp ## the tests that train for real
	$(PYTEST) -m slow

mutants: $(VENV)/dev.stamp ## put one mistake at a time into a copy of the package, and see whether the tests notice
	$(BIN)/python tests/mutants.py

bench: $(VENV)/dev.stamp ## ours and its peers in turns, all parts; leaves bench.md, bench.json, bench.png in runs/bench
	$(BIN)/python -m benchmarks --output runs/bench

lint: $(VENV)/dev.stamp ## formatting, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/ty check src

clean: ## remove the environment, the caches and what was built; runs/ stays
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .hypothesis
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

# The environment. A stamp is newer than what was installed from it, so a second call installs nothing.
# --no-deps: the pinned list is complete, and pip must not look for the `typing` that override.in leaves out.

INSTALL := $(BIN)/python -m pip --disable-pip-version-check install --quiet --progress-bar off

$(VENV)/%.stamp: requirements/%.txt pyproject.toml | $(BIN)/python
	@echo "Installing requirements/$*.txt into $(VENV); the first time takes some minutes, mostly for torch"
	@$(INSTALL) --require-hashes --no-deps -r requirements/$*.txt
	@$(INSTALL) --no-build-isolation --no-deps --editable .
	@touch $@

CANDIDATES := $(or $(PYTHON),python3.11 python3.12 python3.13 python3 python)

$(BIN)/python:
	@for candidate in $(CANDIDATES); do \
	    if $$candidate -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then chosen=$$candidate; break; fi; \
	done; \
	if [ -z "$$chosen" ]; then \
	    echo "maskwright needs Python 3.11 or newer, found none among: $(CANDIDATES). Install one, or name one: make test PYTHON=/path/to/python" >&2; exit 1; \
	fi; \
	$$chosen -m venv $(VENV) || { rm -rf $(VENV); echo "$$chosen -m venv failed; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }

# The pins. User-wide find-links and indexes stay out, so that the files are the same wherever they are made.

COMPILE := env -u PIP_FIND_LINKS -u UV_FIND_LINKS uv pip compile --config-file requirements/uv.toml --quiet --universal \
	--python-version 3.11 --upgrade --generate-hashes --no-emit-index-url --no-emit-find-links \
	--no-annotate --no-header --override requirements/override.in

lock: ## renew the pins of requirements/ (needs uv)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(COMPILE) pyproject.toml requirements/build.in -o requirements/core.txt
	PATH="$(CURDIR)/$(BIN):$$PATH" $(COMPILE) --extra serve -c requirements/core.txt pyproject.toml requirements/build.in -o requirements/serve.txt
	PATH="$(CURDIR)/$(BIN):$$PATH" $(COMPILE) --extra dev -c requirements/serve.txt pyproject.toml requirements/build.in -o requirements/dev.txt
