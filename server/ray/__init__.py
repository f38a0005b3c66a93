"""Replicas on Ray Serve: one server whose engine is many, each a process of a Ray cluster.

The app, its store, keys, jobs and metrics are in the ingress (`application.py`), on an
`InferenceEngine` that passes each request to a replica (`remote_engine.py`). A replica
(`engine_replica.py`) has the engine that `python -m server` would have. Nothing but `application`,
`router`, `serve_replicas` and `__main__` needs Ray.
"""

import os

# Ray reports its use to its makers unless told not to. Set before a cluster starts.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# Serve gives its proxy 5 s to start, and otherwise ends it, and so the server: too few on a busy
# machine.
os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "60")
