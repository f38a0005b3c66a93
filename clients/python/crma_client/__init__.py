"""Python client for CRMA Server.

`Client` blocks and `AsyncClient` is awaited; both have the same methods. The modules
`types` and `chats` have the classes they return, and `errors` the exceptions they raise.
"""

from crma_client import errors, types
from crma_client.async_client import AsyncClient
from crma_client.chats import Chat
from crma_client.client import Client
from crma_client.errors import CrmaClientError
from crma_client.types import Generation, Token

__all__ = [
    "AsyncClient",
    "Chat",
    "Client",
    "CrmaClientError",
    "Generation",
    "Token",
    "errors",
    "types",
]
