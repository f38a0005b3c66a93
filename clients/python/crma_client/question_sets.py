"""Question sets: what there is, one of them, and those that a key keeps on the server."""

from __future__ import annotations

from typing import Any

from crma_client import calls
from crma_client.async_connection import AsyncConnection
from crma_client.connection import Connection


class QuestionSets(Connection):
    """The question sets of `Client`."""

    def question_sets(self) -> list[Any]:
        """List name, digest, number of items and source of the question sets that you may ask."""
        response = self._send("GET", "/question_sets")
        return calls.read_list(response)

    def question_set(self, name: str) -> list[dict[str, Any]]:
        """Get the questions of a set, as the argument `questions` of `ablation` takes them."""
        response = self._send("GET", calls.question_set_path(name))
        return calls.read_lines(response)

    def upload_question_set(self, name: str, lines: bytes) -> dict[str, Any]:
        """Store a question set, given as JSON Lines, for your key; an admin's is for every key."""
        response = self._send("PUT", calls.question_set_path(name), lines)
        return calls.read_object(response)

    def delete_question_set(self, name: str) -> dict[str, Any]:
        """Delete a question set that you uploaded."""
        response = self._send("DELETE", calls.question_set_path(name))
        return calls.read_object(response)


class AsyncQuestionSets(AsyncConnection):
    """The question sets of `AsyncClient`."""

    async def question_sets(self) -> list[Any]:
        """List name, digest, number of items and source of the question sets that you may ask."""
        response = await self._send("GET", "/question_sets")
        return calls.read_list(response)

    async def question_set(self, name: str) -> list[dict[str, Any]]:
        """Get the questions of a set, as the argument `questions` of `ablation` takes them."""
        response = await self._send("GET", calls.question_set_path(name))
        return calls.read_lines(response)

    async def upload_question_set(self, name: str, lines: bytes) -> dict[str, Any]:
        """Store a question set, given as JSON Lines, for your key; an admin's is for every key."""
        response = await self._send("PUT", calls.question_set_path(name), lines)
        return calls.read_object(response)

    async def delete_question_set(self, name: str) -> dict[str, Any]:
        """Delete a question set that you uploaded."""
        response = await self._send("DELETE", calls.question_set_path(name))
        return calls.read_object(response)
