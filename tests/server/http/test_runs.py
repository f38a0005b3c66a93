"""GET /runs: the records of training runs, and who sees them."""

import json
from pathlib import Path
from typing import Any

import api_keys
import pytest
from api import Serve, Served

from server.service.run_records import OF_THE_RELEASE

RECORD: dict[str, Any] = {
    "arm": "MODULAR",
    "seed": 3,
    "order": ["medical", "legal"],
    "accuracy": [[0.0, 0.0], [0.5, 0.0], [0.5, 1.0]],
    "loss": [[2.0, 2.0], [1.0, 2.0], [1.0, 0.5]],
    "ACC": 0.75,
}


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    folder = tmp_path / "runs"
    (folder / "mine").mkdir(parents=True)
    (folder / "mine" / "MODULAR-seed3.json").write_text(json.dumps(RECORD))
    (folder / "other.json").write_text('{"what": "no run"}')
    (folder / "damaged.json").write_text('{"arm"')
    (tmp_path / "secret.json").write_text(json.dumps(RECORD))
    return folder


async def test_runs_are_listed_and_read_and_other_files_are_not(serve: Serve, runs: Path) -> None:
    served = await serve(runs=runs)
    (listed,) = (await served.client.get("/runs")).json()
    assert (listed["id"], listed["arm"], listed["ACC"]) == ("mine/MODULAR-seed3", "MODULAR", 0.75)
    assert "accuracy" not in listed
    assert (await served.client.get(f"/runs/{listed['id']}")).json() == RECORD
    for id in ("other", "damaged", "../secret", "%2e%2e/secret", "mine"):
        assert (await served.client.get(f"/runs/{id}")).status_code == 404


async def test_the_release_has_runs(served: Served) -> None:
    listed = (await served.client.get("/runs")).json()
    assert "full/MODULAR-seed0" in {each["id"] for each in listed}
    shown = (await served.client.get("/runs/full/MODULAR-seed0")).json()
    assert shown == json.loads((OF_THE_RELEASE / "full/MODULAR-seed0.json").read_text())


async def test_a_key_sees_no_run_of_a_task_that_it_may_not_use(
    serve: Serve, runs: Path, tmp_path: Path
) -> None:
    file = tmp_path / "keys.json"
    narrow = api_keys.add(file, "narrow", tasks=["medical"])
    wide = api_keys.add(file, "wide")
    served = await serve(runs=runs, keys_file=file)
    assert (await served.client.get("/runs", headers=narrow)).json() == []
    path = "/runs/mine/MODULAR-seed3"
    assert (await served.client.get(path, headers=narrow)).status_code == 404
    assert (await served.client.get(path, headers=wide)).json() == RECORD
    assert (await served.client.get("/runs")).status_code == 401
