"""Backbones: the versions there are, which serves, and how an administrator changes that."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from crma_client import calls
from crma_client.async_connection import AsyncConnection
from crma_client.connection import Connection

if TYPE_CHECKING:
    from collections.abc import Sequence


class Backbones(Connection):
    """The CRMA backbones of `Client`."""

    def backbones(self) -> dict[str, Any]:
        """Get the versions of the CRMA backbone, which of them serves, and the history of that."""
        response = self._send("GET", "/backbones")
        return calls.read_object(response)

    def roll_back_backbone(self) -> dict[str, Any]:
        """Let the backbone serve that served before. Needs the admin key."""
        response = self._send("POST", "/backbones/rollback")
        return calls.read_object(response)

    def promote_backbone(
        self,
        version: str,
        *,
        dry_run: bool = True,
        margin: float | None = None,
        newcomer_margin: float | None = None,
        allow_ungated: Sequence[str] | None = None,
    ) -> dict[str, Any]:
        """Begin to judge a backbone, which `promotion` then follows. Needs the admin key.

        Args:
            version: a published one that does not serve yet.
            dry_run: decide, and change nothing. False: it serves, whole or as a blend, if no task
                suffers.
            margin: share of its loss by which a task may get worse. Default: 0.01.
            newcomer_margin: the same for a task that nobody uses yet. Default: 0.1.
            allow_ungated: tasks that need not be scored.
        """
        fields = {"dry_run": dry_run, "margin": margin, "newcomer_margin": newcomer_margin}
        tasks = None if allow_ungated is None else list(allow_ungated)
        body = calls.write_body({**fields, "allow_ungated": tasks})
        response = self._send("POST", calls.promote_path(version), body)
        return calls.read_object(response)

    def promotion(self) -> dict[str, Any]:
        """Get the promotion that runs, or ran last: its status, and its evidence once done. Needs
        the admin key.
        """
        response = self._send("GET", "/backbones/promotion")
        return calls.read_object(response)

    def cancel_promotion(self) -> dict[str, Any]:
        """Cancel the promotion that runs; then it has changed nothing. Needs the admin key."""
        response = self._send("DELETE", "/backbones/promotion")
        return calls.read_object(response)


class AsyncBackbones(AsyncConnection):
    """The CRMA backbones of `AsyncClient`."""

    async def backbones(self) -> dict[str, Any]:
        """Get the versions of the CRMA backbone, which of them serves, and the history of that."""
        response = await self._send("GET", "/backbones")
        return calls.read_object(response)

    async def roll_back_backbone(self) -> dict[str, Any]:
        """Let the backbone serve that served before. Needs the admin key."""
        response = await self._send("POST", "/backbones/rollback")
        return calls.read_object(response)

    async def promote_backbone(
        self,
        version: str,
        *,
        dry_run: bool = True,
        margin: float | None = None,
        newcomer_margin: float | None = None,
        allow_ungated: Sequence[str] | None = None,
    ) -> dict[str, Any]:
        """Begin to judge a backbone; see `Client.promote_backbone`."""
        fields = {"dry_run": dry_run, "margin": margin, "newcomer_margin": newcomer_margin}
        tasks = None if allow_ungated is None else list(allow_ungated)
        body = calls.write_body({**fields, "allow_ungated": tasks})
        response = await self._send("POST", calls.promote_path(version), body)
        return calls.read_object(response)

    async def promotion(self) -> dict[str, Any]:
        """Get the promotion that runs, or ran last: its status, and its evidence once done. Needs
        the admin key.
        """
        response = await self._send("GET", "/backbones/promotion")
        return calls.read_object(response)

    async def cancel_promotion(self) -> dict[str, Any]:
        """Cancel the promotion that runs; then it has changed nothing. Needs the admin key."""
        response = await self._send("DELETE", "/backbones/promotion")
        return calls.read_object(response)
