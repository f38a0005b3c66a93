"""The manifest for Kubernetes, as far as it can be checked without a cluster."""

from typing import Any

import kubernetes_validate
import pytest
import yaml
from dockerfile import Dockerfile
from paths import ROOT

from server.drain import CANCEL_SECONDS, CLOSE_SECONDS, END_SECONDS
from server.http.routes.operations import PATHS
from server.settings import Settings

MANIFEST = ROOT / "docker/kubernetes/crma.yaml"
KINDS = ["ConfigMap", "Deployment", "Service", "PodDisruptionBudget"]
OLDEST = "1.30"  # that knows all of it: the sleep before SIGTERM


def objects() -> dict[str, dict[str, Any]]:
    """The objects by kind."""
    return {each["kind"]: each for each in yaml.safe_load_all(MANIFEST.read_text("utf-8"))}


def pod() -> dict[str, Any]:
    return objects()["Deployment"]["spec"]["template"]["spec"]


def container() -> dict[str, Any]:
    (only,) = pod()["containers"]
    return only


def test_the_manifest_has_all_that_a_replicated_service_needs() -> None:
    assert list(objects()) == KINDS


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("version", [OLDEST, kubernetes_validate.latest_version()])
def test_each_object_is_one_of_kubernetes_own(kind: str, version: str) -> None:
    """By Kubernetes' OpenAPI schema: an unknown field is an error."""
    kubernetes_validate.validate(objects()[kind], version, strict=True)


def test_a_mistyped_field_would_be_found() -> None:
    deployment = objects()["Deployment"]
    deployment["spec"]["template"]["spec"]["terminationGracePeriod"] = 65
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(deployment, OLDEST, strict=True)


def test_all_settings_exist_and_have_values_that_they_take(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = dict(objects()["ConfigMap"]["data"])
    given |= {each["name"]: "secret" for each in container()["env"]}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    settings = Settings.load()
    assert settings.store == given["CRMA_STORE"]
    assert not settings.is_open


def test_no_secret_is_in_the_manifest() -> None:
    assert all("secretKeyRef" in each["valueFrom"] for each in container()["env"])
    assert "Secret" not in objects()


def test_labels_select_the_pods() -> None:
    found = objects()
    template = found["Deployment"]["spec"]["template"]
    selectors = [
        found["Deployment"]["spec"]["selector"]["matchLabels"],
        found["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"],
        found["Service"]["spec"]["selector"],
        template["spec"]["topologySpreadConstraints"][0]["labelSelector"]["matchLabels"],
    ]
    assert selectors == [template["metadata"]["labels"]] * 4


def test_probes_ask_the_port_for_health_and_a_long_start_is_no_failure() -> None:
    ports = {each["name"]: each["containerPort"] for each in container()["ports"]}
    settings = objects()["ConfigMap"]["data"]
    assert ports["health"] == int(settings["CRMA_HEALTH_PORT"])
    environment = Dockerfile.read().stages[-1].environment()
    assert ports["http"] == int(environment["CRMA_PORT"])
    for name in ("startupProbe", "livenessProbe", "readinessProbe"):
        asked = container()[name]["httpGet"]
        assert asked["port"] == "health"
        assert asked["path"] in PATHS
    start = container()["startupProbe"]
    assert start["periodSeconds"] * start["failureThreshold"] >= 1200


def test_a_pod_has_the_time_that_the_server_takes_to_stop() -> None:
    settings = objects()["ConfigMap"]["data"]
    before = container()["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert before >= float(settings["CRMA_DRAIN_GRACE_S"])
    requests = max(float(settings[f"CRMA_DRAIN_{each}_S"]) for each in ("GRACE", "TIMEOUT"))
    after = requests + END_SECONDS + CANCEL_SECONDS + CLOSE_SECONDS
    assert pod()["terminationGracePeriodSeconds"] >= before + after


def test_a_container_is_nobody_special_and_writes_to_its_volume_only() -> None:
    assert pod()["securityContext"]["runAsUser"] == 10001
    assert ("USER", "10001") in Dockerfile.read().stages[-1].steps
    rights = container()["securityContext"]
    assert rights["readOnlyRootFilesystem"]
    assert not rights["allowPrivilegeEscalation"]
    assert rights["capabilities"] == {"drop": ["ALL"]}
    (mount,) = container()["volumeMounts"]
    environment = Dockerfile.read().stages[-1].environment()
    assert mount["mountPath"] == environment["CRMA_HOME"] == environment["TMPDIR"]


def test_a_drain_of_a_node_leaves_a_replica() -> None:
    found = objects()
    replicas = found["Deployment"]["spec"]["replicas"]
    assert found["PodDisruptionBudget"]["spec"]["minAvailable"] < replicas
