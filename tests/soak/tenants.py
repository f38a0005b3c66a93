"""Keys that look for what belongs to others: jobs, cached prefixes, tasks that are not theirs."""

import random
from dataclasses import dataclass

import httpx

from soak.caller import Caller
from soak.jobs import JobOwner

NOT_THERE = frozenset({"404 not_found", "404 model_not_found"})
FINE = frozenset({"200"})
NUM_WORDS = 40  # a few blocks of the KV cache


@dataclass(eq=False)
class Spy:
    """Asks for what a key may not see. What it sees is a leak.

    Args:
        owner: whose jobs and prompts they are.
        friend: a key of the owner's tenant.
        stranger: a key of another tenant.
        limited: a key for one task, "legal".

    Attributes:
        num_checks: how often something was asked for.
        num_shared: prefixes that the owner's tenant found cached.
    """

    owner: JobOwner
    friend: Caller
    stranger: Caller
    limited: Caller
    rng: random.Random
    num_checks: int = 0
    num_shared: int = 0

    def spy(self) -> None:
        """Try one of the ways."""
        self.rng.choice([self.read_job, self.list_jobs, self.find_prefix, self.find_tasks])()
        self.num_checks += 1
        self.stranger.gate.pause(0.5)

    def read_job(self) -> None:
        """Read, watch and cancel a job of another key, of the same tenant or not."""
        for id in list(self.owner.open):
            for caller in (self.friend, self.stranger):
                for method, path in (("GET", ""), ("GET", "/events"), ("DELETE", "")):
                    path = f"/ablation/{id}{path}"
                    response = caller.send("another's job", method, path, NOT_THERE)
                    self._leaks_if(response, 200, f"{method} {path} by {caller.name}")

    def list_jobs(self) -> None:
        for caller in (self.friend, self.stranger):
            response = caller.send("list jobs", "GET", "/ablation", FINE)
            if response is None or response.status_code != 200:
                continue
            seen = {job["id"] for job in response.json()} & set(self.owner.open)
            if seen:
                caller.tally.leaks.append(f"{caller.name} lists {seen}")

    def find_prefix(self) -> None:
        """What another tenant has sent must not be cached; what the own tenant has sent may be."""
        words = " ".join(str(self.rng.randrange(10**6)) for _ in range(NUM_WORDS))
        for caller in (self.owner.caller, self.stranger, self.friend):
            body = {"prompt": words, "raw": True, "max_tokens": 1}
            response = caller.send("a prefix", "POST", "/generate", FINE, json=body)
            if response is None or response.status_code != 200:
                return
            num_cached = response.json()["usage"]["cached_tokens"]
            if caller is self.friend:
                self.num_shared += num_cached > 0
            elif num_cached:
                caller.tally.leaks.append(f"{caller.name} found {num_cached} tokens cached")

    def find_tasks(self) -> None:
        """A key for one task sees no other, in any route."""
        body = {"prompt": "Hi", "task": "medical", "max_tokens": 1}
        response = self.limited.send("another's task", "POST", "/generate", NOT_THERE, json=body)
        self._leaks_if(response, 200, "/generate under a task of others")
        for path in ("/v1/models", "/adapters"):
            response = self.limited.send(f"{path} of one task", "GET", path, FINE)
            if response is not None and "medical" in response.text:
                self.limited.tally.leaks.append(f"{path} names a task of others")

    def _leaks_if(self, response: httpx.Response | None, status: int, what: str) -> None:
        if response is not None and response.status_code == status:
            self.stranger.tally.leaks.append(what)
