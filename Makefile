# The targets need make and Python 3.11 or newer with venv and pip. They need neither a GPU nor system packages.
#   make demo        install, then run the whole pipeline on a corpus that it synthesizes
#   make test        install, then run the default test suite on all cores
#   make lint        check formatting, lint rules, types, import contracts and the Dockerfile
#   make check       run lint and test, which a change must pass
#   make format      fix formatting and the lint errors that ruff can fix
#   make slow        run the long tests
#   make test-stack  install a second environment (torch 2.9.1, fairseq2; 8 GB), then run the tests that need it
#   make package     build the wheel and the sdist, and check their metadata
#   make docs        regenerate docs/settings.md
#   make site        build the documentation site into site/
#   make clean       remove caches and build output; make distclean also removes both environments
PYTHON ?= python3
VENV ?= .venv
STACK ?= .venv-stack
# Versions other than the pinned ones, for example: make test PYTHON=python3.10 CONSTRAINTS= TORCH=torch==2.6.0
CONSTRAINTS ?= constraints.txt
TORCH ?= torch
PIN = $(if $(CONSTRAINTS),-c $(CONSTRAINTS))
# Hydra overrides for `make demo`, for example: make demo ARGS='seed=1'
ARGS ?=
# Arguments for pytest, for example: make test PYTEST_ARGS='-k audio -x'
PYTEST_ARGS ?=
# Number of pytest processes. Each test file runs in one process, so that its fixtures are created once.
JOBS ?= auto
PARALLEL = -n $(JOBS) --dist loadfile

export PIP_DISABLE_PIP_VERSION_CHECK = 1

# An environment is updated in place when the pins or the declared dependencies have changed. bin/pip is the
# last file that venv writes, so an environment is created again if its creation was interrupted.
READY := $(VENV)/.jahubert-ready
STACK_READY := $(STACK)/.jahubert-ready

.PHONY: help install demo test lint check format slow test-stack package docs site clean distclean
help:
	@sed -n 's/^#   //p' Makefile

# $(call need,GB,what): stop before a long download that the disk cannot hold.
define need
	@free=$$(df -Pk . | awk 'NR == 2 { print int($$4 / 1048576) }'); \
	if [ "$$free" -lt $(1) ]; then \
		echo "Not enough disk space for $(2): $$free GB free in $$(pwd), $(1) GB needed. Free some space, or build in another folder." >&2; \
		exit 1; \
	fi
endef

$(VENV)/bin/pip:
	$(call need,5,the environment $(VENV))
	$(PYTHON) -m venv $(VENV)

$(READY): pyproject.toml $(CONSTRAINTS) | $(VENV)/bin/pip
	@echo "Installing into $(VENV) (about 2.5 GB with a CPU build of torch)"
	$(VENV)/bin/python -m pip install --quiet $(PIN) '$(TORCH)'
	$(VENV)/bin/python -m pip install --quiet $(PIN) '$(TORCH)' -e '.[train,onnx,dev]'
	@touch $@

$(STACK)/bin/pip:
	$(call need,14,the full stack in $(STACK))
	$(PYTHON) -m venv $(STACK)

$(STACK_READY): pyproject.toml constraints-stack.txt | $(STACK)/bin/pip
	@echo "Installing into $(STACK) (about 8 GB; several minutes)"
	$(STACK)/bin/python -m pip install --quiet -c constraints-stack.txt torch torchaudio
	$(STACK)/bin/python -m pip install --quiet -c constraints-stack.txt -e '.[train,gpu,fairseq2]' pytest transformers
	@touch $@

install: $(READY)

demo: $(READY)
	$(VENV)/bin/python -m jahubert.run recipe=demo stage=all processes=2 $(ARGS)

test: $(READY)
	$(VENV)/bin/python -m pytest $(PARALLEL) $(PYTEST_ARGS)

lint: $(READY)
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports --no-logo
	$(VENV)/bin/hadolint Dockerfile

check: lint test

format: $(READY)
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

slow: $(READY)
	$(VENV)/bin/python -m pytest -m slow $(PYTEST_ARGS)

package: $(READY)
	rm -rf dist
	$(VENV)/bin/python -m build --installer pip .
	$(VENV)/bin/python -m twine check --strict dist/*
	$(VENV)/bin/pyroma --min 8 .  # 8: no e-mail address yet

docs: $(READY)
	$(VENV)/bin/python tools/settings_reference.py

$(VENV)/.docs-ready: $(READY)
	$(VENV)/bin/python -m pip install --quiet $(PIN) -e '.[docs]'
	@touch $@

site: docs $(VENV)/.docs-ready
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/python -m mkdocs build --quiet

# If CONDA_PREFIX is set, fairseq2 does not use the system's search path for libsndfile.
test-stack: $(STACK_READY)
	env -u CONDA_PREFIX $(STACK)/bin/python -m pytest -m stack $(PYTEST_ARGS)

clean:
	rm -rf build dist site *.egg-info .pytest_cache .ruff_cache .mypy_cache .import_linter_cache
	find jahubert recipes tests tools -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV) $(STACK)
