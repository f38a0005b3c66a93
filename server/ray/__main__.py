"""`python -m server.ray replicas.yaml`: the server on replicas, as docs/replicas.md says."""

import argparse
import logging
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import ray
from ray import serve
from ray.serve.config import ProxyLocation

from crma.core.errors import ConfigError, CrmaError
from server.http.log import configure as configure_logs
from server.ray.application import build
from server.ray.config import ReplicasConfig
from server.service.access import check_access
from server.settings import Settings
from server.startup import explain

log = logging.getLogger("server")

NAME = "crma"
FAILED = "DEPLOY_FAILED"  # what Serve calls a deployment that it has given up


def main(arguments: Sequence[str] = ()) -> int:
    """Serve until told to stop.

    The exit code is 2 for a configuration or model that cannot be used.
    """
    parser = argparse.ArgumentParser(prog="python -m server.ray", description=__doc__)
    parser.add_argument("config", nargs="?", type=Path, help="a YAML file; none: the defaults")
    path: Path | None = parser.parse_args(arguments).config
    try:
        config = ReplicasConfig() if path is None else ReplicasConfig.read(path)
        settings = config.server_settings()
        configure_logs(settings.log_format)
        check_access(settings)
        _serve(config, settings)
    except CrmaError as error:
        sys.stderr.write(explain(error) + "\n")
        return 2
    finally:
        ray.shutdown()
    return 0


def _serve(config: ReplicasConfig, settings: Settings) -> None:
    """Start the application, and end it at SIGTERM or SIGINT. Raises ConfigError: it cannot run."""
    _start_ray(config)
    told = threading.Event()
    for each in (signal.SIGTERM, signal.SIGINT):
        signal.signal(each, lambda *_: told.set())  # Ray has handlers of its own until here
    listening = {"host": settings.host, "port": settings.port}
    serve.start(proxy_location=ProxyLocation.HeadOnly, http_options=listening)
    try:
        _deploy(config)
        log.info("listening on http://%s:%d, %s", settings.host, settings.port, _wording(config))
        told.wait()
        log.info("draining")
    finally:
        if config.address is None:
            serve.shutdown()
        else:  # Serve is the cluster's, and may have other applications
            serve.delete(NAME)


def _deploy(config: ReplicasConfig) -> None:
    """Start the application, and wait until it serves. Raises ConfigError: it cannot run."""
    try:
        serve.run(build(config.for_processes()), name=NAME, route_prefix="/")
    except RuntimeError as error:
        message = f"the replicas do not start: {_reason() or error}"
        raise ConfigError(message, field="config", value=NAME) from error


def _reason() -> str:
    """The last line of what stopped a deployment; empty if Serve does not say."""
    found = serve.status().applications.get(NAME)
    deployments = [] if found is None else found.deployments.values()
    said = [each.message.strip() for each in deployments if each.status == FAILED]
    lines = [line for message in said for line in message.splitlines()]
    return lines[-1] if lines else ""


def _start_ray(config: ReplicasConfig) -> None:
    """Join the cluster, or start one."""
    if config.address is not None:
        ray.init(config.address, log_to_driver=False)
        return
    ray.init(
        "local",
        num_cpus=config.cluster_cpus,
        object_store_memory=config.object_store_mib * 2**20,
        include_dashboard=False,
    )


def _wording(config: ReplicasConfig) -> str:
    if config.autoscaling is None:
        return f"{config.replicas} replicas"
    return f"{config.autoscaling.min_replicas} to {config.autoscaling.max_replicas} replicas"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
