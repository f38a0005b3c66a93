"""`AsyncClient`: the calls of `Client`, awaited."""

from __future__ import annotations

from typing import Any

from crma_client.ablations import AsyncAblations
from crma_client.adapters import AsyncAdapters
from crma_client.answers import AsyncAnswers
from crma_client.backbones import AsyncBackbones
from crma_client.client import DEFAULT_URL
from crma_client.question_sets import AsyncQuestionSets
from crma_client.records import AsyncRecords
from crma_client.server_state import AsyncServerState
from crma_client.tokens import AsyncTokens


class AsyncClient(
    AsyncAnswers,
    AsyncAblations,
    AsyncQuestionSets,
    AsyncAdapters,
    AsyncBackbones,
    AsyncTokens,
    AsyncRecords,
    AsyncServerState,
):
    """An async client of one CRMA Server.

    Use it as an async context manager, or call `aclose()`. Its methods are those of `Client`,
    awaited; `Client` documents their arguments, results and errors.
    """

    def __init__(
        self,
        base_url: str = DEFAULT_URL,
        *,
        api_key: str | None = None,
        timeout: float | None = 60.0,
        retries: int = 2,
        **http: Any,
    ) -> None:
        """Take the arguments of `Client`; `http` are further arguments of `httpx.AsyncClient`."""
        super().__init__(base_url, api_key, timeout, retries, **http)
