"""The client and the real server, on a tiny real model: each understands what the other says."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import tiny
from crma_client import AsyncClient, Question, errors

from crma.pull import BaseModel
from crma.store import AdapterStore


@pytest.fixture
async def client(base: BaseModel, tmp_path: Path) -> AsyncIterator[AsyncClient]:
    store = AdapterStore(tmp_path / "store")
    tiny.publish(store, base, "medical", 1, under=tiny.publish_backbone(store, base).digest)
    tiny.publish(store, base, "legal", 2, under=None)
    async with tiny.serving(base, store.root, api_keys=("key",)) as app:
        yield AsyncClient("http://test", api_key="key", transport=httpx.ASGITransport(app))


async def test_an_answer_its_stream_and_where_they_came_from(client: AsyncClient) -> None:
    options: dict[str, Any] = {"task": "medical", "max_tokens": 6, "temperature": 1.0, "seed": 3, "logprobs": True}
    for n in (1, 2):
        whole = await client.generate("Hi", n=n, **options)
        async with client.stream("Hi", n=n, **options) as stream:
            assert {token.index async for token in stream} == set(range(n))
        assert stream.result.choices == whole.choices
        assert (stream.result.usage, stream.result.provenance) == (whole.usage, whole.provenance)
    listing = await client.adapters()
    assert [(task.name, task.resident) for task in listing.tasks] == [("legal", False), ("medical", True)]
    assert listing.backbone is not None
    assert (listing.tasks[1].digest, listing.tasks[1].lineage) == (whole.provenance.task, listing.backbone.digest)
    assert (whole.provenance.crma, whole.provenance.base) == (listing.backbone.digest, listing.base["digest"])
    assert (await client.health(), await client.ready()) == (True, True)
    assert 'crma_request_success_total{adapter="medical"' in await client.metrics()


async def test_an_ablation_too_small_for_statistics_has_none(client: AsyncClient) -> None:
    """One item has no interval, and one that failed no score: null is None, and no error."""
    answer = await client.generate("One?", task="medical", max_tokens=4)
    questions = [Question("q1", "medical", "One?", (answer.text,))]
    report = await client.ablation(questions=questions, variants=["task+crma", "task"], max_tokens=4)
    comparison = report.comparisons[0]
    assert (report.variants["task+crma"].accuracy, report.items[0].outputs["task+crma"]["text"]) == (1.0, answer.text)
    assert (comparison.bootstrap, comparison.equivalent_within_margin, comparison.mcnemar.p) == (None, None, 1.0)
    report = await client.ablation(questions=questions, variants=["task+crma", "task"], max_tokens=600)
    assert (report.variants["task"].failed, report.variants["task"].wilson) == (1, None)
    assert (report.comparisons[0].difference, report.comparisons[0].mcnemar.p) == (None, None)


@pytest.mark.parametrize(
    ("options", "kind", "code", "field"),
    [
        ({"task": "nowhere"}, errors.NotFound, "not_found", "task"),
        ({"task": "legal", "crma": True}, errors.Conflict, "lineage_mismatch", "crma"),
        ({"max_tokens": 600}, errors.InvalidRequest, "prompt_too_long", "prompt"),
    ],
)
async def test_a_refusal_is_the_right_error_and_says_where(
    client: AsyncClient, options: Any, kind: type[errors.StatusError], code: str, field: str
) -> None:
    with pytest.raises(kind) as whole:
        await client.generate("Hi", **options)
    with pytest.raises(kind) as streamed:
        async with client.stream("Hi", **options):
            pytest.fail("a refused stream was opened")
    for caught in (whole.value, streamed.value):
        assert (caught.code, caught.field, caught.allowed is not None) == (code, field, True)
