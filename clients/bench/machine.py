"""The parts of the benchmark that need `crma`, in a process of their own.

`python -m bench.machine describe` writes a JSON object: the folder of the base model, and the
commit, hardware and versions that every row states.

`python -m bench.machine publish FOLDER STORE` publishes the PEFT adapters `lora-*` in FOLDER as
tasks of STORE, for the default base model.

The load generator shares the cores with the server it measures, so it must not import torch, which
`crma` does.
"""

import argparse
import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from crma.core.machine import hardware_in_detail
from crma.core.provenance import commit
from crma.models.base_model import DEFAULT_MODEL, find_base
from crma.models.model_shape import read_shape
from crma.store.adapter_store import AdapterStore


def describe() -> dict[str, Any]:
    """Where the base model is, and what the figures were measured on."""
    return {
        "model": str(find_base(DEFAULT_MODEL).path),
        "commit": commit(),
        "hardware": hardware_in_detail(),
        "versions": {name: version(name) for name in ("torch", "transformers", "peft")},
    }


def publish(folder: Path, store: Path) -> None:
    """Import every PEFT adapter `folder/lora-*` into the store, under its folder's name."""
    base = find_base(DEFAULT_MODEL)
    shape = read_shape(base)
    for adapter in sorted(folder.glob("lora-*")):
        AdapterStore(store).import_peft(adapter, adapter.name, base, licence="unknown", shape=shape)


def main() -> None:
    """Run one command."""
    parser = argparse.ArgumentParser(prog="bench.machine")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("describe")
    publishing = commands.add_parser("publish")
    publishing.add_argument("folder", type=Path)
    publishing.add_argument("store", type=Path)
    options = parser.parse_args()
    if options.command == "describe":
        sys.stdout.write(json.dumps(describe()) + "\n")
    else:
        publish(options.folder, options.store)


if __name__ == "__main__":
    main()
