"""Which adapters a row uses: the key for batch groups, the KV cache and metrics."""

from typing import Literal, NamedTuple

Variant = Literal["base", "task", "crma", "task+crma"]
VARIANTS: tuple[Variant, ...] = ("base", "task", "crma", "task+crma")


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
