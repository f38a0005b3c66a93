"""What an administrator may change in the store through the server: publish, stop, delete a task.

One change at a time. Each is on disk and in the registry when its method returns.
"""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from crma.core.errors import NotFound, StoreError, VersionServes
from crma.core.files import names_in
from crma.store.channels import BACKBONE, task_channel
from crma.store.entry import TaskEntry
from server.engine.errors import AdapterInUse
from server.engine.inference_engine import InferenceEngine
from server.service.errors import AdapterExists, AdapterServes, StoreBusy, StoreNotWritable
from server.service.registry import Registry

TURN_S = 30.0  # that a change waits for others, and for the store to be read


@contextmanager
def writing() -> Iterator[None]:
    """Raises StoreNotWritable for an error of the file system in the block."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or type(error).__name__
        message = f"the adapter store cannot be changed: {reason}"
        raise StoreNotWritable(message, field="CRMA_STORE", allowed="a folder to write") from error


@dataclass(eq=False)
class Publisher:
    """Changes the store that a registry reads.

    Args:
        longest_request_s: after so long, no request can still need an adapter that is gone.
    """

    registry: Registry
    engine: InferenceEngine
    longest_request_s: float
    _change: asyncio.Lock = field(default_factory=asyncio.Lock, init=False)

    async def publish(
        self,
        folder: Path,
        name: str,
        *,
        licence: str = "unknown",
        replace: bool = True,
        trust_base: bool = False,
        prompt_format: str | None = None,
    ) -> TaskEntry:
        """Publish a PEFT LoRA as the next version of a task, and serve it.

        Args:
            folder: holds PEFT's files; trusted, and only read.
            replace: False: a task of this name must not serve yet.
            trust_base: publish it even if its config names another base model.
            prompt_format: raw, chat or template; None: as `crma store import` chooses.

        Raises:
            AdapterExists: it serves, and is not to be replaced.
            ConfigError, StoreError: as `AdapterStore.import_peft`.
        """
        registry = self.registry
        async with self._changing():
            if not replace and name in registry.task_names:
                message = f"task {name!r} serves already: send load_inplace true to replace it"
                raise AdapterExists(message, field="lora_name", value=name, allowed="a new name")
            entry = await registry.threads.run(
                partial(
                    registry.store.import_peft,
                    folder,
                    name,
                    registry.base,
                    licence=licence,
                    shape=registry.shape,
                    trust_base=trust_base,
                    prompt_format=prompt_format,
                )
            )
            await registry.refresh()
        return entry

    async def stop(self, name: str) -> None:
        """Let no version of a task serve. Its versions stay in the store, and requests that run
        with them end as they would have.

        Raises:
            NotFound: no such task serves.
        """
        registry = self.registry
        async with self._changing():
            if name not in registry.task_names:
                message = f"no task {name!r} serves"
                allowed = registry.task_names
                raise NotFound(message, field="lora_name", value=name, allowed=allowed)
            entries = registry.versions(name)
            stop = partial(registry.store.set_serving, {task_channel(name): None})
            await registry.threads.run(stop)
            await registry.refresh()
            await self._free(entries)

    async def roll_back(self, name: str) -> str:
        """Let the version of a task serve that served before, and return it.

        Raises:
            NotFound: no such task serves, or nothing served before.
            LineageMismatch: that version does not fit the backbone that serves.
        """
        registry = self.registry
        async with self._changing():
            if name not in registry.task_names:
                message = f"no task {name!r} serves"
                allowed = registry.task_names
                raise NotFound(message, field="task", value=name, allowed=allowed)
            roll_back = partial(registry.store.roll_back, task_channel(name))
            channels = await registry.threads.run(roll_back)
            await registry.refresh()
        return channels.tasks[name]

    async def roll_back_backbone(self) -> None:
        """Let the backbone serve that served before, and the versions of tasks that fit it.

        Raises:
            NotFound: no backbone served before.
            LineageMismatch: a task would fit it in no version.
        """
        registry = self.registry
        async with self._changing():
            await registry.threads.run(partial(registry.store.roll_back, BACKBONE))
            await registry.refresh()

    async def delete(self, name: str, version: str | None) -> tuple[str, ...]:
        """Remove a version of a task, or all of them, from the store. Requests that run or wait
        with them end as they would have.

        Returns:
            The versions that are gone.

        Raises:
            NotFound: there is no such task or version.
            AdapterServes: a version to remove serves.
        """
        async with self._changing():
            threads = self.registry.threads
            entries = await threads.run(partial(self._unserved, name, version))
            for entry in entries:
                await self.registry.hold(entry)
            removed = await threads.run(partial(self._remove, name, version))
            await self.registry.refresh()
            self.registry.forget(entries, after_s=self.longest_request_s)
            await self._free(entries)
        return removed

    @asynccontextmanager
    async def _changing(self) -> AsyncIterator[None]:
        """One change at a time, which begins with what the store has now.

        Raises:
            ReadOnlyStore: the store is a copy.
            StoreBusy: its turn did not come in time.
        """
        self.registry.store.writable_root()
        async with AsyncExitStack() as turn:
            with writing():
                await self._begin(turn)
                yield

    async def _begin(self, turn: AsyncExitStack) -> None:
        """Wait for the turn, which `turn` ends. Raises StoreBusy."""
        try:
            async with asyncio.timeout(TURN_S):
                await turn.enter_async_context(self._change)
                await self.registry.refresh()
        except TimeoutError as error:
            message = (
                f"the adapter store did not answer for {TURN_S:g} s, or another change of it takes "
                "as long; nothing was changed"
            )
            raise StoreBusy(message, field="CRMA_STORE", allowed="try again later") from error

    def _unserved(self, name: str, version: str | None) -> list[TaskEntry]:
        """The versions to delete that are sound and do not serve.

        Raises NotFound if there is no task of this name.
        """
        store = self.registry.store
        known = names_in(store.root, "tasks")
        if name not in known:
            message = f"no task {name!r} in this server's store"
            raise NotFound(message, field="task", value=name, allowed=sorted(known))
        serving = store.channels().version(task_channel(name))
        found = []
        for each in store.task_versions(name):
            if version in (None, each) and each != serving:
                with suppress(StoreError):  # a damaged one was never loaded
                    found.append(store.task(name, each))
        return found

    def _remove(self, name: str, version: str | None) -> tuple[str, ...]:
        """`AdapterStore.remove_task`; of what serves the error says what to do first."""
        try:
            return self.registry.store.remove_task(name, version)
        except VersionServes as error:
            first = "POST /v1/unload_lora_adapter stops it; crma store rollback serves another"
            message = f"{error.message} ({first})"
            raise AdapterServes(message, field="task", value=error.value, allowed=first) from error

    async def _free(self, entries: list[TaskEntry]) -> None:
        """Free the memory of adapters that no name leads to any more, unless requests use them."""
        named = self.registry.names()
        for entry in entries:
            if entry.digest not in named:
                self.engine.unpin(entry.digest)
                with suppress(AdapterInUse):  # then it is evicted like any other, once it is not
                    await self.engine.unload(entry.digest)
