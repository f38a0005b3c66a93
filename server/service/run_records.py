"""The records of training runs, as `crma train` and `crma experiment` write them: read only."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import crma
from crma.core.errors import NotFound, StoreError
from crma.core.files import MAX_JSON_BYTES, parse_json, read_regular
from server.service.caller import Caller

log = logging.getLogger("server")

OF_THE_RELEASE = Path(crma.__file__).parent / "results"
SUMMARY = (
    "arm",
    "seed",
    "order",
    "steps",
    "ACC",
    "BWT",
    "FWT",
    "mean_loss",
    "mean_drift",
    "commit",
)
"""What a list says of a run."""
_MATRICES = ("accuracy", "loss")  # what makes a file the record of a run


@dataclass(frozen=True)
class RunRecords:
    """The records in a folder and those below it. Their ids are their paths, without suffix.

    Args:
        folder: looked through at each call.
    """

    folder: Path = OF_THE_RELEASE

    def summaries(self, caller: Caller) -> list[dict[str, Any]]:
        """The runs whose tasks a caller may all use, by id; what cannot be read is only logged."""
        found = []
        for id, path in self._files():
            record = _record(id, path)
            if record is not None and _may_see(record, caller):
                found.append({"id": id, **{name: record.get(name) for name in SUMMARY}})
        return found

    def read(self, id: str, caller: Caller) -> dict[str, Any]:
        """A record. Raises NotFound if there is none of that id for the caller."""
        for each, path in self._files():
            record = _record(each, path) if each == id else None
            if record is not None and _may_see(record, caller):
                return record
        raise NotFound(f"no run {id!r}", field="id", value=id, allowed="an id that GET /runs lists")

    def _files(self) -> Iterator[tuple[str, Path]]:
        for path in sorted(self.folder.rglob("*.json")):
            yield path.relative_to(self.folder).with_suffix("").as_posix(), path


def _record(id: str, path: Path) -> dict[str, Any] | None:
    """The record in a file; None if it has none, or cannot be read, which is logged."""
    try:
        record = parse_json(read_regular(path, MAX_JSON_BYTES), id)
    except StoreError as error:
        log.warning("the record of a run cannot be read: %s", error.message)
        return None
    is_run = all(isinstance(record.get(name), list) for name in (*_MATRICES, "order"))
    return record if is_run else None


def _may_see(record: dict[str, Any], caller: Caller) -> bool:
    return all(caller.may_use(task) for task in record["order"])
