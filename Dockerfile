# The image does not contain the base model: the first start pulls it into the volume at CRMA_HOME.
# For CUDA: docker build --build-arg TORCH=cuda .
# docs/operations.md says how the digest and the lock files are renewed.
ARG PYTHON_IMAGE=python:3.11-slim-bookworm@sha256:a36c24f9cbdf4fd0f52d67f0823eeac19c2028c637cecc392d97f980d4fec56b

FROM ${PYTHON_IMAGE} AS environment
ARG TORCH=cpu
# More arguments for pip, such as a mirror's address; what is installed must still have the hashes of the lock files.
ARG PIP_ARGS=""
WORKDIR /app
RUN python -m venv /opt/venv
COPY docker/torch-${TORCH}.lock docker/requirements.lock docker/
# Wheels only, because there is no compiler in this stage. Without dependencies, because the lock files have them all:
# `pip check` proves it.
# hadolint ignore=SC2086
RUN /opt/venv/bin/pip install --no-cache-dir --require-hashes --no-deps --only-binary=:all: ${PIP_ARGS} -r docker/torch-${TORCH}.lock
# A layer of its own, so that another release of a package does not fetch torch again.
# hadolint ignore=SC2086,DL3059
RUN /opt/venv/bin/pip install --no-cache-dir --require-hashes --no-deps --only-binary=:all: ${PIP_ARGS} -r docker/requirements.lock
COPY pyproject.toml README.md LICENSE ./
# The version is in this file. The other packages are empty here, so that a change of code does not reinstall torch: the
# install is editable, and points at /app, where the last stage copies the code.
COPY server/__init__.py server/
RUN mkdir crma && touch crma/__init__.py \
    && /opt/venv/bin/pip install --no-cache-dir --no-deps --no-build-isolation -e . \
    && /opt/venv/bin/pip check

FROM environment AS kernels
# Not by version: Debian takes an old version away when it publishes a new one, and none of this reaches the last stage.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
COPY crma crma
COPY server server
RUN /opt/venv/bin/python -m server.engine.native.prebuilt_kernel

FROM ${PYTHON_IMAGE}
RUN useradd --uid 10001 --no-log-init --home-dir /var/lib/crma --no-create-home crma \
    && install -d -m 0700 -o crma -g crma /var/lib/crma
WORKDIR /app
COPY --from=environment /opt/venv /opt/venv
COPY pyproject.toml LICENSE ./
COPY crma crma
COPY server server
COPY --from=kernels /app/server/engine/native/prebuilt server/engine/native/prebuilt
COPY adapters_store adapters_store
# All that is written is below /var/lib/crma, also what libraries put into the home folder and into temporary files: the
# root file system can be read-only.
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HOME=/var/lib/crma \
    TMPDIR=/var/lib/crma \
    CRMA_HOME=/var/lib/crma \
    CRMA_EVALUATIONS=/var/lib/crma/evaluations \
    CRMA_HOST=0.0.0.0 \
    CRMA_PORT=8000 \
    CRMA_MODEL=SmolLM2-135M-Instruct
USER 10001
VOLUME /var/lib/crma
EXPOSE 8000
# Ready: the store is verified and a step has run. The start period covers the first pull of the base model.
HEALTHCHECK --interval=10s --timeout=5s --start-period=300s --retries=3 CMD ["python", "-c", "\
import http.client, os, sys\n\
server = http.client.HTTPConnection('127.0.0.1', int(os.environ['CRMA_PORT']), timeout=4)\n\
server.request('GET', '/readyz')\n\
sys.exit(server.getresponse().status != 200)"]
CMD ["sh", "-c", "crma pull \"$CRMA_MODEL\" && exec python -m server"]
