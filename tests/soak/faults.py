"""Wrong input and bad connections of every kind, sent while others are being answered."""

import json
import random
import socket
import struct
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httpx
from hostile_bodies import BODIES

from crma.store.manifest import TASK_FILES
from soak.adapters import Adapters
from soak.caller import CUT_OFF, Caller, label

JSON = {"Content-Type": "application/json"}
NUMBERS = (10**309, -(10**309), 1e308, -1e308, 10**18, 3e38, float("inf"), float("nan"))
NUMBER_FIELDS = (
    *("top_k", "top_p", "min_p", "temperature", "repetition_penalty", "presence_penalty"),
    *("frequency_penalty", "max_tokens", "min_tokens", "seed", "n", "timeout_s", "stop_token_ids"),
)
CONNECTION_PATIENCE_S = 40.0
NUM_IDLE = 200
NUM_BURST = 60
CLOSED = "closed"
NO_ANSWER = "no answer"
REFUSALS = (CLOSED, *("400", "401", "404", "405", "408", "409", "413", "422", "429", "431", "504"))


@dataclass(eq=False)
class Attacker:
    """Does one fault at a time, then looks whether the server answers as before.

    Args:
        caller: with a key for generate and ablate, of a tenant of its own.
        admin: with a key for admin.
        adapters: has the weights that overflow.
    """

    caller: Caller
    admin: Caller
    adapters: Adapters
    rng: random.Random

    def attack(self) -> None:
        """Do one of the faults; most often one of those that take no time."""
        quick = [self.huge_number, self.hostile_body, self.wrong_request, self.overflowing_weights]
        slow = [self.broken_connection, self.idle_connections, self.burst, self.long_prompts]
        self.rng.choice(quick * 3 + slow + [self.heavy_answer])()
        self.caller.gate.pause(0.3)

    # Requests -----------------------------------------------------------------------------------

    def huge_number(self) -> None:
        field = self.rng.choice(NUMBER_FIELDS)
        value: Any = self.rng.choice(NUMBERS)
        body = {"prompt": "Hi", "task": "legal", "max_tokens": 4, "temperature": 1.0}
        body[field] = [value] if field == "stop_token_ids" else value
        self._post(f"a huge {field}", "/generate", json.dumps(body))

    def hostile_body(self) -> None:
        name = self.rng.choice(list(BODIES))
        path, body = BODIES[name]
        self._post(name, path, body)

    def wrong_request(self) -> None:
        """Unknown fields, tasks, keys, routes, methods and encodings."""
        good = json.dumps({"prompt": "Hi", "max_tokens": 2})
        unknown_key = {"Authorization": "Bearer nobody"}
        requests: dict[str, tuple[str, str, bytes | str, dict[str, str]]] = {
            "an unknown field": ("POST", "/generate", '{"prompt": "Hi", "nonsense": 1}', {}),
            "an unknown task": ("POST", "/generate", '{"prompt": "Hi", "task": "nobody"}', {}),
            "an unknown key": ("POST", "/generate", good, unknown_key),
            "an unknown route": ("POST", "/nowhere", good, {}),
            "a wrong method": ("PUT", "/generate", good, {}),
            "invalid UTF-8": ("POST", "/generate", b'{"prompt": "\xff\xfe"}', {}),
            "no JSON": ("POST", "/generate", '{"prompt": ', {}),
            "another content type": ("POST", "/generate", good, {"Content-Type": "text/plain"}),
            "a body over the limit": ("POST", "/generate", "x" * (3 << 20), {}),
            "headers over the limit": ("GET", "/v1/models", "", {"X-Long": "x" * 100_000}),
            "a deadline that has passed": ("POST", "/generate", self._late(), {}),
        }
        name = self.rng.choice(list(requests))
        method, path, content, headers = requests[name]
        self._send(name, method, path, may_succeed=False, content=content, headers=JSON | headers)

    def overflowing_weights(self) -> None:
        """Import weights of 3e38."""
        folder = self.adapters.overflowing
        files = [("files", (name, (folder / name).read_bytes())) for name in TASK_FILES]
        fields = {"name": "overflowing", "trust_base": "true"}
        name = "weights of 3e38"
        request = {"caller": self.admin, "data": fields, "files": files}
        self._send(name, "POST", "/adapters", may_succeed=False, **request)

    def heavy_answer(self) -> None:
        """20 log-probabilities of each token of a long prompt."""
        ids = [(i * 37) % 40_000 + 300 for i in range(1000)]
        body = {"model": "base", "prompt": ids, "echo": True, "logprobs": 20, "max_tokens": 1}
        self._post("1,000 tokens with 20 log-probabilities", "/v1/completions", json.dumps(body))

    def long_prompts(self) -> None:
        """Prompts of the length of the context, while others ask for a word."""
        body = {"prompt": "word " * self.rng.choice([1500, 1900, 200_000]), "max_tokens": 1}
        for _ in range(3):
            self._post("a long prompt", "/generate", json.dumps(body | {"timeout_s": 30.0}))

    def burst(self) -> None:
        """Many requests of one key at once, most of whose answers nobody waits for."""

        def act() -> str:
            body = json.dumps({"prompt": "Hi", "max_tokens": 40, "ignore_eos": True}).encode()
            with ExitStack() as open_sockets:
                for _ in range(NUM_BURST):
                    self._connect(open_sockets).sendall(self._head(len(body)) + body)
                time.sleep(1.0)
            return CLOSED

        self._do(f"{NUM_BURST} requests, then gone", act)

    def _late(self) -> str:
        return json.dumps({"prompt": "Hi", "max_tokens": 400, "timeout_s": 0.001})

    # Connections --------------------------------------------------------------------------------

    def broken_connection(self) -> None:
        """Send part of a request, or no request at all, and wait for what comes."""
        whole = json.dumps({"prompt": "Hi", "max_tokens": 30, "ignore_eos": True}).encode()
        head = self._head(len(whole))
        kinds: dict[str, tuple[bytes, bool]] = {  # what is sent, and whether to wait for an answer
            "half a head": (head[: len(head) // 2], True),
            "half a body": (head + whole[:10], True),
            "a head without an end": (b"GET /healthz HTTP/1.1\r\nX: " + b"x" * 100_000, True),
            "no HTTP": (b"\x16\x03\x01\x02\x00\x01\x00" + bytes(range(200)), True),
            "nothing": (b"", True),
            "a request, then a reset": (head + whole, False),
            "half a body, then a reset": (head + whole[:10], False),
        }
        name = self.rng.choice(list(kinds))
        data, waits = kinds[name]

        def act() -> str:
            with ExitStack() as open_sockets:
                connection = self._connect(open_sockets)
                with suppress(BrokenPipeError, ConnectionResetError):
                    connection.sendall(data)
                if not waits:
                    time.sleep(0.1)
                    linger = struct.pack("ii", 1, 0)
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                    return CLOSED
                return _first_line(connection)

        self._do(name, act)

    def idle_connections(self) -> None:
        def act() -> str:
            with ExitStack() as open_sockets:
                for _ in range(NUM_IDLE):
                    self._connect(open_sockets)
                time.sleep(1.0)
            return CLOSED

        self._do(f"{NUM_IDLE} idle connections", act)

    def _connect(self, open_sockets: ExitStack) -> socket.socket:
        address = urlsplit(self.caller.url)
        connection = socket.create_connection(
            (address.hostname or "", address.port or 0), CONNECTION_PATIENCE_S
        )
        return open_sockets.enter_context(connection)

    def _head(self, length: int) -> bytes:
        lines = ["POST /generate HTTP/1.1", "Host: soak", f"Content-Length: {length}"]
        headers = {**self.caller.headers, **JSON}
        lines += [f"{name}: {value}" for name, value in headers.items()]
        return "\r\n".join([*lines, "", ""]).encode()

    # --------------------------------------------------------------------------------------------

    def _post(self, name: str, path: str, content: str) -> None:
        self._send(name, "POST", path, content=content.encode(), headers=JSON)

    def _send(
        self,
        name: str,
        method: str,
        path: str,
        *,
        caller: Caller | None = None,
        may_succeed: bool = True,
        **request: Any,
    ) -> None:
        sender = caller or self.caller

        def act() -> str:
            try:
                return label(sender.client.request(method, path, **request))
            except (httpx.WriteError, httpx.ReadError):
                return CLOSED  # refused before all of it was sent

        self._do(name, act, may_succeed=may_succeed)

    def _do(self, name: str, act: Callable[[], str], *, may_succeed: bool = True) -> None:
        """Do a fault; note what its client saw, and what became of the others and of the server."""
        tally = self.caller.tally
        mark = self.caller.gate.mark()
        num_hurt = len(tally.wrong) + len(tally.unexpected)
        try:
            saw = act()
        except (httpx.TransportError, OSError) as error:
            saw = type(error).__name__
        if self.caller.gate.was_out_since(mark):
            tally.fault(name, CUT_OFF, lost=0, recovered=True)
            return
        lost = len(tally.wrong) + len(tally.unexpected) - num_hurt
        tally.fault(name, saw, lost=lost, recovered=self._answers())
        allowed = ("2", *REFUSALS) if may_succeed else REFUSALS
        if not saw.startswith(allowed):
            tally.unexpected.append(f"fault {name!r}: {saw}")

    def _answers(self) -> bool:
        mark = self.caller.gate.mark()
        try:
            return httpx.get(f"{self.caller.url}/healthz", timeout=10).status_code == 200
        except httpx.TransportError:
            return self.caller.gate.was_out_since(mark)


def _first_line(connection: socket.socket) -> str:
    """The status that comes; "closed" if none does."""
    try:
        answer = connection.recv(4096).decode("latin-1")
    except ConnectionResetError:
        return CLOSED
    except TimeoutError:
        return NO_ANSWER
    return answer.split(" ")[1] if answer.startswith("HTTP/") else CLOSED
