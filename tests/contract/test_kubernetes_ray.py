"""The manifest for KubeRay, as far as it can be checked without a cluster.

Kubernetes' own schema does not know a RayService, but the pods in it.
"""

import ast
import json
import re
from typing import Any

import kubernetes_validate
import pytest
import yaml
from dockerfile import Dockerfile
from paths import ROOT

from server.ray.config import UNSUPPORTED, ReplicasConfig
from server.settings import Settings

MANIFEST = ROOT / "docker/kubernetes/crma-ray.yaml"
GROUPS = ("head", "worker")


def objects() -> dict[str, dict[str, Any]]:
    """The objects by kind."""
    return {each["kind"]: each for each in yaml.safe_load_all(MANIFEST.read_text("utf-8"))}


def cluster() -> dict[str, Any]:
    found: dict[str, Any] = objects()["RayService"]["spec"]["rayClusterConfig"]
    return found


def group(name: str) -> dict[str, Any]:
    (worker,) = cluster()["workerGroupSpecs"]
    found: dict[str, Any] = cluster()["headGroupSpec"] if name == "head" else worker
    return found


def pod(name: str) -> dict[str, Any]:
    spec: dict[str, Any] = group(name)["template"]["spec"]
    return spec


def container(name: str) -> dict[str, Any]:
    (only,) = pod(name)["containers"]
    return only


def served() -> dict[str, Any]:
    """The application that Ray Serve is told to run."""
    (only,) = yaml.safe_load(objects()["RayService"]["spec"]["serveConfigV2"])["applications"]
    return only


def test_the_manifest_has_settings_and_a_service() -> None:
    assert list(objects()) == ["ConfigMap", "RayService"]
    assert objects()["RayService"]["apiVersion"] == "ray.io/v1"


@pytest.mark.parametrize("name", GROUPS)
def test_each_pod_is_one_of_kubernetes_own(name: str) -> None:
    """By Kubernetes' OpenAPI schema: an unknown field is an error."""
    template = group(name)["template"]
    metadata = {"name": name, **template["metadata"]}
    a_pod = {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": template["spec"]}
    kubernetes_validate.validate(a_pod, kubernetes_validate.latest_version(), strict=True)


def test_ray_serve_finds_the_application_and_its_arguments_are_a_configuration() -> None:
    module, _, function = served()["import_path"].partition(":")
    source = ast.parse((ROOT / f"{module.replace('.', '/')}.py").read_text("utf-8"))
    assert function in {each.name for each in source.body if isinstance(each, ast.FunctionDef)}
    config = ReplicasConfig.of(served()["args"])
    assert config.autoscaling is not None
    (worker,) = cluster()["workerGroupSpecs"]
    assert config.autoscaling.min_replicas == worker["minReplicas"]
    assert config.autoscaling.max_replicas == worker["maxReplicas"]


def test_a_worker_has_room_for_one_replica_and_only_the_head_for_the_ingress() -> None:
    config = ReplicasConfig.of(served()["args"])
    assert config.num_cpus == float(container("worker")["resources"]["limits"]["cpu"])
    started = group("head")["rayStartParams"]
    assert float(started["num-cpus"]) == config.ingress_cpus
    assert json.loads(json.loads(started["resources"])) == config.ingress_resources
    assert group("worker")["rayStartParams"] == {}


def test_all_settings_exist_and_are_honoured(monkeypatch: pytest.MonkeyPatch) -> None:
    given = dict(objects()["ConfigMap"]["data"])
    given |= {each["name"]: "secret" for each in container("head")["env"]}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert not Settings.load().is_open
    ReplicasConfig.of(served()["args"]).server_settings()
    assert not {f"CRMA_{name.upper()}" for name in UNSUPPORTED} & given.keys()


def test_the_secrets_are_on_the_head_alone() -> None:
    assert all("secretKeyRef" in each["valueFrom"] for each in container("head")["env"])
    assert "env" not in container("worker")
    assert all("secretRef" not in each for each in container("worker")["envFrom"])


@pytest.mark.parametrize("name", GROUPS)
def test_a_container_is_nobody_special_and_writes_to_its_volumes_only(name: str) -> None:
    assert pod(name)["securityContext"]["runAsUser"] == 10001
    places = {"/tmp", Dockerfile.read().stages[-1].environment()["CRMA_HOME"]}
    for each in (container(name), *pod(name)["initContainers"]):
        rights = each["securityContext"]
        assert rights["readOnlyRootFilesystem"]
        assert not rights["allowPrivilegeEscalation"]
        assert {mount["mountPath"] for mount in each["volumeMounts"]} == places


def test_the_cluster_runs_the_release_of_ray_that_the_tests_ran_with() -> None:
    pinned = re.search(r"^ray==(.+)$", (ROOT / "constraints.txt").read_text("utf-8"), re.MULTILINE)
    assert pinned is not None
    assert cluster()["rayVersion"] == pinned[1]
