"""A random DoRA for a model of any family."""

import torch

from crma.method.frozen_linear import LearnedOutput
from crma.method.injection import Injection, target_names
from crma.method.lora import Lora, LoraConfig, LoraPair


def dora(inj: Injection, rank: int, seed: int = 0, strength: float = 1.0) -> Lora:
    """A random DoRA on every linear, the embedding and the head.

    At strength 1 it changes a weight by as much as the weight is large, and magnitudes by half.
    """
    generator = torch.Generator().manual_seed(seed)
    pairs = {}
    for path, (out, in_) in inj.all_shapes.items():
        A = torch.randn(rank, in_, generator=generator) / in_**0.5
        B = torch.randn(out, rank, generator=generator) / rank**0.5 * strength
        factor = 1 + (torch.rand(out, generator=generator) - 0.5) * strength
        magnitude = factor * inj.frozen(path).squared_norms.cpu().sqrt()
        is_embedding = path in inj.embedding
        pairs[path] = LoraPair(A, B, 0.5, is_embedding, LearnedOutput(magnitude))
    return Lora(LoraConfig(rank, 0.5 * rank, target_names(inj.model, "all-linear")), pairs)
