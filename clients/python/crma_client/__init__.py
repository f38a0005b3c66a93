"""Python client for CRMA Server.

`Client` blocks and `AsyncClient` is awaited; both have the same methods. The module `types` has the
classes they return, and `errors` the exceptions they raise.
"""

from crma_client import errors, types
from crma_client.async_client import AsyncClient
from crma_client.client import Client
from crma_client.errors import CrmaClientError
from crma_client.types import Generation, Token

__all__ = ["AsyncClient", "Client", "CrmaClientError", "Generation", "Token", "errors", "types"]
