"""Which adapters a row uses: the key for batch groups, the KV cache and metrics."""

import re
from typing import Literal, NamedTuple

from crma.core.errors import ConfigError

Variant = Literal["base", "task", "crma", "task+crma"]
VARIANTS: tuple[Variant, ...] = ("base", "task", "crma", "task+crma")
_CELL = re.compile(
    r"base|(?:(task)(?:@([\w.-]+))?)?(?:(?:(?<=.)\+|^)(crma)(?:@([\w.-]+))?)?", re.ASCII
)


class Cell(NamedTuple):
    """What a variant is made of; a version None is the one that serves."""

    task: bool
    task_version: str | None
    crma: bool
    crma_version: str | None


def read_cell(variant: str) -> Cell:
    """One of VARIANTS; `@version` may follow task and crma: "task@v2+crma@v1". ConfigError for anything else."""
    found = _CELL.fullmatch(variant)
    if not variant or found is None:
        allowed = [*VARIANTS, "task@v1", "task@v1+crma@v1", "…"]
        message = f"Variants are those there are, and not {variant!r}."
        raise ConfigError(message, field="variants", value=variant, allowed=allowed)
    return Cell(found[1] is not None, found[2], found[3] is not None, found[4])


class AdapterSelection(NamedTuple):
    """Content digests (`sha256:…`) of the task adapter and the CRMA backbone of one row; None = not used.

    Both None is the plain base model. Names never appear here: two names for one digest are one
    selection, and a name that is re-published gives another.
    """

    task_digest: str | None = None
    crma_digest: str | None = None

    @property
    def variant(self) -> Variant:
        """The ablation cell this selection belongs to."""
        if self.task_digest is None:
            return "base" if self.crma_digest is None else "crma"
        return "task" if self.crma_digest is None else "task+crma"


BASE = AdapterSelection()
