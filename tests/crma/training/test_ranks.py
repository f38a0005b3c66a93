"""crma.training.ranks: processes that train one run together do what one process does alone."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import crma
from paths import ROOT

from crma.models.base_model import BaseModel
from crma.store.adapter_store import AdapterStore
from crma.training.ranks import ALONE, Ranks

CONFIG = """
model = "{model}"
arm = "MODULAR"
tasks = ["{data}/first", "{data}/second"]
epochs = 1
batch_size = 5
dtype = "float32"
lora = {{rank = 2, alpha = 4.0}}
crma = {{num_streams = 2, stream_rank = 2, later_scale = 0.5, drop = 0.2}}
"""
LAUNCH = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1"]
PLAIN = ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]


def test_a_process_alone_has_whole_batches_and_its_own_sums() -> None:
    tensor = torch.ones(2)
    ALONE.add_up([tensor])
    assert tensor.tolist() == [1, 1]
    assert ALONE.share([1, 2, 3]) == [1, 2, 3]
    assert ALONE.writes
    assert Ranks.join() == ALONE


@pytest.mark.parametrize("size", [2, 3, 7])
def test_the_shares_are_the_whole_batch(size: int) -> None:
    rows = list(range(5))
    shares = [Ranks(rank, size).share(rows) for rank in range(size)]
    assert sorted(row for share in shares for row in share) == rows


@pytest.fixture(scope="module")
def config(
    base: BaseModel, write_task: Callable[..., None], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A config of two tasks, whose last batches have fewer rows than the others."""
    root = tmp_path_factory.mktemp("ranks")
    write_task(root / "first", ("yes", "no"))
    write_task(root / "second", ("left", "right"))
    path = root / "run.toml"
    path.write_text(CONFIG.format(model=base.path, data=root))
    return path


def launch(config: Path, out: Path, num_processes: int) -> None:
    """Train a config with `accelerate launch`."""
    number = ["--num_processes", str(num_processes)]
    command = [sys.executable, *LAUNCH, *number, *PLAIN, "-m", "crma", "train", str(config)]
    done = subprocess.run(
        [*command, "--out", str(out)],
        cwd=ROOT,
        check=False,
        timeout=300,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]


def losses(out: Path) -> list[tuple[Any, ...]]:
    """Loss and tokens of every step of both tasks."""
    files = [out / "work" / task / "log.jsonl" for task in ("first", "second")]
    lines = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    return [(line["loss"], line["tokens"]) for line in lines]


@pytest.mark.e2e
@pytest.mark.parametrize("num_processes", [2, 3])
def test_several_processes_train_as_one_does_and_one_of_them_writes(
    config: Path, tmp_path: Path, num_processes: int
) -> None:
    """Of 12 rows in batches of 5, the last batch has 2: with three processes, one has no row."""
    code, _, err = crma("train", config, "--out", tmp_path / "alone")
    assert code == 0, err
    launch(config, tmp_path / "together", num_processes)
    alone, together = losses(tmp_path / "alone"), losses(tmp_path / "together")
    assert len(alone) == len(together) == 6
    for (loss, _), (other, _) in zip(alone, together, strict=True):
        assert other == pytest.approx(loss, rel=1e-4)
    stores = [AdapterStore(tmp_path / name / "store") for name in ("alone", "together")]
    for name in ("first", "second"):
        one, other_one = (store.task(name).load() for store in stores)
        for ours, theirs in zip(one.parameters(), other_one.parameters(), strict=True):
            torch.testing.assert_close(theirs.float(), ours.float(), rtol=0.05, atol=2e-3)
    records = [
        json.loads((tmp_path / each / "record.json").read_text()) for each in ("alone", "together")
    ]
    assert records[1]["loss"] == [pytest.approx(row, rel=1e-3) for row in records[0]["loss"]]


@pytest.mark.e2e
def test_a_run_begun_alone_goes_on_with_several_processes(config: Path, tmp_path: Path) -> None:
    """What is trained is not trained again, by any of them."""
    out = tmp_path / "run"
    assert crma("train", config, "--out", out)[0] == 0
    before = (out / "work" / "second" / "log.jsonl").read_bytes()
    (out / "record.json").unlink()
    launch(config, out, 2)
    assert (out / "work" / "second" / "log.jsonl").read_bytes() == before
    assert (out / "record.json").exists()
