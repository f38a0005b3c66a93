"""Client of a CRMA Server: `Client` and `AsyncClient`; what they return is in `types`, what they raise in `errors`."""

from crma_client import errors, types
from crma_client.client import AsyncClient, Client
from crma_client.errors import CrmaClientError
from crma_client.types import Generation, Token

__all__ = ["AsyncClient", "Client", "CrmaClientError", "Generation", "Token", "errors", "types"]
