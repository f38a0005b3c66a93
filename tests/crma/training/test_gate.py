"""crma.training.gate: no task suffers from a promotion, and none is half done; on a backbone that a real run trained further."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from published import dying
from tiny import publish, publish_backbone

from crma.core.errors import ConfigError, LineageMismatch, StoreError
from crma.evaluation.offline import Served
from crma.models.base_model import BaseModel
from crma.store.adapter_store import AdapterStore
from crma.training.config import TrainConfig
from crma.training.gate import Gate, Gated, blend, promote
from crma.training.protocol import Run, ship

Decide = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def trained(base: BaseModel, write_task: Any, tmp_path_factory: pytest.TempPathFactory) -> Served:
    """Tasks first and second serve under v1; third went on training it to v2, so fast that it may hurt. Read only."""
    root = tmp_path_factory.mktemp("gate")
    answers = {"first": ("yes", "no"), "second": ("left", "right"), "third": ("up", "down")}
    for task in answers:
        write_task(root / task, answers[task])
    store = AdapterStore(root / "store")
    for tasks, start in ((("first", "second"), ""), (("third",), str(store.root))):
        crma = {"num_streams": 2, "stream_rank": 2, "lr": 0.02, "later_scale": 2.0}
        settings = {"epochs": 3, "batch_size": 2, "dtype": "float32", "crma": crma, "start": start}
        config = TrainConfig.from_dict(settings | {"tasks": [str(root / task) for task in tasks]})
        run = Run(config, base, root / f"run-{tasks[0]}", lambda *_: None)
        run.execute()
        candidate = ship(run, store)
    assert candidate is not None
    assert candidate == store.backbone("v2")
    return Served(base, store, device="cpu", dtype="float32")


@pytest.fixture
def served(trained: Served, tmp_path: Path) -> Served:
    """The same with a store of one's own."""
    shutil.copytree(trained.store.root, tmp_path / "store")
    return trained.with_store(AdapterStore(tmp_path / "store"))


@pytest.fixture
def decide(served: Served) -> Decide:
    return lambda version="v2", **options: promote(served, version, note=lambda _: None, **options)


def drifts(served: Served, weight: float) -> dict[str, float]:
    """In percent, of every task under the backbone so far on the way from v1 to v2; measured apart from any gate."""
    store = served.store
    v1, v2 = (store.backbone(version).load() for version in ("v1", "v2"))
    tasks = [Gated.of(served, store.task(name, "v1")) for name in ("first", "second", "third")]
    scores = Gate(served, v1, v2, tasks, {}, print).score(blend(v1, v2, weight))
    return {name: score["drift"] for name, score in scores.items()}


def test_what_goes_on_training_descends_from_what_serves_and_does_not_serve(served: Served) -> None:
    store = served.store
    first, second = store.backbone("v1"), store.backbone("v2")
    assert second.manifest.lineage[0] == first.digest
    assert second.manifest.certificate["max_movement"] > 0
    assert store.channels().serving() == {
        "backbone": "v1",
        "tasks/first": "v1",
        "tasks/second": "v1",
    }
    assert store.task("third", "v1").manifest.backbone == second.digest


def test_a_harmless_candidate_serves_with_its_task_and_rolls_back_with_it(
    served: Served, decide: Decide
) -> None:
    store, before = served.store, served.store.channels().serving()
    publish(store, served.base, "first", 1, serve=False)  # no newcomer: it never saw a backbone
    evidence = decide(margin=10.0)
    assert (evidence["lambda"], len(evidence["tried"])) == (1, 1)
    assert store.channels().serving() == {**before, "backbone": "v2", "tasks/third": "v1"}
    assert [change.evidence for change in store.channels().history[-2:]] == [evidence, None]
    assert store.verify() == []
    assert store.roll_back("backbone").serving() == before
    assert store.verify() == []
    assert (
        decide(margin=10.0, dry_run=True)["lambda"] == 1
    )  # and can be promoted again; this time it is not
    assert store.channels().serving() == before


def test_a_harmful_candidate_is_cut_back_to_the_largest_share_that_harms_nobody(
    served: Served, decide: Decide
) -> None:
    store = served.store
    margin = max(drifts(served, 0.5).values()) / 100 + 1e-6
    assert max(drifts(served, 1.0).values()) > 100 * margin + 1
    evidence = decide(margin=margin, newcomer_margin=margin)
    share, tried = (
        evidence["lambda"],
        {each["lambda"]: each["harmed"] for each in evidence["tried"]},
    )
    assert 0.5 <= share < 1
    assert share == max(weight for weight, harmed in tried.items() if not harmed)
    assert [weight for weight in tried if weight > share]
    new = store.backbone()
    assert (new.version, new.manifest.blend.weight) == ("v3", share)
    v1, v2 = (store.backbone(version) for version in ("v1", "v2"))
    assert new.manifest.lineage[:2] == (v1.digest, v2.digest)
    for name, tensor in new.load().tensors().items():
        torch.testing.assert_close(
            tensor, v1.load().tensors()[name].lerp(v2.load().tensors()[name], share)
        )
    _, rows, _ = Gated.of(served, store.task("first"))
    loss = served.evaluator("first").measure(served.plan("task+crma", "first"), rows).loss
    assert loss == pytest.approx(
        next(t for t in evidence["tried"] if t["lambda"] == share)["tasks"]["first"]["loss"]
    )
    assert store.verify() == []


def test_where_every_share_harms_the_old_one_stays_and_the_evidence_is_kept(
    served: Served, decide: Decide
) -> None:
    before = served.store.channels()
    evidence = decide(margin=10.0, newcomer_margin=-0.99)
    assert {name for each in evidence["tried"] for name in each["harmed"]} == {"third"}
    after = served.store.channels()
    assert (evidence["lambda"], after.serving()) == (0, before.serving())
    assert (after.history[-1].action, after.history[-1].evidence) == ("keep", evidence)
    assert len(after.history) == len(before.history) + 1
    after.check_integrity()
    with pytest.raises(StoreError):
        served.store.roll_back("tasks/third")


def test_the_ends_of_a_blend_are_the_backbones_themselves(served: Served) -> None:
    v1, v2 = (served.store.backbone(version).load() for version in ("v1", "v2"))
    v1.W.data[0, 0, 0] = -0.0
    for weight, end in ((0.0, v1), (1.0, v2)):
        for name, tensor in blend(v1, v2, weight).tensors().items():
            assert tensor.numpy().tobytes() == end.tensors()[name].numpy().tobytes()


def test_a_task_that_cannot_be_scored_stops_a_promotion_unless_it_is_named(
    served: Served, decide: Decide
) -> None:
    store = served.store
    publish(store, served.base, "blind", 1, backbone=store.backbone("v1").digest)
    publish(store, served.base, "imported", 2)
    with pytest.raises(
        ConfigError, match=r"blind cannot be scored: it recorded no validation loss"
    ):
        decide(margin=10.0)
    assert list(decide(margin=10.0, allow_ungated=["blind"])["ungated"]) == ["blind"]
    assert store.channels().backbone == "v2"
    with pytest.raises(ConfigError, match="this backbone serves"):
        decide()


def test_only_what_descends_from_what_serves_now_is_a_candidate(
    served: Served, decide: Decide
) -> None:
    store = served.store
    with pytest.raises(StoreError, match="Something else serves"):
        promote(
            served, "v2", margin=10.0, note=lambda _: publish(store, served.base, "imported", 2)
        )
    stranger = publish_backbone(store, served.base, serve=False)
    with pytest.raises(LineageMismatch):
        decide(stranger.version)
    assert store.channels().backbone == "v1"


def test_a_promotion_killed_before_it_counts_leaves_the_old_and_can_be_done_again(
    served: Served, decide: Decide
) -> None:
    """Of a share of the candidate, which is published before it serves. Channels move in one write."""
    store, margin = served.store, max(drifts(served, 0.5).values()) / 100 + 1e-6
    before = store.channels()
    with dying(1, ("replace",)):
        decide(margin=margin, newcomer_margin=margin)
    assert (store.channels(), store.backbone_versions()) == (before, ("v1", "v2", "v3"))
    assert store.verify() == []
    decide(margin=margin, newcomer_margin=margin)
    assert store.channels().serving() == {**before.serving(), "backbone": "v3", "tasks/third": "v1"}
    assert store.backbone_versions() == ("v1", "v2", "v3"), (
        "the blend that was published is used again"
    )
    assert store.verify() == []
