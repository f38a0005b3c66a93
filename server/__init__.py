"""The server: HTTP in `routes`, the engine in `engine`, the method in `crma`."""

import os

# Before torch reads it. A CPU thread that waits for another spins, by default for milliseconds; where a core has more
# to do than this server, the other waits for that core meanwhile: beside one busy process a step took ten times as
# long. 10,000 turns are enough where all work at the same time.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

__version__ = "0.1.0"
