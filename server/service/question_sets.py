"""Question sets by name: those of the store, which are read only, and those that an administrator uploads."""

import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crma.core.errors import ConfigError, NotFound
from crma.core.files import locked, replace_file
from crma.evaluation.question_set import QuestionSet, parse_question_set, read_question_set
from crma.store.manifest import NAME_PATTERN
from server.service.errors import InvalidField

log = logging.getLogger("server")


@dataclass(frozen=True)
class QuestionSets:
    """Files `<name>.jsonl` in two folders. A name from outside is looked up among them, and never in a path."""

    built_in: Path
    uploaded: Path

    def read(self, name: str) -> QuestionSet:
        """Raises NotFound, or ConfigError for a file that is damaged."""
        there = self._files()
        if name not in there:
            raise NotFound(
                f"no question set {name!r}", field="question_set", value=name, allowed=list(there)
            )
        return read_question_set(there[name])

    def describe(self) -> list[dict[str, Any]]:
        """Name, digest and number of items of each; one that is damaged is only logged."""
        found = []
        for path in self._files().values():
            try:
                found.append(read_question_set(path).describe())
            except ConfigError as error:
                log.warning("a question set cannot be used: %s", error.message)
        return found

    def write(self, name: str, lines: bytes) -> QuestionSet:
        """Keeps a set from JSON Lines in place of an uploaded one of that name. Raises InvalidField for the name, and
        ConfigError that names the line."""
        if not re.fullmatch(NAME_PATTERN, name) or (self.built_in / f"{name}.jsonl").exists():
            allowed = f"{NAME_PATTERN}, and not the name of a set of the store"
            raise InvalidField(
                "name: not for an uploaded set", field="name", value=name, allowed=allowed
            )
        questions = parse_question_set(name, lines)
        with locked(self.uploaded):
            replace_file(self.uploaded / f"{name}.jsonl", lines)
        return questions

    def _files(self) -> dict[str, Path]:
        folders = (self.uploaded, self.built_in)
        found = {
            path.stem: path
            for folder in folders
            for path in folder.glob("*.jsonl")
            if path.name[0] != "."
        }
        return dict(sorted(found.items()))
