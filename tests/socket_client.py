"""A client that sends bytes as it likes, over a real socket."""

import asyncio
import json
from typing import Any


class Client:
    """A socket of a client."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def send(self, data: bytes) -> None:
        """Send bytes."""
        self.writer.write(data)
        await self.writer.drain()

    async def answer(self) -> tuple[int, Any]:
        """Status and body of the next answer; the body is read as JSON if it says so."""
        async with asyncio.timeout(10):
            head = (await self.reader.readuntil(b"\r\n\r\n")).decode().lower()
            length = int(head.partition("content-length: ")[2].partition("\r\n")[0])
            body = (await self.reader.readexactly(length)).decode()
        return int(head.split()[1]), json.loads(body) if "application/json" in head else body

    async def end(self) -> bytes:
        """What still comes until the server closes the connection."""
        async with asyncio.timeout(10):
            try:
                return await self.reader.read()
            except ConnectionError:
                return b""
