"""The shape of a base model: computed once, recorded beside it, and never read when stale."""

import json
import shutil
from pathlib import Path
from unittest.mock import patch

import pytest
from tiny import injection

from crma.core.errors import UnsupportedModel
from crma.models import model_shape
from crma.models.base_model import BaseModel, read_base
from crma.models.model_shape import RECORD, ModelShape, read_shape
from crma.models.pull import pull


@pytest.fixture
def pulled(base: BaseModel, tmp_path: Path) -> BaseModel:
    """A pulled model of its own, without a record."""
    folder = tmp_path / "home" / "models" / base.name
    shutil.copytree(base.path, folder, ignore=shutil.ignore_patterns(RECORD))
    return read_base(folder)


def num_computed(base: BaseModel) -> int:
    """How often the shape of the tiny model is computed to read it once; it must be right."""
    with patch.object(model_shape, "_compute", wraps=model_shape._compute) as compute:
        assert read_shape(base) == ModelShape.of(injection().model)
    return compute.call_count


def test_the_shape_is_that_of_the_model() -> None:
    shape = ModelShape.of(injection().model)
    assert (shape.num_layers, shape.hidden_size) == (2, 32)
    assert shape.linears["model.layers.1.mlp.up_proj"] == (48, 32)
    assert len(shape.linears) == 2 * 7
    assert shape.embedding == {"model.embed_tokens": (32, 300)}
    assert shape.head == {"lm_head": (300, 32)}
    assert shape.biased == []


def test_the_shape_is_computed_once_and_the_model_stays_verified(pulled: BaseModel) -> None:
    assert num_computed(pulled) == 1
    assert num_computed(pulled) == 0
    assert list(pulled.path.glob(f"{RECORD}*")) == [pulled.path / RECORD]
    assert read_base(pulled.path, verify=True) == pulled
    assert pull(str(pulled.path)) == pulled


def test_a_record_of_another_config_or_library_or_a_damaged_one_is_replaced(
    pulled: BaseModel,
) -> None:
    read_shape(pulled)
    path = pulled.path / RECORD
    record = json.loads(path.read_text())
    stale = [{**record, field: "another"} for field in ("config", "transformers")]
    for content in (*map(json.dumps, stale), "", '{"shape": {}}'):
        path.write_text(content)
        assert num_computed(pulled) == 1
        assert json.loads(path.read_text()) == record


def test_a_folder_that_cannot_be_written_gives_the_shape_all_the_same(pulled: BaseModel) -> None:
    (pulled.path / RECORD).mkdir()  # nobody can replace a folder by a file, not even root
    assert num_computed(pulled) == 1
    assert num_computed(pulled) == 1
    assert [path.name for path in pulled.path.glob(f"{RECORD}*")] == [RECORD]


def test_a_model_that_transformers_cannot_build_is_unsupported(pulled: BaseModel) -> None:
    (pulled.path / "config.json").write_text('{"model_type": "no-such-model"}')
    with pytest.raises(UnsupportedModel, match="transformers cannot build tiny"):
        read_shape(pulled)
