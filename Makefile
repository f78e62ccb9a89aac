# make demo    a real chat model answers in this terminal
# make test    the test suite
# make check   style, types, import rules, file sizes
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
MODEL := .models/SmolLM2-135M-Instruct.Q4_1.gguf
GEMMA := .models/gemma-3-270m-Q4_K_M.gguf
PROMPT ?= Why is the sky blue? Answer in two sentences.
export PROMPT
INSTALLED := $(VENV)/.installed

.PHONY: demo test check model install clean

demo: $(INSTALLED) $(MODEL)
	$(BIN)/halimede generate $(MODEL) "$$PROMPT" --max-tokens 128 --temperature 0

test: $(INSTALLED) $(MODEL) $(GEMMA)
	$(BIN)/pytest -n 2

check: $(INSTALLED)
	scripts/check

model: $(INSTALLED) $(MODEL) $(GEMMA)

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt scripts/install
	PYTHON="$(PYTHON)" scripts/install $(VENV)
	touch $@

$(MODEL) $(GEMMA): | $(INSTALLED)
	scripts/fetch_model $(BIN)/python $@

clean:
	rm -rf $(VENV) .models build dist *.egg-info src/*.egg-info
