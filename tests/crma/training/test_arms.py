"""crma.training.arms: the LoRA rank of each arm."""

from crma.training.arms import ARMS


def test_a_matched_arm_has_the_smallest_rank_with_enough_parameters() -> None:
    matched = ARMS["FROZEN-matched"]
    for per_rank, crma in ((100, 1), (100, 100), (100, 101), (7, 250)):
        rank = matched.rank(8, per_rank, crma)
        assert rank * per_rank >= 8 * per_rank + crma > (rank - 1) * per_rank


def test_other_arms_keep_the_configured_rank() -> None:
    assert {arm.rank(8, 100, 1000) for arm in ARMS.values() if not arm.matched} == {8}
