"""crma.models.serving_record: transformers is asked once, and a stale answer is never used."""

import json
import shutil
from functools import partial
from pathlib import Path
from unittest.mock import patch

import pytest
import tiny_configs
import transformers
from tiny import tokenizer
from transformers import AutoConfig, PreTrainedConfig

from crma.models import serving_record
from crma.models.base_model import BaseModel, read_base
from crma.models.plain_tokenizer import PlainTokenizer
from crma.models.pull import pull
from crma.models.serving_record import BACKEND, RECORD, read_served, serving_tokenizer

TEXT = "the <|im_end|> of naïve 日本"
LLAMA = partial(transformers.LlamaConfig, **tiny_configs.SIZES)


@pytest.fixture
def pulled(base: BaseModel, tmp_path: Path) -> BaseModel:
    """A pulled model of its own, without a record."""
    folder = tmp_path / "home" / "models" / base.name
    shutil.copytree(base.path, folder, ignore=shutil.ignore_patterns(".*"))
    return read_base(folder)


def num_asked(base: BaseModel) -> int:
    """How often transformers is asked to read a model once; config and tokenizer must be right."""
    with patch.object(serving_record, "_ask_transformers", wraps=_ASK) as ask:
        assert read_served(base).config["hidden_size"] == 32
        found = serving_tokenizer(base)
    assert isinstance(found, PlainTokenizer)
    assert found.encode(TEXT) == tokenizer().encode(TEXT)
    return ask.call_count


_ASK = serving_record._ask_transformers


def test_transformers_is_asked_once_and_the_model_stays_verified(pulled: BaseModel) -> None:
    assert num_asked(pulled) == 1
    assert num_asked(pulled) == 0
    assert sorted(path.name for path in pulled.path.glob(".*")) == [RECORD, BACKEND]
    assert read_base(pulled.path, verify=True) == pulled
    assert pull(str(pulled.path)) == pulled


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "chat_template.jinja"])
def test_a_changed_file_of_the_model_is_read_anew(pulled: BaseModel, name: str) -> None:
    read_served(pulled)
    path = pulled.path / name
    path.write_text(path.read_text() + "\n")
    assert num_asked(pulled) == 1
    assert num_asked(pulled) == 0


def test_a_damaged_record_or_one_of_another_library_is_replaced(pulled: BaseModel) -> None:
    read_served(pulled)
    path = pulled.path / RECORD
    record = json.loads(path.read_text())
    other = {**record, "versions": {**record["versions"], "transformers": "0.1"}}
    for content in (json.dumps(other), "", '{"served": {}}'):
        path.write_text(content)
        assert num_asked(pulled) == 1
        assert json.loads(path.read_text()) == record
    for damage in (b"", b"{}"):
        (pulled.path / BACKEND).write_bytes(damage)
        assert num_asked(pulled) == 1
    (pulled.path / BACKEND).unlink()
    assert num_asked(pulled) == 1
    assert num_asked(pulled) == 0


def test_a_folder_that_cannot_be_written_gives_the_same(pulled: BaseModel) -> None:
    (pulled.path / RECORD).mkdir()  # nobody can replace a folder by a file, not even root
    (pulled.path / BACKEND).mkdir()
    assert num_asked(pulled) == 2
    assert (pulled.path / RECORD).is_dir()


def test_an_older_server_in_another_process_leaves_a_tokenizer_that_is_not_used(
    pulled: BaseModel,
) -> None:
    served = read_served(pulled)
    with patch.object(serving_record, "read_served", return_value=served):
        (pulled.path / BACKEND).write_text("another's")
        assert serving_tokenizer(pulled).encode(TEXT) == tokenizer().encode(TEXT)


@pytest.mark.parametrize("family", [*tiny_configs.FAMILIES, *tiny_configs.SCALED])
def test_the_config_has_every_field_of_transformers_config(family: str, tmp_path: Path) -> None:
    config: PreTrainedConfig = {**tiny_configs.FAMILIES, **tiny_configs.SCALED}[family]()
    config.save_pretrained(tmp_path)
    read = AutoConfig.from_pretrained(tmp_path)
    served = read_served(BaseModel("tiny", "", tmp_path, {}))
    assert {name for name in vars(read) if not name.startswith("_")} <= served.config.keys()
    for name, value in served.config.items():
        if name not in ("dtype", "transformers_version"):
            assert value == json.loads(json.dumps(getattr(read, name))), name


class OwnWay(transformers.TokenizersBackend):
    """A tokenizer that encodes in a way of its own."""

    def encode(self, *args: object, **kwargs: object) -> list[int]:
        return [7]


def test_a_tokenizer_with_ways_of_its_own_stays_with_transformers(pulled: BaseModel) -> None:
    own = OwnWay.from_pretrained(pulled.path)
    with patch.object(serving_record, "_transformers_tokenizer", return_value=own):
        assert read_served(pulled).tokenizer is None
        assert serving_tokenizer(pulled) is own
    again = tokenizer()
    again.split_special_tokens, before = True, again.split_special_tokens
    try:
        assert not serving_record._is_plain(again)
    finally:
        again.split_special_tokens = before


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        (None, None),
        ("", "no chat template"),
        ("{{ messages[0].role }}", "does not show the user's text"),
        ("{{ raise_exception('no users') }}", "refuses one user turn: no users"),
    ],
)
def test_whether_the_chat_template_serves_is_recorded(
    pulled: BaseModel, template: str | None, problem: str | None
) -> None:
    """Each start imported transformers to render one question."""
    if template is not None:
        (pulled.path / "chat_template.jinja").write_text(template)
    read_served(pulled)
    with patch.object(serving_record, "_ask_transformers", side_effect=AssertionError):
        found = read_served(pulled).chat_problem
    assert found is None if problem is None else problem in str(found)


def test_a_model_without_a_tokenizer_serves_no_chats(tmp_path: Path) -> None:
    LLAMA().save_pretrained(tmp_path)
    problem = read_served(BaseModel("tiny", "", tmp_path, {})).chat_problem
    assert problem == "the base model has no tokenizer that can be read"
