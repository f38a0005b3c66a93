"""The adapters before training: their shapes, and their seeded random values."""

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from crma.method.backbone import Backbone, CrmaConfig
from crma.method.injection import Injection, target_names
from crma.method.lora import Lora, LoraConfig, LoraPair, match_targets, new_lora
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


def first_lora(config: TrainConfig, injection: Injection, stage: str) -> Lora:
    """A new LoRA for a stage, seeded by the run and the name of the stage."""
    seeded = generator(config.seed, stage)
    settings = lora_config(config, injection)
    return new_lora(settings, injection.shapes, seeded, config.lora.drawn_rank)


def mean_lora(earlier: Sequence[Lora]) -> Lora:
    """A trainable LoRA with the A of all earlier ones, which stays, and the mean of their B.

    Args:
        earlier: at least one; all with the same A.
    """
    first = earlier[0]
    pairs = {}
    for path, pair in first.pairs.items():
        A = nn.Parameter(pair.A.detach().float(), requires_grad=False)
        B = torch.stack([lora.pairs[path].B.detach().float() for lora in earlier]).mean(0)
        pairs[path] = LoraPair(A, nn.Parameter(B), pair.scaling)
    return Lora(first.config, pairs)


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
