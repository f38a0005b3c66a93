"""The processes that train one run together, each on its share of every batch.

`accelerate launch` and `torchrun` start them. They end every step with the same gradients, bit for
bit, and so with the same adapters; the first of them writes.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Self, TypeVar

import torch
from torch import Tensor, distributed

from crma.core.errors import TrainingError

Item = TypeVar("Item")


@dataclass(frozen=True)
class Ranks:
    """One of `size` processes, by default alone.

    Attributes:
        rank: the number of this process, counted from 0.
        size: how many there are.
        sharded: each holds a part of the base model, so every forward pass takes all of them.
    """

    rank: int = 0
    size: int = 1
    sharded: bool = False

    @classmethod
    def join(cls) -> Self:
        """Meet the processes that were started with this one; alone if it was started alone.

        On CUDA each process has a device of its own from then on.
        """
        if not distributed.is_available() or not distributed.is_torchelastic_launched():
            return cls()
        has_cuda = torch.cuda.is_available()
        if has_cuda:
            torch.cuda.set_device(distributed.get_node_local_rank())
        if not distributed.is_initialized():
            distributed.init_process_group("cpu:gloo,cuda:nccl" if has_cuda else "gloo")
        size = distributed.get_world_size()
        return cls(distributed.get_rank(), size, sharded=size > 1 and _is_sharded())

    @property
    def writes(self) -> bool:
        """Whether this process writes what all have trained."""
        return self.rank == 0

    @property
    def measures(self) -> bool:
        """Whether this process takes part in forward passes that only measure."""
        return self.writes or self.sharded

    def share(self, items: Sequence[Item]) -> Sequence[Item]:
        """This process's part of a batch; it may be empty."""
        return items[self.rank :: self.size]

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors of one dtype and device by their sums over all processes."""
        if self.size == 1:
            return
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        distributed.all_reduce(flat)
        parts = torch.split(flat, [tensor.numel() for tensor in tensors])
        for tensor, part in zip(tensors, parts, strict=True):
            tensor.copy_(part.view_as(tensor))

    def wait(self) -> None:
        """Wait until all processes are here."""
        if self.size > 1:
            distributed.barrier()

    def check_same(self, tensors: Iterable[Tensor]) -> None:
        """Raise TrainingError, in every process, if the tensors differ between processes."""
        if self.size == 1:
            return
        found: list[str | None] = [None] * self.size
        distributed.all_gather_object(found, _digest(tensors))
        if len(set(found)) != 1:
            message = "the processes have trained different adapters"
            allowed = "the same bits in every process"
            raise TrainingError(message, field="ranks", value=found, allowed=allowed)

    def leave(self) -> None:
        """Part from the others."""
        if self.size > 1:
            distributed.destroy_process_group()


ALONE = Ranks()


def _is_sharded() -> bool:
    """Whether `accelerate launch --use_fsdp` started this process."""
    try:
        from accelerate.utils import parse_flag_from_env
    except ImportError:
        return False  # torchrun
    return bool(parse_flag_from_env("ACCELERATE_USE_FSDP"))


def _digest(tensors: Iterable[Tensor]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
