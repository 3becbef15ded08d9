# Needs Python 3.11 or newer, venv and make; uses uv when it is there.
.DEFAULT_GOAL := help
.PHONY: help setup demo test test-node test-bench lint format bench chaos simulate docs lock clean

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
JOBS ?= 3

help: ## Say what each target does
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

setup: $(STAMP) ## Make .venv with everything pinned by hash

$(STAMP): requirements-dev.lock pyproject.toml
	@PYTHON="$(PYTHON)" sh scripts/setup.sh $(VENV)
	@touch $@

demo: $(STAMP) ## Start everything with two sample orgs and show it until Ctrl-C
	@$(BIN)/nightmail demo

test: $(STAMP) ## Run the tests (about 7 minutes on 2 cores)
	@$(BIN)/python -m pytest -n $(JOBS) --dist worksteal

test-node: $(STAMP) ## Run the official Node SDK and verifiers against Nightmail (needs npm)
	@npm install --silent --no-audit --no-fund --prefix .node resend@6.38.0 svix@2.5.0 standardwebhooks@1.1.1
	@NODE_RESEND=$(CURDIR)/.node $(BIN)/python -m pytest tests/node

test-bench: $(STAMP) ## Run every benchmark for some seconds: does it still work?
	@$(BIN)/python -m pytest tests/bench -m bench -n $(JOBS) --dist worksteal

lint: $(STAMP) ## Formatting, lint, types, import contracts, migrations
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports
	@$(BIN)/squawk --config .squawk.toml nightmail/schema/*.sql

format: $(STAMP) ## Format the code
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

bench: $(STAMP) ## Measure against floors and a peer, and write docs/benchmarks.md
	@$(BIN)/python -m bench

chaos: $(STAMP) ## Kill runners for two minutes under load and account for every message and delivery
	@$(BIN)/python -m tests.crash.kill_loop --seconds 60
	@$(BIN)/python -m tests.crash.webhook_kill_loop --seconds 60

simulate: $(STAMP) ## Run 20,000 seeded interleavings over real PostgreSQL
	@$(BIN)/python -m tests.simulation --seeds 20000

docs: $(STAMP) ## Write the generated pages again
	@$(BIN)/python scripts/settings_page.py > docs/settings.md
	@$(BIN)/python scripts/webhooks_page.py > docs/webhooks.new && mv docs/webhooks.new docs/webhooks.md

lock: $(STAMP) ## Pin the dependencies again
	@$(BIN)/uv pip compile -q --generate-hashes --no-emit-index-url --no-header --universal --python-version 3.11 pyproject.toml -o requirements.lock
	@$(BIN)/uv pip compile -q --generate-hashes --no-emit-index-url --no-header --universal --python-version 3.11 pyproject.toml --group dev -o requirements-dev.lock

clean: ## Remove what setup, demo and tests made
	rm -rf $(VENV) .node .nightmail .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
