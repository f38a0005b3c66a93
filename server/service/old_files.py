"""Records that older releases kept as files, moved into the database when the server starts.

Below the folder of evaluations, `ablations/<id>.json` was a job and `question_sets/<name>.jsonl` an
uploaded question set. A file that was moved gets the suffix `.imported`. They belong to nobody in
particular: "" is their owner.
"""

import asyncio
import json
import logging
import re
import uuid
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import get_args

from sqlalchemy import Connection
from sqlalchemy.exc import IntegrityError

from crma.core.errors import CrmaError
from crma.core.files import locked
from crma.evaluation.question_set import read_question_set
from server.records import jobs, question_sets
from server.records.database import Database
from server.records.errors import RecordsError
from server.records.jobs import Job, Status

log = logging.getLogger("server")

SUFFIX = ".imported"
_ID = re.compile(r"[a-z]+-[0-9a-f]{32}")
_DAMAGE = (OSError, ValueError, KeyError, TypeError, RecursionError, CrmaError)


async def import_files(folder: Path, database: Database) -> None:
    """Move the files of older releases into the database. A file that is none is left alone.

    Args:
        folder: of the evaluations.
        database: where they go. If it cannot be written, they stay files until the next start.
    """
    try:
        await _import(folder / "ablations", "*.json", database, _read_job)
        await _import(folder / "question_sets", "*.jsonl", database, _read_set)
    except OSError as error:
        log.error("records of an older release in %s stay files: %s", folder, error)


_Add = Callable[[Connection], None]


async def _import(
    folder: Path, pattern: str, database: Database, read: Callable[[Path], _Add]
) -> None:
    for path in await asyncio.to_thread(_found, folder, pattern):
        try:
            add = await asyncio.to_thread(read, path)
        except _DAMAGE as error:
            log.warning("%s is not a record of an older release: %s", path, error)
            continue
        try:
            await database.run(add)
        except IntegrityError:
            log.info("%s is in the database already", path)
        except RecordsError as error:
            log.error("%s stays a file: %s", path, error.message)
            return
        await asyncio.to_thread(_mark, path)


def _found(folder: Path, pattern: str) -> list[Path]:
    """The files to move. What a writer that died left half written is removed first."""
    paths = sorted(folder.glob(pattern))
    if not paths:
        return []
    with locked(folder):
        return [path for path in paths if path.exists() and not path.name.startswith(".")]


def _mark(path: Path) -> None:
    try:
        path.rename(path.with_name(path.name + SUFFIX))
    except OSError as error:  # it is found in the database at the next start
        log.warning("%s cannot be renamed: %s", path, error)


def _read_job(path: Path) -> _Add:
    """What adds the job of a file. One that says "running" was interrupted."""
    record = json.loads(path.read_bytes())
    if not _ID.fullmatch(record["id"]) or path.stem != record["id"]:
        raise ValueError(record["id"])
    datetime.fromisoformat(record["created"])
    if record["status"] not in get_args(Status):
        raise ValueError(record["status"])
    is_running = record["status"] == "running"
    job = Job(
        id=record["id"],
        owner="",
        base="",
        created=record["created"],
        request=record["request"],
        spec={},
        num_items=int(record["progress"]["total"]),
        num_done=int(record["progress"]["done"]),
        status="interrupted" if is_running else record["status"],
        error=record["error"],
    )
    result = None if record["result"] is None else json.dumps(record["result"])

    def add(connection: Connection) -> None:
        jobs.add(connection, job, result)

    return add


def _read_set(path: Path) -> _Add:
    """What adds the question set of a file, unless there is one of that name already."""
    question_set = read_question_set(path)
    questions = question_set.questions
    content = [each.model_dump(mode="json", exclude_defaults=True) for each in questions]

    def add(connection: Connection) -> None:
        if question_sets.find(connection, question_set.name, question_sets.EVERYONE) is not None:
            return
        id = uuid.uuid4().hex
        question_sets.begin(connection, id, question_sets.EVERYONE, question_set.name, 0)
        question_sets.add_questions(connection, id, 0, content, 0)
        question_sets.complete(connection, id, question_set.digest, len(content))

    return add
