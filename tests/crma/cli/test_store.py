"""`crma store import` on a model whose shape is recorded: fast, because it imports no torch."""

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from paths import ROOT

from crma.models.base_model import BaseModel
from crma.models.model_shape import read_shape
from crma.store.adapter_store import AdapterStore
from crma.store.peft_format import CONFIG

SCRIPT = """
import json, sys
from crma.cli.command import main
try:
    main()
finally:
    print(json.dumps([name for name in ("torch", "transformers") if name in sys.modules]))
"""


def run(arguments: Sequence[object]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", SCRIPT, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_an_import_loads_neither_torch_nor_transformers(
    base: BaseModel, store: AdapterStore, tmp_path: Path
) -> None:
    read_shape(base)
    folder = store.task("medical").path  # published adapters are PEFT's files
    target = tmp_path / "target"
    arguments = ["store", "import", folder, "task", "--store", target, "--model", base.path]
    done = run(arguments)
    assert (done.returncode, done.stdout.splitlines()[-1:]) == (0, [json.dumps([])]), done.stderr
    entry = AdapterStore(target).task("task")
    assert entry.digest in done.stdout
    assert entry.digest == store.task("medical").digest  # the same bytes under another name


def test_an_import_names_both_base_models_and_can_be_told_to_trust(
    base: BaseModel, store: AdapterStore, tmp_path: Path
) -> None:
    """An adapter of another model was imported in silence."""
    folder = shutil.copytree(store.task("medical").path, tmp_path / "peft")
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, "base_model_name_or_path": "Qwen/Other"}))
    target = tmp_path / "target"
    arguments = ["store", "import", folder, "task", "--store", target, "--model", base.path]
    refused = run(arguments)
    assert refused.returncode == 1
    assert "made for Qwen/Other" in refused.stderr
    assert f"the base model is {base.name}" in refused.stderr
    assert run([*arguments, "--trust-base"]).returncode == 0
    assert AdapterStore(target).task_names() == ("task",)
