# make demo: the whole chain on synthetic data.  make test: the tests.  make lint: ruff, imports.
# make docs: docs/config.md from the config's schema.
VENV := .venv
PYTHON := $(VENV)/bin/python
# The GPU set where an NVIDIA GPU answers, the CPU set elsewhere.
REQUIREMENTS := $(shell nvidia-smi -L >/dev/null 2>&1 && echo requirements.txt || echo requirements-cpu.txt)
STAMP := $(VENV)/.installed-$(REQUIREMENTS)

.PHONY: demo test lint docs setup clean
demo: setup
	$(PYTHON) -m mm_jax demo --overwrite

test: setup
	$(PYTHON) -m pytest -n 2 --dist loadfile

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/lint-imports

docs: setup
	$(PYTHON) tools/config_reference.py --write

setup: $(STAMP)

$(STAMP): $(REQUIREMENTS) pyproject.toml
	python3 -m venv $(VENV)
	$(PYTHON) -m pip install --quiet --disable-pip-version-check -r $(REQUIREMENTS)
	touch $@

clean:
	rm -rf $(VENV) demo .pytest_cache .ruff_cache
