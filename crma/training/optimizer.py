"""Which parameters of a task train, and how fast."""

import math
from typing import Any

from crma.training.adapted_model import AdaptedModel
from crma.training.arms import ARMS, Group
from crma.training.config import TrainConfig

MIXING = ("S", "gamma")  # the mixing logits and the gate


def learning_rate_factor(step: int, total: int, warmup: float) -> float:
    """The factor on the peak learning rate: a linear warm-up, then half a cosine down to 0.

    Args:
        step: counted from 0.
        total: steps of the task.
        warmup: share of the steps in which the rate rises.
    """
    rise = max(1, round(warmup * total))
    if step < rise:
        return (step + 1) / rise
    angle = math.pi * (step - rise) / max(1, total - rise)
    return 0.5 * (1 + math.cos(angle))


def parameter_groups(
    config: TrainConfig, adapted: AdaptedModel, *, first_task: bool
) -> list[dict[str, Any]]:
    """The AdamW parameter groups of a task.

    Backbone parameters that do not train are left out and no longer require a gradient. The mixing
    logits and the gate have no weight decay. Parameters of the LoRA that require no gradient are
    left out too.

    Args:
        config: the run's.
        adapted: the model of this task.
        first_task: whether the backbone trains at its full rates, in all groups of the arm.

    Returns:
        Groups named "lora" and after each backbone parameter, with their peak learning rates.
    """
    lora = {
        "name": "lora",
        "params": [each for each in adapted.lora_parameters if each.requires_grad],
        "lr": config.lora.lr,
        "weight_decay": config.weight_decay,
    }
    groups: list[dict[str, Any]] = [lora] if lora["params"] else []
    if adapted.backbone is None or not adapted.backbone_moves:
        return groups
    arm, settings = ARMS[config.arm], config.crma
    scale = 1.0 if first_task else settings.later_scale
    later_moves: tuple[Group, ...] = ("R",) if arm.protects else settings.later_moves
    for name, parameter in adapted.backbone.named_parameters():
        trains = name in arm.groups and (first_task or name in later_moves)
        parameter.requires_grad_(trains)
        if not trains:
            continue
        is_mixing = name in MIXING
        lr = settings.mixing_lr if is_mixing else settings.lr
        group = {
            "name": name,
            "params": [parameter],
            "lr": lr * scale,
            "weight_decay": 0.0 if is_mixing else config.weight_decay,
        }
        groups.append(group)
    return groups
