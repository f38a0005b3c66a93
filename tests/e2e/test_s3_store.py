"""A store in S3, as moto's server speaks it over HTTP: served, followed, refused, and away."""

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import tiny
from command_line import crma
from mirrored import contents
from signing_keys import make_keys

from crma.models.base_model import BaseModel
from crma.store.adapter_store import AdapterStore
from crma.store.manifest import TASK_FILES

pytestmark = pytest.mark.e2e
ADDRESS = "s3://adapters/some/store"
WEIGHTS = TASK_FILES[1]


class Bucket:
    """A bucket of a server that can be away, and the folder that is put into it.

    Args:
        store: the store that is put there.
    """

    def __init__(self, store: AdapterStore) -> None:
        import boto3
        from moto.server import ThreadedMotoServer

        self.store = store
        self.server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
        self.server.start()
        self.port = self.server.get_host_and_port()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._client = boto3.client(
            "s3",
            endpoint_url=self.url,
            region_name="us-east-1",
            aws_access_key_id="writer",
            aws_secret_access_key="secret",
        )
        httpx.post(f"{self.url}/moto-api/reset").raise_for_status()
        self._client.create_bucket(Bucket="adapters")

    def put(self, name: str, data: bytes) -> None:
        self._client.put_object(Bucket="adapters", Key=f"some/store/{name}", Body=data)

    def sync(self) -> None:
        """Put every file there, `channels.json` first: the order that hurts most."""
        files = contents(self.store.root)
        for name in ("channels.json", *files):
            self.put(name, files[name])

    def go_away(self) -> None:
        self.server.stop()

    def come_back(self) -> None:
        from moto.server import ThreadedMotoServer

        self.server = ThreadedMotoServer(ip_address="127.0.0.1", port=self.port)
        self.server.start()


@pytest.fixture
def bucket(store: AdapterStore, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    made = Bucket(store)
    monkeypatch.setenv("AWS_ENDPOINT_URL", made.url)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "reader")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    made.sync()
    yield made
    made.go_away()


@pytest.fixture
def home(base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home of the test's own, for copies of stores."""
    monkeypatch.setenv("CRMA_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def tampered(data: bytes) -> bytes:
    """Other bytes, as many."""
    return data[:-1] + bytes([data[-1] ^ 1])


def verify(base: BaseModel) -> tuple[int, str]:
    code, out, _ = crma("store", "verify", "--store", ADDRESS, "--model", base.path)
    return code, out


def test_the_command_reads_a_store_in_s3(
    bucket: Bucket, store: AdapterStore, base: BaseModel, home: Path
) -> None:
    assert verify(base)[0] == 0
    code, out, _ = crma("store", "ls", "--store", ADDRESS)
    assert code == 0
    assert store.task("medical").digest in out
    (copied,) = (home / "mirrors").iterdir()
    assert contents(copied) == contents(store.root)
    damaged = tiny.publish(store, base, "legal", 5).path / WEIGHTS
    bucket.sync()
    bucket.put("tasks/legal/v2/" + WEIGHTS, tampered(damaged.read_bytes()))
    code, out = verify(base)
    assert code == 1
    assert f"{ADDRESS}/tasks/legal/v2: {WEIGHTS}: not the file that was published" in out
    bucket.sync()
    assert verify(base)[0] == 0


@pytest.mark.parametrize(
    "command",
    [
        ("promote", "v1", "--model", "{base}"),
        ("rollback", "--channel", "tasks/legal"),
        ("gc", "--delete"),
        ("import", "{lora}", "new", "--model", "{base}"),
        ("sign", "{key}"),
    ],
    ids=lambda command: command[0],
)
def test_commands_that_would_change_it_say_where_it_is_written(
    bucket: Bucket,
    store: AdapterStore,
    base: BaseModel,
    home: Path,
    tmp_path: Path,
    command: tuple[str, ...],
) -> None:
    """`promote` refused it too, after minutes of measurements."""
    for seed in (5, 6, 7):  # so that there is something to delete
        tiny.publish(store, base, "legal", seed)
    bucket.sync()
    key = make_keys(tmp_path, "author").private
    places = {"base": base.path, "lora": store.task("legal").path, "key": key}
    arguments = [each.format_map(places) for each in command]
    code, _, err = crma("store", *arguments, "--store", ADDRESS)
    assert code == 1
    assert f"{ADDRESS} is read from here and never changed: publish where it is written" in err


def test_a_store_that_was_never_there_stops_the_start_and_one_that_is_away_does_not(
    bucket: Bucket, base: BaseModel, home: Path
) -> None:
    code, _, err = crma("store", "ls", "--store", "s3://adapters/typo")
    assert code == 1
    assert "s3://adapters/typo/channels.json cannot be read: there is no such object" in err
    code, _, err = crma("store", "ls", "--store", "s3://no-such-bucket/store")
    assert code == 1
    assert crma("store", "ls", "--store", ADDRESS)[0] == 0
    bucket.go_away()
    code, out, err = crma("store", "ls", "--store", ADDRESS)
    assert (code, "tasks/medical" in out) == (0, True)
    assert f"{ADDRESS}/channels.json cannot be read" in err
    bucket.come_back()


async def test_a_server_follows_its_bucket_and_goes_on_while_it_is_away(
    bucket: Bucket, store: AdapterStore, base: BaseModel, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"home": tmp_path / "home", "model": str(base.path), "kernel": "off"}
    async with tiny.serving(base, ADDRESS, store_poll_s=0.05, **options) as app:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:

            async def ask() -> httpx.Response:
                return await client.post("/generate", json={"prompt": "Hi", "task": "legal"})

            async def digest() -> str:
                return (await ask()).json()["provenance"]["task"]

            async def problem() -> str:
                return (await client.get("/readyz")).json()["store_problem"]

            async def until(condition: Callable[[Any], bool], look: Callable[[], Any]) -> None:
                async with asyncio.timeout(120):
                    while not condition(await look()):
                        await asyncio.sleep(0.05)

            first = await digest()
            assert first == store.task("legal").digest
            second = tiny.publish(store, base, "legal", 5).digest
            bucket.sync()
            await until(lambda found: found == second, digest)
            file = tiny.publish(store, base, "legal", 6).path / WEIGHTS
            sound = file.read_bytes()
            file.write_bytes(tampered(sound))
            bucket.sync()
            await until(lambda found: "legal/v3" in (found or ""), problem)
            assert await digest() == second
            file.write_bytes(sound)
            bucket.sync()
            await until(lambda found: found == store.task("legal").digest, digest)
            await until(lambda found: found is None, problem)
            await asyncio.to_thread(bucket.go_away)
            await until(lambda found: "cannot be read" in (found or ""), problem)
            assert (await ask()).status_code == 200
            headers = {"Authorization": "Bearer admin"}
            refused = await client.delete("/adapters/legal", headers=headers)
            assert (refused.status_code, refused.json()["error"]["code"]) == (
                409,
                "read_only_store",
            )
            bucket.come_back()
            store.roll_back("tasks/legal")
            bucket.sync()
            await until(lambda found: found == second, digest)
            await until(lambda found: found is None, problem)
