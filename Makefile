# The project's commands. CI calls these and nothing else; `check` never edits.
PYTHON ?= python3
VENV := .venv
# Where a command should run on another interpreter than the one in .venv: make gpu PY=python3
PY ?= $(VENV)/bin/python

.PHONY: help demo test check fix clean

help:
	@echo "make demo    fine-tune a small model with VB-LoRA, save, reload and merge it; writes build/demo/"
	@echo "make test    the whole test suite"
	@echo "make check   ruff and mypy; edits nothing"
	@echo "make fix     let ruff format and repair what it can"
	@echo "make clean   remove .venv and build/"

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

demo: $(VENV)/.installed
	$(PY) -m vblora_triton finetune --output build/demo

test: $(VENV)/.installed
	$(PY) -m pytest

check: $(VENV)/.installed
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

fix: $(VENV)/.installed
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

clean:
	rm -rf $(VENV) build
