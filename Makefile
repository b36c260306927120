# In a fresh clone run `make demo` or `make test`: the Python packages are installed into .venv on first use.
# PYTHON=/path/to/python chooses the interpreter; the default is the newest of 3.11 to 3.13 that runs.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.DEFAULT_GOAL := help
.PHONY: setup demo test slow slurm faults soak lint format clean help

N ?= 100
PYTHON ?= python3.13 python3.12 python3.11 python3
BIN := .venv/bin
PARALLEL := --numprocesses=auto --maxprocesses=8 --dist=worksteal
STAMP := .venv/.installed

setup: $(STAMP) ## create .venv and install all dependencies

demo: $(STAMP) ## meta-train eight small tasks on eight ranks, then meta-test phi
	$(BIN)/python launch/prepare.py --suite demo --out data/demo
	$(BIN)/torchrun --standalone --nproc_per_node=8 launch/train.py --config configs/demo.yaml
	$(BIN)/python launch/meta_test.py --config configs/demo_meta_test.yaml --phi runs/demo/phi.safetensors

test: $(STAMP) ## run the tests
	$(BIN)/python -m pytest $(PARALLEL)

slow: $(STAMP) ## run the tests too slow for `make test`
	$(BIN)/python -m pytest $(PARALLEL) -m slow

slurm: $(STAMP) ## run the tests of launch/slurm on a SLURM that they start (root; apt-get install slurm-wlm munge)
	$(BIN)/python -m pytest -m slurm tests/slurm

faults: $(STAMP) ## run the fault-injection tests (minutes)
	$(BIN)/python -m pytest $(PARALLEL) -m faults tests/faults

soak: $(STAMP) ## kill ranks and torchrun N times at random (N=100), compare phi with an uninterrupted run's
	$(BIN)/python benchmarks/soak.py --kills $(N)

lint: $(STAMP) ## check style and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(STAMP) ## fix style and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## delete .venv and caches; data/ and runs/ stay
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +

help: ## list the targets
	@sed -nE 's/^([a-z]+):[^#]*## (.*)/make \1\t\2/p' Makefile

# FFCV is installed from source, which needs a C++ compiler, Python's headers and two libraries with headers.
# `need PACKAGE COMMAND`: the Debian package is missing if the command fails.
$(STAMP): pyproject.toml
	@for python in $(PYTHON) ''; do
		"$$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null && break
	done || { echo "No Python 3.11, 3.12 or 3.13 among: $(PYTHON). Name one: make PYTHON=/path/to/python3.13" >&2; exit 1; }

	missing=
	need() { "$${@:2}" >/dev/null 2>&1 || missing+=" $$1"; }
	minor=$$("$$python" -c 'import sys; print("python3.%d" % sys.version_info[1])')
	need g++               command -v $(firstword $(CXX))
	need pkg-config        command -v pkg-config
	need libopencv-dev     pkg-config --exists opencv4
	need libturbojpeg0-dev pkg-config --exists libturbojpeg
	need "$$minor-dev"     "$$python" -c 'import sysconfig; open(sysconfig.get_path("include") + "/Python.h")'
	need "$$minor-venv"    "$$python" -c 'import ensurepip'
	if [ -n "$$missing" ]; then
		install="apt-get install -y --no-install-recommends$$missing"
		sudo=$$([ "$$(id -u)" = 0 ] || echo sudo -n)
		if ! command -v apt-get >/dev/null || ! $$sudo true 2>/dev/null; then
			echo "FFCV cannot be compiled: missing$$missing. Run one of these commands, then make again:"
			echo "  Debian, Ubuntu:  sudo apt-get update && sudo $$install"
			echo "  conda:           conda create -y -n dist_cts -c conda-forge python=3.13 cxx-compiler pkg-config" \
				"'libopencv<5' libjpeg-turbo && conda activate dist_cts"
			exit 1
		fi >&2
		$$sudo apt-get update -q || true # a broken package source is harmless: the next line decides
		$$sudo env DEBIAN_FRONTEND=noninteractive $$install
	fi

	$(BIN)/python -m pip --version >/dev/null 2>&1 || "$$python" -m venv --clear .venv
	echo "Installing into .venv: a few minutes, about 6 GB."
	$(BIN)/python -m pip install --editable '.[dev]'
	$(BIN)/python -c 'import ffcv, torchvision'
	touch $@
