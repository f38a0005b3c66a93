"""Rotary embeddings of a mixed batch: each row by the frequencies of its own sequence.

Mostly these are the same for all sequences, and a position's cosines and sines are kept. Else
transformers' modules choose one table for all rows of a call, by the largest position in it, and
keep it for later calls. This takes their arithmetic, but chooses row by row and keeps nothing.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import embedding

from crma.core.errors import UnsupportedModel
from crma.models.rope import RopeScaling
from server.engine.native.step import Chunk

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Rotation = tuple[Tensor, Tensor]  # cosines and sines [T, 1, e], the first half of the sines negated
Rotary = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # h, positions -> cosines, sines

FEWEST_POSITIONS = 1024  # of a table; it grows to the next power of two
NUM_TABLES = 256  # kept: of a dynamic model, every length beyond the original one has its own


class Rotations:
    """What turns the queries and keys of a batch.

    Args:
        rotary: the model's embedding, or what takes its place.
        is_steady: a position's rotation is always the same: it is computed once.
    """

    def __init__(self, rotary: Rotary, *, is_steady: bool) -> None:
        self._rotary = rotary
        self._is_steady = is_steady
        self._num_known = 0
        self._known: Rotation | None = None  # of the positions from 0 on: [n, e]

    def at(self, positions: Tensor, num_positions: int, h: Tensor) -> Rotation:
        """The rotations of positions [T].

        Args:
            num_positions: they lie below it.
            h: its dtype is that of the result.
        """
        if not self._is_steady:
            cos, sin = self._computed(positions, h)
            return cos[:, None], sin[:, None]
        if self._known is None or num_positions > self._num_known:
            self._num_known = max(FEWEST_POSITIONS, 1 << (num_positions - 1).bit_length())
            first = torch.arange(self._num_known, device=positions.device)
            self._known = self._computed(first, h)
        cos, sin = self._known
        return embedding(positions, cos)[:, None], embedding(positions, sin)[:, None]

    def _computed(self, positions: Tensor, h: Tensor) -> Rotation:
        """As `at`, but [T, e]."""
        cos, sin = self._rotary(h, positions[None])
        half = sin.shape[-1] // 2
        return cos[0], torch.cat((-sin[0, :, :half], sin[0, :, half:]), dim=-1)


class ScaledRotary:
    """The cosines and sines of a batch whose sequences have different frequencies.

    Args:
        model: has one rotary embedding for all its layers.
        scaling: says which length's frequencies a token gets.

    Raises:
        UnsupportedModel: the model has none, several, or one that works otherwise.
    """

    def __init__(self, model: PreTrainedModel, scaling: RopeScaling) -> None:
        self.scaling = scaling
        self._module = _rotary_module(model, scaling)
        self._config: Any = model.config
        self._lengths: list[int] = []
        self._table = lru_cache(NUM_TABLES)(self._new_table)

    def set_rows(self, chunks: list[Chunk]) -> None:
        """Choose the frequencies of the next batch, whose rows are the tokens of some chunks."""
        self._lengths = []
        for chunk in chunks:
            num_prompt_tokens = len(chunk.sequence.request.prompt_ids)
            num_tokens = len(chunk.sequence.token_ids)
            self._lengths += [
                self.scaling.length_at(position, num_prompt_tokens, num_tokens)
                for position in range(chunk.start, chunk.stop)
            ]

    def __call__(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Take the place of the module's own forward pass.

        Args:
            x: its dtype and device are those of the result.
            position_ids: [1, T] or [T, 1], of the rows that were set.

        Returns:
            Cosines and sines, of the shape of `position_ids` and one more dimension.
        """
        lengths = torch.tensor(self._lengths, device=position_ids.device)
        positions = position_ids.flatten()
        tables: list[Tensor] = [x.new_empty(0), x.new_empty(0)]
        for length in set(self._lengths):
            rows = (lengths == length).nonzero()[:, 0]
            found = self._table(length)(x, positions[rows][None])
            for index, part in enumerate(found):
                if not tables[index].numel():
                    tables[index] = part.new_empty(len(positions), part.shape[-1])
                tables[index][rows] = part[0]
        cos, sin = (table.view(*position_ids.shape, -1) for table in tables)
        return cos, sin

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Let the model compute with this for one step; between steps it has its own."""
        self._module.forward = self
        try:
            yield
        finally:
            del self._module.forward

    def _new_table(self, length: int) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """The module's arithmetic with the frequencies of a length."""
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS  # few models come here

        module: Any = copy.copy(self._module)
        module._buffers = dict(module._buffers)
        module.inv_freq = self._module.original_inv_freq
        if length > self.scaling.original:
            # A tensor, as transformers has it there: the powers are then rounded alike.
            device = self._module.original_inv_freq.device
            compute = ROPE_INIT_FUNCTIONS[self._module.rope_type]
            module.inv_freq, _ = compute(self._config, device, seq_len=torch.tensor(length))
        plain = type(module).forward.__wrapped__
        return lambda x, position_ids: plain(module, x, position_ids)


def _rotary_module(model: PreTrainedModel, scaling: RopeScaling) -> Any:
    """The module that computes the cosines and sines of all layers."""
    found = [module for module in model.modules() if hasattr(module, "original_inv_freq")]
    can_follow = len(found) == 1 and scaling.kind != "mixed"
    if can_follow and hasattr(type(found[0]).forward, "__wrapped__"):
        return found[0]
    name = type(model).__name__
    raise UnsupportedModel(
        f"{name} cannot be served beyond {scaling.original} tokens: its rotary frequencies depend "
        "on the length of a sequence in a way that cannot be followed row by row",
        field="rope_type",
        value=scaling.kind,
        allowed=f"max_model_len <= {scaling.original}",
    )
