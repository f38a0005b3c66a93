"""Question sets by name: those of the store, which are read only, and those an admin uploads."""

import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crma.core.errors import ConfigError, NotFound
from crma.core.files import PRIVATE, locked, replace_file
from crma.evaluation.question_set import QuestionSet, parse_question_set, read_question_set
from crma.store.manifest import NAME_PATTERN
from server.service.errors import InvalidField

log = logging.getLogger("server")


@dataclass(frozen=True)
class QuestionSets:
    """The files `<name>.jsonl` of two folders.

    A name is looked up among the files that exist; a name from a request never becomes a path.

    Args:
        built_in: the store's folder.
        uploaded: the folder of uploaded sets, created with the first of them.
    """

    built_in: Path
    uploaded: Path

    def read(self, name: str) -> QuestionSet:
        """Read a question set.

        Raises:
            NotFound: there is no set of that name.
            ConfigError: the file is damaged.
        """
        files = self._files()
        if name not in files:
            message = f"no question set {name!r}"
            raise NotFound(message, field="question_set", value=name, allowed=list(files))
        return read_question_set(files[name])

    def describe(self) -> list[dict[str, Any]]:
        """Return name, digest and number of items of each set; damaged sets are only logged."""
        described = []
        for path in self._files().values():
            try:
                described.append(read_question_set(path).describe())
            except ConfigError as error:
                log.warning("a question set cannot be used: %s", error.message)
        return described

    def write(self, name: str, lines: bytes) -> QuestionSet:
        """Keep a set of JSON Lines, in place of any uploaded set of that name.

        Raises:
            InvalidField: the name is not allowed, or is that of a set of the store.
            ConfigError: a line is wrong; the field names it.
        """
        if not re.fullmatch(NAME_PATTERN, name) or (self.built_in / f"{name}.jsonl").exists():
            message = "name: not allowed for an uploaded question set"
            allowed = f"{NAME_PATTERN}, and not the name of a set of the store"
            raise InvalidField(message, field="name", value=name, allowed=allowed)
        question_set = parse_question_set(name, lines)
        with locked(self.uploaded):
            replace_file(self.uploaded / f"{name}.jsonl", lines, mode=PRIVATE)
        return question_set

    def _files(self) -> dict[str, Path]:
        """Return name -> file, sorted by name; the store's sets hide uploaded ones."""
        files = {}
        for folder in (self.uploaded, self.built_in):
            for path in folder.glob("*.jsonl"):
                if not path.name.startswith("."):
                    files[path.stem] = path
        return dict(sorted(files.items()))
