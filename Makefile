# Two commands do all the set-up: `make demo` and `make test`.

PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test check slow docs clean

demo: .venv/installed  ## compare DeepThin with its rivals on real digits, reload the best file, write a report
	rm -rf runs/demo
	env -u DEEPTHIN_DATA $(BIN)/deepthin compare digits --methods dense,deepthin,rank,same-size --ratios 0.02,0.01 \
		--steps 1500 --out runs/demo

test: .venv/installed  ## the whole test suite
	$(BIN)/python -m pytest -n 2

slow: .venv/installed  ## tests that take minutes
	$(BIN)/python -m pytest -n 2 -m slow --override-ini addopts="-ra --strict-markers"

check: .venv/installed  ## formatting, lint, types, import directions
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/pyright
	$(BIN)/python -m pytest -q tests/test_architecture.py

docs: .venv/installed  ## the documentation, into site/
	$(BIN)/python docs/symmetry.py
	$(BIN)/mkdocs build --strict

.venv/installed: pyproject.toml constraints.txt CMakeLists.txt $(wildcard csrc/*)
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[all]'
	touch $@

clean:
	rm -rf .venv runs site dist
