"""Training with a base model that is divided among processes (crma.training.shards), by gloo."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command_line import crma
from paths import ROOT

from crma.models.base_model import BaseModel

pytestmark = pytest.mark.e2e

CONFIG = """
model = "{model}"
tasks = ["{data}/first", "{data}/second"]
epochs = 2
batch_size = 5
ema = 0.9
dtype = "float32"
lora = {{rank = 2, alpha = 4.0}}
crma = {{num_streams = 2, stream_rank = 2, later_scale = 0.5, drop = 0.2}}
"""
LAUNCH = ["-m", "accelerate.commands.launch", "--num_machines", "1", "--mixed_precision", "no"]
PLAIN = ["--dynamo_backend", "no", "--main_process_port", "0"]
SHARDED = ["--use_fsdp", "--fsdp_version", "2"]
WHOLE = ["--multi_gpu"]

HELD = """
import sys
import torch
from torch.distributed.tensor import DTensor
from crma.models.base_model import find_base
from crma.training.ranks import Ranks
from crma.training.shards import load_shards

ranks = Ranks.join()
model = load_shards(find_base(sys.argv[1]), torch.device("cpu"), torch.float32, ranks)
weights = list(model.parameters())
assert all(isinstance(weight, DTensor) for weight in weights)
held = sum(weight.to_local().numel() for weight in weights)
print("held", ranks.sharded, held, sum(weight.numel() for weight in weights), flush=True)
ranks.leave()
"""


@pytest.fixture(scope="module")
def config(
    base: BaseModel, write_task: Callable[..., None], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A config of two tasks, whose last batches have 2 rows: a third process has none of them."""
    root = tmp_path_factory.mktemp("shards")
    write_task(root / "first", ("yes", "no"))
    write_task(root / "second", ("left", "right"))
    path = root / "run.toml"
    path.write_text(CONFIG.format(model=base.path, data=root))
    return path


def launch(num_processes: int, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run `accelerate launch`."""
    number = ["--num_processes", str(num_processes)]
    command = [sys.executable, *LAUNCH, *number, *PLAIN, *map(str, arguments)]
    return subprocess.run(
        command, cwd=ROOT, check=False, timeout=300, capture_output=True, text=True
    )


def train(config: Path, out: Path, num_processes: int, kind: list[str], arm: str) -> dict[str, Any]:
    """Train with several processes. Returns the record, with the losses of all steps."""
    run = ["-m", "crma", "train", config, "--arm", arm, "--out", out]
    done = launch(num_processes, *kind, *run)
    assert done.returncode == 0, done.stderr[-4000:]
    return with_steps(out)


def with_steps(out: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((out / "record.json").read_text())
    files = sorted((out / "work").rglob("log.jsonl"))
    record["log"] = [
        json.loads(line)["loss"] for file in files for line in file.read_text().splitlines()
    ]
    return record


@pytest.mark.parametrize(("num_processes", "arm"), [(2, "MODULAR"), (3, "NULL-SPACE")])
def test_a_divided_base_trains_the_same_adapters_to_the_bit(
    config: Path, tmp_path: Path, num_processes: int, arm: str
) -> None:
    """As processes with a whole copy each; and one process has the same losses up to rounding."""
    divided = train(config, tmp_path / "divided", num_processes, SHARDED, arm)
    whole = train(config, tmp_path / "whole", num_processes, WHOLE, arm)
    for key in ("log", "loss", "accuracy", "loss_unaveraged", "digests"):
        assert divided[key] == whole[key], key
    code, _, err = crma("train", config, "--arm", arm, "--out", tmp_path / "alone")
    assert code == 0, err
    alone = with_steps(tmp_path / "alone")
    assert divided["log"] == pytest.approx(alone["log"], rel=1e-4)
    assert divided["loss"] == [pytest.approx(row, rel=1e-3) for row in alone["loss"]]


def test_each_process_holds_its_part_of_the_base_model(base: BaseModel, tmp_path: Path) -> None:
    (tmp_path / "held.py").write_text(HELD)
    done = launch(2, *SHARDED, tmp_path / "held.py", base.path)
    assert done.returncode == 0, done.stderr[-4000:]
    lines = [line.split() for line in done.stdout.splitlines() if line.startswith("held")]
    assert [line[1] for line in lines] == ["True", "True"]
    held, total = [int(line[2]) for line in lines], int(lines[0][3])
    assert sum(held) == pytest.approx(total, rel=0.05)  # parts are padded to one size
    assert max(held) < 0.6 * total


def test_what_cannot_be_done_with_parts_is_refused(config: Path, tmp_path: Path) -> None:
    run = ["-m", "crma", "train", config, "--out"]
    old = launch(2, "--use_fsdp", "--fsdp_version", "1", *run, tmp_path / "old")
    assert old.returncode != 0
    assert "give --fsdp_version 2" in old.stderr
    offload = ["--fsdp_offload_params", "true"]
    offloaded = launch(2, *SHARDED, *offload, *run, tmp_path / "offloaded")
    assert offloaded.returncode != 0
    assert "leave --fsdp_offload_params out" in offloaded.stderr
    shipped = launch(2, *SHARDED, *run, tmp_path / "run", "--ship", tmp_path / "store")
    assert shipped.returncode != 0
    assert "train without --ship" in shipped.stderr
    assert not (tmp_path / "run" / "work").exists()
