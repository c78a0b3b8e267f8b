# The Annotated DETR. `make book` and `make test` work from nothing but Python ≥ 3.11 and make; README.md has the raw commands.
.DEFAULT_GOAL := help
SHELL := /bin/bash
UV_VERSION := 0.13.9
VENV := .venv
PY := $(VENV)/bin/python
UV := $(VENV)/bin/uv
READY := $(VENV)/.ready
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest -q -n 2 --dist loadfile

# A Python that is new enough: PYTHON=… wins, then the newest that this project is tested on.
find-python = for p in $(PYTHON) $(1); do \
	  if "$$p" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then echo "$$p"; break; fi; done

.PHONY: help book book-report test test-long test-oldest test-notebooks bench test-pages pdf serve lint-workflows clean lock export setup

help:
	@echo "make book            run every notebook that has changed, and build the book into _build/html"
	@echo "make book-report     how long the chapters are, and how often something is seen in them"
	@echo "make test            the tests; test-long: the slow ones; test-oldest: on the oldest versions that the package admits"
	@echo "make test-notebooks  run every notebook where only the built wheel is installed, as on Colab"
	@echo "make test-pages      look at every page of the book in a browser, wide and narrow, light and dark"
	@echo "make pdf             print the whole book into one PDF, with a browser"
	@echo "make bench           how fast it is, against transformers and the machine"
	@echo "make serve           show the book at http://localhost:8000; PORT=8001 for another port"
	@echo "make export          write the package's modules from the notebooks"
	@echo "make lint-workflows  check the workflows of .github/workflows"
	@echo "make lock            resolve the lock files of book/ anew"
	@echo "make clean           remove what was built (not the environments); make distclean removes those, too"

setup: $(READY)

$(READY): book/lock.txt pyproject.toml
	@set -e; \
	if ! [ -x $(PY) ]; then \
	  python=$$($(call find-python,python3.13 python3.12 python3.11 python3 python)); \
	  if [ -z "$$python" ]; then \
	    echo "This project needs Python 3.11 or newer with its venv module (on Debian: apt install python3-venv). Found: $$(python3 --version 2>&1). Name another by: make PYTHON=/path/to/python"; exit 1; fi; \
	  echo "Setting up $(VENV) with $$("$$python" --version). The first time this downloads about 3 GB, most of it PyTorch."; \
	  "$$python" -m venv $(VENV); fi; \
	[ -x $(UV) ] && [ "$$($(UV) --version | cut -d' ' -f2)" = $(UV_VERSION) ] || $(PY) -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION); \
	$(UV) pip sync --quiet --python $(PY) book/lock.txt; \
	$(UV) pip install --quiet --python $(PY) --no-deps --no-build-isolation --editable .; \
	touch $@

book: $(READY)
	@$(PY) book/build.py

book-report: $(READY)
	@$(PY) book/report.py

test: $(READY)
	@$(PYTEST) -m "not slow"

test-long: $(READY)
	@$(PYTEST) -m slow

OLDEST := .venv-oldest
$(OLDEST)/.ready: book/lock-oldest.txt pyproject.toml $(READY)
	@set -e; \
	if ! [ -x $(OLDEST)/bin/python ]; then \
	  python=$$($(call find-python,python3.12 python3.11) ); \
	  if [ -z "$$python" ]; then python=$$($(PY) -c 'import sys; print(sys._base_executable)'); fi; \
	  echo "Setting up $(OLDEST) with the oldest versions that pyproject.toml admits."; \
	  "$$python" -m venv $(OLDEST); fi; \
	$(UV) pip sync --quiet --python $(OLDEST)/bin/python book/lock-oldest.txt; \
	$(UV) pip install --quiet --python $(OLDEST)/bin/python --no-deps --no-build-isolation --editable .; \
	touch $@

test-oldest: $(OLDEST)/.ready
	@OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest -q -n 2 --dist loadfile -m "not slow"

bench: $(READY)
	@$(PY) book/bench.py

test-notebooks: $(READY)
	@$(PY) book/run_notebooks.py

test-pages: book
	@$(PY) book/look.py

pdf: book
	@$(PY) book/make_pdf.py

PORT := 8000
serve: book
	@$(PY) book/serve.py --port $(PORT)

# From PyPI, into uv's cache: tools that look at files and are part of nothing else.
lint-workflows: $(READY)
	@$(UV) tool run --quiet check-jsonschema@0.39.0 --builtin-schema vendor.github-workflows .github/workflows/*.yml
	@$(UV) tool run --quiet zizmor@1.32.0 --quiet --offline --min-severity medium .github

export: $(READY)
	@$(PY) book/check_drift.py --write

# Two files: what the book and the tests run on, and the oldest versions that pyproject.toml admits.
lock:
	@[ -x $(UV) ] || { python=$$($(call find-python,python3.13 python3.12 python3.11 python3)); "$$python" -m venv $(VENV); $(PY) -m pip install --quiet uv==$(UV_VERSION); }
	$(UV) pip compile --quiet --universal --fork-strategy fewest --upgrade --python-version 3.11 --all-extras --no-annotate --generate-hashes --no-emit-package annotated-detr \
	  --custom-compile-command "make lock" pyproject.toml -o book/lock.txt
	$(UV) pip compile --quiet --universal --upgrade --python-version 3.11 --resolution lowest-direct --extra test --extra notebooks --extra tensorboard \
	  --no-annotate --generate-hashes --custom-compile-command "make lock" pyproject.toml book/lock-oldest.in -o book/lock-oldest.txt

clean:
	@rm -rf _build .cache build dist runs *.egg-info .pytest_cache .hypothesis
	@find annotated_detr tests book nbs -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean
	@rm -rf .venv .venv-oldest .venv-wheel
