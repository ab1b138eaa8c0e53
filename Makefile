# Two commands do everything on a machine with Python 3.9 or later: make demo, make test. Nothing is installed outside this folder.
# Environments stand under .venv/, each with a stamp per thing installed in it, so that only what changed is done again.

ENV := .venv/dev
# -I: what is imported is what is installed, never the checkout's folder of the same name.
PY := $(ENV)/bin/python -I
PIP := $(PY) -m pip --disable-pip-version-check -qq
PYTEST := $(PY) -m pytest
# The folder too: its time changes when a module comes or goes.
SOURCES := setup.py pyproject.toml scx_enroll $(wildcard scx_enroll/*.py)
# An environment does not survive that its Python goes or that the checkout moves; looked at before make looks at the stamps.
$(shell [ ! -e $(ENV) ] || { $(ENV)/bin/python -c '' && grep -qF '$(CURDIR)/$(ENV)/' $(ENV)/bin/pip; } 2>/dev/null || rm -rf $(ENV))

.DEFAULT_GOAL := help
.NOTPARALLEL:
.DELETE_ON_ERROR:
.PHONY: help demo test fast slow lint matrix packages bench ticks load fleet model clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-8s %s\n", $$1, $$2}' Makefile

demo: $(ENV)/.package ## show what the program is for, with a CA and an agent of its own, in a minute; AUTH=kerberos
	@$(PY) -m tests.demo $(AUTH)

test: fast lint matrix slow ## install what is needed and run everything

fast: $(ENV)/.test ## the tests that are done in a few minutes
	$(PYTEST) -q -n auto --dist worksteal -m "not slow"

# Most of it waits for processes, so more workers than cores; one of them is asleep for a while, and others take over what it was to do.
slow: $(ENV)/.test $(ENV)/.packages
	$(PYTEST) -q -n 6 --dist worksteal -m slow

lint: $(ENV)/.lint ## ruff and mypy --strict
	$(ENV)/bin/ruff check --quiet .
	$(PY) -m mypy

matrix: $(ENV)/.test ## the fast tests on the oldest and the newest Python and libraries
	$(PY) tests/matrix.py

packages: $(ENV)/.packaging ## build the deb and the rpm into dist/
	$(PY) packaging/build.py

bench: $(ENV)/.package ## what a run costs, against a bare Python, certbot, certsrv, openssl and curl; writes docs/bench.md
	$(PY) -m tests.bench

ticks: $(ENV)/.package $(ENV)/.packages ## what the installed timer costs a day beside certbot's, in booted Debian machines; as root
	$(PY) -m tests.bench.ticks

load: $(ENV)/.package ## a few hundred hosts at one CA at once; HOSTS=300
	$(PY) -m tests.load $(if $(HOSTS),--hosts $(HOSTS))

fleet: $(ENV)/.package ## simulate 100,000 hosts in every scenario, for half an hour; writes docs/fleet.md and its picture
	$(PY) -m tests.fleet --write

model: $(ENV)/.test ## let everybody who works on a host act in random order, thousands of times; N=5000, REAL=50 with real processes
	$(PY) -m tests.model --sequences $(or $(N),5000)
	$(PY) -m tests.model --kind clones --steps 8 --sequences $$(( $(or $(N),5000) / 20 ))
	$(if $(REAL),$(PY) -m tests.model --kind real --steps 10 --sequences $(REAL))

clean: ## remove the environments, the caches and what building left
	rm -rf --one-file-system .venv .cache build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find scx_enroll tests -name __pycache__ -prune -exec rm -rf {} +

$(ENV)/.made: tests/requirements-build.txt
	@set -e; found=; \
	for python in $(PYTHON) python3 python3.14 python3.13 python3.12 python3.11 python3.10 python3.9; do \
	  if "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 9))' 2>/dev/null; then found=$$python; break; fi; \
	done; \
	if [ -z "$$found" ]; then echo >&2 'make: no Python 3.9 or later found: apt-get install python3 python3-venv'; exit 1; fi; \
	if ! "$$found" -c 'import ensurepip, venv' 2>/dev/null; then \
	  echo >&2 "make: $$found can't make environments: apt-get install python3-venv"; exit 1; fi; \
	rm -rf $(ENV); "$$found" -m venv $(ENV)
	@# tests is found from any folder, after everything that is installed
	@$(PY) -c 'import os, sysconfig; open(os.path.join(sysconfig.get_path("purelib"), "checkout.pth"), "w").write(os.getcwd() + "\n")'
	$(PIP) install -r tests/requirements-build.txt
	@touch $@

$(ENV)/.package: $(ENV)/.made $(SOURCES)
	@rm -rf build/lib build/bdist* *.egg-info
	@$(PIP) uninstall --yes scx-enroll
	$(PIP) install --no-build-isolation .
	@rm -rf build/lib build/bdist* *.egg-info
	@touch $@

$(ENV)/.test: tests/requirements.txt | $(ENV)/.package
	$(PIP) install -r tests/requirements.txt
	@touch $@

$(ENV)/.packaging: packaging/requirements.txt | $(ENV)/.made
	$(PIP) install -r packaging/requirements.txt
	@touch $@

$(ENV)/.packages: tests/requirements-packages.txt | $(ENV)/.packaging
	$(PIP) install -r tests/requirements-packages.txt
	@touch $@

$(ENV)/.lint: tests/requirements-lint.txt | $(ENV)/.test
	$(PIP) install -r tests/requirements-lint.txt
	@touch $@
