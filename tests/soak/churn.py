"""An administrator who publishes, promotes, rolls back, loads, unloads and deletes all the time."""

import random
from dataclasses import dataclass

from crma.core.errors import NotFound
from crma.store.channels import BACKBONE
from crma.store.manifest import TASK_FILES
from soak.adapters import CHURNED, STABLE, UPLOADED, Adapters
from soak.caller import Caller

BUSY = frozenset({"200", "404 not_found", "409 adapter_in_use", "409 adapter_pool_full"})
PUBLISHED = frozenset({"201"})
MAX_VERSIONS = 5
PAUSE_S = 0.5


@dataclass(eq=False)
class Churn:
    """Changes the store, through the server and past it.

    Args:
        caller: with a key for admin.
        adapters: what can be published.
    """

    caller: Caller
    adapters: Adapters
    rng: random.Random

    def change(self) -> None:
        """Make one change."""
        acts = [self.publish, self.promote, self.roll_back, self.upload, self.delete, self.stop]
        acts += [self.load_or_unload, self.load_or_unload, self.load_or_unload, self.move_backbone]
        self.rng.choice(acts)()
        self.caller.gate.pause(PAUSE_S)

    def publish(self) -> None:
        """Publish a version past the server, as `crma train` does."""
        task = self.rng.choice(CHURNED)
        self.adapters.publish(task, self.rng.randrange(len(self.adapters.variants[task])))
        self._count("publish")

    def promote(self) -> None:
        """Let any version of a task serve."""
        store = self.adapters.store
        task = self.rng.choice(CHURNED)
        store.set_serving({f"tasks/{task}": self.rng.choice(store.task_versions(task))})
        self._count("promote")

    def roll_back(self) -> None:
        """Let the version before serve again; it may have been deleted by now."""
        try:
            self.adapters.store.roll_back(f"tasks/{self.rng.choice(CHURNED)}")
        except NotFound:
            self._count("roll back: deleted")
            return
        self._count("roll back")

    def move_backbone(self) -> None:
        """Let the other backbone serve."""
        if self.rng.random() < 0.8:
            return  # it touches everything
        store = self.adapters.store
        version = "v1" if store.channels().backbone == "v2" else "v2"
        store.set_serving({BACKBONE: version})
        self._count("move backbone")

    def upload(self) -> None:
        """Publish through the server."""
        task = self.rng.choice(UPLOADED)
        self.upload_version(task, self.rng.randrange(len(self.adapters.uploads[task])))

    def upload_version(self, task: str, number: int) -> None:
        """Upload one of the folders of a task."""
        folder = self.adapters.uploads[task][number]
        files = [("files", (name, (folder / name).read_bytes())) for name in TASK_FILES]
        fields = {"name": task, "licence": "Apache-2.0", "trust_base": "true"}
        self.caller.send("upload", "POST", "/adapters", PUBLISHED, data=fields, files=files)

    def delete(self) -> None:
        """Delete an old version of a task that has many."""
        task = self.rng.choice([*CHURNED, *UPLOADED])
        versions = self.adapters.store.task_versions(task)
        if len(versions) <= MAX_VERSIONS:
            return
        version = self.rng.choice(versions[1:-1])
        may = frozenset({"200", "404 not_found", "409 adapter_serves"})
        self.caller.send("delete", "DELETE", f"/adapters/{task}@{version}", may)

    def stop(self) -> None:
        """Let a task serve no more; its next upload does again."""
        body = {"lora_name": self.rng.choice(UPLOADED)}
        may = frozenset({"200", "404 model_not_found", "404 not_found"})
        self.caller.send("stop", "POST", "/v1/unload_lora_adapter", may, json=body)

    def load_or_unload(self) -> None:
        """Load, unload, pin or unpin an adapter; what ablations use is not taken from them."""
        task = self.rng.choice([*STABLE, *CHURNED, *UPLOADED])
        acts = ["load", "unload", "pin", "unload?when_in_use=wait"]
        if task not in STABLE:
            acts += ["unload?when_in_use=cancel"] * 2
        act = self.rng.choice(acts)
        response = self.caller.send(act, "POST", f"/adapters/{task}/{act}", BUSY)
        if act == "pin" and response is not None and response.status_code == 200:
            version = response.json()["version"]  # another one may serve by now
            self.caller.send("unpin", "POST", f"/adapters/{task}@{version}/unpin", BUSY)

    def _count(self, act: str) -> None:
        self.caller.tally.count(act, "done")
