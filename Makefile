# The project's commands. CI calls these and nothing else; `check` never edits.
PYTHON ?= python3
VENV := .venv
# Where a command should run on another interpreter than the one in .venv: make gpu PY=python3
PY ?= $(VENV)/bin/python

# Only .venv's own interpreter wants it made.
INSTALLED := $(if $(filter $(VENV)/bin/python,$(PY)),$(VENV)/.installed)

# Processes that share the tests, a file at a time: make test JOBS=8
JOBS ?= 2
PYTEST = OMP_NUM_THREADS=1 $(PY) -m pytest -n $(JOBS) --dist loadfile

# Where results of `make gpu` go.
OUT ?= build/gpu
ADAPTER_TESTS := tests/test_imports.py tests/test_peft_model.py tests/test_task_models.py tests/test_checkpoint.py \
	tests/test_auto.py tests/test_injected.py tests/test_hub.py tests/test_card.py tests/test_status.py \
	tests/test_optim.py tests/tuner tests/vblora \
	tests/vera tests/documented tests/integrations tests/exchange
# These take long, and know nothing of peft.
LONG_TESTS := tests/vblora/test_selection.py tests/vera/test_shared_projection.py tests/exchange/test_merge.py \
	tests/integrations/test_compile.py tests/integrations/test_quantised_processes.py

.PHONY: help demo test test-without-peft check fix bench report kernels-report forecast host peft-suite package gpu clean

help:
	@echo "make demo    fine-tune a small model with VB-LoRA, save, reload and merge it; writes build/demo/"
	@echo "make test    the whole test suite"
	@echo "make check   ruff, mypy, and whether the README's tables are the measured ones; edits nothing"
	@echo "make bench   measure beside PEFT and the base alone; without a GPU what a CPU can say (BENCH=options)"
	@echo "make report  put what bench/results/ holds into README.md and CONTRIBUTING.md"
	@echo "make kernels-report   compile the kernels for four chips and print what they use; needs no GPU"
	@echo "make forecast   forecast the time of every kernel on a Hopper GPU, without one (FORECAST=options)"
	@echo "make host    time of Python per adapted linear, the driver left out, beside PEFT's"
	@echo "make peft-suite   PEFT's own tests of VB-LoRA and VeRA, patched too, or ours (OBJECTS=ours); fetches them"
	@echo "make package   build wheel and sdist, and try each in a fresh virtual environment"
	@echo "make gpu     what only a GPU can show: the suite natively, compute-sanitizer, times (PY=python3 OUT=folder)"
	@echo "make fix     let ruff format and repair what it can"
	@echo "make clean   remove .venv and build/"

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

demo: $(VENV)/.installed
	$(PY) -m vblora_triton finetune --output build/demo

# The second run has peft, and everything; the first shows that nothing but the comparisons with peft needs it.
# Benchmarks run once there, as tests; `pytest --benchmark-only tests/bench/test_benchmark.py` times them.
test: test-without-peft
	$(PYTEST) --benchmark-disable

test-without-peft: $(VENV)/.installed
	$(PYTEST) -p tests.without_peft $(ADAPTER_TESTS) $(LONG_TESTS:%=--ignore=%)

check: $(VENV)/.installed
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(PY) -m bench.report --check

fix: $(VENV)/.installed
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

# `make bench BENCH="block --json bench/results/block.json"`; `python -m bench --help` has the options.
# Threads that spin while they wait would take the time of whoever else uses the machine, and give it back as noise.
bench: $(INSTALLED)
	OMP_WAIT_POLICY=$${OMP_WAIT_POLICY:-passive} $(PY) -m bench $(BENCH)

report: $(INSTALLED)
	$(PY) -m bench.report

kernels-report: $(VENV)/.installed
	$(PY) -m tools.kernels_report

# Never a measurement: tools/forecast/README.md. `python -m tools.forecast --help` has the options.
FORECAST ?= --json bench/results/forecast.json
forecast: $(VENV)/.installed
	$(PY) -m tools.forecast $(FORECAST)

host: $(VENV)/.installed
	$(PY) -m tools.forecast.host --json bench/results/host.json

# Goes on where an earlier run stopped: `make clean`, or --fresh, forgets it.
OBJECTS ?= patched
peft-suite: $(VENV)/.installed
	$(PY) -m tools.peft_suite --out build/peft-suite --objects $(OBJECTS)

package: $(VENV)/.installed
	$(PY) -m tools.package

# On another interpreter than .venv's nothing is installed: make gpu PY=python3 PARTS="first ops"
gpu:
	PYTHONPATH=. $(PY) -m tools.gpu --out $(OUT) $(if $(PARTS),--parts $(PARTS))

clean:
	rm -rf $(VENV) build
