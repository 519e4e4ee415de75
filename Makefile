# make demo: the whole chain on synthetic data.  make test: the tests.  make lint: ruff.
VENV := .venv
PYTHON := $(VENV)/bin/python
# The GPU set where an NVIDIA GPU answers, the CPU set elsewhere.
REQUIREMENTS := $(shell nvidia-smi -L >/dev/null 2>&1 && echo requirements.txt || echo requirements-cpu.txt)
STAMP := $(VENV)/.installed-$(REQUIREMENTS)

.PHONY: demo test lint setup clean
demo: setup
	$(PYTHON) -m mm_jax demo --overwrite

test: setup
	$(PYTHON) -m pytest -n 2 --dist loadfile

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

setup: $(STAMP)

$(STAMP): $(REQUIREMENTS) requirements-common.txt requirements-beam.txt pyproject.toml
	python3 -m venv $(VENV)
	$(PYTHON) -m pip install --quiet --disable-pip-version-check -r $(REQUIREMENTS)
	$(PYTHON) -m pip install --quiet --disable-pip-version-check --no-deps -e .
	touch $@

clean:
	rm -rf $(VENV) demo .pytest_cache .ruff_cache
