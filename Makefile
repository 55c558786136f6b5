PYTHON ?= python

.DEFAULT_GOAL := help
.PHONY: help install style check test bench clean

help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install:  ## Install what the project and its checks need into the active environment
	$(PYTHON) -m pip install -r requirements.txt -r requirements-dev.txt

style:  ## Format the code and mend what ruff can mend
	$(PYTHON) -m ruff format .
	$(PYTHON) -m ruff check --fix .

check:  ## Lint, formatting and types; changes nothing
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy

test:  ## Run the tests, without the slow ones
	$(PYTHON) -m pytest

bench:  ## Time training against transformers and the course's procedure (minutes)
	$(PYTHON) benchmark.py train

clean:  ## Remove caches; keeps data, checkpoints and predictions
	rm -rf .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -not -path './.git/*' -not -path './.venv/*' -prune -exec rm -rf {} +
