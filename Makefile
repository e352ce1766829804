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

.PHONY: test test-all fuzz gate demo gpu clean

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

# Every kernel, with every configuration that its launcher can choose, compiled for sm_75, sm_80, sm_90 and sm_100 and
# held to their limits of registers and shared memory. Needs no GPU; ten minutes on two cores, then cached.
# `make test` does the same for DETR's own shapes on sm_90.
gate: $(READY)
	$(PY) -m benchmarks.compile_gate

demo: $(READY)
	$(PY) -m detr_fast demo

# The GPU tests, then every benchmark suite, on whatever GPU is there: at most ten minutes, two with QUICK=1. Goes on
# after a failure; the exit status comes at the end. Results: benchmarks/results/<gpu>/. TUNE=1 adds five minutes in which
# other tile sizes are timed; nothing is changed by it. SAME=1 adds six comparisons of 300 training steps with
# the reference path's, COCO_PATH=<folder> two more on COCO's images, a minute each at most.
# The tests are interrupted at their time limit, not ended: pytest then still says what failed. With QUICK=1 the limit is
# no failure, since compiling the kernels for the first time takes longer; the first failing test is the last.
gpu: QUICKLY := $(filter-out 0,$(QUICK))
gpu: TUNING := $(filter-out 0,$(TUNE))
gpu: SAMENESS := $(filter-out 0,$(SAME))
gpu: $(READY)
	@$(PY) -c "import sys, torch; sys.exit(not torch.cuda.is_available())" || \
	{ echo "make gpu: PyTorch finds no CUDA GPU here; nothing was run (make test needs none)"; exit 1; }
	@timeout -s INT -k 15 $(if $(QUICKLY),40,220) $(PY) -m pytest -m gpu $(if $(QUICKLY),-x); tests=$$?; \
	if [ $$tests = 124 ]; then echo "make gpu: the GPU tests were stopped at their time limit"; \
	$(if $(QUICKLY),tests=0;) fi; \
	$(PY) -m benchmarks all $(if $(QUICKLY),--quick --budget 75,--budget 310); suites=$$?; \
	tuned=0; \
	$(if $(TUNING),timeout 330 $(PY) -m benchmarks tune $(if $(QUICKLY),--quick) --budget 270; tuned=$$?;) \
	same=0; \
	$(if $(SAMENESS),for way in "--dtype float64" "--resync" "--resync --bf16" "--dropout 0.1" \
	  "--tolerance 1" "--control --tolerance 1" \
	  $(if $(COCO_PATH),"--resync --image-size 320 400 --coco_path $(COCO_PATH)" \
	    "--resync --bf16 --image-size 320 400 --coco_path $(COCO_PATH)"); do \
	  timeout 60 $(PY) -m benchmarks.studies.same_training --save $$way || same=$$?; \
	done;) \
	echo "make gpu: GPU tests exit $$tests, benchmarks exit $$suites$(if $(TUNING),; tuning exit $$tuned)$(if $(SAMENESS),; the same training exit $$same)"; \
	exit $$(( tests != 0 || suites != 0 || tuned != 0 || same != 0 ))

# Style, format, and the types of the public API.
.PHONY: lint
lint: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

clean:
	rm -rf $(VENV) build dist *.egg-info
