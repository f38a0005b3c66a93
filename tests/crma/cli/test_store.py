"""`crma import` on a model whose shape is recorded: fast, because it imports no torch."""

import json
import subprocess
import sys
from pathlib import Path

from paths import ROOT

from crma.models.base_model import BaseModel
from crma.models.model_shape import read_shape
from crma.store.adapter_store import AdapterStore

SCRIPT = """
import json, sys
from crma.cli.command import main
try:
    main()
finally:
    print(json.dumps([name for name in ("torch", "transformers") if name in sys.modules]))
"""


def test_an_import_loads_neither_torch_nor_transformers(
    base: BaseModel, store: AdapterStore, tmp_path: Path
) -> None:
    read_shape(base)
    folder = store.task("medical").path  # published adapters are PEFT's files
    target = tmp_path / "target"
    arguments = ["import", folder, "task", "--store", target, "--model", base.path]
    command = [sys.executable, "-c", SCRIPT, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.splitlines()[-1:]) == (0, [json.dumps([])]), done.stderr
    entry = AdapterStore(target).task("task")
    assert entry.digest in done.stderr
    assert entry.digest == store.task("medical").digest  # the same bytes under another name
