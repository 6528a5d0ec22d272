# Everything a user or developer runs. `make demo` and `make test` work on a fresh machine
# with Python 3.10+, g++ and make; nothing else has to be installed first.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
.DEFAULT_GOAL := help
.PHONY: help build demo test check bench bench-methods bench-plan wheel clean

help:
	@echo "make demo   build, fetch the demo model, quantize it, compare, talk"
	@echo "make test   build and run every test"
	@echo "make check  ruff, mypy, clang-format, import directions, file lengths"
	@echo "make bench  measure against llama.cpp and OpenVINO in the same run"
	@echo "make bench-methods  compare every method of quantization, beside other toolkits"
	@echo "make bench-plan     predictions of lowbit plan against measurement, into docs/planning.md"
	@echo "make wheel  build a wheel into dist/"

$(VENV)/.base:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q "scikit-build-core>=0.10" "nanobind>=2.4" ninja "cmake>=3.18" numpy
	@touch $@

# The editable install keeps its build folder, so only what changed is compiled again.
build: $(VENV)/.base
	CMAKE_BUILD_PARALLEL_LEVEL=$${JOBS:-$$(nproc)} $(BIN)/python -m pip install -q --no-build-isolation -e .

# torch first and pinned: its plain wheel would bring CUDA along.
$(VENV)/.test: $(VENV)/.base pyproject.toml
	$(BIN)/python -m pip install -q torch==2.13.0
	$(BIN)/python -m pip install -q pytest hypothesis ml_dtypes gguf pychop scipy transformers
	$(BIN)/python -m pip install -q --no-deps compressed-tensors loguru bitsandbytes
	$(BIN)/python -m pip install -q uvicorn uvloop httptools msgspec prometheus_client llguidance \
	  httpx openai schemathesis playwright lm_eval codecarbon accelerate triton
	@touch $@

$(VENV)/.check: $(VENV)/.base
	$(BIN)/python -m pip install -q ruff mypy clang-format
	@touch $@

$(VENV)/.plot: $(VENV)/.base
	$(BIN)/python -m pip install -q "matplotlib>=3.8"
	@touch $@

demo: build
	$(BIN)/python -m lowbit.cli demo

test: build $(VENV)/.test
	$(BIN)/python -m pytest

check: build $(VENV)/.check
	$(BIN)/ruff check src tests bench
	$(BIN)/ruff format --check src tests bench
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files 'native/*.cc' 'native/*.h')
	$(BIN)/python -m pytest tests/test_house.py

bench: build $(VENV)/.test $(VENV)/.plot
	$(BIN)/python bench/run.py

bench-methods: build $(VENV)/.test $(VENV)/.plot
	$(BIN)/python bench/methods.py $(ARGS)

bench-plan: build $(VENV)/.test
	$(BIN)/python bench/plan.py $(ARGS)

wheel: $(VENV)/.base
	$(BIN)/python -m pip wheel -q --no-deps -w dist .

clean:
	rm -rf build dist src/lowbit/*.so
