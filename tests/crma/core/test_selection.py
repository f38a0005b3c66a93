"""crma.core.selection: names of variants, and the variant of a selection."""

import pytest

from crma.core.errors import ConfigError
from crma.core.selection import BASE, VARIANTS, AdapterSelection, Cell, read_cell

SELECTIONS = {
    "base": BASE,
    "task": AdapterSelection(task_digest="sha256:t"),
    "crma": AdapterSelection(crma_digest="sha256:c"),
    "task+crma": AdapterSelection("sha256:t", "sha256:c"),
}


def test_every_variant_is_the_variant_of_a_selection_and_the_name_of_a_cell() -> None:
    assert tuple(SELECTIONS) == VARIANTS
    for name, selection in SELECTIONS.items():
        assert selection.variant == name
        uses_task = selection.task_digest is not None
        uses_crma = selection.crma_digest is not None
        assert read_cell(name) == Cell(uses_task, None, uses_crma, None)


def test_an_unknown_variant_is_refused_with_those_that_exist() -> None:
    with pytest.raises(ConfigError, match="There is no variant 'lora'") as caught:
        read_cell("lora")
    assert caught.value.field == "variants"
    assert list(VARIANTS) == caught.value.allowed[:4]
