# make demo   align a small model on this machine       make test   run the tests
# make lint   format, rules, types                       make dist   build wheel and sdist
# make test-floor   tests with the oldest triton and transformers that are supported (requirements/floor.txt)
# make test-kills   kill runs at each of their file operations, resume, compare to the bit (about 20 minutes)
# make bench  ratios of time and memory against the peers (about 7 minutes)
# make gpu-kit    gather what a card's machine without a network lacks (PYTHON_VERSION=3.12); then there: bash gpu/prove.sh
# make test-gpu, make bench-gpu  the tests and the stages of benchmarks.gpu, on this machine's card; without one "Error 3"
# ARGS="..." is passed on: make demo ARGS="--pairs all --minutes 60", make test ARGS="-k resume"

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PYTHON_VERSION ?= 3.12
ARGS ?=

.PHONY: demo test test-floor test-kills bench gpu-kit test-gpu bench-gpu lint format dist clean

demo: $(VENV)/.run
	$(BIN)/fastdpo demo --overwrite_output_dir $(ARGS)

test: $(VENV)/.dev
	$(BIN)/python -m pytest $(ARGS)

FLOOR := $(abspath $(VENV))/floor
# Every kernel, and a cut through the trainer; CONTRIBUTING.md names the wider selection
FLOOR_TESTS ?= tests/device_kernels tests/formulas/test_rng.py tests/ops/test_selective_logprob.py \
  $(wildcard tests/ops/test_linear_logprob_fused*.py tests/ops/test_preference_loss*.py) \
  $(patsubst %,tests/training/rows/test_%.py,prefix_sharing segment_attention cut) \
  $(patsubst %,tests/training/%.py,scoring/test_scoring models/test_quantized test_trl_trainer) tests/commands/test_cli.py
test-floor: $(VENV)/.floor
	FASTDPO_TEST_FLOOR=$(FLOOR) PYTHONPATH=$(FLOOR) $(BIN)/python -m pytest $(FLOOR_TESTS) $(ARGS)

test-kills: $(VENV)/.dev
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false $(BIN)/python tests/kills.py $(ARGS)

bench: $(VENV)/.bench
	$(BIN)/python -m benchmarks $(ARGS)

gpu-kit:
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python gpu/kit.py --python $(PYTHON_VERSION) $(ARGS)

test-gpu: $(VENV)/.dev
	FASTDPO_TEST_DEVICE=cuda $(BIN)/python -m pytest -m gpu $(ARGS)

bench-gpu: $(VENV)/.bench-gpu
	$(BIN)/python -m benchmarks.gpu $(ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

dist: $(VENV)/.dev
	$(BIN)/python -m build

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(VENV)/.run: requirements/run.txt requirements/demo-model.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "fastdpo needs Python 3.10 or newer; set PYTHON=...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --requirement requirements/run.txt
	$(BIN)/python -m pip install --quiet --no-deps --requirement requirements/demo-model.txt
	$(BIN)/python -m pip install --quiet --no-deps --editable .
	touch $@

$(VENV)/.dev: $(VENV)/.run requirements/dev.txt
	$(BIN)/python -m pip install --quiet --requirement requirements/dev.txt
	touch $@

$(VENV)/.floor: $(VENV)/.dev requirements/floor.txt
	rm -rf $(FLOOR)
	$(BIN)/python -m pip install --quiet --no-deps --target $(FLOOR) --requirement requirements/floor.txt
	touch $@

$(VENV)/.bench: $(VENV)/.dev requirements/bench.txt
	$(BIN)/python -m pip install --quiet --no-deps --requirement requirements/bench.txt
	touch $@

$(VENV)/.bench-gpu: $(VENV)/.bench requirements/gpu-kit.txt
	$(BIN)/python -m pip install --quiet --no-deps --requirement requirements/gpu-kit.txt
	touch $@
