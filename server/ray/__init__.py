"""Replicas on Ray Serve: one server whose engine is many, each a process of a Ray cluster.

The app, its store, keys, jobs and metrics are in the ingress (`application.py`), on an
`InferenceEngine` that passes each request to a replica (`remote_engine.py`). A replica
(`engine_replica.py`) has the engine that `python -m server` would have. Nothing but `application`,
`router`, `serve_replicas` and `__main__` needs Ray.
"""

import os

# Ray reports its use to its makers unless told not to. Set before a cluster starts.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
