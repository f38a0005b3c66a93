"""crma.models.loading: the dtype that each device serves and trains in."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from paths import ROOT

from crma.core.errors import ConfigError
from crma.models import loading
from crma.models.loading import computes_in_bfloat16, cuda_dtype, resolve_dtype, training_dtype

CUDA = torch.device("cuda")
CPU = torch.device("cpu")


@pytest.fixture
def t4(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every CUDA device is a T4, of which torch says that it supports bfloat16."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)


@pytest.mark.parametrize(
    ("capability", "dtype"),
    [
        ((6, 1), torch.float16),
        ((7, 0), torch.float16),  # V100
        ((7, 5), torch.float16),  # T4
        ((8, 0), torch.bfloat16),  # A100
        ((8, 6), torch.bfloat16),
        ((9, 0), torch.bfloat16),  # H100
        ((12, 0), torch.bfloat16),
    ],
)
def test_a_gpu_serves_in_bfloat16_from_compute_capability_8(
    capability: tuple[int, int], dtype: torch.dtype
) -> None:
    assert cuda_dtype(capability) == dtype


@pytest.mark.usefixtures("t4")
def test_a_t4_serves_in_float16_where_torch_would_emulate_bfloat16() -> None:
    assert not computes_in_bfloat16(CUDA)
    assert resolve_dtype("auto", CUDA) == torch.float16


@pytest.mark.usefixtures("t4")
def test_a_t4_trains_in_float32_unless_told_otherwise() -> None:
    assert training_dtype("auto", CUDA) == torch.float32
    assert training_dtype("bfloat16", CUDA) == torch.bfloat16


@pytest.mark.parametrize("device", [CPU, CUDA], ids=str)
@pytest.mark.parametrize("name", ["float32", "float16", "bfloat16"])
def test_every_device_takes_every_dtype_that_is_named(device: torch.device, name: str) -> None:
    """float16 was refused everywhere, also where it is the fastest."""
    assert resolve_dtype(name, device) == getattr(torch, name)


@pytest.mark.parametrize("has_bfloat16", [True, False])
def test_a_cpu_without_bfloat16_computes_in_float32(
    monkeypatch: pytest.MonkeyPatch, has_bfloat16: bool
) -> None:
    monkeypatch.setattr(loading, "computes_in_bfloat16", lambda _: has_bfloat16)
    expected = torch.bfloat16 if has_bfloat16 else torch.float32
    assert resolve_dtype("auto", CPU) == expected
    assert training_dtype("auto", CPU) == expected


def test_a_dtype_that_does_not_exist_is_refused_with_those_that_do() -> None:
    with pytest.raises(ConfigError) as caught:
        resolve_dtype("int4", CPU)
    assert caught.value.field == "dtype"
    assert caught.value.value == "int4"
    assert caught.value.allowed == ["auto", "bfloat16", "float16", "float32"]


LOADING_BESIDE_AN_IMPORT = """
import sys
import threading
from pathlib import Path

from crma.models.base_model import BaseModel
from crma.models.loading import load_model, torch
from crma.models.plain_tokenizer import import_templates

has_begun = threading.Event()

class Watch:
    def find_spec(self, name, path=None, target=None):
        if name.startswith("transformers."):
            has_begun.set()

sys.meta_path.insert(0, Watch())
threading.Thread(target=import_templates).start()
has_begun.wait()
try:
    base = BaseModel("none", "sha256:0", Path(sys.argv[1]), {})
    load_model(base, torch.device("cpu"), torch.float32)
except ValueError as error:
    print(error)
"""


@pytest.mark.e2e
def test_a_model_is_loaded_while_another_thread_imports_transformers(tmp_path: Path) -> None:
    """A start ended in "cannot import name 'AutoModelForCausalLM' from 'transformers'"."""
    command = [sys.executable, "-c", LOADING_BESIDE_AN_IMPORT, str(tmp_path)]  # no model is there
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert "config.json" in run.stdout, run.stderr
