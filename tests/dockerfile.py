"""Reads the Dockerfile: its stages and their steps, as Docker joins and fills in the lines."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from paths import ROOT

VARIABLE = re.compile(r"\$\{(\w+)\}|\$(\w+)")
# The instructions in which Docker itself replaces variables; in the others, the shell does.
FILLED = {"FROM", "ARG", "COPY", "ENV", "USER", "VOLUME", "WORKDIR"}


@dataclass
class Stage:
    """One stage.

    base: an image or the name of an earlier stage. arguments: what ARG sets. steps: instruction and
    the rest of its line.
    """

    name: str
    base: str
    is_local: bool
    arguments: dict[str, str] = field(default_factory=dict)
    steps: list[tuple[str, str]] = field(default_factory=list)

    def command(self, instruction: str) -> list[str]:
        """The exec form of the last such instruction."""
        texts = [text for name, text in self.steps if name == instruction]
        return json.loads(texts[-1][texts[-1].index("[") :])

    def environment(self) -> dict[str, str]:
        """What ENV sets."""
        found = {}
        for name, text in self.steps:
            if name == "ENV":
                found |= variables(text)
        return found


@dataclass
class Dockerfile:
    """All stages, the last of which is the image."""

    stages: list[Stage]

    @classmethod
    def read(cls, path: Path = ROOT / "Dockerfile", **arguments: str) -> Self:
        """Parse a file.

        Args:
            path: the file.
            arguments: values of ARG, as `--build-arg` gives them.
        """
        stages: list[Stage] = []
        known: dict[str, str] = {}  # before the first stage, then in it
        outside: dict[str, str] = {}
        for instruction, text in _instructions(path.read_text("utf-8")):
            filled = _filled(text, known) if instruction in FILLED else text
            if instruction == "FROM":
                base, _, name = filled.partition(" AS ")
                known = dict(outside)
                earlier = {stage.name for stage in stages}
                stages.append(Stage(name, base, base in earlier))
            elif instruction == "ARG":
                name, _, default = filled.partition("=")
                known[name] = arguments.get(name, default.strip('"'))
                into = stages[-1].arguments if stages else outside
                into[name] = known[name]
            else:
                if instruction == "ENV":
                    known |= variables(filled)
                stages[-1].steps.append((instruction, filled))
        return cls(stages)


def variables(text: str) -> dict[str, str]:
    """Name -> value, of the rest of a line of ENV."""
    return dict(pair.split("=", 1) for pair in text.split())


def _instructions(text: str) -> list[tuple[str, str]]:
    """Instruction and the rest of its line; comments dropped, continued lines joined."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = "\n".join(lines).replace("\\\n", "")
    pairs = (line.split(maxsplit=1) for line in joined.splitlines() if line.strip())
    return [(name, rest) for name, rest in pairs]


def _filled(text: str, known: Mapping[str, str]) -> str:
    def value(match: re.Match[str]) -> str:
        name = match[1] or match[2]
        return known.get(name, match[0])

    return VARIABLE.sub(value, text)
