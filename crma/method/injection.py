"""Puts LoRA and CRMA on any supported Hugging Face decoder; every row of a batch chooses its own.

Blocks and linears are found by structure, not by a table of model names. Nothing in the model is replaced: forward
hooks add the deltas, so a model without an active plan computes exactly what it did before.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from crma.core.errors import ConfigError, InvalidAdapter, UnsupportedModel
from crma.core.selection import AdapterSelection
from crma.method.backbone import FoldedPair
from crma.method.lora import Lora, add_grouped


class RowDeltas(Protocol):
    """LoRA deltas for a batch in which every row has its own adapter, computed in place."""

    def add_(self, site: tuple[str, ...], y: Tensor, x: Tensor) -> None:
        """Adds to y [b, out] each row's delta for x [b, in]; `site`: paths of the linears."""


@dataclass(frozen=True)
class Plan:
    """Which rows of one batch use what: `tasks` (rows, LoRA) and `backbones` (rows, one pair a layer); rows None = all.

    No row is in two groups of a kind; a row in none is the base model's. `stacked` takes the place of `tasks` where no
    gradient is needed. `head_rows`: the rows whose logits are wanted; None = all.
    """

    tasks: Sequence[tuple[Tensor | None, Lora]] = ()
    backbones: Sequence[tuple[Tensor | None, Sequence[FoldedPair]]] = ()
    stacked: RowDeltas | None = None
    head_rows: Tensor | None = None


def decoder_blocks(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The path and list of decoder blocks: the one ModuleList as long as the config says the model is deep.

    Raises:
        UnsupportedModel: with the reason, where the model is not a plain stack of decoder blocks of linears.
    """
    config = model.config
    name = type(model).__name__

    def refuse(reason: str) -> UnsupportedModel:
        message = f"{name} cannot be served: {reason}"
        return UnsupportedModel(
            message, field="model", value=name, allowed="a decoder of linear layers"
        )

    if getattr(config, "is_encoder_decoder", False):
        raise refuse("it is an encoder-decoder")
    if config.get_text_config() is not config:
        raise refuse("it is a multimodal model; use its text-only checkpoint")
    depth = getattr(config, "num_hidden_layers", None)
    stacks = [
        (path, m)
        for path, m in model.named_modules()
        if isinstance(m, nn.ModuleList) and len(m) == depth
    ]
    stacks = [
        (path, blocks)
        for path, blocks in stacks
        if not any(path.startswith(outer + ".") for outer, _ in stacks)
    ]
    if len(stacks) != 1:
        raise refuse(
            f"it has {len(stacks)} stacks of num_hidden_layers={depth} blocks instead of one"
        )
    path, blocks = stacks[0]
    for block in blocks:
        if not any(isinstance(m, nn.Linear) for m in block.modules()):
            raise refuse(f"its blocks ({type(block).__name__}) have no torch.nn.Linear to adapt")
        if attention_module(block) is None:
            raise refuse(
                f"its blocks ({type(block).__name__}) have no attention to keep a KV cache for"
            )
    if odd := set(getattr(config, "layer_types", None) or ()) - {
        "full_attention",
        "sliding_attention",
    }:
        raise refuse(f"it has layers of the kind {min(odd)}")
    return path, blocks


def attention_module(block: nn.Module) -> str | None:
    """The name of the block's attention: the child whose name says attention and that holds linears."""
    named = [
        (name, child)
        for name, child in block.named_children()
        if "attn" in name or "attention" in name
    ]
    return next(
        (name for name, child in named if any(isinstance(m, nn.Linear) for m in child.modules())),
        None,
    )


def linear_shapes(model: PreTrainedModel) -> dict[str, tuple[int, int]]:
    """Module path -> (out_features, in_features) of every linear in the decoder blocks, in model order."""
    path, blocks = decoder_blocks(model)
    return {
        f"{path}.{name}": (module.out_features, module.in_features)
        for name, module in blocks.named_modules()
        if isinstance(module, nn.Linear)
    }


def target_names(model: PreTrainedModel, which: str) -> tuple[str, ...]:
    """Last names of the linears that `which` stands for: "attention", "all-linear", or a comma-separated list."""
    if which not in ("attention", "all-linear"):
        return tuple(name.strip() for name in which.split(",") if name.strip())
    _, blocks = decoder_blocks(model)
    attention = attention_module(blocks[0])
    root = blocks[0].get_submodule(attention) if which == "attention" and attention else blocks[0]
    return tuple(
        dict.fromkeys(
            name.rsplit(".", 1)[-1] for name, m in root.named_modules() if isinstance(m, nn.Linear)
        )
    )


class Injection:
    """The hooks on one model, and the plan that they follow in the current forward pass.

    One forward pass at a time: the plan is set for the time of a `with injection.active(plan)` block by the one thread
    that runs the model. Gradients flow through both kinds of delta.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        _, self.blocks = decoder_blocks(model)
        self.model = model
        self.shapes = linear_shapes(model)
        self.hidden_size: int = model.config.hidden_size
        self._plan = Plan()
        for path in self.shapes:
            model.get_submodule(path).register_forward_hook(self._lora_hook(path))
        for layer, block in enumerate(self.blocks):
            block.register_forward_hook(self._crma_hook(layer))
        model.get_output_embeddings().register_forward_pre_hook(self._head_hook)

    @contextmanager
    def active(self, plan: Plan) -> Iterator[None]:
        """Follow `plan` inside the block; base model again after it, whatever happened."""
        self._plan = plan
        try:
            yield
        finally:
            self._plan = Plan()

    def check(self, lora: Lora) -> None:
        """Raises InvalidAdapter for a pair on a module that the model lacks, or of the wrong shape."""
        for path, pair in lora.pairs.items():
            found, expected = (
                (pair.B.shape[0], pair.A.shape[1]),
                self.shapes.get(path, "a linear of the decoder"),
            )
            if found != expected:
                raise InvalidAdapter(
                    "LoRA that fits no module", field=path, value=found, allowed=expected
                )

    def check_backbone(self, num_layers: int, hidden_size: int) -> None:
        """Raises InvalidAdapter for a backbone of another depth or width than the model."""
        found, expected = (num_layers, hidden_size), (len(self.blocks), self.hidden_size)
        if found != expected:
            message = "backbone of the wrong shape"
            raise InvalidAdapter(
                message, field="num_layers, hidden_size", value=found, allowed=expected
            )

    def _lora_hook(self, path: str) -> Any:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            if self._plan.stacked is not None:
                self._plan.stacked.add_(
                    (path,), output.view(-1, output.shape[-1]), inputs[0].flatten(0, -2)
                )
                return None
            groups = [
                (rows, lora.pairs[path]) for rows, lora in self._plan.tasks if path in lora.pairs
            ]
            return add_grouped(output, inputs[0], groups) if groups else None

        return hook

    def _head_hook(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
        # torch gives every row of a sliced (not contiguous) batch its own copy of the head: 57 MB on the default model.
        rows = self._plan.head_rows
        return (inputs[0] if rows is None else inputs[0][rows]).contiguous()

    def _crma_hook(self, layer: int) -> Any:
        def hook(_: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
            if not self._plan.backbones:
                return None
            h = output[0] if isinstance(output, tuple) else output
            for rows, pairs in self._plan.backbones:
                h = (
                    h + pairs[layer].delta(h)
                    if rows is None
                    else h.index_add(0, rows, pairs[layer].delta(h[rows]))
                )
            return (h, *output[1:]) if isinstance(output, tuple) else h

        return hook


def plan_rows(
    selections: Sequence[AdapterSelection],
    loras: Mapping[str, Lora],
    backbones: Mapping[str, Sequence[FoldedPair]],
    device: torch.device | str = "cpu",
) -> Plan:
    """Group the rows of a batch by what they selected.

    Args:
        selections: one a row.
        loras, backbones: what is loaded, by digest.

    Raises:
        ConfigError: a selection that is not loaded (never the base model instead).
    """

    def group(
        digests: Sequence[str | None], loaded: Mapping[str, Any], field: str
    ) -> list[tuple[Tensor | None, Any]]:
        by_digest: dict[str, list[int]] = {}
        for row, digest in enumerate(digests):
            if digest is not None:
                by_digest.setdefault(digest, []).append(row)
        if missing := set(by_digest) - set(loaded):
            raise ConfigError(
                f"{field} is not loaded", field=field, value=min(missing), allowed=sorted(loaded)
            )
        return [
            (
                None if len(rows) == len(selections) else torch.tensor(rows, device=device),
                loaded[digest],
            )
            for digest, rows in by_digest.items()
        ]

    tasks = group([s.task_digest for s in selections], loras, "task_digest")
    return Plan(tasks, group([s.crma_digest for s in selections], backbones, "crma_digest"))
