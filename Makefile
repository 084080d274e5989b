# LenVM. `make` or `make help` lists the targets.
.DEFAULT_GOAL := help
SHELL := bash
.SHELLFLAGS := -euo pipefail -c

PYTHON  ?= python3
ENVS    := $(or $(LENVM_ENVS),.envs)
TRAIN   := $(ENVS)/train/bin
SERVE   := $(ENVS)/serve/bin
PORT    ?= 8000
DATA    ?=
ARGS    ?=
# Passed to env/build.py, e.g. ENV_ARGS="--device cpu"
ENV_ARGS ?=
PIPELINE = $(SERVE)/lenvm pipeline

.PHONY: help
help: ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## /{printf "  make %-18s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: envs env-train env-serve env-serve-floor
envs: env-train env-serve ## build the two environments (cached by a hash of the pins)
env-train: ## build the training environment (LlamaFactory)
	@$(PYTHON) env/build.py train $(ENV_ARGS)
env-serve: ## build the serving environment (SGLang)
	@$(PYTHON) env/build.py serve $(ENV_ARGS)
env-serve-floor: ## the same with the oldest supported SGLang, for its tests
	@$(PYTHON) env/build.py serve-floor $(ENV_ARGS)

.PHONY: demo run-gsm8k serve-demo
demo: envs ## the whole of LenVM on a small synthetic language, ending with a report; ARGS="--set key=value ..."
	@$(PIPELINE) run examples/demo/recipe.yaml --train-python $(TRAIN)/python $(ARGS)
run-gsm8k: envs ## the same pipeline on GSM8K: make run-gsm8k DATA=DIR
	@test -n "$(DATA)" || { echo "run-gsm8k: DATA is empty; give the folder with gsm8k_train.jsonl and gsm8k_test.jsonl: make run-gsm8k DATA=DIR" >&2; exit 2; }
	@$(PIPELINE) run examples/gsm8k/recipe.yaml --train-python $(TRAIN)/python --set data=$(DATA) $(ARGS)
serve-demo: envs ## serve the demo pair: make serve-demo PORT=8000
	@$(PIPELINE) serve examples/demo/recipe.yaml --train-python $(TRAIN)/python --port $(PORT) $(ARGS)

.PHONY: results
results: envs ## docs/results.md from the pairs of `make demo` and `make run-gsm8k`: make results DATA=DIR
	@test -n "$(DATA)" || { echo "results: DATA is empty; give the folder with gsm8k_test.jsonl, math500.jsonl and lifebench_no_summary.jsonl: make results DATA=DIR" >&2; exit 2; }
	@test -d runs/demo/lenvm || { echo "results: there is no runs/demo/lenvm; run make demo first" >&2; exit 2; }
	@test -d runs/gsm8k/lenvm || { echo "results: there is no runs/gsm8k/lenvm; run make run-gsm8k DATA=$(DATA) first" >&2; exit 2; }
	@$(SERVE)/python benchmarks/evidence.py --data $(DATA) --write docs $(ARGS)

.PHONY: test test-fast lint
test: envs env-serve-floor ## lint and all tests, those of the server's core on the oldest supported SGLang too
	@$(PYTHON) env/test.py
test-fast: envs env-serve-floor ## lint and the tests that start no server and train nothing (under 2 minutes)
	@$(PYTHON) env/test.py --fast
lint: env-train ## ruff, format check, type check
	@$(PYTHON) env/test.py --only lint

.PHONY: clean
clean: ## remove caches and what the pipelines wrote (not the environments)
	@rm -rf runs .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist
	@find . -name __pycache__ -type d -not -path './.envs/*' -prune -exec rm -rf {} +
