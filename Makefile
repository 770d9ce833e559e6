# make train: from nothing to a trained, measured funnel.  make test: the tests, the way CI runs them.
# make docs: the site, in build/site.
# make gpu-check EXTRA=gpu: what only a GPU can show, as one JSON to post.
PYTHON ?= python3
BIN := .venv/bin
EXTRA ?= cpu
DATA := data/ml-100k

.PHONY: install data train test slow-test check fast-test golden docs gpu-check clean

install: .venv/installed-$(EXTRA)

.venv/installed-$(EXTRA): setup.py joint/__init__.py
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --disable-pip-version-check -e ".[$(EXTRA),dev]"
	[ "$(EXTRA)" = gpu ] || $(BIN)/pip install --disable-pip-version-check --no-deps torchrec==1.8.0
	touch $@

data: $(DATA)/dataset.json

# MovieLens-100K lies in RecBole's wheel, which is only read as a zip: nothing of it is installed or kept elsewhere.
$(DATA)/dataset.json: | .venv/installed-$(EXTRA)
	mkdir -p data/downloads
	$(BIN)/pip download --quiet --disable-pip-version-check --no-deps --dest data/downloads recbole==1.2.1
	$(BIN)/python -m joint.prepare movielens data/downloads/recbole-1.2.1-py3-none-any.whl $(DATA) --overwrite

train: install data
	$(BIN)/python -m joint.train configs/sdcl.yaml

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy joint losses towers

test: check
	$(BIN)/python -m pytest -m "not slow"

# Trainings killed thirty times over, hundreds of random logs against a slow oracle: for whoever touches those.
slow-test: install
	$(BIN)/python -m pytest -m slow

fast-test: install
	$(BIN)/python -m pytest -m "not slow" --ignore tests/training

golden: install
	REWRITE=1 $(BIN)/python -m pytest tests/training/test_configs.py tests/docs/test_config_reference.py

docs: install
	$(BIN)/mkdocs build --strict

gpu-check: install
	$(BIN)/python -m benchmarks.gpu_check

clean:
	rm -rf .venv data runs
