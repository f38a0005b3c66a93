"""Texts as tokens, and back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from crma_client import calls
from crma_client.async_connection import AsyncConnection
from crma_client.connection import Connection
from crma_client.types import read

if TYPE_CHECKING:
    from collections.abc import Sequence


class Tokens(Connection):
    """The tokenizer of `Client`."""

    def tokenize(self, prompt: str | None = None, **body: Any) -> dict[str, Any]:
        """Encode a prompt, or with `messages=[…]` a conversation, as the server would to answer it.

        Args:
            prompt: a raw prompt, which no prompt format changes.
            body: further fields of POST /tokenize, such as model and messages.

        Returns:
            Its tokens, their count, and max_model_len, as the server sent them.
        """
        content = calls.write_body({"prompt": prompt, **body})
        response = self._send("POST", "/tokenize", content=content)
        return calls.read_object(response)

    def detokenize(self, tokens: Sequence[int]) -> str:
        """The text of token ids."""
        content = calls.write_body({"tokens": list(tokens)})
        response = self._send("POST", "/detokenize", content=content)
        return read(str, calls.read_object(response).get("prompt"))


class AsyncTokens(AsyncConnection):
    """The tokenizer of `AsyncClient`."""

    async def tokenize(self, prompt: str | None = None, **body: Any) -> dict[str, Any]:
        """Encode a prompt or a conversation; see `Client.tokenize`."""
        content = calls.write_body({"prompt": prompt, **body})
        response = await self._send("POST", "/tokenize", content=content)
        return calls.read_object(response)

    async def detokenize(self, tokens: Sequence[int]) -> str:
        """The text of token ids."""
        content = calls.write_body({"tokens": list(tokens)})
        response = await self._send("POST", "/detokenize", content=content)
        return read(str, calls.read_object(response).get("prompt"))
