"""`python -m server`: settings from the environment, one base model, one store, one process."""

from __future__ import annotations

import gc

if __name__ == "__main__":
    gc.disable()  # until `main`: what is imported stays, and to look through it takes 0.3 s

import argparse
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import uvicorn

from crma.core.errors import CrmaError
from crma.models.base_model import BaseModel
from server.drain import CANCEL_SECONDS, DrainingServer
from server.engine.inference_engine import InferenceEngine
from server.engine.native.freed_memory import return_freed_memory
from server.http.log import configure as configure_logs
from server.listener import addresses, listen, max_connections, protocol, raise_descriptor_limit
from server.loading import answering
from server.service.access import check_access
from server.settings import Settings, drop_service_links
from server.startup import build, explain, new_metrics

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    EngineOn = Callable[[Settings, BaseModel, PreTrainedTokenizerBase], InferenceEngine]

log = logging.getLogger("server")


def _options(arguments: Sequence[str]) -> dict[str, Any]:
    """Settings from the command line. Ends the process for one that does not exist."""
    parser = argparse.ArgumentParser(prog="python -m server", description=__doc__)
    for name in ("store", "model", "host", "port", "device"):
        parser.add_argument(f"--{name}", help=f"as CRMA_{name.upper()}")
    parser.add_argument(
        "--allow-open", action="store_true", help="as CRMA_ALLOW_OPEN=true: serve without keys"
    )
    parser.add_argument(
        "--json",
        dest="log_format",
        action="store_const",
        const="json",
        help="as CRMA_LOG_FORMAT=json",
    )
    parser.add_argument("--quiet", action="store_true", help="log warnings and errors only")
    given = vars(parser.parse_args(arguments))
    return {name: value for name, value in given.items() if value}


def main(arguments: Sequence[str] = ()) -> int:
    """Serve until told to stop.

    The exit code is 2 for a setting, model or port that cannot be used, and 1 if the engine has
    failed. The ports are bound before anything is read or written.
    """
    gc.enable()
    options = _options(arguments)
    if options.pop("quiet", False):
        logging.disable(logging.INFO)
    links = drop_service_links()
    with ExitStack() as ports:
        return _serve(options, links, ports)


def _serve(options: Mapping[str, Any], links: Sequence[str], ports: ExitStack) -> int:
    """As `main`; `ports` closes what was bound."""
    try:
        settings = Settings.load(**options)
        configure_logs(settings.log_format)
        if links:
            log.warning("ignored, because Kubernetes set it for a Service: %s", ", ".join(links))
        check_access(settings)
        most = max_connections(settings, raise_descriptor_limit())
        sockets = [ports.enter_context(each) for each in listen(settings)]
        metrics = new_metrics(settings)
        log.info("loading %s; /readyz says when it can serve", settings.model)
        with answering(sockets, protocol(settings, most, metrics)):
            app = build(settings, metrics)
    except CrmaError as error:
        sys.stderr.write(explain(error) + "\n")
        return 2
    return_freed_memory()
    gc.freeze()  # what is loaded now stays: collections need not look through it again and again
    log.info("listening on %s; /docs has documentation and examples", addresses(sockets))
    if settings.page:
        log.info("open the same address in a browser to ask, compare and watch")
    config = uvicorn.Config(
        app,
        http=protocol(settings, most, metrics),
        ws="none",
        lifespan="on",  # an app that cannot start ends the server; by default uvicorn would go on
        log_config=None,
        access_log=False,
        timeout_keep_alive=settings.keep_alive_s,
        timeout_graceful_shutdown=CANCEL_SECONDS,
    )
    server = DrainingServer(config, app.state.frontend)
    app.state.frontend.engine.on_failure = server.fail
    server.on_drained = server.end_process_in_time
    server.run(sockets)
    return server.exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
