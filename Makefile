# The commands of this project. `make bench` and `make test` set up what they need.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
RUN    := runs/$(shell date -u +%Y%m%d-%H%M%S)

.PHONY: install test check bench gpu clean
install: $(STAMP)
$(STAMP): pyproject.toml requirements.txt constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -r requirements.txt
	touch $@

test: $(STAMP)            ## the whole test suite (no GPU needed)
	$(BIN)/pytest -n 2 --dist loadgroup -q $(ARGS)

check: $(STAMP)           ## style, types and the direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

bench: $(STAMP)           ## measure everything on this machine, print the report, build the page
	$(BIN)/attnbench run --impl all --gpu auto --preset tiny --out $(RUN)
	$(BIN)/attnbench report $(RUN)
	$(BIN)/attnbench site build $(RUN) --out _site
	@echo "The page: $(CURDIR)/_site/index.html"

# Nothing is installed for it: GPU machines are often closed, and come with their own torch.
GPU_PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))
gpu:                      ## check, tune and race our kernels against others on this GPU, in under 10 minutes
	$(GPU_PYTHON) scripts/gpu.py --out $(RUN)-gpu $(ARGS)

clean:
	rm -rf build dist _site runs .mypy_cache .ruff_cache
