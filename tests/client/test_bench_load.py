"""clients/bench/load.py: what it reads in the bytes of a server, and which requests have failed."""

import json
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest
from bench import load
from bench.metrics import RequestResult
from bench.workloads import Workload

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
ROW = Workload(num_requests=1, concurrency=1, new_tokens=2)


def event(text: str | None = None, *, tokens: int | None = None) -> bytes:
    choices = [] if text is None else [{"text": text, "finish_reason": None}]
    usage = None if tokens is None else {"completion_tokens": tokens}
    line = f"data: {json.dumps({'choices': choices, 'usage': usage})}\n\n".encode()
    return b"%x\r\n%s\r\n" % (len(line), line)


@contextmanager
def answering(pieces: Sequence[bytes], *, closes: bool = True) -> Iterator[tuple[str, list[bytes]]]:
    """A server that answers one request with these bytes; its address, and what it was asked."""
    asked: list[bytes] = []
    done = threading.Event()

    def serve() -> None:
        connection, _ = listening.accept()
        with connection:
            asked.append(connection.recv(100_000))
            for piece in pieces:
                connection.sendall(piece)
            if not closes:
                done.wait(10)

    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=serve)
        thread.start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}", asked
        done.set()
        thread.join()


def result(url: str) -> RequestResult:
    (found,), _ = load.run(url, ROW, "seed")
    return found


WHOLE = HEAD + event("a") + event("b") + event(tokens=2) + b"0\r\n\r\n"


@pytest.mark.parametrize("size", [1, 7, 10_000])
@pytest.mark.parametrize("closes", [True, False])
def test_a_stream_is_read_however_its_bytes_are_divided(size: int, closes: bool) -> None:
    """And whether or not the server closes the connection after it."""
    pieces = [WHOLE[start : start + size] for start in range(0, len(WHOLE), size)]
    with answering(pieces, closes=closes) as (url, asked):
        found = result(url)
    assert found.error is None
    assert found.num_tokens == len(found.token_times) == 2
    assert found.sent_at <= found.token_times[0] <= found.token_times[1]
    head, body = asked[0].split(b"\r\n\r\n")
    assert head.startswith(b"POST /v1/completions HTTP/1.1\r\n")
    assert json.loads(body)["max_tokens"] == 2


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (b"HTTP/1.1 429 Too Many Requests\r\ncontent-length: 4\r\n\r\nfull", "HTTP 429: b'full'"),
        (HEAD + event("a"), "RemoteProtocolError"),  # cut off
        (b"no HTTP\r\n\r\n", "RemoteProtocolError"),
    ],
)
def test_a_request_without_a_whole_answer_has_failed(answer: bytes, error: str) -> None:
    with answering([answer]) as (url, _):
        found = result(url)
    assert found.error is not None
    assert found.error.startswith(error)


def test_a_server_that_is_not_there_fails_its_request() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    found = result(f"http://127.0.0.1:{port}")
    assert found.error is not None
    assert found.error.startswith("ConnectionRefusedError")
