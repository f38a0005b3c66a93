"""The arithmetic of docs/cost.md is that of the models and of the code; test_documents.py holds
its tables to it."""

import json
import re
from dataclasses import replace

import cost_model
import pytest
import tiny
import tiny_configs
import torch
from bench_results import bench_records
from cost_model import BASES, MEASURED, Shape
from paths import BENCH, EXPERIMENTS, ROOT

from crma.method.backbone import Backbone, CrmaConfig
from server.engine.native.kv_cache import block_bytes

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
    config = CrmaConfig(TINY.num_layers, TINY.hidden_size, num_streams=4, stream_rank=4)
    folded = Backbone(config).folded("cpu", torch.float32)
    assert TINY.crma_numbers == sum(each.numel() for pair in folded for each in pair)
    assert TINY.kv_numbers * injection.model.dtype.itemsize == block_bytes(injection.model, 1)


def test_the_backbone_is_that_which_is_shipped() -> None:
    shipped = CrmaConfig(MEASURED.num_layers, MEASURED.hidden_size, num_streams=4, stream_rank=4)
    assert shipped.rank == cost_model.CRMA_RANK


def test_a_record_of_the_measured_model_is_its_own_row() -> None:
    """Nothing is scaled there; a model twice as large takes twice as long."""
    steps = {row["row"]: row for row in bench_records("amx") if row.get("engine") == "server"}
    assert cost_model.step_seconds(MEASURED) == steps["base"]["itl_p50_s"]["median"]
    for numbers, row in (
        ("lora_numbers", "mixed / base"),
        ("crma_numbers", "crma-on / crma-off"),
    ):
        added = cost_model.added(MEASURED, numbers, row)
        assert 1 / (1 + added) == pytest.approx(steps[row]["ratio"]["median"])
    loads = json.loads((BENCH / "loads.json").read_text("utf-8"))
    assert loads["file_bytes"] == pytest.approx(MEASURED.lora_numbers * cost_model.BYTES, rel=0.02)
    a_load = cost_model.load_seconds_a_byte() * loads["file_bytes"]
    assert a_load == pytest.approx(loads["load_s"]["median"])
    twice = replace(MEASURED, num_layers=2 * MEASURED.num_layers)
    share = cost_model.step_seconds(twice) / cost_model.step_seconds(MEASURED)
    assert share == pytest.approx(twice.num_parameters / MEASURED.num_parameters)


def test_a_figure_in_the_words_is_that_of_the_table() -> None:
    page = (ROOT / "docs/cost.md").read_text("utf-8")
    (said,) = re.findall(r"give each of 16 requests (\d+) tokens a second of a 1B model", page)
    assert int(said) == int(1 / cost_model.step_seconds(BASES[0]))


def test_more_tasks_never_need_fewer_replicas() -> None:
    replicas = [int(row[-1]) for row in cost_model.slot_rows()]
    for first in range(0, len(replicas), len(cost_model.TASKS)):
        of_one = replicas[first : first + len(cost_model.TASKS)]
        assert of_one == sorted(of_one)
