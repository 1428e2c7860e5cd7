# Two commands do everything on a fresh machine: `make demo` and `make test`.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin

CHROMIUM ?= chromium

.PHONY: demo test crash exact check format setup integrations slurm screenshot clean

demo: setup            ## train the digits example as a chain and compare it bit for bit
	$(BIN)/chainrun demo

test: setup integrations slurm  ## all tests; those that need SLURM are skipped where it cannot be installed
	$(BIN)/python -m pytest -n 2 --dist loadgroup $(ARGS)

crash: setup           ## 1,000 kills and 5,000 power cuts, where `make test` has some of each
	CHAINRUN_KILLS=1000 CHAINRUN_CUTS=5000 $(BIN)/python -m pytest -n 2 -rP $(ARGS) \
	  tests/test_crash.py tests/test_power.py tests/test_faults.py

# Every loop and object at every cut, 0, 1 and 3 workers, 1 and 2 ranks, 20 steps at least (tests/everywhere.py).
# Hours on two cores; `make exact EXACT=tests/test_modules.py` goes over a part.
EXACT ?= tests/test_loops.py tests/test_loader.py tests/test_iterable.py tests/test_loader_errors.py \
  tests/test_training_objects.py tests/test_modules.py tests/test_register.py tests/test_parallel.py \
  tests/test_counter.py tests/test_random_loaders.py tests/test_random_programs.py
exact: setup           ## exactness everywhere, where `make test` goes over some of the combinations
	rm -f .exact.jsonl
	CHAINRUN_EXACT=$(CURDIR)/.exact.jsonl CHAINRUN_EXAMPLES=100 CHAINRUN_PROGRAMS=200 \
	  $(BIN)/python -m pytest -n 2 $(ARGS) $(EXACT)

check: setup           ## format, lint, strict types, layer contracts
	$(BIN)/ruff format --check . slurm/cluster
	$(BIN)/ruff check . slurm/cluster
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_layers.py

format: setup
	$(BIN)/ruff format . slurm/cluster
	$(BIN)/ruff check --fix . slurm/cluster

setup: $(VENV)/.ready

$(VENV)/.ready: requirements.lock pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@

integrations: $(VENV)/.integrations

$(VENV)/.integrations: requirements-integrations.lock $(VENV)/.ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-integrations.lock
	touch $@

# A real SLURM for the tests, from the system's packages; gcc builds the tests' clock shim (slurm/README.md).
slurm:
	@if command -v slurmctld >/dev/null && command -v munged >/dev/null && command -v gcc >/dev/null; then :; \
	elif ! command -v apt-get >/dev/null; then echo "no apt-get here: the tests that need SLURM are skipped"; \
	elif [ "$$(id -u)" = 0 ]; then \
	  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends slurm-wlm munge gcc libc6-dev >/dev/null; \
	else \
	  sudo -n apt-get update -qq && sudo -n apt-get install -qq -y --no-install-recommends slurm-wlm munge gcc libc6-dev >/dev/null || \
	  echo "slurm-wlm and munge could not be installed: the tests that need SLURM are skipped"; \
	fi

# The pages that the tests have kept, as a browser shows them (apt-get install chromium).
screenshot:
	@for page in artifacts/*/*.html; do \
	  profile=$$(mktemp -d); \
	  $(CHROMIUM) --headless --no-sandbox --disable-gpu --disable-background-networking --hide-scrollbars \
	    --user-data-dir=$$profile --window-size=1200,2800 --screenshot=$${page%.html}-browser.png \
	    "file://$(CURDIR)/$$page" 2>/dev/null && echo $${page%.html}-browser.png; \
	  rm -rf $$profile; \
	done

clean:
	rm -rf $(VENV) build dist
