"""Adapters: what serves, what is in memory, and what administrators publish, stop and delete."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from crma_client import calls
from crma_client.async_connection import AsyncConnection
from crma_client.connection import Connection

if TYPE_CHECKING:
    from os import PathLike


class Adapters(Connection):
    """The adapters of `Client`. A task is `name`, or `name@version` for a version of it."""

    def adapters(self) -> dict[str, Any]:
        """List the base model, the CRMA backbone and the task adapters that the server serves."""
        response = self._send("GET", "/adapters")
        return calls.read_object(response)

    def adapter(self, name: str) -> dict[str, Any]:
        """Get the versions of a task, which of them serves, and the history of that."""
        response = self._send("GET", calls.adapter_path(name))
        return calls.read_object(response)

    def upload_adapter(
        self,
        name: str,
        folder: str | PathLike[str],
        *,
        licence: str | None = None,
        trust_base: bool = False,
        prompt_format: str | None = None,
    ) -> dict[str, Any]:
        """Publish a PEFT LoRA on the server as the next version of a task. Needs the admin key.

        Args:
            name: of the task, which serves this version from now on.
            folder: holds adapter_config.json and adapter_model.safetensors; the tokenizer's files
                in it are sent too.
            licence: of the adapter, such as Apache-2.0, if you know it.
            trust_base: publish it even if its config names another base model.
            prompt_format: raw, chat or template. None: the adapter's own template if it has one,
                else that of the base model, else raw.

        Returns:
            The version, as `adapters` lists it.

        Raises:
            InvalidArgument: a file of the folder cannot be opened.
        """
        fields = calls.upload_fields(name, licence, trust_base, prompt_format)
        with calls.upload_form(folder, fields) as form:
            response = self._send("POST", "/adapters", **form)
        return calls.read_object(response)

    def load_adapter(self, task: str) -> dict[str, Any]:
        """Bring an adapter into memory before a request needs it. Needs the admin key."""
        response = self._send("POST", calls.adapter_path(task, "load"))
        return calls.read_object(response)

    def unload_adapter(
        self, task: str, when_in_use: Literal["refuse", "wait", "cancel"] = "refuse"
    ) -> dict[str, Any]:
        """Free the memory of an adapter until a request needs it again. Needs the admin key.

        Args:
            task: the adapter.
            when_in_use: refuse: a Conflict; wait: for its requests; cancel: end them with an error.
        """
        path = calls.adapter_path(task, "unload")
        response = self._send("POST", calls.query_path(path, {"when_in_use": when_in_use}))
        return calls.read_object(response)

    def pin_adapter(self, task: str) -> dict[str, Any]:
        """Load an adapter and keep it in memory until it is unpinned. Needs the admin key."""
        response = self._send("POST", calls.adapter_path(task, "pin"))
        return calls.read_object(response)

    def unpin_adapter(self, task: str) -> dict[str, Any]:
        """Undo `pin_adapter`. Needs the admin key."""
        response = self._send("POST", calls.adapter_path(task, "unpin"))
        return calls.read_object(response)

    def roll_back_adapter(self, name: str) -> dict[str, Any]:
        """Let the version of a task serve that served before. Needs the admin key."""
        response = self._send("POST", calls.adapter_path(name, "rollback"))
        return calls.read_object(response)

    def stop_adapter(self, name: str) -> None:
        """Let no version of a task serve; all stay in the store. Needs the admin key."""
        body = calls.write_body({"lora_name": name})
        self._send("POST", "/v1/unload_lora_adapter", body)

    def delete_adapter(self, task: str) -> dict[str, Any]:
        """Delete a version, `name@version`, or all of a task that no longer serves. Needs the admin
        key.
        """
        response = self._send("DELETE", calls.adapter_path(task))
        return calls.read_object(response)


class AsyncAdapters(AsyncConnection):
    """The adapters of `AsyncClient`. A task is `name`, or `name@version` for a version of it."""

    async def adapters(self) -> dict[str, Any]:
        """List the base model, the CRMA backbone and the task adapters that the server serves."""
        response = await self._send("GET", "/adapters")
        return calls.read_object(response)

    async def adapter(self, name: str) -> dict[str, Any]:
        """Get the versions of a task, which of them serves, and the history of that."""
        response = await self._send("GET", calls.adapter_path(name))
        return calls.read_object(response)

    async def upload_adapter(
        self,
        name: str,
        folder: str | PathLike[str],
        *,
        licence: str | None = None,
        trust_base: bool = False,
        prompt_format: str | None = None,
    ) -> dict[str, Any]:
        """Publish a PEFT LoRA from a folder; see `Client.upload_adapter`."""
        fields = calls.upload_fields(name, licence, trust_base, prompt_format)
        with calls.upload_form(folder, fields) as form:
            response = await self._send("POST", "/adapters", **form)
        return calls.read_object(response)

    async def load_adapter(self, task: str) -> dict[str, Any]:
        """Bring an adapter into memory before a request needs it. Needs the admin key."""
        response = await self._send("POST", calls.adapter_path(task, "load"))
        return calls.read_object(response)

    async def unload_adapter(
        self, task: str, when_in_use: Literal["refuse", "wait", "cancel"] = "refuse"
    ) -> dict[str, Any]:
        """Free the memory of an adapter; see `Client.unload_adapter`."""
        path = calls.adapter_path(task, "unload")
        response = await self._send("POST", calls.query_path(path, {"when_in_use": when_in_use}))
        return calls.read_object(response)

    async def pin_adapter(self, task: str) -> dict[str, Any]:
        """Load an adapter and keep it in memory until it is unpinned. Needs the admin key."""
        response = await self._send("POST", calls.adapter_path(task, "pin"))
        return calls.read_object(response)

    async def unpin_adapter(self, task: str) -> dict[str, Any]:
        """Undo `pin_adapter`. Needs the admin key."""
        response = await self._send("POST", calls.adapter_path(task, "unpin"))
        return calls.read_object(response)

    async def roll_back_adapter(self, name: str) -> dict[str, Any]:
        """Let the version of a task serve that served before. Needs the admin key."""
        response = await self._send("POST", calls.adapter_path(name, "rollback"))
        return calls.read_object(response)

    async def stop_adapter(self, name: str) -> None:
        """Let no version of a task serve; all stay in the store. Needs the admin key."""
        body = calls.write_body({"lora_name": name})
        await self._send("POST", "/v1/unload_lora_adapter", body)

    async def delete_adapter(self, task: str) -> dict[str, Any]:
        """Delete a version, `name@version`, or all of a task that no longer serves. Needs the admin
        key.
        """
        response = await self._send("DELETE", calls.adapter_path(task))
        return calls.read_object(response)
