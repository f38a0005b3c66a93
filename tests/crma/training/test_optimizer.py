"""crma.training.optimizer: which parameters train, at which learning rate and weight decay."""

import pytest
from tiny import backbone, injection, lora

from crma.training.adapted_model import AdaptedModel
from crma.training.config import TrainConfig
from crma.training.optimizer import learning_rate_factor, parameter_groups

CONFIG = TrainConfig.from_dict(
    {
        "tasks": ["a"],
        "weight_decay": 0.1,
        "lora": {"lr": 1.0},
        "crma": {"lr": 2.0, "mixing_lr": 3.0, "later_scale": 0.5, "later_moves": ["S", "W"]},
    }
)
Rates = dict[str, tuple[float, float]]  # group -> (learning rate, weight decay)


def groups(*, first_task: bool, moves: bool = True) -> tuple[Rates, set[str]]:
    """The rates of the optimizer's groups, and the backbone parameters that require a gradient."""
    shared = backbone(injection(), 0)
    trainable = lora(injection(), 2, "attention", 0).trainable()
    adapted = AdaptedModel(injection(), trainable, shared, backbone_moves=moves)
    found = parameter_groups(CONFIG, adapted, first_task=first_task)
    owners = {id(parameter): name for name, parameter in shared.named_parameters()}
    for group in found:
        assert {owners.get(id(p), "lora") for p in group["params"]} == {group["name"]}
    rates = {group["name"]: (group["lr"], group["weight_decay"]) for group in found}
    return rates, {name for name, p in shared.named_parameters() if p.requires_grad}


def test_mixing_and_gate_have_a_rate_of_their_own_and_no_weight_decay() -> None:
    rates, trains = groups(first_task=True)
    assert rates == {
        "lora": (1.0, 0.1),
        "S": (3.0, 0.0),
        "gamma": (3.0, 0.0),
        "R": (2.0, 0.1),
        "W": (2.0, 0.1),
    }
    assert trains == {"S", "gamma", "R", "W"}


def test_after_the_first_task_only_the_configured_groups_train_and_more_slowly() -> None:
    rates, trains = groups(first_task=False)
    assert rates == {"lora": (1.0, 0.1), "S": (1.5, 0.0), "W": (1.0, 0.1)}
    assert trains == {"S", "W"}


def test_a_backbone_that_stands_still_has_no_group() -> None:
    rates, _ = groups(first_task=False, moves=False)
    assert rates == {"lora": (1.0, 0.1)}


def test_the_learning_rate_rises_to_its_peak_and_falls_to_zero() -> None:
    factors = [learning_rate_factor(step, 100, 0.1) for step in range(101)]
    assert factors[:10] == pytest.approx([0.1 * i for i in range(1, 11)])
    assert factors[10] == pytest.approx(1)
    assert factors[55] == pytest.approx(0.5)
    assert factors[100] == pytest.approx(0)
    assert learning_rate_factor(0, 1, 0.0) == 1.0
