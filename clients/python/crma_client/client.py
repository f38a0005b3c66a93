"""`Client`: every call blocks until its answer is there."""

from __future__ import annotations

from typing import Any

from crma_client.ablations import Ablations
from crma_client.adapters import Adapters
from crma_client.answers import Answers
from crma_client.backbones import Backbones
from crma_client.question_sets import QuestionSets
from crma_client.records import Records
from crma_client.server_state import ServerState
from crma_client.tokens import Tokens

DEFAULT_URL = "http://127.0.0.1:8000"


class Client(Answers, Ablations, QuestionSets, Adapters, Backbones, Tokens, Records, ServerState):
    """A blocking client of one CRMA Server.

    Use it as a context manager, or call `close()`. Threads may share it. Every method raises a
    class of `crma_client.errors` and nothing else.
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
        """Prepare a client; it connects at the first request.

        Args:
            base_url: the address of the server.
            api_key: sent as a bearer token.
            timeout: seconds to wait for a connection and for each part of an answer: the next token
                of a stream, or else the whole answer. None waits for ever, but no longer than 10 s
                for a connection.
            retries: most attempts after the first. Only what cannot have run is sent again (there
                was no connection, or the server was full, not ready, or about to stop), and what
                only reads, after any failure but a time-out. Waits grow, differ at random, and are
                never shorter than Retry-After.
            http: further arguments of `httpx.Client`, such as verify, proxy or transport.

        Raises:
            InvalidArgument: `base_url` is not a URL, or a header cannot carry `api_key`.
        """
        super().__init__(base_url, api_key, timeout, retries, **http)
