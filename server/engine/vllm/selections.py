"""Which selections of adapters vLLM has as LoRAs, and in which folders they are.

A selection has the name of its digests, so that an adapter that is published again under its name
never meets keys and values of the old one: vLLM's prefix cache goes by name and folder.
"""

import asyncio
import hashlib
import logging
import shutil
from collections import OrderedDict
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from vllm.lora.request import LoRARequest
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError

from crma.core.errors import InvalidAdapter
from crma.core.selection import AdapterSelection
from server.engine.vllm.adapter_pool import HostAdapterPool
from server.engine.vllm.selection_folder import write_folder

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class _Loaded:
    """A selection that vLLM has. users: sequences that it runs with it."""

    lora: LoRARequest
    users: int = 0


class Selections:
    """The selections in vLLM; to be used on the event loop only.

    Args:
        llm: loads them.
        pool: has the adapters that they are made of.
        folder: where their files are; it is this object's own.
        blocks: the path of the blocks in the model.
        most: so many are kept, and more only where all are in use.
    """

    def __init__(
        self, llm: AsyncLLM, pool: HostAdapterPool, folder: Path, blocks: str, most: int
    ) -> None:
        self._llm = llm
        self._pool = pool
        self._folder = folder
        self._blocks = blocks
        self._most = most
        self._loaded: OrderedDict[AdapterSelection, _Loaded] = OrderedDict()
        self._ids = count(1)  # vLLM's: never used twice, because it caches by them
        self._lock = asyncio.Lock()

    def use(self, selection: AdapterSelection) -> LoRARequest | None:
        """Let a sequence run with a selection, until `release`. None: it is not loaded."""
        loaded = self._loaded.get(selection)
        if loaded is None:
            return None
        loaded.users += 1
        self._loaded.move_to_end(selection)
        return loaded.lora

    def release(self, selection: AdapterSelection) -> None:
        """A sequence has ended that ran with a selection."""
        self._loaded[selection].users -= 1

    async def load(self, selection: AdapterSelection) -> None:
        """Write a selection's folder and load it. Its adapters are in use in the pool.

        Raises:
            InvalidAdapter: vLLM refuses it.
        """
        async with self._lock:
            if selection in self._loaded:
                return
            while len(self._loaded) >= self._most and await self._drop_oldest():
                pass
            name = "+".join(digest or "none" for digest in selection)
            folder = self._folder / hashlib.sha256(name.encode()).hexdigest()[:32]
            await asyncio.to_thread(self._write, folder, selection)
            lora = LoRARequest(name, next(self._ids), str(folder))
            try:
                await self._llm.add_lora(lora)
            except Exception as error:
                shutil.rmtree(folder, ignore_errors=True)
                if isinstance(error, EngineDeadError):
                    raise
                logger.warning("vLLM does not load %s: %s", name, error)
                message = f"vLLM does not load this adapter: {error}"
                raise InvalidAdapter(message, field="digest", value=name) from error
            self._loaded[selection] = _Loaded(lora)

    async def drop_gone(self) -> None:
        """Free the selections that nobody uses and whose adapters are no longer resident."""
        async with self._lock:
            resident = {None, *self._pool.resident()}
            for selection, loaded in list(self._loaded.items()):
                if not loaded.users and not resident.issuperset(selection):
                    await self._drop(selection)

    async def _drop_oldest(self) -> bool:
        """Free the least recently used selection that nobody uses. False: there is none."""
        for selection, loaded in self._loaded.items():
            if not loaded.users:
                await self._drop(selection)
                return True
        return False

    async def _drop(self, selection: AdapterSelection) -> None:
        lora = self._loaded.pop(selection).lora
        await self._llm.remove_lora(lora.lora_int_id)
        await asyncio.to_thread(shutil.rmtree, lora.lora_path, ignore_errors=True)

    def _write(self, folder: Path, selection: AdapterSelection) -> None:
        lora = backbone = None
        if selection.task_digest is not None:
            lora = self._pool.loras[selection.task_digest]
        if selection.crma_digest is not None:
            backbone = self._pool.backbones[selection.crma_digest]
        write_folder(folder, lora, backbone, self._blocks)
