"""The one training loop: LoRA and backbone of one task, every step logged.

Shapes: L layers, n streams; b rows, s positions (evaluate.Batch).
"""

import hashlib
import json
import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from crma.core.errors import TrainingError
from crma.evaluation.evaluator import IGNORED, Encoded, answer_logits, answer_loss, collate
from crma.method.backbone import Backbone, FoldedPair
from crma.method.injection import Injection, Plan
from crma.method.lora import Lora
from crma.training.arms import ARMS
from crma.training.config import TrainConfig

ALIVE_FROM_STEP = 10


class RecordingPair(FoldedPair):
    """A layer's folded pair in training: keeps ||dh|| / ||h|| of the last forward pass."""

    ratio: Tensor | None = None

    def delta(self, h: Tensor) -> Tensor:
        """[b, s, d] -> [b, s, d], differentiable in the pair."""
        out = super().delta(h)
        with torch.no_grad():
            self.ratio = out.float().norm() / h.float().norm()
        return out


class AdaptedModel(nn.Module):
    """The frozen base with what trains on it; forward gives the summed answer loss of a batch, in nats."""

    def __init__(
        self, injection: Injection, lora: Lora, backbone: Backbone | None, *, backbone_moves: bool
    ) -> None:
        super().__init__()
        self.injection = injection
        self.lora = lora
        self.lora_parameters = nn.ParameterList(lora.parameters())
        self.backbone = backbone
        self.backbone_moves = backbone_moves
        self.recording: list[RecordingPair] = []

    def forward(self, batch: Any, *, crma: bool = True) -> Tensor:
        backbones = []
        if self.backbone is not None and crma:
            if self.backbone_moves or not self.recording:  # one that stands still is folded once
                with torch.set_grad_enabled(self.backbone_moves):
                    A, B = (
                        factor.to(self.injection.model.dtype) for factor in self.backbone.fold()
                    )
                self.recording = [RecordingPair(a, b) for a, b in zip(A, B, strict=True)]
            backbones = [(None, self.recording)]
        with self.injection.active(Plan([(None, self.lora)], backbones)):
            return answer_loss(answer_logits(self.injection.model, batch), batch)


def epoch_batches(rows: Sequence[Encoded], batch_size: int, key: str) -> list[list[int]]:
    """Length-grouped random batches: the same for the same key, on every machine.

    Shuffled, sorted by length within windows of eight batches (little padding, still random), batches shuffled again.
    """
    rng = random.Random(int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big"))
    order = list(range(len(rows)))
    rng.shuffle(order)
    window = 8 * batch_size
    batches = []
    for start in range(0, len(order), window):
        group = sorted(
            order[start : start + window], key=lambda i: len(rows[i].prompt) + len(rows[i].answer)
        )
        batches += [group[i : i + batch_size] for i in range(0, len(group), batch_size)]
    rng.shuffle(batches)
    return batches


def schedule(step: int, total: int, warmup: float) -> float:
    """Learning-rate factor of a step: linear warm-up, then half a cosine to 0."""
    rise = max(1, round(warmup * total))
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, total - rise)))


def parameter_groups(
    config: TrainConfig, adapted: AdaptedModel, *, first_task: bool
) -> list[dict[str, Any]]:
    """AdamW groups. No weight decay on the mixing logits and the gate; groups that may not move are left out."""
    decay = config.weight_decay
    groups = [
        {
            "name": "lora",
            "params": list(adapted.lora_parameters),
            "lr": config.lora.lr,
            "weight_decay": decay,
        }
    ]
    if adapted.backbone is None or not adapted.backbone_moves:
        return groups
    settings = config.crma
    scale = 1.0 if first_task else settings.later_scale
    for name, parameter in adapted.backbone.named_parameters():
        moves = name in ARMS[config.arm].groups and (first_task or name in settings.later_moves)
        parameter.requires_grad_(moves)
        if not moves:
            continue
        mixing = name in ("S", "gamma")
        lr = (settings.mixing_lr if mixing else settings.lr) * scale
        groups.append(
            {
                "name": name,
                "params": [parameter],
                "lr": lr,
                "weight_decay": 0.0 if mixing else decay,
            }
        )
    return groups


def backbone_log(
    backbone: Backbone, M_0: Tensor, recording: Sequence[RecordingPair]
) -> dict[str, list[float]]:
    """Per layer, after a backward pass: what the norm of M alone cannot show.

    grad_S is ||dloss/dS||_F (0 where S does not move), moved is ||M - M_0||_F against the start of the run, entropy is
    the mean row entropy of M in nats, sigma_2 its second singular value, W_norm = ||Ŵ||_2, dh the size of the update
    relative to the residual stream.
    """
    with torch.no_grad():
        M = backbone.mixing()
        gram = torch.linalg.eigvalsh(backbone.W.mT @ backbone.W)[:, -1].clamp(min=0, max=1)
        grad = (
            torch.zeros(len(M))
            if backbone.S.grad is None
            else backbone.S.grad.flatten(1).norm(dim=1)
        )
        log = {
            "grad_S": grad,
            "moved": (M - M_0).flatten(1).norm(dim=1),
            "entropy": -(M.clamp(min=1e-30).log() * M).sum(-1).mean(-1),
            "sigma_2": torch.linalg.svdvals(M)[:, 1],
            "c_M_minus_1": torch.maximum(
                (M.abs().sum(-1) - 1).abs().amax(-1), (M.abs().sum(-2) - 1).abs().amax(-1)
            ),
            "gate": torch.sigmoid(backbone.gamma),
            "W_norm": gram.sqrt(),
            "dh": torch.stack([pair.ratio for pair in recording if pair.ratio is not None]),
        }
    return {name: [float(f"{v:.6g}") for v in values.tolist()] for name, values in log.items()}


@dataclass
class TaskTrainer:
    """Trains one task: what it needs, and the folder for its log."""

    config: TrainConfig
    accelerator: Accelerator
    adapted: AdaptedModel
    rows: Sequence[Encoded]
    task: str
    first_task: bool
    pad_id: int
    folder: Path
    M_0: Tensor | None = None
    starts: int = 0  # the step at which the backbone starts to move

    def run(self, progress: Callable[[int, int], None]) -> float:
        """Train to the end of the last epoch; `progress(step, steps)` after each. Returns the seconds it took.

        Raises:
            TrainingError: a loss or gradient that is not finite, or a mixing gradient that is dead.
        """
        config = self.config
        groups = parameter_groups(config, self.adapted, first_task=self.first_task)
        optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99))
        steps_per_epoch = math.ceil(len(self.rows) / config.batch_size)
        total = steps_per_epoch * config.epochs
        self.starts = round(config.crma.starts_at * total) if self.first_task else 0

        def rate(name: str, step: int) -> float:
            return schedule(step, total, config.warmup) * (name == "lora" or step >= self.starts)

        rates = torch.optim.lr_scheduler.LambdaLR(
            optimizer, [partial(rate, group["name"]) for group in groups]
        )
        self.folder.mkdir(parents=True, exist_ok=True)
        started, drawn = time.perf_counter(), random.Random(f"{config.seed}/{self.task}/drop")
        with (self.folder / "log.jsonl").open("wb", buffering=0) as log:
            for epoch in range(config.epochs):
                batches = epoch_batches(
                    self.rows, config.batch_size, f"{config.seed}/{self.task}/{epoch}"
                )
                for step, indices in enumerate(batches, start=epoch * steps_per_epoch):
                    batch = collate(
                        [self.rows[i] for i in indices], self.pad_id, self.accelerator.device
                    )
                    line = self._step(optimizer, batch, crma=drawn.random() >= config.crma.drop)
                    rates.step()
                    factor = schedule(step, total, config.warmup)
                    logged = {"task": self.task, "step": step, "epoch": epoch, "lr": factor} | line
                    log.write(
                        json.dumps(logged, allow_nan=False, separators=(",", ":")).encode() + b"\n"
                    )
                    self._check(step, line)
                    progress(step + 1, total)
        return time.perf_counter() - started

    def _step(self, optimizer: torch.optim.Optimizer, batch: Any, *, crma: bool) -> dict[str, Any]:
        optimizer.zero_grad(set_to_none=True)
        loss = self.adapted(batch, crma=crma) / (batch.targets != IGNORED).sum()
        self.accelerator.backward(loss)
        norms = {}
        for group in optimizer.param_groups:
            norms[group["name"]] = float(
                nn.utils.clip_grad_norm_(group["params"], self.config.clip)
            )
        line: dict[str, Any] = {"loss": loss.item(), "tokens": batch.num_tokens, "grad_norm": norms}
        if self.adapted.backbone is not None and self.M_0 is not None and crma:
            line["crma"] = backbone_log(self.adapted.backbone, self.M_0, self.adapted.recording)
        if not all(map(math.isfinite, (line["loss"], *norms.values()))):
            message = f"{self.task}: loss or gradient is not finite; lower lr"
            raise TrainingError(message, field="loss", value=line, allowed="finite")
        optimizer.step()
        return line

    def _check(self, step: int, line: dict[str, Any]) -> None:
        """M's gradient is 0 until W moves and must be alive in every layer ten steps later, in task 1."""
        learns_M = "S" in ARMS[self.config.arm].groups and "crma" in line
        if not (self.first_task and learns_M and step >= self.starts + ALIVE_FROM_STEP):
            return
        if dead := [layer for layer, norm in enumerate(line["crma"]["grad_S"]) if norm == 0.0]:
            message = f"{self.task}: the gradient of M is 0 at step {step}"
            raise TrainingError(
                message, field="layers", value=dead, allowed="a gradient in every layer"
            )
