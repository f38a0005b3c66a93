# The image with Ray, which docker/kubernetes/crma-ray.yaml needs:
# docker build -t crma-server . && docker build -f docker/ray.Dockerfile -t … .
ARG IMAGE=crma-server
# hadolint ignore=DL3006
FROM ${IMAGE}
USER root
# KubeRay's probes call wget. Not by version: Debian takes an old version away when it publishes a new one.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends wget && rm -rf /var/lib/apt/lists/*
COPY constraints.txt ./
RUN pip install --no-cache-dir --only-binary=:all: -c constraints.txt "ray[serve]"
ENV RAY_USAGE_STATS_ENABLED=0
USER 10001
