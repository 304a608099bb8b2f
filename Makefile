# Everything here works as the first command in a fresh clone: it needs Python 3.10+, make and a package index.
#
#   make test       the default tests
#   make talk       ask the built-in model the recorded questions, write answer.wav
#   make check      format, lint, types, import direction
#   make help       all of them

PYTHON ?= python3
VENV ?= .venv
REFERENCE ?= .venv-reference
LOWEST ?= .venv-lowest
CLIENT ?= .venv-client
OPENAI ?= .venv-openai
SECONDS ?= 300
TRAIN ?= .venv-train
# torch's plain name brings several GB of CUDA on Linux: point pip at a CPU index, or name a CPU build, if you can.
TORCH ?= torch==2.13.0

BIN = $(VENV)/bin
READY = $(VENV)/.installed
REFERENCE_READY = $(REFERENCE)/.installed
CLIENT_READY = $(CLIENT)/.installed
OPENAI_READY = $(OPENAI)/.installed
TRAIN_READY = $(TRAIN)/.installed
QUESTIONS = moshi_mlx/assets/questions.wav

.DEFAULT_GOAL := help
.PHONY: help install test test-gpu-path test-train talk bench check fuzz format reference resolve lowest wheel-check clean kyutai-client livekit-client openai-client openai-clients

help:  ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1|/' | awk -F'|' '{printf "make %-12s %s\n", $$1, $$2}'

install: $(READY)  ## the virtual environment, with what the tests need

$(READY): pyproject.toml scripts/make_venv.py
	@$(PYTHON) scripts/make_venv.py $(VENV) --editable '.[dev]'
	@touch $@

# What is measured by the clock, or plays on the one virtual sound card, runs alone.
ALONE := tests/app tests/realtime tests/web tests/engine tests/test_sharding.py

test: $(READY)  ## the default tests: no network, no reference packages
	@status=0; \
	$(BIN)/python -m pytest -n 2 --dist loadfile $(ALONE:%=--ignore=%) || status=1; \
	$(BIN)/python -m pytest $(ALONE) || status=1; \
	exit $$status

# The networks in MLX also where numpy would compute: engine, live conversations, program and server.
test-gpu-path: $(READY)  ## tests of what computes, with MLX in place of numpy: what a GPU runs
	MOSHI_MLX_BACKEND=mlx $(BIN)/python -m pytest tests/engine tests/realtime tests/test_session.py \
	    tests/app/test_small.py tests/app/test_file.py tests/web/test_small.py tests/web/test_talk.py

talk: $(READY)  ## the built-in model answers the recorded questions
	$(BIN)/moshi-mlx-local file $(QUESTIONS) -o answer.wav --force

bench: $(READY)  ## every benchmark; KYUTAI_PYTHON names a Python with Kyutai's moshi_mlx to measure beside
	$(BIN)/python -m benchmarks

check: $(READY)  ## format, lint, strict types, import direction: the gate before a commit
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_imports.py

fuzz: $(READY)  ## hostile files, hubs, clients and kills for SECONDS (300), beyond what the default tests try
	$(BIN)/python -m tests.fuzz --seconds $(SECONDS)

format: $(READY)  ## let ruff format and fix what it can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# The reference packages. moshi 0.2.13 asks for an older torch than runs here, so it comes without its
# dependencies and what its model code imports is named by hand.
$(REFERENCE_READY): pyproject.toml scripts/make_venv.py
	@$(PYTHON) scripts/make_venv.py $(REFERENCE) --editable '.[dev]' '$(TORCH)' \
	    einops safetensors sphn aiohttp rustymimi==0.4.1
	@$(REFERENCE)/bin/python -m pip --disable-pip-version-check --quiet --quiet install --no-deps moshi==0.2.13
	@touch $@

reference: $(REFERENCE_READY)  ## tests/parity against live PyTorch moshi and rustymimi, in an environment of its own
	$(REFERENCE)/bin/python -m pytest -m parity tests/parity

# The default tests run all of tests/training that needs no PyTorch; here is the rest.
$(TRAIN_READY): pyproject.toml scripts/make_venv.py
	@$(PYTHON) scripts/make_venv.py $(TRAIN) --editable '.[dev,train]' '$(TORCH)'
	@touch $@

test-train: $(TRAIN_READY)  ## the training's tests with PyTorch, in an environment of its own
	$(TRAIN)/bin/python -m pytest tests/training

# Kyutai's Python client alone: its module needs these few of the package's dependencies, and not PyTorch.
$(CLIENT_READY): scripts/make_venv.py
	@$(PYTHON) scripts/make_venv.py $(CLIENT) aiohttp sphn numpy
	@$(CLIENT)/bin/python -m pip --disable-pip-version-check --quiet --quiet install --no-deps moshi==0.2.13
	@touch $@

kyutai-client: $(CLIENT_READY)  ## Kyutai's Python client, for the tests in which it talks with our server

livekit-client:  ## LiveKit's PersonaPlex client, for the test in which it talks with our server
	@$(PYTHON) -m venv .venv-livekit && .venv-livekit/bin/pip install -q livekit-agents livekit-plugins-nvidia sphn

# openai's own types judge every event; the other clients, some hundred packages, only talk with the server.
$(OPENAI_READY): scripts/make_venv.py
	@$(PYTHON) scripts/make_venv.py $(OPENAI) 'openai[realtime]' numpy
	@touch $@

openai-client: $(OPENAI_READY)  ## the openai package, for the tests of OpenAI's protocols

openai-clients: $(OPENAI_READY)  ## and openai-agents, pipecat and livekit, which talk with our server
	@$(PYTHON) scripts/make_venv.py $(OPENAI) 'openai[realtime]' numpy openai-agents livekit-agents \
	    livekit-plugins-openai 'pipecat-ai[openai,websocket]'
	@touch $(OPENAI_READY)

resolve: $(READY)  ## show that every dependency has a wheel, per platform and Python (asks the package index)
	$(BIN)/python scripts/check_resolve.py

lowest: scripts/make_venv.py  ## the default tests with the oldest versions that pyproject.toml allows
	@$(PYTHON) scripts/lowest.py > $(LOWEST).txt
	@$(PYTHON) scripts/make_venv.py $(LOWEST) --editable '.[dev]' --constraint $(LOWEST).txt
	@rm -f $(LOWEST).txt
	$(LOWEST)/bin/python -m pytest

wheel-check: $(READY)  ## build the wheel and look at what it would put into site-packages
	$(BIN)/python scripts/check_wheel.py

clean:  ## remove the environments and caches
	rm -rf $(VENV) $(REFERENCE) $(LOWEST) $(CLIENT) $(OPENAI) $(TRAIN) build dist .pytest_cache .mypy_cache .ruff_cache
