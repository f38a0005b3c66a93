"""A proxy in front of a server that can cut a connection in the middle of an answer."""

import socket
import struct
import threading
from contextlib import suppress
from dataclasses import dataclass, field
from urllib.parse import urlsplit

RESET = struct.pack("ii", 1, 0)  # SO_LINGER: closing sends RST, as a lost connection may


@dataclass
class CuttingProxy:
    """Relays bytes to a server and back.

    Args:
        server: its URL.
        cut_at: an answer in which this has come `after` times is cut there; b"": none is.
    """

    server: str
    cut_at: bytes = b""
    after: int = 2
    _listener: socket.socket = field(init=False)

    def __enter__(self) -> "CuttingProxy":
        self._listener = socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def _accept(self) -> None:
        with suppress(OSError):  # the listener was closed
            while True:
                client, _ = self._listener.accept()
                at = urlsplit(self.server)
                upstream = socket.create_connection((at.hostname, at.port))
                for relay in (self._send, self._answer):
                    threading.Thread(target=relay, args=(client, upstream), daemon=True).start()

    def _send(self, client: socket.socket, upstream: socket.socket) -> None:
        with suppress(OSError):
            while data := client.recv(65536):
                upstream.sendall(data)
            upstream.shutdown(socket.SHUT_WR)

    def _answer(self, client: socket.socket, upstream: socket.socket) -> None:
        seen = b""
        with suppress(OSError):
            while data := upstream.recv(65536):
                client.sendall(data)
                seen += data
                if self.cut_at and seen.count(self.cut_at) >= self.after:
                    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
                    break
        for each in (client, upstream):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RD)
            each.close()
