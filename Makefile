# fracture-sweep. `make help` lists the targets.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
LOCK := requirements.lock
PIP := $(BIN)/python -m pip --disable-pip-version-check
DEMO ?= demo

.PHONY: help setup demo test check format bundle lock clean

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(BIN)/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v <= (3, 13) else f"fracture-sweep needs Python 3.11 to 3.13, and $(PYTHON) is {v[0]}.{v[1]}: say which with make PYTHON=python3.12 …")'
	@command -v cc >/dev/null 2>&1 || command -v gcc >/dev/null 2>&1 || { echo "make setup: no C compiler found, and pyradiomics needs one to install. Debian/Ubuntu: apt-get install gcc python3-dev; Fedora: dnf install gcc python3-devel; macOS: xcode-select --install" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.setup: $(BIN)/python pyproject.toml $(LOCK)
	@echo "installing the services into $(VENV) (a minute or two) ..."
	$(PIP) install --quiet --constraint $(LOCK) --editable '.[all]'
	@touch $@

$(VENV)/.test: $(VENV)/.setup
	@echo "installing what the tests need, torch among it (some minutes) ..."
	$(PIP) install --quiet --constraint $(LOCK) --editable '.[test,check]'
	@$(BIN)/python -c 'import torch' 2>/dev/null || $(PIP) install --quiet "torch==$(TORCH_VERSION)"
	$(PIP) install --quiet --constraint $(LOCK) --editable '.[trainer]'
	@touch $@

TORCH_VERSION ?= 2.13.0

setup: $(VENV)/.setup ## the virtual environment .venv with all services (no torch)
	@echo "ready: $(BIN)/fracture-sweep --help"

demo: setup ## the main job on phantoms: make an archive, sweep it, print the worklist
	$(BIN)/fracture-sweep phantoms $(DEMO)/archive --patients 8 --seed 11
	$(BIN)/fracture-sweep run $(DEMO)/archive --out $(DEMO)/results

check: $(VENV)/.test ## ruff, mypy --strict, import-linter
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: $(VENV)/.test ## all tests, against a real RabbitMQ and a real S3 server
	$(BIN)/python -m pytest

format: $(VENV)/.test ## ruff's formatter and its safe fixes
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bundle: $(VENV)/.test ## train the demonstration bundle again (phantoms; about an hour on two cores)
	$(BIN)/python -m services.trainer.demonstration --out deploy/bundles/demo --work build/bundle

lock: $(VENV)/.test ## renew the locked versions of all dependencies
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --no-emit-index-url --no-annotate --no-header \
	  --extra test --extra check --extra trainer pyproject.toml --output-file $(LOCK)

clean: ## remove the virtual environment and what was built
	rm -rf $(VENV) build dist $(DEMO) ./*.egg-info
