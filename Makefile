# fracture-sweep. `make help` lists the targets.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
LOCK := requirements.lock
PIP := $(BIN)/python -m pip --disable-pip-version-check
DEMO ?= demo
OUT ?= results
# GPU=1 puts the deep extractor on an NVIDIA GPU
COMPOSE ?= docker compose -f docker-compose.yml $(if $(GPU),-f deploy/compose.gpu.yml)
AS_ME := --user "$$(id -u):$$(id -g)"
# the site's own keys, where `make secrets` made them: then embedded and distributed give the same ids
SITE := $(wildcard secrets/pseudonym.key)
KEYS := $(if $(SITE),FRACTURE_SWEEP_SECRETS_PSEUDONYM_KEY_FILE=secrets/pseudonym.key \
  FRACTURE_SWEEP_SECRETS_ENCRYPTION_KEY_FILE=secrets/encryption.key)

.PHONY: help setup demo test check format bundle lock clean secrets up down logs ps submit status export \
  demo-distributed chaos pin-images study segmenter nnunet-check

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
	@$(PIP) show --quiet torchvision 2>/dev/null || $(PIP) install --quiet --no-deps "torchvision==$(TORCHVISION_VERSION)"
	@touch $@

# These two belong together. torchvision comes without its dependencies: numpy and pillow are here already, and its
# wish for a certain torch must not bring a second build, gigabytes of CUDA, over the one that is installed. Beside a CPU
# build its compiled operators do not load; services/trainer/torchvision_models.py does without them.
TORCH_VERSION ?= 2.13.0
TORCHVISION_VERSION ?= 0.28.0

setup: $(VENV)/.setup ## the virtual environment .venv with all services (no torch)
	@echo "ready: $(BIN)/fracture-sweep --help"

demo: setup ## the main job on phantoms: make an archive, sweep it, print the worklist
	$(BIN)/fracture-sweep phantoms archive $(DEMO)/archive --patients 8 --spines 2 --seed 11
	$(KEYS) $(BIN)/fracture-sweep run $(DEMO)/archive --out $(DEMO)/results$(if $(SITE),-site)

# -- the whole system by docker compose (docs/distributed.md) ----------------------------------------------------------
secrets: ## random passwords and keys into secrets/, those that are not there yet
	@mkdir -p secrets && chmod 700 secrets
	@if [ -x $(BIN)/fracture-sweep ]; then $(BIN)/fracture-sweep secrets secrets; else \
	  echo "making the secrets with our own image (a minute or two the first time) ..." && \
	  $(COMPOSE) build --quiet prepare-store && \
	  docker run --rm --network none $(AS_ME) --workdir / --volume "$$PWD/secrets:/secrets" \
	    fracture-sweep/cli:$${VERSION:-0.1.0} secrets /secrets; fi

up: secrets ## the whole system: RabbitMQ, S3, Orthanc, Prometheus and every worker (GPU=1: on a GPU)
	$(COMPOSE) up --detach --build --wait
	@echo "RabbitMQ    http://127.0.0.1:$${RABBITMQ_UI_PORT:-15672}   user admin, password in secrets/rabbitmq/admin"
	@echo "Orthanc     http://127.0.0.1:$${ORTHANC_UI_PORT:-8042}    user admin, password in secrets/orthanc/admin"
	@echo "Prometheus  http://127.0.0.1:$${PROMETHEUS_PORT:-9090}"
	@echo "next: make demo-distributed, or make submit INPUT=/a/folder SWEEP=a-name, and make status"

down: ## stop it; what was written stays (every worker finishes what it has in hand)
	$(COMPOSE) down

logs: ## follow the logs
	$(COMPOSE) logs --follow --tail 50

ps: ## what runs, and whether it is ready
	$(COMPOSE) ps

submit: ## upload a folder or a CSV of pairs: make submit INPUT=/a/folder SWEEP=a-name
	@test -n "$(INPUT)" -a -n "$(SWEEP)" || { echo "make submit INPUT=/a/folder SWEEP=a-name" >&2; exit 2; }
	$(COMPOSE) run --rm --volume "$(abspath $(INPUT)):/input:ro" submit /input --sweep "$(SWEEP)"

status: ## follow what was submitted until nothing is pending
	$(COMPOSE) run --rm cli status --watch $(SWEEP)

export: ## worklist and reports into OUT=results
	@mkdir -p "$(OUT)"
	$(COMPOSE) run --rm $(AS_ME) --volume "$(abspath $(OUT)):/out" cli export $(SWEEP) --out /out

demo-distributed: up ## make demo's archive and worklist, by the whole system
	@mkdir -p $(DEMO)/distributed
	$(COMPOSE) run --rm $(AS_ME) --volume "$(abspath $(DEMO)):/demo" cli phantoms archive /demo/archive --patients 8 --spines 2 \
	  --seed 11
	$(MAKE) submit INPUT=$(DEMO)/archive SWEEP=demo
	$(MAKE) status
	$(MAKE) export OUT=$(DEMO)/distributed

pin-images: ## write the digests of the images' tags into .env, on a machine that reaches their registry
	deploy/pin-images.sh

chaos: $(VENV)/.test ## every disturbance of docs/reliability.md on the whole stack (some 40 minutes)
	$(BIN)/python -m pytest tests/compose -m chaos

check: $(VENV)/.test ## ruff, mypy --strict, import-linter
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/hadolint --config deploy/hadolint.yaml $$(git ls-files "*Dockerfile")

test: $(VENV)/.test ## all tests, against a real RabbitMQ and a real S3 server, then the whole stack by Docker
	$(BIN)/python -m pytest -m "not compose" --numprocesses 2 --dist loadfile
	$(BIN)/python -m pytest tests/compose -m "not chaos or ci_chaos"

format: $(VENV)/.test ## ruff's formatter and its safe fixes
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bundle: $(VENV)/.test ## train the demonstration bundle again (phantoms; some hours on two cores, resumable)
	$(BIN)/python -m services.trainer.pretraining --out build/bundle/phantom-signs.safetensors --work build/bundle/pretraining
	$(BIN)/fracture-sweep phantoms cohort build/bundle/cohort --patients 365 --kappa 0.85 --seed 7 --nifti
	$(BIN)/fracture-sweep mask-cohort build/bundle/cohort/COHORT.csv --out build/bundle/automatic
	$(BIN)/fracture-sweep train build/bundle/automatic/COHORT.csv --out build/bundle/run --training deploy/bundles/demo.toml \
	  --name phantom-demonstration --bundle-version 6 --notes deploy/bundles/demo-notes.md
	rm -rf deploy/bundles/demo && cp -R build/bundle/run/bundle deploy/bundles/demo

study: $(VENV)/.test ## in_sample, crossfit and frozen over five phantom cohorts (many hours, resumable)
	$(BIN)/python -m services.trainer.pretraining --out build/bundle/phantom-signs.safetensors --work build/bundle/pretraining
	$(BIN)/python -m services.study --weights build/bundle/phantom-signs.safetensors --out build/study --rows docs/study.csv

segmenter: $(VENV)/.test ## train the built-in segmenter again: LABELMAPS=/a/folder (docs/segmentation.md; an hour on two cores, resumable)
	@test -n "$(LABELMAPS)" || { echo "make segmenter LABELMAPS=/a/folder" >&2; exit 2; }
	$(BIN)/fracture-sweep train-segmenter "$(LABELMAPS)" --out build/segmenter --volumes 1200 --steps 4000 \
	  --name fracture-sweep-spine
	cp build/segmenter/network/network.onnx build/segmenter/network/network.json deploy/segmenters/built-in/

nnunet-check: $(VENV)/.test ## the plugged-in command with the real nnU-Net, random weights (an environment of several gigabytes)
	test -x build/nnunet/bin/nnUNetv2_predict_from_modelfolder || { $(PYTHON) -m venv build/nnunet \
	  && build/nnunet/bin/pip install --quiet nnunetv2; }
	NNUNET_ENVIRONMENT=build/nnunet $(BIN)/python -m pytest tests/nnunet

lock: $(VENV)/.test ## renew the locked versions of all dependencies
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --no-emit-index-url --no-annotate --no-header \
	  --extra test --extra check --extra trainer pyproject.toml --output-file $(LOCK)

clean: ## remove the virtual environment and what was built
	rm -rf $(VENV) build dist $(DEMO) ./*.egg-info
