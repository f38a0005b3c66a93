"""The folder that holds pulled base models (`models/`) and built data sets (`data/`)."""

import os
from pathlib import Path


def cache_home() -> Path:
    """The cache folder: `$CRMA_HOME`, or `~/.cache/crma`. It may not exist yet."""
    chosen = os.environ.get("CRMA_HOME")
    if chosen:
        return Path(chosen).expanduser()
    return Path.home() / ".cache" / "crma"


def setting_names() -> list[str]:
    """The variables of the environment that are, or look like, settings; without their values."""
    return sorted(name for name in os.environ if name.startswith("CRMA_"))
