# make demo: consolidate the bundled variants, look at the artifact, generate from each variant
# make test: lint, types, tests
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := demo

.PHONY: install demo test lint clean

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: install
	rm -rf $(DEMO)/artifact
	$(BIN)/moecc consolidate recipes/quickstart.yaml --out $(DEMO)/artifact
	$(BIN)/moecc inspect $(DEMO)/artifact
	$(BIN)/moecc generate $(DEMO)/artifact --variant python --prompt 'def f(x):' --max-new-tokens 12
	$(BIN)/python examples/side_by_side.py $(DEMO)/artifact
	@printf '\nserve it: $(BIN)/moecc serve $(DEMO)/artifact --cpu\n'

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

test: lint
	$(BIN)/pytest -q -n 2 --dist loadfile

clean:
	rm -rf $(VENV) $(DEMO) build *.egg-info
