"""Where pulled base models (`models/`) and built data sets (`data/`) live on this machine."""

import os
from pathlib import Path


def cache_home() -> Path:
    """The cache folder: `$CRMA_HOME`, or `~/.cache/crma`. It need not exist."""
    chosen = os.environ.get("CRMA_HOME")
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "crma"
