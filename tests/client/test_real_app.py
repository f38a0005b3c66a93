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
def store(base: BaseModel, tmp_path: Path) -> AdapterStore:
    store = AdapterStore(tmp_path / "store")
    backbone = tiny.publish_backbone(store, base)
    tiny.publish(store, base, "medical", 1, under=backbone.digest)
    tiny.publish(store, base, "legal", 2, under=None)
    return store


@pytest.fixture
async def client(base: BaseModel, store: AdapterStore) -> AsyncIterator[AsyncClient]:
    async with tiny.serving(base, store.root, api_keys=("key",)) as app:
        transport = httpx.ASGITransport(app)
        async with AsyncClient("http://test", api_key="key", transport=transport) as client:
            yield client


async def test_an_answer_and_its_stream(client: AsyncClient, base: BaseModel, store: AdapterStore) -> None:
    options: dict[str, Any] = {"task": "medical", "max_tokens": 6, "temperature": 1.0, "seed": 3, "logprobs": True}
    for n in (1, 2):
        whole = await client.generate("Hi", n=n, **options)
        async with client.stream("Hi", n=n, **options) as stream:
            tokens = [token async for token in stream]
        assert stream.result.choices == whole.choices
        assert (stream.result.usage, stream.result.provenance) == (whole.usage, whole.provenance)
        assert {token.index for token in tokens} == set(range(n))
    used, backbone = whole.provenance, store.backbone()
    assert backbone is not None
    assert (used.base, used.task, used.crma) == (base.digest, store.task("medical").digest, backbone.digest)
    assert (whole.crma, used.seed, len(whole.choices[0].logprobs or ())) == (True, 3, 6)


async def test_an_ablation_too_small_for_statistics_has_none(client: AsyncClient) -> None:
    """One item has no interval and nothing to be equivalent by: null is None, and no error."""
    answer = await client.generate("One?", task="medical", max_tokens=4)
    questions = [Question("q1", "medical", "One?", (answer.text,))]
    report = await client.ablation(questions=questions, variants=["task+crma", "task"], max_tokens=4)
    comparison = report.comparisons[0]
    assert (report.variants["task+crma"].accuracy, report.variants["task"].by_task["medical"].scored) == (1.0, 1)
    assert (comparison.bootstrap, comparison.equivalent_within_margin, comparison.mcnemar.p) == (None, None, 1.0)
    assert report.items[0].outputs["task+crma"]["text"] == answer.text
    failed = await client.ablation(questions=questions, variants=["task+crma", "task"], max_tokens=600)
    comparison = failed.comparisons[0]
    assert (failed.variants["task"].failed, failed.variants["task"].wilson) == (1, None)
    assert (comparison.difference, comparison.mcnemar.p) == (None, None)


async def test_adapters_health_and_metrics(client: AsyncClient, store: AdapterStore) -> None:
    await client.generate("Hi", task="medical", max_tokens=2)
    listing, backbone = await client.adapters(), store.backbone()
    assert backbone is not None
    assert [(t.name, t.resident, t.lineage) for t in listing.tasks] == [
        ("legal", False, None),
        ("medical", True, backbone.digest),
    ]
    assert listing.backbone is not None
    assert (listing.backbone.digest, listing.base["name"]) == (backbone.digest, "tiny")
    assert (await client.health(), await client.ready()) == (True, True)
    assert 'crma_request_success_total{adapter="medical"' in await client.metrics()


@pytest.mark.parametrize(
    ("options", "kind", "code", "field"),
    [
        ({"task": "nowhere"}, errors.NotFound, "not_found", "task"),
        ({"task": "legal", "crma": True}, errors.Conflict, "lineage_mismatch", "crma"),
        ({"max_tokens": 600}, errors.InvalidRequest, "prompt_too_long", "prompt"),
        ({"temperature": 3.0}, errors.InvalidRequest, "invalid_field", "temperature"),
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


async def test_another_key_is_not_let_in(client: AsyncClient) -> None:
    async with AsyncClient("http://test", api_key="other", transport=client._http._transport) as stranger:
        with pytest.raises(errors.NotAuthorized):
            await stranger.generate("Hi")
        assert await stranger.health()
