"""A server under mixed load, churn and faults, which is killed and started again and again."""

import json
import random
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from api_keys import Headers, add
from health_probe import watched

from crma.evaluation.question_set import read_question_set
from crma.store.channels import BACKBONE
from soak.adapters import CHURNED, STABLE, UPLOADED, Adapters, make_adapters
from soak.asking import Asker
from soak.caller import Caller, client_of
from soak.churn import Churn
from soak.expected import Expected
from soak.faults import Attacker
from soak.gate import Gate
from soak.jobs import JobOwner, report_of
from soak.life import IdleState, Life
from soak.server_run import ServerRun
from soak.tally import MAX_SHOWN, Tally
from soak.tenants import Spy

KEYS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {  # name -> scopes, fields
    "alice": (("generate", "ablate"), {"tenant": "red", "max_concurrent": 32}),
    "anna": (("generate", "ablate"), {"tenant": "red", "max_concurrent": 32}),
    "bob": (("generate", "ablate"), {"tenant": "blue", "max_concurrent": 32}),
    "carl": (("generate",), {"tenant": "blue", "tasks": ["legal"]}),
    "mallory": (("generate", "ablate"), {"tenant": "green"}),
    "root": (("admin",), {}),
    "watcher": (("metrics",), {}),
}
SETTINGS = {
    "CRMA_DTYPE": "float32",
    "CRMA_MAX_LOADED_ADAPTERS": "6",
    "CRMA_KV_CACHE_TOKENS": "4096",
    "CRMA_KEEP_ALIVE_S": "3",
    "CRMA_HEAD_TIMEOUT_S": "5",
    "CRMA_BODY_TIMEOUT_S": "8",
    "CRMA_MAX_ABLATION_KEPT": "100000",
    # What a busy machine does late is no fault.
    "CRMA_REQUEST_TIMEOUT_S": "1200",
}
PROMPTS = [
    "Name three primary colours, and say which of them is the colour of the sky.",
    "Explain in one sentence why the sea is salty. " * 8,
]
NUM_QUESTIONS = 3  # of each stable task
NUM_ASKERS = 2  # of each key
LAST_LOAD_S = 12.0  # between the look at an idle server and its end
STILL_S = 300.0


@dataclass(eq=False)
class Soak:
    """The server, and everybody who uses it.

    Args:
        folder: for the store, the records, the keys and the logs.
    """

    folder: Path
    gate: Gate = field(default_factory=Gate)
    tally: Tally = field(default_factory=Tally)
    lives: list[Life] = field(default_factory=list)

    def __post_init__(self) -> None:
        keys = self.folder / "keys.json"
        self.headers: dict[str, Headers] = {
            name: add(keys, name, *scopes, **fields) for name, (scopes, fields) in KEYS.items()
        }
        self.adapters: Adapters = make_adapters(self.folder)
        settings = {
            "CRMA_STORE": str(self.adapters.store.root),
            "CRMA_KEYS_FILE": str(keys),
            "CRMA_EVALUATIONS": str(self.folder / "records"),
            **SETTINGS,
        }
        self.server = ServerRun(self.folder, settings)
        alone = client_of(self.server.url, self.headers["alice"])
        self.clients = [alone]
        self.expected = Expected(alone, _prompts(), _items())
        self.callers = {name: self._caller(name) for name in KEYS}
        self.owners = [JobOwner(self.callers[name], self.expected) for name in ("alice", "bob")]
        others = [self.callers[name] for name in ("anna", "bob", "carl")]
        self.spy = Spy(self.owners[0], *others, random.Random(0))
        self.churn = Churn(self.callers["root"], self.adapters, random.Random(1))
        root, mallory = self.callers["root"], self.callers["mallory"]
        self.attackers = [
            Attacker(mallory, root, self.adapters, random.Random(seed)) for seed in (2, 3)
        ]

    # Before -------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Start the server, publish everything once, and ask every selection alone."""
        self.server.start()
        for task in CHURNED:
            for number in range(len(self.adapters.variants[task])):
                self.adapters.publish(task, number)
        for task in UPLOADED:
            for number in range(len(self.adapters.uploads[task])):
                self.churn.upload_version(task, number)
        store = self.adapters.store
        own = [*STABLE, *CHURNED]
        named = [f"{task}@{each}" for task in own for each in store.task_versions(task)]
        uploaded = [f"{task}@{each}" for task in UPLOADED for each in store.task_versions(task)]
        for version in ("v2", "v1"):
            self._serve_backbone(version)
            self.expected.learn_report()
            for task in (None, *named):
                self.expected.learn(task, crma=True)
        for task in (None, *named, *uploaded):
            self.expected.learn(task, crma=False)

    def _serve_backbone(self, version: str) -> None:
        store = self.adapters.store
        if store.channels().backbone != version:
            store.set_serving({BACKBONE: version})
        client = self.expected.client

        def serves() -> bool:
            shown: dict[str, Any] = client.get("/adapters").json()["backbone"]
            return shown["version"] == version

        self.server.wait_for(serves)

    # Lives --------------------------------------------------------------------------------------

    def run(self, num_lives: int, life_s: float) -> None:
        """Live and be killed; the last life ends as an operator ends it.

        `report.json` in the folder has what was seen so far, after each life.
        """
        for number in range(1, num_lives + 1):
            life = Life(self.server.starts_s[-1])
            self.lives.append(life)
            is_last = number == num_lives
            with self._watched(life):
                self._load(life, life_s, is_last=is_last)
            if is_last:
                life.exit_code = self.server.stop()
            else:
                self._kill()
            (self.folder / "report.json").write_text(json.dumps(self.report(), indent=1))

    def _load(self, life: Life, life_s: float, *, is_last: bool) -> None:
        """Load for a life, with a look at the idle server after its first part and at its end."""
        until = time.monotonic() + life_s
        self._act(min(60.0, life_s / 4), None)
        life.idle.append(self._look_at_idle())
        self._act(until - time.monotonic() - LAST_LOAD_S, life)
        life.idle.append(self._look_at_idle())
        if not is_last:
            self._act(LAST_LOAD_S, None)

    def _act(self, seconds: float, life: Life | None) -> None:
        """Let everybody act, and note the memory."""
        self.gate.open()
        started = time.monotonic()
        while time.monotonic() < started + max(seconds, 1.0):
            time.sleep(1.0)
            if life is not None:
                life.memory.append((time.monotonic() - started, self.server.resident_mib()))

    def _look_at_idle(self) -> IdleState:
        """Hold everybody, wait until nothing runs and connections are closed, and look."""
        self.gate.hold()
        self.gate.wait_until_still(STILL_S)
        for owner in self.owners:
            owner.wait_until_ended(STILL_S)
        watcher = self.headers["watcher"]
        self.server.wait_for(lambda: self._num_requests(watcher) == 0, STILL_S)
        time.sleep(2 * float(SETTINGS["CRMA_BODY_TIMEOUT_S"]))  # what idles is closed by then
        return IdleState.of(self.server, watcher)

    def _num_requests(self, headers: Headers) -> float:
        gauges = self.server.gauges(headers)
        return gauges["crma_num_requests_running"] + gauges["crma_num_requests_waiting"]

    def _kill(self) -> None:
        self.gate.outage()
        for owner in self.owners:
            owner.note_kill()
        self.server.kill()
        num_lost = self._num_lost()
        self.gate.wait_until_still(STILL_S)
        self.server.start()
        for owner in self.owners:
            owner.follow()
        lost = self._num_lost() - num_lost
        self.tally.fault("kill -9", "cut off", lost=lost, recovered=True)

    def _num_lost(self) -> int:
        return sum(len(owner.lost) for owner in self.owners)

    @contextmanager
    def _watched(self, life: Life) -> Iterator[None]:
        with watched(self.server.url) as watch:
            yield
        life.healthz_s = watch.slowest_s
        life.num_unhealthy = watch.num_failed

    def report(self) -> dict[str, Any]:
        """Everything that was counted and measured so far, as JSON."""
        return {
            **self.tally.report(),
            **report_of(self.owners),
            "tenant_checks": self.spy.num_checks,
            "shared_prefixes": self.spy.num_shared,
            "complaints_in_logs": self.server.complaints()[:MAX_SHOWN],
            "recovery_s": [round(each, 1) for each in self.server.starts_s[1:]],
            "lives": [life.report() for life in self.lives],
        }

    # Workers ------------------------------------------------------------------------------------

    @contextmanager
    def working(self) -> Iterator[None]:
        """Everybody, each in a thread of their own."""
        threads = [threading.Thread(target=self._repeat, args=(act,)) for act in self._acts()]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self.gate.end()
            for thread in threads:
                thread.join()
            self.server.end()
            for client in self.clients:
                client.close()

    def _acts(self) -> list[Callable[[], None]]:
        acts: list[Callable[[], None]] = [self.spy.spy, self.churn.change]
        acts += [owner.start_or_follow for owner in self.owners]
        acts += [attacker.attack for attacker in self.attackers]
        for seed, name in enumerate(["alice", "anna", "bob"] * NUM_ASKERS):
            asker = Asker(self._caller(name), self.expected, random.Random(100 + seed))
            acts.append(asker.ask)
        acts += [asker.disconnect, asker.sample]
        return acts

    def _caller(self, name: str) -> Caller:
        """A caller with connections of its own."""
        caller = Caller(name, self.headers[name], self.server.url, self.gate, self.tally)
        self.clients.append(caller.client)
        return caller

    def _repeat(self, act: Callable[[], None]) -> None:
        is_over = False
        while not is_over:
            with self.gate.act() as may_act:
                is_over = not may_act
                if may_act:
                    self._try(act)

    def _try(self, act: Callable[[], None]) -> None:
        try:
            act()
        except Exception:  # noted as what nobody expected, and the worker goes on
            self.tally.unexpected.append(traceback.format_exc())


def _questions() -> dict[str, list[Any]]:
    path = Path(__file__).parents[2] / "adapters_store" / "question_sets" / "public.jsonl"
    found: dict[str, list[Any]] = {}
    for each in read_question_set(path).questions:
        found.setdefault(each.task, []).append(each)
    return found


def _prompts() -> list[str]:
    questions = _questions()
    return [*PROMPTS, *(questions[task][0].question for task in STABLE)]


def _items() -> list[dict[str, Any]]:
    questions = _questions()
    return [
        each.model_dump(mode="json", exclude_defaults=True)
        for task in STABLE
        for each in questions[task][:NUM_QUESTIONS]
    ]
