"""server.service.old_files: what an older release kept as files is in the database afterwards."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from server.records import jobs, question_sets
from server.records.database import Database
from server.service.old_files import import_files

ID = "abl-" + "0" * 32
RECORD: dict[str, Any] = {
    "id": ID,
    "created": "2026-11-20T10:00:00.000000+00:00",
    "request": {"question_set": "public"},
    "progress": {"done": 3, "total": 3},
    "status": "done",
    "error": None,
    "result": {"accuracy": 0.5},
}
LINE = {"id": "q", "task": "medical", "question": "Which?", "answers": ["this"]}


def write(folder: Path, **change: Any) -> Path:
    """A record as an older release wrote it."""
    record = {**RECORD, **change}
    path = folder / "ablations" / f"{record['id']}.json"
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text(json.dumps(record))
    return path


async def test_jobs_and_question_sets_are_moved_once(database: Database, tmp_path: Path) -> None:
    done = write(tmp_path)
    running = write(tmp_path, id="abl-" + "1" * 32, status="running", result=None)
    (tmp_path / "question_sets").mkdir()
    (tmp_path / "question_sets" / "mine.jsonl").write_text(json.dumps(LINE))
    await import_files(tmp_path, database)
    job = await database.run(jobs.find, ID, "")
    assert job is not None
    assert (job.status, job.num_done, job.request) == ("done", 3, RECORD["request"])
    result = await database.run(jobs.result_of, ID)
    assert json.loads(str(result)) == RECORD["result"]
    interrupted = await database.run(jobs.find, running.stem, "")
    assert interrupted is not None
    assert interrupted.status == "interrupted"
    found = await database.run(question_sets.find, "mine", "anybody")
    assert found is not None
    assert found[1] == [LINE]
    assert sorted(path.name for path in tmp_path.glob("*/*.json*")) == sorted(
        ["mine.jsonl.imported", f"{done.name}.imported", f"{running.name}.imported"]
    )
    write(tmp_path)  # as if the file could not be renamed
    await import_files(tmp_path, database)
    assert len(await database.run(jobs.newest, "", 9)) == 2


@pytest.mark.parametrize(
    "change", [{"id": "other"}, {"status": "lost"}, {"created": "then"}, {"progress": {}}]
)
async def test_a_file_that_is_no_record_is_left_alone(
    database: Database, tmp_path: Path, change: dict[str, Any]
) -> None:
    path = write(tmp_path, **change)
    await import_files(tmp_path, database)
    assert path.exists()
    assert await database.run(jobs.newest, "", 9) == []


async def test_without_such_files_nothing_is_written(
    open_database: Callable[[], Database], tmp_path: Path
) -> None:
    await import_files(tmp_path, open_database())
    assert list(tmp_path.iterdir()) == []
