# Two commands: `make quickstart` shows a whole run on this machine, `make test` proves that everything works.
# PYTHON is the interpreter that makes the environment, VENV its folder; pip runs with your own settings.

PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?=
BIN = $(VENV)/bin
SETUP = $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	echo 'error: Python 3.10 or newer is needed, and $(PYTHON) is not that; name another: PYTHON=/path/to/python3.11' >&2; \
	exit 2; }; \
	$(PYTHON) tools/venv.py --venv "$(VENV)"

.DEFAULT_GOAL := help
.PHONY: help quickstart slurm-demo test test-system test-long test-slurm-versions lint bench bench-slurm lock schemas schemas-check clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /  make \1|/p' Makefile | awk -F'|' '{printf "%-20s %s\n", $$1, $$2}'

quickstart: ## install into .venv, then data prep, SFT and RL of a tiny Nemotron here
	@$(SETUP) --extra trl
	@"$(BIN)/nemotron" nano3 pipe -c tiny
	@echo; echo "nemotron is in $(BIN); put it on your PATH with: . $(BIN)/activate"

slurm-demo: ## the same, shorter, on a real Slurm of two nodes on this machine (needs `make test-system` once)
	@$(SETUP) --extra trl
	@"$(BIN)/python" -m slurm.demo

# CI machines are ours to change; nobody else's gets a system package from a test.
ifeq ($(CI),true)
test: test-system
endif
test: lint ## every check and test but the long ones
	"$(BIN)/python" -m pytest -m "not long" $(PYTEST_ARGS)

test-long: ## the tests marked long as well
	@$(SETUP) --extra test
	"$(BIN)/python" -m pytest $(PYTEST_ARGS)

SYSTEM_PACKAGES = chromium slurmctld slurmd slurm-client slurmdbd munge mariadb-server-core mariadb-client-core docker.io \
	docker-registry openssh-server openssh-client openssh-sftp-server iproute2 squashfs-tools gcc libc6-dev libslurm-dev \
	strace sshfs
test-system: ## the Debian packages that the tests need: a real Slurm, a real docker, a browser (as root, by apt-get)
	@missing=$$(for package in $(SYSTEM_PACKAGES); do \
		dpkg-query -W -f '$${Status}' $$package 2>/dev/null | grep -q 'ok installed' || echo $$package; done); \
	if [ -z "$$missing" ]; then echo "make test-system: all there"; exit 0; fi; \
	command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ] || { \
		echo "error: not installed:" $$missing >&2; \
		echo "    fix:  run it as root on Debian or Ubuntu, or install them your way" >&2; exit 2; }; \
	apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends $$missing

SLURM_SUITES = bullseye trixie sid
test-slurm-versions: ## the Slurm tests on the Slurms of other Debian releases, from 20.11 on (apt, patchelf, network; an hour)
	@$(SETUP) --extra test
	"$(BIN)/python" tools/slurm_versions.py test $(SLURM_SUITES)

lint: ## ruff, the import rules, the type checker
	@$(SETUP) --extra test
	"$(BIN)/ruff" check .
	"$(BIN)/lint-imports"
	"$(BIN)/mypy"

bench: ## CPU seconds of the commands that must start fast
	@$(SETUP) --extra trl
	"$(BIN)/python" bench/startup.py
	"$(BIN)/python" bench/listing.py
	"$(BIN)/python" bench/store.py

bench-slurm: ## command to accepted job, beside sbatch and NeMo-Run (needs `make test-system`)
	@$(SETUP) --extra trl
	"$(BIN)/python" bench/submission.py

lock: ## pin anew after a change of dependencies in pyproject.toml
	@$(SETUP) --extra test
	"$(BIN)/python" tools/lock.py

schemas: ## what NVIDIA's packages accept, read from them anew (network; 1.5 GB below .schemas/)
	@$(SETUP) --extra test
	"$(BIN)/python" tools/schemas/build.py

schemas-check: ## megatron-bridge 0.3.1 anew, held against the checked-in file (network; 1.6 GB)
	@$(SETUP) --extra test
	"$(BIN)/python" tools/schemas/build.py --check megatron_bridge-0.3.1

clean: ## remove the environment, caches and builds; runs and artifacts stay
	rm -rf "$(VENV)" "$(VENV).lock" .schemas build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
