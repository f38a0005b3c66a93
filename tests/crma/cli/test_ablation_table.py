"""What `crma ablate` prints of a report."""

from typing import Any

import pytest

from crma.cli.ablation_table import table


def report(detectable: float | None, num: int) -> dict[str, Any]:
    row = {"accuracy": 0.5, "wilson": [0.3, 0.7], "correct": num // 2, "scored": num}
    pair = {
        **{"a": "task+crma", "b": "task", "n": num, "difference": 0.1, "bootstrap": [-0.1, 0.3]},
        "mcnemar": {"gained": 3, "lost": 1, "p": 0.625},
        "detectable_difference": detectable,
    }
    return {"variants": {"task+crma": row, "task": row}, "comparisons": [pair]}


@pytest.mark.parametrize(
    ("detectable", "said"),
    [
        (0.3125, "80 of 100 runs of 20 questions would see a difference of 0.31; a smaller one"),
        (None, "20 questions are too few to find any difference"),
    ],
)
def test_a_comparison_says_what_so_many_questions_can_show(
    detectable: float | None, said: str
) -> None:
    """A person read p alone, and took a small set for a proof that nothing differs."""
    *_, compared, power = table("mine", report(detectable, 20)).splitlines()
    assert compared == "task+crma - task: +0.10 [-0.10, 0.30], gained 3, lost 1, p = 0.62"
    assert power.strip().startswith(said)
