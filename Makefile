# Needs Python 3.11 or newer (the pinned packages do), make and gcc; everything else goes to .venv.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
# Files that are Python as well as shell (pretrain_moiie_*.sh) are left out.
SCRIPTS := $(filter-out examples/pretrain_%,$(wildcard examples/*.sh examples/slurm/*))
# One thread per process: tests and the demonstration start more processes than cores.
export OMP_NUM_THREADS ?= 1

# Versions of Transformer Engine that tests/te runs with: the one of the image's age, and the newest.
TE_VERSIONS := 2.12.0 2.20.2
TE_TESTS := $(TE_VERSIONS:%=test-te-%)

.PHONY: help install demo test test-fast check test-te $(TE_TESTS)

help:
	@echo "make install  .venv with all packages (also done on first use by the others)"
	@echo "make demo     train and ask a tiny model on the CPU"
	@echo "make test     all tests"
	@echo "make test-fast  those that take less than ten seconds each, on one process"
	@echo "make test-te  those of Transformer Engine's modules (also part of make test)"
	@echo "make check    style and types, shell scripts, Dockerfile"

install: $(STAMP)

$(STAMP): requirements.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --requirement requirements.txt
	$(BIN)/python -m pip install --quiet --no-deps --editable .
	@touch $@

demo: $(STAMP)
	$(BIN)/python tools/demo.py

# Processes that tests start are forks of one that has imported everything
# (tests/helpers/fork_server.py), but for those that kill processes or send them signals.
test: export MOIIE_TEST_FORKS = 1
test: $(STAMP)
	$(BIN)/python -m pytest -q -n 2 --dist worksteal
	$(MAKE) test-te

# One pytest process for each version, because Megatron-Core looks for it once.
test-te: $(TE_TESTS)

$(TE_TESTS): export MOIIE_TEST_FORKS = 1
$(TE_TESTS): test-te-%: .venv/transformer-engine-%/.installed
	MOIIE_TEST_TE=$(abspath $(<D)) $(BIN)/python -m pytest -q -n 2 --dist worksteal tests/te

# The wheel is Python only, and nothing else sees a directory of its own.
.venv/transformer-engine-%/.installed: | $(STAMP)
	rm -rf $(@D)
	$(BIN)/python -m pip install --quiet --no-deps --no-compile --target $(@D) transformer-engine==$*
	@touch $@

test-fast: $(STAMP)
	$(BIN)/python -m pytest -q -n 2 --dist worksteal -m "not slow and not distributed"

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/shellcheck -x $(SCRIPTS)
	$(BIN)/hadolint docker/Dockerfile
