# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
PYTHON ?= python3
VENV := .venv
# Installing again is needed only when what is installed has changed.
INSTALLED := $(VENV)/.installed

.PHONY: venv quickstart test slow lint

venv: $(INSTALLED)

$(INSTALLED): setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet -c constraints.txt -e '.[training,dev]'
	touch $@

quickstart: $(INSTALLED)
	$(VENV)/bin/python training_scripts/quickstart.py

lint: $(INSTALLED)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

test: $(INSTALLED)
	$(VENV)/bin/python -m pytest

slow: $(INSTALLED)
	$(VENV)/bin/python -m pytest -m "slow and not gpu"
