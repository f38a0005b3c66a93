"""The adapters before training: their shapes, and their seeded random values."""

import hashlib
from typing import Any

import torch

from crma.method.backbone import Backbone, CrmaConfig
from crma.method.injection import Injection, target_names
from crma.method.lora import LoraConfig, match_targets
from crma.training.arms import ARMS
from crma.training.config import TrainConfig


def lora_config(config: TrainConfig, injection: Injection) -> LoraConfig:
    """The LoRA of a task: its rank follows from the arm, alpha / rank from the settings."""
    settings = config.lora
    shapes = injection.shapes
    targets = target_names(injection.model, settings.target_modules)
    parameters_per_rank = sum(sum(shapes[path]) for path in match_targets(targets, shapes))
    backbone = new_backbone(config, injection)
    crma_parameters = sum(parameter.numel() for parameter in backbone.parameters())
    rank = ARMS[config.arm].rank(settings.rank, parameters_per_rank, crma_parameters)
    return LoraConfig(rank, settings.alpha * rank / settings.rank, targets)


def new_backbone(config: TrainConfig, injection: Injection) -> Backbone:
    """The backbone before task 1, seeded by the run."""
    num_layers = len(injection.blocks)
    shape = CrmaConfig(num_layers, injection.hidden_size, **backbone_shape(config))
    return Backbone(shape, generator(config.seed, "backbone"))


def backbone_shape(config: TrainConfig) -> dict[str, Any]:
    """The part of a backbone's shape that the configuration decides; the model decides the rest."""
    return {
        "num_streams": config.crma.num_streams,
        "stream_rank": config.crma.stream_rank,
        "mapping": ARMS[config.arm].mapping,
    }


def generator(seed: int, purpose: str) -> torch.Generator:
    """A CPU generator with a random stream of its own.

    Args:
        seed: the run's.
        purpose: distinguishes the draws of one run; hashed with the seed to 63 bits.
    """
    digest = hashlib.sha256(f"{seed}/{purpose}".encode()).digest()
    bits = int.from_bytes(digest[:8], "big") >> 1
    return torch.Generator().manual_seed(bits)
