"""The arithmetic of docs/cost.md is that of the models and of the code; test_documents.py holds
its tables to it."""

import re

import cost_model
import pytest
import tiny
import tiny_configs
from cost_model import BASES, MEASURED, Shape
from paths import EXPERIMENTS

from crma.method.backbone import CrmaConfig

TINY = Shape("tiny", 2, 32, 16, 48, tiny_configs.VOCAB)


@pytest.mark.parametrize(
    ("shape", "config"),
    [(BASES[0], "tinyllama-1.1b.toml"), (BASES[1], "mistral-7b.toml")],
)
def test_the_models_have_as_many_parameters_as_their_configs_say(shape: Shape, config: str) -> None:
    head = (EXPERIMENTS / config).read_text("utf-8")
    (said,) = re.findall(r"([\d,]+) parameters", head)
    assert shape.num_parameters == int(said.replace(",", ""))


def test_models_and_adapters_are_counted_as_the_code_makes_them() -> None:
    injection = tiny.injection()
    assert TINY.num_parameters == sum(each.numel() for each in injection.model.parameters())
    lora = tiny.lora(injection, cost_model.RANK, "all-linear")
    assert TINY.lora_numbers == sum(each.numel() for each in lora.parameters())


def test_the_backbone_is_that_which_is_shipped() -> None:
    shipped = CrmaConfig(MEASURED.num_layers, MEASURED.hidden_size, num_streams=4, stream_rank=4)
    assert shipped.rank == cost_model.CRMA_RANK


def test_more_tasks_never_need_fewer_replicas() -> None:
    replicas = [int(row[-1]) for row in cost_model.slot_rows()]
    for first in range(0, len(replicas), len(cost_model.TASKS)):
        of_one = replicas[first : first + len(cost_model.TASKS)]
        assert of_one == sorted(of_one)
