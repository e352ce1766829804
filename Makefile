# `make demo` and `make test` install all they need into .venv. To use an environment of your own that already has
# everything: make test PYTHON=python3
SHELL := /bin/bash
VENV := .venv
PYTHON ?=
ifeq ($(PYTHON),)
  PY := $(VENV)/bin/python
  READY := $(VENV)/ready
else
  PY := $(PYTHON)
  READY :=
endif
BASE_PYTHON ?= python3

.PHONY: test test-all fuzz check-wheel gate demo gpu clean

$(VENV)/ready: setup.py pyproject.toml
	@echo "installing into $(VENV); torch is large, this takes minutes the first time"
	$(BASE_PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --quiet --upgrade pip
	$(VENV)/bin/python -m pip install --quiet --quiet -e ".[test]"
	@touch $@

# First everything but the kernels, then the kernels through Triton's interpreter, which must be chosen before Triton is
# imported, so that one process cannot do both. Each half in JOBS processes; `test-all` adds what is marked slow.
JOBS ?= 2
PYTEST = OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 $(PY) -m pytest -n $(JOBS) --dist worksteal
test: CHOSEN := not gpu and not slow
test-all: CHOSEN := not gpu
test test-all: $(READY)
	@$(PYTEST) -m "not interpret and $(CHOSEN)"; rest=$$?; \
	TRITON_INTERPRET=1 $(PYTEST) -m "interpret and $(CHOSEN)"; interpreted=$$?; \
	exit $$(( rest != 0 || interpreted != 0 ))

# All of what `make test` fuzzes a hundredth of, with new examples each time: some minutes. A failure prints how to
# repeat it.
fuzz: $(READY)
	DETR_FAST_FUZZ=full $(PYTEST) -m "not interpret and not gpu" tests/fuzz

# The source distribution and the wheel that is built from it: installed beside nothing of this repository, all modules are
# imported, and the command line detects.
check-wheel: $(READY)
	$(PYTEST) -n 0 tests/test_wheel.py

# Every kernel, with every configuration that its launcher can choose, compiled for sm_75, sm_80, sm_90 and sm_100 and
# held to their limits of registers and shared memory, each where it is used. Needs no GPU; ten minutes on two cores, then cached.
# `make test` does the same for DETR's own shapes on sm_90.
gate: $(READY)
	$(PY) -m benchmarks.compile_gate

demo: $(READY)
	$(PY) -m detr_fast demo

# What only a GPU can tell, thirteen minutes at most: the doctor, cuDNN's convolutions, the GPU tests, the training step, the
# latency of one image, every benchmark suite. Goes on after a failure; every result is printed and saved when it is there, under benchmarks/results/<gpu>/.
# QUICK=1: under three minutes. PART="probe step" runs these alone. What runs only if it is named: PART=compiled, the training
# step with torch.compile; PART=tune, other tile sizes; PART=same, six comparisons of 300 training steps with the reference
# path's; PART=sanitize, every kernel under compute-sanitizer and 100 times over. BUDGET=seconds. `python -m benchmarks.gpu
# --list` shows the parts.
gpu: $(READY)
	@$(PY) -m benchmarks.gpu $(if $(filter-out 0,$(QUICK)),--quick) $(if $(PART),--part $(PART)) $(if $(BUDGET),--budget $(BUDGET))

# Style, format, and the types of the public API.
.PHONY: lint
lint: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

clean:
	rm -rf $(VENV) build dist *.egg-info
