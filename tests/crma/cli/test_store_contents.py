"""`crma store ls`, `show` and `gc`: what a store holds, and what of it may go."""

import json

import pytest
import tiny
from command_line import crma

from crma.models.base_model import BaseModel
from crma.store.adapter_store import AdapterStore


def test_a_list_has_every_channel_with_what_serves(base: BaseModel, store: AdapterStore) -> None:
    tiny.publish(store, base, "legal", 5)
    code, out, err = crma("store", "ls", "--store", store.root)
    assert (code, err) == (0, "")
    head, *lines = out.splitlines()
    assert head.split() == ["CHANNEL", "SERVES", "VERSIONS", "DIGEST"]
    assert [line.split()[0] for line in lines] == ["backbone", "tasks/legal", "tasks/medical"]
    legal = json.loads(crma("store", "ls", "--store", store.root, "--json")[1])["channels"][1]
    assert (legal["serves"], legal["versions"]) == ("v2", ["v1", "v2"])
    assert legal["digest"] == store.task("legal").digest


def test_a_store_may_be_named_by_the_servers_variable(
    store: AdapterStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CRMA_STORE", str(store.root))
    assert "tasks/medical" in crma("store", "ls")[1]


def test_the_manifest_of_a_version_is_shown(store: AdapterStore) -> None:
    options = ("--store", store.root, "--json")
    shown = json.loads(crma("store", "show", "medical@v1", *options)[1])
    assert shown == store.task("medical").manifest.model_dump(mode="json")
    backbone = json.loads(crma("store", "show", "backbone", *options)[1])
    assert backbone["certificate"]["holds"]
    code, out, _ = crma("store", "show", "medical", "--store", store.root)
    assert code == 0
    assert len(out.splitlines()) == len(shown)  # a field a line, templates too
    code, _, err = crma("store", "show", "medical@v7", "--store", store.root)
    assert (code, "v7" in err) == (2, True)


def test_nothing_is_deleted_unless_that_is_asked_for(base: BaseModel, store: AdapterStore) -> None:
    for seed in range(3):
        tiny.publish(store, base, "new", seed)
    code, out, err = crma("store", "gc", "--store", store.root)
    assert (code, out) == (0, "new@v1\n")
    assert "--delete" in err
    assert store.task_versions("new") == ("v1", "v2", "v3")
    code, out, _ = crma("store", "gc", "--store", store.root, "--delete", "--json")
    assert (code, json.loads(out)) == (0, {"outdated": ["new@v1"], "deleted": True})
    assert store.task_versions("new") == ("v2", "v3")
    assert crma("store", "gc", "--store", store.root) == (0, "", "0 versions can be deleted\n")


@pytest.mark.parametrize("command", ["init", "import . new"])
def test_a_store_on_another_machine_is_not_written_from_here(command: str) -> None:
    code, out, err = crma("store", *command.split(), "--store", "s3://bucket/store")
    assert (code, out) == (1, "")
    assert "s3://bucket/store is read from here and never changed" in err
