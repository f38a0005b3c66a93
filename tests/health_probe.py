"""How long /healthz takes, asked again and again by a process of its own.

    python tests/health_probe.py http://127.0.0.1:8000

asks until its standard input ends, then prints one line of JSON. The process that attacks a server
would delay its own questions.
"""

import http.client
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from urllib.parse import urlsplit

PAUSE_S = 0.02


@dataclass
class Watch:
    """What a probe has seen, once it has ended.

    Attributes:
        slowest_s: the longest that an answer took.
        num_asked, num_failed: probes, and those without an answer of 200.
    """

    slowest_s: float = 0.0
    num_asked: int = 0
    num_failed: int = 0


@contextmanager
def watched(url: str) -> Iterator[Watch]:
    """Ask /healthz of a server for as long as the context lasts."""
    watch = Watch()
    command = [sys.executable, __file__, url]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as probe:
        assert probe.stdout is not None
        assert probe.stdout.readline() == "asking\n"
        yield watch
        found, _ = probe.communicate()
        watch.__dict__.update(json.loads(found))


def _ask(host: str, watch: Watch) -> None:
    """Ask once, on a connection of its own as probes of orchestrators do."""
    started = time.monotonic()
    connection = http.client.HTTPConnection(host, timeout=60)
    try:
        connection.request("GET", "/healthz")
        watch.num_failed += connection.getresponse().status != 200
    except OSError:
        watch.num_failed += 1
    finally:
        connection.close()
    watch.num_asked += 1
    watch.slowest_s = max(watch.slowest_s, time.monotonic() - started)


def main() -> None:
    """Ask until the standard input ends."""
    host = urlsplit(sys.argv[1]).netloc
    watch = Watch()
    ended = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), ended.set()), daemon=True).start()
    _ask(host, watch)
    sys.stdout.write("asking\n")
    sys.stdout.flush()
    while not ended.wait(PAUSE_S):
        _ask(host, watch)
    sys.stdout.write(json.dumps(watch.__dict__))


if __name__ == "__main__":
    main()
