# make demo    a real chat model answers in this terminal
# make test    the test suite
# make check   style, types, import rules, file sizes
# make gate    compile every kernel for every target, with both versions of Triton; `make test` does a part
# make baseline  store what the machine code of changed kernels is now (docs/kernels.md)
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
MODEL := .models/SmolLM2-135M-Instruct.Q4_1.gguf
GEMMA := .models/gemma-3-270m-Q4_K_M.gguf
PROMPT ?= Why is the sky blue? Answer in two sentences.
export PROMPT
INSTALLED := $(VENV)/.installed
# The oldest Triton that is supported, beside the environment: PYTHONPATH puts it before the installed one.
OLD_TRITON_VERSION := $(shell tail -n 1 triton-versions.txt)
OLD_TRITON := $(VENV)/triton-$(basename $(OLD_TRITON_VERSION))
# Triton has wheels for Linux only.
ifeq ($(shell uname -s),Linux)
OLD_TRITON_INSTALLED := $(OLD_TRITON)/.installed
endif

.PHONY: demo test gate baseline check model install clean

demo: $(INSTALLED) $(MODEL)
	$(BIN)/halimede generate $(MODEL) "$$PROMPT" --max-tokens 128 --temperature 0

test: $(INSTALLED) $(MODEL) $(GEMMA) $(OLD_TRITON_INSTALLED)
	$(BIN)/pytest -n 2
	$(if $(OLD_TRITON_INSTALLED),PYTHONPATH=$(CURDIR)/$(OLD_TRITON) $(BIN)/pytest -n 2 -k "not a_broken_kernel" tests/kernels/test_gpu_*.py)

gate: $(INSTALLED) $(OLD_TRITON_INSTALLED)
	$(BIN)/python scripts/kernel_baseline.py --check
	PYTHONPATH=$(CURDIR)/$(OLD_TRITON) $(BIN)/python scripts/kernel_baseline.py --check

baseline: $(INSTALLED) $(OLD_TRITON_INSTALLED)
	$(BIN)/python scripts/kernel_baseline.py
	PYTHONPATH=$(CURDIR)/$(OLD_TRITON) $(BIN)/python scripts/kernel_baseline.py
	$(BIN)/python scripts/kernel_table.py

check: $(INSTALLED)
	scripts/check

model: $(INSTALLED) $(MODEL) $(GEMMA)

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt triton-versions.txt scripts/install
	PYTHON="$(PYTHON)" scripts/install $(VENV)
	touch $@

$(OLD_TRITON)/.installed: triton-versions.txt | $(INSTALLED)
	rm -rf $(OLD_TRITON)
	$(BIN)/python -m pip --disable-pip-version-check install --no-deps --target $(OLD_TRITON) \
		triton==$(OLD_TRITON_VERSION)
	touch $@

$(MODEL) $(GEMMA): | $(INSTALLED)
	scripts/fetch_model $(BIN)/python $@

clean:
	rm -rf $(VENV) .models build dist *.egg-info src/*.egg-info
