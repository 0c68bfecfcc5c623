# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
PYTHON ?= python3
VENV := .venv
# Installing again is needed only when what is installed has changed.
INSTALLED := $(VENV)/.installed

.PHONY: venv quickstart test slow services lint docs experiments experiments-smoke

venv: $(INSTALLED)

$(INSTALLED): setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet -c constraints.txt -e '.[training,demo,serve,docs,dev]'
	touch $@

quickstart: $(INSTALLED)
	$(VENV)/bin/python training_scripts/quickstart.py

lint: $(INSTALLED)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

# Two processes of one thread each, a file at a time.
test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n 2 --dist loadfile

# The site, in site/.
docs: $(INSTALLED)
	$(VENV)/bin/mkdocs build --strict

# Demo in a browser, serving, training on several processes.
services: $(INSTALLED)
	$(VENV)/bin/python -m pytest -m services

slow: $(INSTALLED)
	$(VENV)/bin/python -m pytest -m "slow and not gpu"

# Each can be interrupted and goes on; tables and plots are in runs/experiments/<name>/.
EXPERIMENTS := k_ablation partitions pairs_and_regression small_students stages routing_errors generalisation
experiments: $(INSTALLED)
	$(VENV)/bin/python benchmarks/toy.py --workers 2
	for name in $(EXPERIMENTS); do $(VENV)/bin/python benchmarks/$$name.py --workers 2 || exit 1; done

# Two side by side, each in a folder of its own.
experiments-smoke: $(INSTALLED)
	printf '%s\n' $(EXPERIMENTS) toy | xargs -P 2 -I{} \
		$(VENV)/bin/python benchmarks/{}.py --smoke --seeds 0 --output_dir runs/experiments_smoke/{}
