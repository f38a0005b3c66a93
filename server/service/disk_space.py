"""How much room is left where the server writes, for an alert before a disk is full."""

import logging
import shutil
import threading
from collections.abc import Mapping
from pathlib import Path

from server.service.metrics import Metrics

log = logging.getLogger("server")

INTERVAL_S = 15.0


class DiskSpace:
    """Measures in a thread of its own: a file system that hangs holds up nothing else.

    Args:
        folders: by the name that the metric has for them. Of one that does not exist yet, the
            nearest folder above it is measured.
    """

    def __init__(self, folders: Mapping[str, Path], metrics: Metrics) -> None:
        self._folders = folders
        self._metrics = metrics
        self._stopped = threading.Event()

    def start(self) -> None:
        """Measure now and then, until `stop`."""
        threading.Thread(target=self._run, name="disk-space", daemon=True).start()

    def stop(self) -> None:
        """End the thread, without waiting for it."""
        self._stopped.set()

    def measure(self) -> None:
        """Show the room of every folder; one that cannot be measured has no figures."""
        for name, folder in self._folders.items():
            try:
                usage = shutil.disk_usage(_existing(folder))
            except OSError as error:
                log.warning("%s: its free room cannot be measured: %s", folder, error)
                for gauge in (self._metrics.disk_free, self._metrics.disk_size):
                    gauge.remove_by_labels({"folder": name})
                continue
            self._metrics.disk_free.labels(name).set(usage.free)
            self._metrics.disk_size.labels(name).set(usage.total)

    def _run(self) -> None:
        while not self._stopped.is_set():
            self.measure()
            self._stopped.wait(INTERVAL_S)


def _existing(folder: Path) -> Path:
    """A folder, or the nearest one above it that exists."""
    folder = folder.absolute()
    return next((each for each in (folder, *folder.parents) if each.exists()), folder)
