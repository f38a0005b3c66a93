"""The server: HTTP in `http`, requests and adapters in `service`, the model in `engine`."""

import os

# Set before torch starts OpenMP. A waiting CPU thread spins, by default for milliseconds. On a
# core that is shared with another process, that delays the thread it waits for: beside one busy
# process a step took ten times as long. 10,000 turns suffice where all threads work at the same
# time.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

__version__ = "0.1.0"
