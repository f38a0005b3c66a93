"""Question sets by name: those of the store, which are read only, and uploaded ones."""

import asyncio
import logging
import re
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from sqlalchemy import Connection

from crma.core.errors import ConfigError, NotFound
from crma.evaluation.question_lines import QuestionLines
from crma.evaluation.question_set import Question, QuestionSet, read_question_set
from crma.store.manifest import NAME_PATTERN
from crma.store.version_stamp import FileStamp, file_stamp
from server.daemon_threads import DaemonThreads
from server.records import question_sets as rows
from server.records.database import Database
from server.records.errors import RecordsError
from server.service.errors import InvalidField, TooManyQuestionSets

log = logging.getLogger("server")

BATCH = 500  # questions a transaction, about
_BATCH_BYTES = 2**20  # or so many bytes of them: a line may have a megabyte
_PATIENCE_S = 3600.0  # an upload of which nothing came for so long is removed


@dataclass(frozen=True)
class QuestionSets:
    """The question sets of one app. The store's hide uploaded ones of the same name.

    Args:
        built_in: the store's folder of files `<name>.jsonl`. A name is looked up among those that
            exist; a name from a request never becomes a path.
        database: has the uploaded sets.
        max_kept: uploaded sets of one owner.
    """

    built_in: Path
    database: Database
    max_kept: int = 100
    _threads: DaemonThreads = field(default_factory=DaemonThreads, init=False)

    async def stop(self, patience_s: float = 10.0) -> None:
        """Wait until nobody reads the store any more, unless it hangs."""
        await self._threads.wait(patience_s)

    async def read(self, name: str, owner: str) -> QuestionSet:
        """Read a set of the store, of an owner, or of everyone.

        Raises:
            NotFound: there is no set of that name.
            ConfigError: the file is damaged.
            RecordsError: uploaded sets cannot be read.
        """
        files = await self._files()
        if name in files:
            return await self._threads.run(partial(read_question_set, files[name]))
        found = await self.database.run_if_made(None, rows.find, name, owner)
        if found is None:
            uploaded = await self.database.run_if_made([], rows.visible, owner)
            allowed = sorted({*files, *(each.name for each in uploaded)})
            message = f"no question set {name!r}"
            raise NotFound(message, field="question_set", value=name, allowed=allowed)
        _, content = found
        return await asyncio.to_thread(_parsed, name, content)

    async def describe(self, owner: str) -> list[dict[str, Any]]:
        """Return name, digest, number of items and source of each set that an owner may ask.

        The source is "store", "shared" or "own": of sets with one name, the first of these is
        asked, but for an own one, which comes before a shared one. Damaged files are only logged.

        Raises RecordsError.
        """
        described = {}
        for stored in await self.database.run_if_made([], rows.visible, owner):
            described[stored.name] = _described(
                stored.name, stored.digest, stored.num_items, stored.owner
            )
        for name, file in (await self._files()).items():
            try:
                content = await self._threads.run(partial(_describe_file, file))
                described[name] = {**content, "source": "store"}
            except ConfigError as error:
                log.warning("a question set cannot be used: %s", error.message)
        return [described[name] for name in sorted(described)]

    async def upload(self, name: str, owner: str, pieces: AsyncIterator[bytes]) -> dict[str, Any]:
        """Keep a set of JSON Lines, in place of the owner's earlier one of that name.

        Nobody sees it before it is complete, and what came of one that fails is removed.

        Args:
            name: of the set.
            owner: who may ask it; "": everyone.
            pieces: of the lines, cut anywhere.

        Returns:
            Its name, digest, number of items and source.

        Raises:
            InvalidField: the name is not allowed, or is that of a set of the store.
            TooManyQuestionSets: the owner has `max_kept` others.
            ConfigError: a line is wrong; the field names it.
            RecordsError: it cannot be kept.
        """
        if not re.fullmatch(NAME_PATTERN, name) or name in await self._files():
            message = "name: not allowed for an uploaded question set"
            allowed = f"{NAME_PATTERN}, and not the name of a set of the store"
            raise InvalidField(message, field="name", value=name, allowed=allowed)
        id = uuid.uuid4().hex

        def begin(connection: Connection) -> None:
            if rows.num_others(connection, owner, name) >= self.max_kept:
                message = f"{self.max_kept} question sets of this key are kept; delete one first"
                allowed = f"<= {self.max_kept}"
                raise TooManyQuestionSets(message, field="name", value=name, allowed=allowed)
            rows.begin(connection, id, owner, name, _PATIENCE_S)

        await self.database.run(begin)
        try:
            digest, num_items = await self._receive(id, name, pieces)
            await self.database.run(rows.complete, id, digest, num_items)
        except BaseException:
            with suppress(RecordsError):  # then it is removed later
                await asyncio.shield(self.database.run(rows.remove, id))
            raise
        return _described(name, digest, num_items, owner)

    async def delete(self, name: str, owner: str) -> None:
        """Remove an uploaded set of an owner. Jobs that have begun to ask it go on.

        Raises:
            NotFound: the owner has none of that name.
            RecordsError: it cannot be removed.
        """
        if not await self.database.run_if_made(False, rows.remove_named, owner, name):
            uploaded = await self.database.run_if_made([], rows.visible, owner)
            allowed = [each.name for each in uploaded if each.owner == owner]
            message = f"no uploaded question set {name!r} that is yours to delete"
            raise NotFound(message, field="name", value=name, allowed=allowed)

    async def _receive(self, id: str, name: str, pieces: AsyncIterator[bytes]) -> tuple[str, int]:
        """Check and keep questions as they arrive. Returns their digest and number."""
        lines = QuestionLines(name)
        waiting: list[Question] = []
        num_bytes = 0
        async for piece in pieces:
            waiting += await asyncio.to_thread(lines.read, piece)
            num_bytes += len(piece)
            if waiting and (len(waiting) >= BATCH or num_bytes >= _BATCH_BYTES):
                await self._keep(id, lines.num_items - len(waiting), waiting)
                waiting = []
                num_bytes = 0
        last, digest = await asyncio.to_thread(lines.end)
        waiting += last
        if waiting:
            await self._keep(id, lines.num_items - len(waiting), waiting)
        return digest, lines.num_items

    async def _keep(self, id: str, first: int, questions: Sequence[Question]) -> None:
        def add(connection: Connection) -> None:
            content = [each.model_dump(mode="json", exclude_defaults=True) for each in questions]
            rows.add_questions(connection, id, first, content, _PATIENCE_S)

        await self.database.run(add)

    async def _files(self) -> dict[str, Path]:
        """Return name -> file, of the store."""
        return await self._threads.run(partial(_find_files, self.built_in))


def _find_files(folder: Path) -> dict[str, Path]:
    files = sorted(folder.glob("*.jsonl"))
    return {file.stem: file for file in files if not file.name.startswith(".")}


def _describe_file(file: Path) -> dict[str, Any]:
    """`QuestionSet.describe` of a file. Raises ConfigError if it is damaged."""
    return _describe_once(file, file_stamp(file))


@lru_cache(256)
def _describe_once(file: Path, stamp: FileStamp | None) -> dict[str, Any]:  # noqa: ARG001
    """The same: a large file takes seconds, and is read again only when its stamp changes."""
    return read_question_set(file).describe()


def _parsed(name: str, content: Sequence[Any]) -> QuestionSet:
    """A stored set, with its digest computed already: that takes a while."""
    questions = tuple(Question.model_validate(each) for each in content)
    question_set = QuestionSet(name, questions)
    question_set.describe()
    return question_set


def _described(name: str, digest: str, num_items: int, owner: str) -> dict[str, Any]:
    """As `QuestionSet.describe`, of an uploaded set."""
    source = "shared" if owner == rows.EVERYONE else "own"
    return {"name": name, "digest": digest, "items": num_items, "source": source}
