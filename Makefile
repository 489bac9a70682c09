# Everything a fresh machine needs: Python 3.11 with venv and pip, and make. No GPU, no system packages.
#   make demo        install, then run the whole pipeline on a corpus it makes itself
#   make test        install, then the default test suite
#   make check       formatting, lint, types, import contracts, tests: what a change must pass
#   make slow        the long tests
#   make test-stack  a second environment (torch 2.9.1, fairseq2, faiss-gpu; 8 GB) and the tests that need it
#   make clean       remove caches and build output; make distclean also removes both environments
PYTHON ?= python3
VENV ?= .venv
STACK ?= .venv-stack
# Hydra overrides for `make demo`, for example: make demo ARGS='seed=1'
ARGS ?=
# Arguments for pytest, for example: make test PYTEST_ARGS='-k audio -x'
PYTEST_ARGS ?=

export PIP_DISABLE_PIP_VERSION_CHECK = 1

# An environment is made again, in place, when what is pinned or declared has changed. bin/pip is the last
# thing that venv writes, so an interrupted one is made again too.
READY := $(VENV)/.jahubert-ready
STACK_READY := $(STACK)/.jahubert-ready

.PHONY: help install demo test check format slow test-stack clean distclean
help:
	@sed -n 's/^#   //p' Makefile

# $(call need,GB,what): stop before a long download when the disk cannot hold its end.
define need
	@free=$$(df -Pk . | awk 'NR == 2 { print int($$4 / 1048576) }'); \
	if [ "$$free" -lt $(1) ]; then \
		echo "Not enough disk space for $(2): $$free GB free in $$(pwd), $(1) GB needed. Free some, or build in another place." >&2; \
		exit 1; \
	fi
endef

$(VENV)/bin/pip:
	$(call need,5,the environment $(VENV))
	$(PYTHON) -m venv $(VENV)

$(READY): pyproject.toml constraints.txt | $(VENV)/bin/pip
	@echo "Installing into $(VENV) (about 2.5 GB with a CPU build of torch)"
	$(VENV)/bin/python -m pip install --quiet -c constraints.txt torch
	$(VENV)/bin/python -m pip install --quiet -c constraints.txt -e '.[train,onnx,dev]'
	@touch $@

$(STACK)/bin/pip:
	$(call need,14,the full stack in $(STACK))
	$(PYTHON) -m venv $(STACK)

$(STACK_READY): pyproject.toml constraints-stack.txt | $(STACK)/bin/pip
	@echo "Installing into $(STACK) (about 8 GB; several minutes)"
	$(STACK)/bin/python -m pip install --quiet -c constraints-stack.txt torch torchaudio
	$(STACK)/bin/python -m pip install --quiet -c constraints-stack.txt -e '.[train,gpu,fairseq2,lm]' pytest transformers
	@touch $@

install: $(READY)

demo: $(READY)
	$(VENV)/bin/python -m jahubert.run recipe=demo stage=all processes=2 $(ARGS)

test: $(READY)
	$(VENV)/bin/python -m pytest $(PYTEST_ARGS)

check: $(READY)
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports --no-logo
	$(VENV)/bin/python -m pytest -q $(PYTEST_ARGS)

format: $(READY)
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

slow: $(READY)
	$(VENV)/bin/python -m pytest -m slow $(PYTEST_ARGS)

# CONDA_PREFIX would make fairseq2 look for libsndfile inside that environment instead of this one.
test-stack: $(STACK_READY)
	env -u CONDA_PREFIX $(STACK)/bin/python -m pytest -m stack $(PYTEST_ARGS)

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .import_linter_cache
	find jahubert recipes tests tools -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV) $(STACK)
