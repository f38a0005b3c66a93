"""crma.training.loop: which parameters move how fast, and in what order examples come."""

import pytest
from tiny import backbone, injection, lora

from crma.evaluation.evaluator import Encoded
from crma.training.config import TrainConfig
from crma.training.loop import AdaptedModel, epoch_batches, parameter_groups, schedule

ROWS = [Encoded([0] * (i * 7 % 23 + 1), [1]) for i in range(50)]
CRMA = {"lr": 2.0, "mixing_lr": 3.0, "later_scale": 0.5, "later_moves": ["S", "W"]}
CONFIG = TrainConfig.from_dict(
    {"tasks": ["a"], "weight_decay": 0.1, "lora": {"lr": 1.0}, "crma": CRMA}
)


def groups(
    *, first_task: bool, moves: bool = True
) -> tuple[dict[str, tuple[float, float]], set[str]]:
    """Name -> (learning rate, weight decay) of the optimizer's groups, and what of the backbone takes a gradient."""
    shared = backbone(injection(), 0)
    adapted = AdaptedModel(
        injection(), lora(injection(), 2, "attention", 0).trainable(), shared, backbone_moves=moves
    )
    found = parameter_groups(CONFIG, adapted, first_task=first_task)
    owners = {id(p): name for name, p in shared.named_parameters()}
    for group in found:
        assert {owners.get(id(p), "lora") for p in group["params"]} == {group["name"]}
    rates = {group["name"]: (group["lr"], group["weight_decay"]) for group in found}
    return rates, {name for name, p in shared.named_parameters() if p.requires_grad}


def test_mixing_and_gate_have_their_rate_and_never_weight_decay() -> None:
    rates, live = groups(first_task=True)
    assert rates == {
        "lora": (1.0, 0.1),
        "S": (3.0, 0.0),
        "gamma": (3.0, 0.0),
        "R": (2.0, 0.1),
        "W": (2.0, 0.1),
    }
    assert live == {"S", "gamma", "R", "W"}


def test_after_the_first_task_only_what_the_config_names_moves_and_more_slowly() -> None:
    rates, live = groups(first_task=False)
    assert rates == {"lora": (1.0, 0.1), "S": (1.5, 0.0), "W": (1.0, 0.1)}
    assert live == {"S", "W"}
    assert groups(first_task=False, moves=False)[0] == {"lora": (1.0, 0.1)}


@pytest.mark.parametrize("batch_size", [1, 4, 16, 64])
def test_an_epoch_holds_every_example_once_in_an_order_of_its_key(batch_size: int) -> None:
    batches = epoch_batches(ROWS, batch_size, "0/a/0")
    assert sorted(i for batch in batches for i in batch) == list(range(50))
    assert sorted(map(len, batches), reverse=True)[:-1] == [batch_size] * (len(batches) - 1)
    assert epoch_batches(ROWS, batch_size, "0/a/0") == batches
    assert epoch_batches(ROWS, batch_size, "0/a/1") != batches or batch_size == 64


def test_the_rate_rises_to_its_peak_and_falls_to_nothing() -> None:
    rates = [schedule(step, 100, 0.1) for step in range(101)]
    assert rates[:11] == pytest.approx([*(0.1 * i for i in range(1, 11)), 1])
    assert (rates[55], rates[100]) == pytest.approx((0.5, 0))
    assert schedule(0, 1, 0.0) == 1.0
