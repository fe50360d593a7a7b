# Every target works on a machine with python3 (with venv), pip and make.
PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 3
BIN := $(VENV)/bin
EXAMPLES := src/veneer/base_models/examples

export PIP_DISABLE_PIP_VERSION_CHECK := 1
# One thread per process: more slow down test workers and small models.
test test-all test-fast: export OMP_NUM_THREADS := 1
# Cleared: where it is set, each process of a run compiles every module again.
test test-all test-fast: export PYTHONDONTWRITEBYTECODE :=

.PHONY: help app demo test test-all test-fast lint docs bench clean

help:
	@echo "make app     a page in the browser: train, generate, control, classify"
	@echo "make demo    fine-tune the bundled base model on an octopus and a sneaker (about three minutes on two cores)"
	@echo "make test    the tests of every commit; WORKERS=$(WORKERS) processes, ARGS='-k lora' for pytest"
	@echo "make test-all   also the nightly tests: further models, methods and files, load and crashes"
	@echo "make test-fast  the quick tests, in about a minute and a half"
	@echo "make lint    ruff and mypy"
	@echo "make docs    build the documentation site in build/site"
	@echo "make bench   time veneer against the frozen base model and peft; ARGS='--size tiny'"
	@echo "make clean   remove the virtual environment and files of tools"

app: $(VENV)/.installed
	$(BIN)/veneer app $(ARGS)

demo: $(VENV)/.installed
	$(BIN)/veneer personalize $(ARGS)
	$(BIN)/veneer personalize $(EXAMPLES)/sneaker --concept '<sneaker>' --class-word shoe --method pivotal --prompts \
	  'a photo of a {concept}' 'a {concept}, center, pink background, photo style' \
	  'a {concept}, street background, photo style' 'a small {concept}, top right, green background, photo style' $(ARGS)

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal $(if $(ARGS),,-m "not nightly") $(ARGS)

test-all: $(VENV)/.installed-test
	$(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal $(ARGS)

test-fast: FAST := not nightly and not matrix and not browser and not training and not slow
test-fast: $(VENV)/.installed-test
	$(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal -m "$(FAST)" $(ARGS)

lint: $(VENV)/.installed-test $(VENV)/.installed-lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The variables silence notices of plugins about other versions of MkDocs.
docs: export NO_MKDOCS_2_WARNING := true
docs: export DISABLE_MKDOCS_2_WARNING := true
docs: $(VENV)/.installed-docs
	$(BIN)/mkdocs build --strict $(ARGS)

bench: $(VENV)/.installed-bench
	$(BIN)/veneer bench $(ARGS)

# Editable: only a change of pyproject.toml needs a new installation.
$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[all]'
	touch $@

$(VENV)/.installed-%: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[$*]'
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache
