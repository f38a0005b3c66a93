"""crma.training.joint_runs: which runs train at once."""

from crma.training.config import TrainConfig
from crma.training.joint_runs import groups


def config(seed: int, *tasks: str, arm: str = "FROZEN", **changes: object) -> TrainConfig:
    return TrainConfig.from_dict(
        {"tasks": tasks or ("a", "b"), "seed": seed, "arm": arm, **changes}
    )


def test_runs_that_differ_in_seed_and_order_are_one_group() -> None:
    assert groups({"x": config(0), "y": config(1, "b", "a")}, 9) == [["x", "y"]]


def test_runs_that_differ_in_anything_else_are_apart() -> None:
    configs = {
        "x": config(0),
        "arm": config(0, arm="PRIVATE"),
        "tasks": config(0, "a", "c"),
        "batch": config(0, batch_size=3),
        "rate": config(0, lora={"lr": 1e-3}),
        "y": config(1),
    }
    assert groups(configs, 9) == [["x", "y"], ["arm"], ["tasks"], ["batch"], ["rate"]]


def test_a_large_group_is_divided_evenly() -> None:
    sizes = [len(group) for group in groups({str(seed): config(seed) for seed in range(25)}, 12)]
    assert sizes == [9, 9, 7]
