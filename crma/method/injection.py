"""Adds LoRA and CRMA to any supported Hugging Face decoder, with a choice for each row of a batch.

Decoder blocks and linears are found by the model's structure, not by a table of model names. No
module is replaced: forward hooks add the deltas, so a model without an active plan computes exactly
the same numbers as before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn, Protocol, TypeVar

import torch
from torch import Tensor, nn

from crma.core.errors import ConfigError, InvalidAdapter, UnsupportedModel
from crma.core.selection import AdapterSelection
from crma.method.backbone import FoldedPair
from crma.method.frozen_linear import Affine, FrozenLinear
from crma.method.lora import Lora, LoraPair, add_grouped

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ATTENTION_TYPES = ("full_attention", "sliding_attention")
"""The kinds of layers, in the `layer_types` of a config, that keep an ordinary KV cache."""

Adapter = TypeVar("Adapter")


class RowDeltas(Protocol):
    """The LoRAs of a batch whose rows use different adapters, applied in place."""

    def add_(self, site: tuple[str, ...], y: Tensor, x: Tensor) -> None:
        """Rescale each row of y as its adapter says, and add that adapter's delta.

        Args:
            site: the paths of the linears that read x: one, or several whose outputs lie side by
                side in y.
            y: [rows, out] the outputs of the linears, changed in place. The rows are all positions
                of the batch, flattened.
            x: [rows, in] the input of the linears; of the embedding, token ids [rows].
        """


@dataclass(frozen=True)
class Plan:
    """The adapters that the rows of one batch use; by default, none.

    `rows` is an int64 index into the batch, or None for all rows. No row is in two groups of
    `tasks`, or in two of `backbones`; a row in none runs the base model.

    Args:
        tasks: (rows, task adapter).
        backbones: (rows, one folded pair for each layer).
        stacked: replaces `tasks` when serving, where no gradient is needed.
        head_rows: the rows whose logits are computed; None: all.
        stacked_head: as `stacked`, for the head, which sees only the rows of `head_rows`. None: no
            adapter of the batch changes the head.
    """

    tasks: Sequence[tuple[Tensor | None, Lora]] = ()
    backbones: Sequence[tuple[Tensor | None, Sequence[FoldedPair]]] = ()
    stacked: RowDeltas | None = None
    head_rows: Tensor | None = None
    stacked_head: RowDeltas | None = None


def decoder_blocks(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The decoder blocks: the one ModuleList whose length is the config's num_hidden_layers.

    Returns:
        The list's module path, and the list.

    Raises:
        UnsupportedModel: the model is not one plain stack of decoder blocks, each with attention
            and linears; the message gives the reason.
    """
    config = model.config
    if getattr(config, "is_encoder_decoder", False):
        _refuse(model, "it is an encoder-decoder")
    if config.get_text_config() is not config:
        _refuse(model, "it is a multimodal model; use its text-only checkpoint")
    stacks = _outermost_stacks(model)
    if len(stacks) != 1:
        depth = f"num_hidden_layers={_depth(model)}"
        _refuse(model, f"it has {len(stacks)} stacks of {depth} blocks instead of one")
    path, blocks = stacks[0]
    for block in blocks:
        _check_block(model, block)
    for layer_type in sorted(set(getattr(config, "layer_types", None) or ())):
        if layer_type not in ATTENTION_TYPES:
            _refuse(model, f"it has layers of the type {layer_type}")
    return path, blocks


def _refuse(model: PreTrainedModel, reason: str) -> NoReturn:
    name = type(model).__name__
    message = f"{name} cannot be served: {reason}"
    raise UnsupportedModel(message, field="model", value=name, allowed="a decoder of linear layers")


def _depth(model: PreTrainedModel) -> int | None:
    return getattr(model.config, "num_hidden_layers", None)


def _outermost_stacks(model: PreTrainedModel) -> list[tuple[str, nn.ModuleList]]:
    """(path, list) of every ModuleList as long as the model is deep and not inside another one."""
    stacks: list[tuple[str, nn.ModuleList]] = []
    for path, module in model.named_modules():  # outer modules come before inner ones
        if not isinstance(module, nn.ModuleList) or len(module) != _depth(model):
            continue
        if not any(path.startswith(f"{outer}.") for outer, _ in stacks):
            stacks.append((path, module))
    return stacks


def _check_block(model: PreTrainedModel, block: nn.Module) -> None:
    kind = type(block).__name__
    if not _has_linear(block):
        _refuse(model, f"its blocks ({kind}) have no torch.nn.Linear to adapt")
    if attention_module(block) is None:
        _refuse(model, f"its blocks ({kind}) have no attention to keep a KV cache for")


def _has_linear(module: nn.Module) -> bool:
    return any(isinstance(child, nn.Linear) for child in module.modules())


def attention_module(block: nn.Module) -> str | None:
    """The name of a block's attention: the first child that is named for it and holds linears."""
    for name, child in block.named_children():
        if ("attn" in name or "attention" in name) and _has_linear(child):
            return name
    return None


def linear_shapes(model: PreTrainedModel) -> dict[str, tuple[int, int]]:
    """Module path -> (out_features, in_features) of the linears in the blocks, in model order."""
    path, blocks = decoder_blocks(model)
    return {
        f"{path}.{name}": (module.out_features, module.in_features)
        for name, module in blocks.named_modules()
        if isinstance(module, nn.Linear)
    }


def embedding_shape(model: PreTrainedModel) -> dict[str, tuple[int, int]]:
    """{module path: (hidden size, vocabulary)} of the embedding, a linear on one-hot rows."""
    embedding = model.get_input_embeddings()
    if not isinstance(embedding, nn.Embedding):
        return {}
    return {_path_of(model, embedding): (embedding.embedding_dim, embedding.num_embeddings)}


def head_shape(model: PreTrainedModel) -> dict[str, tuple[int, int]]:
    """{module path: (vocabulary, hidden size)} of the head, which gives the logits."""
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        return {}
    return {_path_of(model, head): (head.out_features, head.in_features)}


def _path_of(model: PreTrainedModel, wanted: nn.Module) -> str:
    return next(path for path, module in model.named_modules() if module is wanted)


def target_names(model: PreTrainedModel, which: str) -> tuple[str, ...]:
    """The last names of the linears to adapt, each once, in model order.

    Args:
        model: names are taken from its first block.
        which: "attention", "all-linear", or a comma-separated list, returned as given.
    """
    if which not in ("attention", "all-linear"):
        return tuple(name.strip() for name in which.split(",") if name.strip())
    _, blocks = decoder_blocks(model)
    root = blocks[0]
    attention = attention_module(root)
    if which == "attention" and attention is not None:
        root = root.get_submodule(attention)
    names = (
        path.rsplit(".", 1)[-1]
        for path, module in root.named_modules()
        if isinstance(module, nn.Linear)
    )
    return tuple(dict.fromkeys(names))


class Injection:
    """The hooks on one model, and the plan that they follow in the current forward pass.

    Only one thread may run the model, one forward pass at a time, each inside
    `with injection.active(plan)`. Gradients flow through the LoRA and the CRMA deltas.

    Args:
        model: receives the hooks, which stay for as long as it lives.

    Attributes:
        blocks: the decoder blocks.
        shapes: module path -> (out, in) of the linears in the blocks.
        embedding, head: the same of the embedding and the head, each alone in its dict.
        frozen: finds a linear by its path. Whoever takes the weights out of the model replaces it.

    Raises:
        UnsupportedModel: as `decoder_blocks`.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        _, self.blocks = decoder_blocks(model)
        self.model = model
        self.shapes = linear_shapes(model)
        self.embedding = embedding_shape(model)
        self.head = head_shape(model)
        self.frozen: Callable[[str], FrozenLinear] = self._frozen_module
        self.hidden_size: int = model.config.hidden_size
        self._plan = Plan()
        for path in self.all_shapes:
            model.get_submodule(path).register_forward_hook(self._lora_hook(path))
        for layer, block in enumerate(self.blocks):
            block.register_forward_hook(self._crma_hook(layer))
        model.get_output_embeddings().register_forward_pre_hook(self._head_hook)

    @property
    def all_shapes(self) -> dict[str, tuple[int, int]]:
        """Module path -> (out, in) of everything that a LoRA can adapt."""
        return {**self.embedding, **self.shapes, **self.head}

    @contextmanager
    def active(self, plan: Plan) -> Iterator[None]:
        """Follow `plan` inside the block. After it, even after an error, the model is the base."""
        self._plan = plan
        try:
            yield
        finally:
            self._plan = Plan()

    def check(self, lora: Lora) -> None:
        """Check that every pair of a LoRA fits a linear of the model.

        Raises:
            InvalidAdapter: a pair belongs to no linear of the model, or has the wrong shape.
        """
        shapes = self.all_shapes
        for path, pair in lora.pairs.items():
            found = (pair.B.shape[0], pair.A.shape[1])
            expected = shapes.get(path)
            if found != expected or pair.is_embedding != (path in self.embedding):
                message = f"{path}: the LoRA pair fits no linear of the model"
                allowed = expected or "a linear of the decoder, its embedding or its head"
                raise InvalidAdapter(message, field=path, value=found, allowed=allowed)

    def check_backbone(self, num_layers: int, hidden_size: int) -> None:
        """Check the depth and width of a backbone.

        Raises:
            InvalidAdapter: they are not those of the model.
        """
        found = (num_layers, hidden_size)
        expected = (len(self.blocks), self.hidden_size)
        if found != expected:
            message = "num_layers, hidden_size: the backbone does not fit the model"
            field = "num_layers, hidden_size"
            raise InvalidAdapter(message, field=field, value=found, allowed=expected)

    def bind(self, lora: Lora) -> Lora:
        """A copy whose changes of outputs are computed once, instead of in every forward pass.

        Args:
            lora: in the model's dtype, on its device; it must pass `check`.
        """
        pairs = {path: pair.bound(partial(self.frozen, path)) for path, pair in lora.pairs.items()}
        return Lora(lora.config, pairs)

    def _frozen_module(self, path: str) -> FrozenLinear:
        return FrozenLinear.of(self.model.get_submodule(path))

    def _lora_hook(self, path: str) -> Callable[..., Tensor | None]:
        is_head = path in self.head

        def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            plan = self._plan
            x = inputs[0]
            if plan.stacked is not None:
                stacked = plan.stacked_head if is_head else plan.stacked
                if stacked is not None:
                    y = output.view(-1, output.shape[-1])
                    stacked.add_((path,), y, x.reshape(len(y), *x.shape[output.dim() - 1 :]))
                return None
            groups = [(rows, lora.pairs[path]) for rows, lora in plan.tasks if path in lora.pairs]
            return self._add_groups(path, output, x, groups) if groups else None

        return hook

    def _add_groups(
        self, path: str, y: Tensor, x: Tensor, groups: Sequence[tuple[Tensor | None, LoraPair]]
    ) -> Tensor:
        """The outputs y of a linear for inputs x, with the pair of each group of rows applied."""
        find = partial(self.frozen, path)
        bound = [(rows, pair.bound(find)) for rows, pair in groups]
        for rows, pair in bound:
            if isinstance(pair.output, Affine):
                y = pair.output.applied(y, rows)
        return add_grouped(y, x, bound)

    def _head_hook(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
        h = inputs[0]
        if self._plan.head_rows is not None:
            h = h[self._plan.head_rows]
        # A batch that is a slice is not contiguous, and torch then copies the head's weights for
        # every row: 57 MB on the default model.
        return h.contiguous()

    def _crma_hook(self, layer: int) -> Callable[..., Any]:
        def hook(_: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
            if not self._plan.backbones:
                return None
            groups = [(rows, pairs[layer]) for rows, pairs in self._plan.backbones]
            if isinstance(output, tuple):  # some families return more than the hidden state
                h, *rest = output
                return (add_grouped(h, h, groups), *rest)
            return add_grouped(output, output, groups)

        return hook


def plan_rows(
    selections: Sequence[AdapterSelection],
    loras: Mapping[str, Lora],
    backbones: Mapping[str, Sequence[FoldedPair]],
    device: torch.device | str = "cpu",
) -> Plan:
    """Group the rows of a batch by their adapters.

    Args:
        selections: one for each row.
        loras: the loaded task adapters, by digest.
        backbones: the loaded backbones, by digest.
        device: of the row indices.

    Raises:
        ConfigError: a selected adapter is not loaded. The base model never stands in for it.
    """
    task_digests = [selection.task_digest for selection in selections]
    crma_digests = [selection.crma_digest for selection in selections]
    tasks = _group_rows(task_digests, loras, "task_digest", device)
    return Plan(tasks, _group_rows(crma_digests, backbones, "crma_digest", device))


def _group_rows(
    digests: Sequence[str | None],
    loaded: Mapping[str, Adapter],
    field: str,
    device: torch.device | str,
) -> list[tuple[Tensor | None, Adapter]]:
    """(rows, adapter) of each digest, in the order of first use; rows None where all rows use it.

    Args:
        digests: one for each row; None: no adapter.
        loaded: the adapters, by digest.
        field: what the digests are, for the error.
        device: of the row indices.
    """
    by_digest: dict[str, list[int]] = {}
    for row, digest in enumerate(digests):
        if digest is not None:
            by_digest.setdefault(digest, []).append(row)
    missing = set(by_digest) - set(loaded)
    if missing:
        digest = min(missing)
        message = f"{field}: {digest} is not loaded"
        raise ConfigError(message, field=field, value=digest, allowed=sorted(loaded))
    groups: list[tuple[Tensor | None, Adapter]] = []
    for digest, rows in by_digest.items():
        index = None if len(rows) == len(digests) else torch.tensor(rows, device=device)
        groups.append((index, loaded[digest]))
    return groups
