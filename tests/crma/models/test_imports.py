"""Light modules stay light: a command that only reads files does not wait seconds for torch."""

import subprocess
import sys

from paths import ROOT

CORE = [f"crma.core.{file.stem}" for file in sorted((ROOT / "crma" / "core").glob("[a-z]*.py"))]
MODELS = [f"crma.models.{name}" for name in ("base_model", "packages", "prompts", "pull")]


def test_core_and_the_file_handling_of_models_import_neither_torch_nor_transformers() -> None:
    modules = ", ".join(CORE + MODELS)
    script = f"import sys, {modules}; print({{'torch', 'transformers'}} & sys.modules.keys())"
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
