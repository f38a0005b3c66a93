"""crma.training.gate: no task suffers from a promotion, and no promotion is half done.

The candidate is a backbone that a real run trained further.
"""

import json
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
from crma.method.injection import Plan
from crma.models.base_model import BaseModel
from crma.store.adapter_store import AdapterStore
from crma.training.config import TrainConfig
from crma.training.gate import SLACK, Gate, blend
from crma.training.gated_task import GatedTask
from crma.training.promotion import promote
from crma.training.protocol import Run
from crma.training.shipping import ship

Decide = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def trained(base: BaseModel, write_task: Any, tmp_path_factory: pytest.TempPathFactory) -> Served:
    """Tasks first and second serve under v1; third trained it on to v2, fast enough to harm them.

    Read only.
    """
    root = tmp_path_factory.mktemp("gate")
    write_task(root / "first", ("yes", "no"))
    write_task(root / "second", ("left", "right"))
    write_task(root / "third", ("up", "down"))
    store = AdapterStore(root / "store")

    def train(*tasks: str, start: str = "") -> Run:
        values = {
            "tasks": [str(root / task) for task in tasks],
            "start": start,
            "epochs": 3,
            "batch_size": 2,
            "dtype": "float32",
            "crma": {"num_streams": 2, "stream_rank": 2, "lr": 0.02, "later_scale": 2.0},
        }
        config = TrainConfig.from_dict(values)
        run = Run(config, base, root / f"run-{tasks[0]}", lambda *_: None)
        run.execute()
        return run

    assert ship(train("first", "second"), store) == (None, {})
    run = train("third", start=str(store.root))
    candidate, existing = ship(run, store)
    assert (candidate, existing) == (store.backbone("v2"), {})
    assert ship(run, store) == (candidate, {"backbone": "v2", "tasks/third": "v1"})
    return Served(base, store, device="cpu", dtype="float32")


@pytest.fixture
def served(trained: Served, tmp_path: Path) -> Served:
    """The same model with a copy of the store that the test may change."""
    shutil.copytree(trained.store.root, tmp_path / "store")
    return trained.with_store(AdapterStore(tmp_path / "store"))


@pytest.fixture
def decide(served: Served) -> Decide:
    """Promotes v2, or another version."""

    def decide(version: str = "v2", **options: Any) -> dict[str, Any]:
        return promote(served, version, note=lambda _: None, **options)

    return decide


def drifts(served: Served, weight: float) -> dict[str, float]:
    """The drift in percent of every task under a blend of v1 and v2, measured without a search."""
    store = served.store
    v1, v2 = (store.backbone(version).load() for version in ("v1", "v2"))
    entries = [store.task(name, "v1") for name in ("first", "second", "third")]
    tasks = [GatedTask.of(served, entry) for entry in entries]
    gate = Gate(served, v1, v2, tasks, {}, {"third"}, {}, print)
    losses = gate.score(blend(v1, v2, weight))
    return {task.entry.name: 100 * (losses[task.entry.name] / task.recorded - 1) for task in tasks}


def harmful_margin(served: Served) -> float:
    """A margin that half of the candidate keeps and the whole candidate exceeds."""
    margin = max(drifts(served, 0.5).values()) / 100 + 1e-6
    assert max(drifts(served, 1.0).values()) > 100 * margin + 1
    return margin


def rerecord(served: Served, name: str, factor: float, **conditions: Any) -> None:
    """Multiply the recorded loss of a task, and say where it was recorded; nothing: unknown."""
    path = served.store.task(name, "v1").path / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["measured"]["validation"]["loss"] *= factor
    if conditions:
        manifest["measured"]["conditions"] |= conditions
    else:
        del manifest["measured"]["conditions"]
    path.write_text(json.dumps(manifest))


def losses(served: Served, version: str) -> dict[str, float]:
    """The validation loss of the serving tasks under a version of the backbone."""
    pairs = served.backbone(served.store.backbone(version))
    found = {}
    for name in ("first", "second"):
        entry, rows, _ = GatedTask.of(served, served.store.task(name))
        plan = Plan([(None, served.lora(entry))], [(None, pairs)])
        found[name] = served.evaluator(entry).measure(plan, rows).loss
    return found


def test_the_limit_follows_from_the_smaller_of_the_loss_at_publication_and_under_the_serving_one(
    served: Served, decide: Decide
) -> None:
    serving = losses(served, "v1")
    rerecord(served, "first", 0.5, dtype="float32")  # lower than the serving backbone's
    rerecord(served, "second", 2.0, dtype="float32")
    evidence = decide(margin=0.25, dry_run=True)
    limits = evidence["limits"]
    assert limits["first"]["limit"] == pytest.approx(1.25 * 0.5 * serving["first"] + SLACK)
    assert limits["second"]["limit"] == pytest.approx(1.25 * serving["second"] + SLACK)
    assert limits["second"]["recorded"] == pytest.approx(2 * serving["second"])
    assert limits["second"]["serving"] == pytest.approx(serving["second"])
    assert limits["third"]["serving"] is None  # it cannot serve under the serving backbone
    for trial in evidence["tried"]:
        over = [n for n, each in trial["tasks"].items() if each["loss"] > limits[n]["limit"]]
        assert trial["harmed"] == over


@pytest.mark.parametrize("conditions", [{}, {"dtype": "bfloat16"}, {"hardware": {"cpu": "old"}}])
def test_a_loss_recorded_elsewhere_is_measured_again_under_the_backbone_of_that_time(
    served: Served, decide: Decide, conditions: dict[str, Any]
) -> None:
    """On another machine the serving backbone alone seemed to drift by 1.2 %.

    Manifests of earlier versions do not say where they were measured.
    """
    serving = losses(served, "v1")
    rerecord(served, "first", 0.9, **conditions)
    limit = decide(margin=0.0, newcomer_margin=10.0, dry_run=True)["limits"]["first"]
    assert limit["recorded_here"] == pytest.approx(serving["first"])
    assert limit["limit"] == pytest.approx(serving["first"] + SLACK)


def test_a_task_that_got_worse_since_the_serving_backbone_is_harmed_however_high_its_record(
    served: Served, decide: Decide
) -> None:
    margin = harmful_margin(served)
    for name in ("first", "second"):
        rerecord(served, name, 3.0, dtype="float32")
    trial = decide(margin=margin, newcomer_margin=10.0, dry_run=True)["tried"][0]
    assert trial["harmed"]
    assert all(trial["tasks"][name]["drift"] < 0 for name in trial["harmed"])


@pytest.mark.parametrize("dry_run", [False, True])
def test_every_trial_prints_both_columns_and_the_limit_applied(
    served: Served, dry_run: bool
) -> None:
    lines: list[str] = []
    evidence = promote(served, "v2", margin=10.0, dry_run=dry_run, note=lines.append)
    limit = evidence["limits"]["first"]
    loss = evidence["tried"][0]["tasks"]["first"]["loss"]
    (line,) = [line for line in lines if line.strip().startswith("first:")]
    assert f"{loss:.4f} <= limit {limit['limit']:.4f}" in line
    assert f"at publication {limit['recorded']:.4f}" in line
    assert f"serving {limit['serving']:.4f}" in line
    (line,) = [line for line in lines if line.strip().startswith("third:")]
    assert line.endswith("cannot serve yet")


def test_a_backbone_that_was_trained_further_descends_from_the_serving_one_and_does_not_serve(
    served: Served,
) -> None:
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
    store = served.store
    before = store.channels().serving()
    publish(store, served.base, "first", 1, serve=False)  # no newcomer: trained without a backbone
    evidence = decide(margin=10.0)
    assert (evidence["lambda"], len(evidence["tried"])) == (1, 1)
    assert store.channels().serving() == {**before, "backbone": "v2", "tasks/third": "v1"}
    assert [change.evidence for change in store.channels().history[-2:]] == [evidence, None]
    assert store.verify() == []
    assert store.roll_back("backbone").serving() == before
    assert store.verify() == []


def test_a_candidate_that_was_rolled_back_can_be_promoted_again(
    served: Served, decide: Decide
) -> None:
    decide(margin=10.0)
    served.store.roll_back("backbone")
    assert decide(margin=10.0)["lambda"] == 1
    assert served.store.channels().backbone == "v2"


def test_a_dry_run_decides_and_changes_nothing(served: Served, decide: Decide) -> None:
    before = served.store.channels()
    assert decide(margin=10.0, dry_run=True)["lambda"] == 1
    assert served.store.channels() == before


def test_a_harmful_candidate_is_blended_with_the_largest_weight_that_harms_nobody(
    served: Served, decide: Decide
) -> None:
    store = served.store
    margin = harmful_margin(served)
    evidence = decide(margin=margin, newcomer_margin=margin)
    weight = evidence["lambda"]
    trials = {trial["lambda"]: trial for trial in evidence["tried"]}
    assert 0.5 <= weight < 1
    assert weight == max(tried for tried, trial in trials.items() if not trial["harmed"])
    assert any(tried > weight for tried in trials)
    new = store.backbone()
    assert (new.version, new.manifest.blend.weight) == ("v3", weight)
    v1, v2 = (store.backbone(version) for version in ("v1", "v2"))
    assert new.manifest.lineage[:2] == (v1.digest, v2.digest)
    start, end = v1.load().tensors(), v2.load().tensors()
    for name, tensor in new.load().tensors().items():
        torch.testing.assert_close(tensor, start[name].lerp(end[name], weight))
    _, rows, _ = GatedTask.of(served, store.task("first"))
    loss = served.evaluator("first").measure(served.plan("task+crma", "first"), rows).loss
    assert loss == pytest.approx(trials[weight]["tasks"]["first"]["loss"])
    assert store.verify() == []


def test_if_every_weight_harms_a_task_the_serving_backbone_stays_and_the_evidence_is_kept(
    served: Served, decide: Decide
) -> None:
    before = served.store.channels()
    evidence = decide(margin=10.0, newcomer_margin=-0.99)
    harmed = {name for trial in evidence["tried"] for name in trial["harmed"]}
    assert harmed == {"third"}
    after = served.store.channels()
    assert (evidence["lambda"], after.serving()) == (0, before.serving())
    assert (after.history[-1].action, after.history[-1].evidence) == ("keep", evidence)
    assert len(after.history) == len(before.history) + 1
    after.check_integrity()
    with pytest.raises(StoreError):
        served.store.roll_back("tasks/third")


def test_a_blend_with_weight_0_or_1_is_its_end_bit_for_bit(served: Served) -> None:
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
    message = "blind cannot be scored: it recorded no validation loss"
    with pytest.raises(ConfigError, match=message):
        decide(margin=10.0)
    evidence = decide(margin=10.0, allow_ungated=["blind"])
    assert list(evidence["ungated"]) == ["blind"]
    assert store.channels().backbone == "v2"
    with pytest.raises(ConfigError, match="this backbone serves"):
        decide()


def test_a_promotion_fails_if_something_else_began_to_serve_meanwhile(served: Served) -> None:
    store = served.store

    def interfere(_: str) -> None:
        publish(store, served.base, "imported", 2)

    with pytest.raises(StoreError, match="Something else serves"):
        promote(served, "v2", margin=10.0, note=interfere)
    assert store.channels().backbone == "v1"


def test_only_a_descendant_of_the_serving_backbone_is_a_candidate(
    served: Served, decide: Decide
) -> None:
    stranger = publish_backbone(served.store, served.base, serve=False)
    with pytest.raises(LineageMismatch):
        decide(stranger.version)
    assert served.store.channels().backbone == "v1"


def test_a_killed_promotion_leaves_the_serving_backbone_and_can_be_done_again(
    served: Served, decide: Decide
) -> None:
    """It dies after the blend is published and before the channels move, which is one write."""
    store = served.store
    margin = harmful_margin(served)
    before = store.channels()
    with dying(1, ("replace",)):
        decide(margin=margin, newcomer_margin=margin)
    assert (store.channels(), store.backbone_versions()) == (before, ("v1", "v2", "v3"))
    assert store.verify() == []
    decide(margin=margin, newcomer_margin=margin)
    assert store.channels().serving() == {**before.serving(), "backbone": "v3", "tasks/third": "v1"}
    # The blend that was published already is used again.
    assert store.backbone_versions() == ("v1", "v2", "v3")
    assert store.verify() == []
