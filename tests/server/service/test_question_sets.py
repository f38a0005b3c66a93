"""server.service.question_sets: uploads that arrive in pieces, and who may ask what."""

import asyncio
import json
import os
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event, func, select

from crma.core.errors import ConfigError, NotFound
from crma.evaluation import question_lines, question_set
from crma.evaluation.question_set import QuestionSet, parse_question_set
from server.records import question_sets as rows
from server.records.database import Database
from server.records.errors import RecordsNotWritable
from server.records.tables import question_sets as table
from server.records.tables import questions
from server.service import question_sets as service
from server.service.errors import InvalidField
from server.service.question_sets import BATCH, QuestionSets


def line(number: int, **change: Any) -> bytes:
    item = {"id": f"q{number}", "task": "medical", "question": "Which?", "answers": ["this"]}
    return json.dumps({**item, **change}).encode() + b"\n"


async def pieces(parts: Iterable[bytes]) -> AsyncIterator[bytes]:
    for part in parts:
        yield part


async def numbers(database: Database) -> tuple[int, int]:
    """How many sets and questions the tables hold, whoever sees them."""

    def count(connection: Any) -> tuple[int, int]:
        return tuple(
            connection.execute(select(func.count()).select_from(each)).scalar_one()
            for each in (table, questions)
        )

    return await database.run(count)


@pytest.fixture
def sets(database: Database, tmp_path: Path) -> QuestionSets:
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "public.jsonl").write_bytes(line(0))
    return QuestionSets(tmp_path / "store", database)


async def test_a_set_in_pieces_is_the_set_of_the_whole_file(
    sets: QuestionSets, database: Database
) -> None:
    content = b"\xef\xbb\xbf" + b"".join(line(i) for i in range(2 * BATCH + 7)) + b"\n  \n"
    content += line(-1, choices=["this", "that"]).rstrip()
    cut = [content[start : start + 1009] for start in range(0, len(content), 1009)]
    described = await sets.upload("mine", "", pieces(cut))
    whole = parse_question_set("mine", content)
    assert described == {**whole.describe(), "source": "shared"}
    assert await sets.read("mine", "anybody") == whole
    public = {**parse_question_set("public", line(0)).describe(), "source": "store"}
    assert await sets.describe("") == [described, public]
    assert await numbers(database) == (1, 2 * BATCH + 8)


async def test_a_set_may_hold_so_many_questions_and_no_more(
    sets: QuestionSets, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(question_lines, "MAX_ITEMS", 2000)
    monkeypatch.setattr(question_set, "MAX_ITEMS", 2000)
    assert (await sets.upload("large", "", pieces(map(line, range(2000)))))["items"] == 2000
    with pytest.raises(ConfigError, match="2001 questions"):
        await sets.upload("larger", "", pieces(map(line, range(9000))))
    assert await numbers(database) == (1, 2000)


@pytest.mark.e2e
async def test_a_set_of_a_hundred_thousand_questions_is_uploaded_and_read(
    sets: QuestionSets,
) -> None:
    blocks = (b"".join(line(i) for i in range(k, k + 1000)) for k in range(0, 100_000, 1000))
    described = await sets.upload("large", "", pieces(blocks))
    read = await sets.read("large", "")
    assert {**read.describe(), "source": "shared"} == described
    assert described["items"] == question_set.MAX_ITEMS == 100_000


@pytest.mark.parametrize(
    ("wrong", "field"),
    [
        (b"{}", "mine line 1003.id"),
        (line(3), "mine line 1003.id"),
        (b'"' + b"x" * 2**20, "mine line 1003"),
        (b"\xff\n", "mine line 1003"),
    ],
)
async def test_a_wrong_line_is_named_and_nothing_of_the_set_is_left(
    sets: QuestionSets, database: Database, wrong: bytes, field: str
) -> None:
    await sets.upload("mine", "", pieces([line(7)]))
    with pytest.raises(ConfigError) as caught:
        await sets.upload("mine", "", pieces([*map(line, range(1000)), b"\n\n", wrong]))
    assert caught.value.field == field
    assert (await sets.read("mine", "")).questions[0].id == "q7"
    assert await numbers(database) == (1, 1)


async def test_an_empty_set_is_refused(sets: QuestionSets, database: Database) -> None:
    with pytest.raises(ConfigError, match="holds 0 questions"):
        await sets.upload("mine", "", pieces([b"\n", b""]))
    assert await numbers(database) == (0, 0)


async def test_a_set_is_seen_only_once_it_is_complete(
    sets: QuestionSets, database: Database
) -> None:
    arrived, go = asyncio.Event(), asyncio.Event()

    async def slow() -> AsyncIterator[bytes]:
        yield b"".join(map(line, range(BATCH)))
        arrived.set()
        await go.wait()
        yield line(BATCH)

    uploading = asyncio.create_task(sets.upload("mine", "", slow()))
    await arrived.wait()
    assert await numbers(database) == (1, BATCH)
    with pytest.raises(NotFound):
        await sets.read("mine", "")
    await database.run(rows.remove_abandoned)  # it is not
    go.set()
    await uploading
    assert len((await sets.read("mine", "")).questions) == BATCH + 1


async def test_an_upload_that_is_cut_off_leaves_nothing(
    sets: QuestionSets, database: Database
) -> None:
    arrived = asyncio.Event()

    async def cut() -> AsyncIterator[bytes]:
        yield b"".join(map(line, range(BATCH)))
        arrived.set()
        await asyncio.Event().wait()

    uploading = asyncio.create_task(sets.upload("mine", "", cut()))
    await arrived.wait()
    uploading.cancel()
    await asyncio.gather(uploading, return_exceptions=True)
    assert await numbers(database) == (0, 0)


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
async def test_an_upload_that_fills_the_disk_is_refused_and_leaves_nothing(
    sets: QuestionSets, database: Database
) -> None:
    await sets.upload("mine", "", pieces([line(7)]))
    engine = database._engine
    event.listen(engine, "begin", lambda it: it.exec_driver_sql("pragma max_page_count=40"))
    with pytest.raises(RecordsNotWritable, match="full"):
        await sets.upload("mine", "", pieces(map(line, range(4 * BATCH))))
    assert await numbers(database) == (1, 1)
    assert (await sets.read("mine", "")).questions[0].id == "q7"


async def test_what_came_of_an_upload_whose_server_died_is_removed(
    sets: QuestionSets, database: Database
) -> None:
    await database.run(rows.begin, "dead", "", "mine", -1.0)
    await database.run(rows.add_questions, "dead", 0, [{"id": "q"}], -1.0)
    await database.run(rows.remove_abandoned)
    assert await numbers(database) == (0, 0)


async def test_a_set_belongs_to_its_owner_and_one_of_nobody_to_everyone(
    sets: QuestionSets,
) -> None:
    await sets.upload("shared", "", pieces([line(0)]))
    await sets.upload("own", "a", pieces([line(1)]))
    await sets.upload("shared", "a", pieces([line(2)]))

    async def ids(owner: str) -> dict[str, str]:
        names = [each["name"] for each in await sets.describe(owner)]
        return {name: (await sets.read(name, owner)).questions[0].id for name in names}

    assert await ids("a") == {"own": "q1", "public": "q0", "shared": "q2"}
    assert await ids("b") == {"public": "q0", "shared": "q0"}
    with pytest.raises(NotFound) as caught:
        await sets.read("own", "b")
    assert caught.value.allowed == ["public", "shared"]


@pytest.mark.parametrize("name", ["public", "A", ".x", "x" * 65, "../mine"])
async def test_a_name_that_is_not_allowed_is_refused(sets: QuestionSets, name: str) -> None:
    with pytest.raises(InvalidField):
        await sets.upload(name, "", pieces([line(0)]))


async def test_a_pipe_in_the_store_is_no_question_set_and_is_not_waited_for(
    sets: QuestionSets,
) -> None:
    """It stopped every list of the sets, and the end of the server."""
    os.mkfifo(sets.built_in / "pipe.jsonl")
    async with asyncio.timeout(30):
        assert [each["name"] for each in await sets.describe("")] == ["public"]
        with pytest.raises(ConfigError, match="not a plain file"):
            await sets.read("pipe", "")


async def test_a_file_of_the_store_is_read_for_a_list_only_when_it_has_changed(
    sets: QuestionSets, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = service.read_question_set
    seen = []

    def counted(path: Path) -> QuestionSet:
        seen.append(path)
        return read(path)

    monkeypatch.setattr(service, "read_question_set", counted)
    first = await sets.describe("")
    assert await sets.describe("") == first
    assert len(seen) == 1
    replaced = sets.built_in / "new"
    replaced.write_bytes(line(0) + line(1))
    replaced.replace(sets.built_in / "public.jsonl")
    assert [each["items"] for each in await sets.describe("")] == [2]
    assert len(seen) == 2
