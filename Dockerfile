# The image does not contain the base model: the first start pulls it into the volume at CRMA_HOME.
# For another build of torch: docker build --build-arg PIP_ARGS="--extra-index-url …" .
ARG PYTHON_IMAGE=python:3.11-slim

FROM ${PYTHON_IMAGE} AS environment
ARG PIP_ARGS=""
WORKDIR /app
RUN python -m venv /opt/venv
COPY pyproject.toml constraints.txt README.md LICENSE ./
# Empty packages stand in for the code, so that a change of code does not reinstall torch. The install is editable: it
# points at /app, where the next stage copies the code. Wheels only, because there is no compiler in this stage.
RUN mkdir -p crma server \
    && touch crma/__init__.py server/__init__.py \
    && /opt/venv/bin/pip install --no-cache-dir --only-binary=:all: ${PIP_ARGS} -c constraints.txt -e .

FROM ${PYTHON_IMAGE}
# The compiler builds the native kernel for the CPU that it starts on (CRMA_KERNEL).
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
RUN useradd --uid 10001 --create-home crma \
    && install -d -o crma -g crma /var/lib/crma
WORKDIR /app
COPY --from=environment /opt/venv /opt/venv
COPY pyproject.toml LICENSE ./
COPY crma crma
COPY server server
COPY --chown=crma:crma adapters_store adapters_store
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    CRMA_HOME=/var/lib/crma \
    CRMA_EVALUATIONS=/var/lib/crma/evaluations \
    CRMA_HOST=0.0.0.0 \
    CRMA_PORT=8000 \
    CRMA_MODEL=SmolLM2-135M-Instruct
USER crma
VOLUME /var/lib/crma
EXPOSE 8000
# Ready: the store is verified and a step has run. The start period covers the first pull of the base model.
HEALTHCHECK --interval=10s --timeout=5s --start-period=300s --retries=3 CMD ["python", "-c", "\
import http.client, os, sys\n\
server = http.client.HTTPConnection('127.0.0.1', int(os.environ['CRMA_PORT']), timeout=4)\n\
server.request('GET', '/readyz')\n\
sys.exit(server.getresponse().status != 200)"]
CMD ["sh", "-c", "crma pull \"$CRMA_MODEL\" && exec python -m server"]
