# Every target sets up what it needs: the environment is made once in .venv, from pinned lock files, and reused.
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install browser test test-slurm test-gpu test-vllm-0.26 test-wheel test-docker lint format quickstart quickstart-base reproduce
.PHONY: reproduce-full bench-deps launch-deps clean

VENV := .venv
BIN := $(VENV)/bin
# An existing environment is kept, whatever python3 is.
ifeq ($(origin PYTHON),undefined)
PYTHON := $(firstword $(wildcard $(BIN)/python) python3)
endif
# A folder, wheel or index with torch's CPU build: the default build brings 3 GB of CUDA libraries that a CPU run never loads.
TORCH_WHEELS ?=
# One thread a process: more of them fight over the same cores.
OMP_NUM_THREADS ?= 1
export OMP_NUM_THREADS

TAG_PROGRAM := import sys; print("py%d%d" % sys.version_info[:2])
TAG := $(shell $(PYTHON) -c '$(TAG_PROGRAM)' 2>/dev/null)
INSTALLED := $(VENV)/.installed-$(TAG)
TEST_INSTALLED := $(VENV)/.test-installed-$(TAG)
LAUNCH_INSTALLED := $(VENV)/.launch-installed-$(TAG)
SLURM_SANDBOX ?= /tmp/megatron_nsr_slurm
PEERS := $(VENV)/bench-peers
OLD_VENV := .venv-vllm-0.26
WHEEL_VENV := .venv-wheel
OLD_INSTALLED := $(OLD_VENV)/.installed-$(TAG)
LOCKS := requirements/cpu-torch.lock $(wildcard requirements/cpu-$(TAG).lock)

# Debian's Python has venv without ensurepip unless python3-venv is installed; its own pip can fill such an environment.
MAKE_VENV = $(call make_venv,$(VENV))
make_venv = $(PYTHON) -m venv --clear $(1) >/dev/null 2>&1 || { $(PYTHON) -m venv --clear --without-pip $(1) && \
  $(PYTHON) -m pip --python $(1)/bin/python install -qq --disable-pip-version-check pip; }
PIP_OPTIONS := install -qq --disable-pip-version-check --no-input
PIP := $(BIN)/python -m pip $(PIP_OPTIONS)
WHEEL_PIP := $(WHEEL_VENV)/bin/python -m pip $(PIP_OPTIONS)
OLD_PIP := $(OLD_VENV)/bin/python -m pip $(PIP_OPTIONS)
TORCH_SOURCE := $(if $(TORCH_WHEELS),$(if $(findstring ://,$(TORCH_WHEELS)),--extra-index-url,--find-links) "$(TORCH_WHEELS)")

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9.-]+:.*## / { printf "  make %-16s %s\n", $$1, $$2 }' Makefile
	@echo "  variables: PYTHON=python3.11 (or 3.12); TORCH_WHEELS=folder, wheel or index with torch's CPU build (saves 3 GB)"

install: $(INSTALLED) ## make .venv from the lock files (reused while they do not change)

$(INSTALLED): $(LOCKS) pyproject.toml
	@case "$(TAG)" in \
	  py311|py312) ;; \
	  *) echo "Python 3.11 or 3.12 is needed, and $(PYTHON) is $(or $(patsubst py3%,Python 3.%,$(TAG)),not there): try make install PYTHON=python3.11" >&2; exit 1 ;; \
	esac
	@[ "$$($(BIN)/python -c '$(TAG_PROGRAM)' 2>/dev/null)" = "$(TAG)" ] || $(MAKE_VENV)
	@echo "Installing torch (1 of 3) ..."
	@$(PIP) $(TORCH_SOURCE) -c requirements/cpu-$(TAG).lock -r requirements/cpu-torch.lock
	@echo "Installing the pinned packages (2 of 3) ..."
	@$(PIP) --no-deps -r requirements/cpu-$(TAG).lock
	@echo "Installing megatron_nsr (3 of 3) ..."
	@$(PIP) --no-deps --no-build-isolation -e .
	@touch $@

launch-deps: $(LAUNCH_INSTALLED) ## nemo-run, for `megatron-nsr launch`, beside what is installed

$(LAUNCH_INSTALLED): $(INSTALLED) $(wildcard requirements/launch-$(TAG).lock)
	@echo "Installing nemo-run ..."
	@$(PIP) --no-deps -r requirements/launch-$(TAG).lock
	@touch $@

$(TEST_INSTALLED): $(LAUNCH_INSTALLED) $(wildcard requirements/test-$(TAG).lock) requirements/mlflow.lock
	@echo "Installing the test tools ..."
	@$(PIP) --no-deps -r requirements/test-$(TAG).lock -r requirements/mlflow.lock
	@touch $@

# Any Chromium or Chrome will do; where there is none, Debian's is installed if that needs no question.
BROWSERS := chromium chromium-browser google-chrome google-chrome-stable
browser: ## find or install the Chromium that the report's tests drive; CHROMIUM=FILE names one elsewhere
	@for name in $(CHROMIUM) $(BROWSERS); do if command -v "$$name" >/dev/null; then exit 0; fi; done; \
	if command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ]; then as_root=env; \
	elif command -v apt-get >/dev/null && sudo -n true 2>/dev/null; then as_root="sudo -n"; \
	fi; \
	if [ -n "$$as_root" ]; then \
	  echo "Installing Chromium ..."; \
	  $$as_root apt-get update -qq >/dev/null && \
	  $$as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium fonts-dejavu-core >/dev/null && exit 0; \
	fi; \
	echo "The report's tests need Chromium, and it could not be installed (apt-get with a package chromium, as root, is needed for that)." >&2; \
	echo "Install Chromium or Chrome, or name the program: make test CHROMIUM=/path/to/chrome" >&2; exit 1

# Distributed tests start as many processes as they have ranks; of the others two fit two cores.
test: $(TEST_INSTALLED) browser ## run all tests
	$(BIN)/python -m pytest tests/unit -n 2 --dist loadfile
	$(BIN)/python -m pytest tests/distributed
	$(BIN)/python -m pytest tests/integration -n 2 --dist loadfile

test-vllm-0.26: $(TEST_INSTALLED) $(OLD_INSTALLED) ## the rollout server tests with servers of vLLM 0.26 and torch 2.11
	MEGATRON_NSR_SERVER_PYTHON=$(CURDIR)/$(OLD_VENV)/bin/python $(BIN)/python -m pytest tests/integration/test_rollout_servers.py

# Debian's Slurm as two nodes on this machine; as root, or with sudo that asks no password. It is taken down whatever the tests say.
test-slurm: $(TEST_INSTALLED) ## launch real jobs on a Slurm of two nodes, which is installed and started on this machine
	SLURM_SANDBOX=$(SLURM_SANDBOX) tools/slurm_sandbox.sh up && \
	SLURM_CONF=$(SLURM_SANDBOX)/slurm.conf $(BIN)/python -m pytest tests/slurm; status=$$?; \
	SLURM_SANDBOX=$(SLURM_SANDBOX) tools/slurm_sandbox.sh down; exit $$status

# The environment is the GPU host's own (docs/containers.md), with the test tools; nothing is installed here.
test-gpu: ## on a host with a CUDA GPU: every part of tools/gpu_acceptance.py, and the Triton kernels
	$(PYTHON) -m pytest tests/gpu

# The pinned packages of .venv, those of vllm-0.26.lock in their place.
$(OLD_INSTALLED): $(LOCKS) requirements/vllm-0.26-torch.lock requirements/vllm-0.26.lock
	@$(call make_venv,$(OLD_VENV))
	@awk -F== 'NR == FNR { new[$$1] } NR == FNR || !($$1 in new)' requirements/vllm-0.26.lock requirements/cpu-$(TAG).lock > $(OLD_VENV)/merged.lock
	@echo "Installing torch for vLLM 0.26 (1 of 2) ..."
	@$(OLD_PIP) $(TORCH_SOURCE) -c $(OLD_VENV)/merged.lock -r requirements/vllm-0.26-torch.lock
	@echo "Installing the pinned packages for vLLM 0.26 (2 of 2) ..."
	@$(OLD_PIP) --no-deps -r $(OLD_VENV)/merged.lock
	@touch $@

# Nothing of .venv but the tool that builds is used: an environment from the lock files, the wheel in it, two training steps.
test-wheel: $(TEST_INSTALLED) ## build the packages, install the wheel in a fresh environment, train two steps there
	@rm -rf dist $(WHEEL_VENV)
	$(BIN)/python -m build --no-isolation
	@$(call make_venv,$(WHEEL_VENV))
	@echo "Installing the pinned packages ..."
	@$(WHEEL_PIP) $(TORCH_SOURCE) -c requirements/cpu-$(TAG).lock -r requirements/cpu-torch.lock
	@$(WHEEL_PIP) --no-deps -r requirements/cpu-$(TAG).lock
	$(WHEEL_PIP) --no-deps dist/megatron_nsr-*.whl
	tools/try_installed.sh $(WHEEL_VENV)
	@rm -rf $(WHEEL_VENV)

# TORCH_WHEELS as above. Needs no Docker daemon: tools/build_cpu_image.sh says what it does without one.
test-docker: ## build the image's cpu target and train two steps in it
	tools/build_cpu_image.sh

lint: $(TEST_INSTALLED) ## ruff, its formatter in checking mode, mypy
	@status=0; \
	$(BIN)/ruff check . || status=1; \
	$(BIN)/ruff format --check . || status=1; \
	$(BIN)/mypy megatron_nsr $(wildcard tools/*.py tools/*/*.py examples/*.py examples/*/*.py) || status=1; \
	exit $$status

format: $(TEST_INSTALLED) ## let ruff format the code and sort its imports
	$(BIN)/ruff check --select I --fix .
	$(BIN)/ruff format .

quickstart: $(INSTALLED) ## pre-train a tiny model, train it with PSR, NSR and W-REINFORCE, compare: a CPU, 15 minutes
	$(BIN)/python -m examples.quickstart

quickstart-base: $(INSTALLED) ## only pre-train the quickstart's base model
	$(BIN)/python -m examples.quickstart --only base

reproduce: $(INSTALLED) ## the paper's comparison on one tiny base model, on two cores, into docs/reproduction.md
	$(BIN)/python -m examples.reproduction one

reproduce-full: $(INSTALLED) ## the same on three bases with five seeds and a search; the same command continues after a kill
	$(BIN)/python -m examples.reproduction full

bench-deps: $(PEERS)/.installed-$(TAG) ## the other fused heads that tools/benchmarks/fused_head.py compares with

# A folder of their own: their declared requirements contradict our pins, and verl brings a package named `tests`.
$(PEERS)/.installed-$(TAG): $(INSTALLED) $(wildcard requirements/bench-$(TAG).lock) requirements/bench-cuda.lock
	@rm -rf $(PEERS)
	@echo "Installing the benchmark's peers ..."
	@$(PIP) --no-deps --target $(PEERS) -r requirements/bench-$(TAG).lock
	@if command -v nvidia-smi >/dev/null; then $(PIP) --no-deps --target $(PEERS) -r requirements/bench-cuda.lock; fi
	@touch $@

clean: ## remove .venv, caches and build output (runs/ stays)
	rm -rf $(VENV) $(OLD_VENV) $(WHEEL_VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
