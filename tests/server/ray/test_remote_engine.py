"""server.ray.remote_engine: requests in replicas that come and go, without Ray."""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest
import tiny
from replicas import ClosingRemoteEngine, InProcessReplicas, remote_engine
from scripted_engine import ScriptedEngine
from tiny import ask

from crma.core.errors import CrmaError, NotFound, StoreError
from crma.core.selection import BASE, AdapterSelection
from server.engine.errors import AdapterPoolFull, InvalidConstraint, QueueFull
from server.engine.request import Constraint, ConstraintKind, FinishReason, Request, RequestOutput
from server.ray.call import Call, Part
from server.ray.replicas import ReplicaDied

TASK = AdapterSelection("task-0")


@asynccontextmanager
async def serving(
    num_replicas: int = 2, **options: Any
) -> AsyncIterator[tuple[ClosingRemoteEngine, InProcessReplicas]]:
    """A remote engine on scripted engines that have run their first step."""
    engines = [ScriptedEngine() for _ in range(num_replicas)]
    remote, replicas = remote_engine(engines, **options)
    for digest, adapter in tiny.adapters(tiny.injection()).items():
        remote.register(digest, lambda adapter=adapter: adapter, 1000)
    await remote.warm_up()
    try:
        yield remote, replicas
    finally:
        await remote.close()


async def run(engine: ClosingRemoteEngine, request: Request) -> list[RequestOutput]:
    return [output async for output in engine.submit(request)]


def whole(request_id: str = "r", selection: AdapterSelection = BASE) -> Request:
    """A request of which nobody sees anything before its end."""
    return replace(ask(request_id, selection), is_streamed=False)


async def test_a_streamed_answer_comes_in_parts_and_a_whole_one_in_one() -> None:
    async with serving() as (engine, _):
        streamed = await run(engine, ask("streamed"))
        (once,) = await run(engine, whole("whole"))
    assert [output.text for output in streamed] == ["one", " two"]
    assert (once.text, once.token_ids) == ("one two", (5, 6))
    assert once.finish_reason is FinishReason.STOP
    assert once.timings == streamed[-1].timings


@pytest.mark.parametrize("request_", [ask("r", TASK), whole("r", TASK)], ids=["stream", "whole"])
async def test_a_request_that_has_not_begun_runs_again_in_another_replica(
    request_: Request,
) -> None:
    async with serving() as (engine, replicas):
        replicas.dying["r0"] = 0
        outputs = await run(engine, request_)
        assert "".join(output.text for output in outputs) == "one two"
        assert replicas.calls == [("r0", "r"), ("r1", "r")]
        assert (engine.counters.num_retried, engine.counters.num_lost) == (1, 0)


async def test_a_stream_that_has_begun_ends_and_says_that_it_is_lost() -> None:
    async with serving() as (engine, replicas):
        replicas.dying["r0"] = 1
        outputs = await run(engine, ask("r", n=2))
        assert [output.text for output in outputs] == ["one", "", ""]
        assert [(each.finish_reason, each.error) for each in outputs[1:]] == [
            (FinishReason.ABORT, "lost")
        ] * 2
        assert replicas.calls == [("r0", "r")]
        assert (engine.counters.num_retried, engine.counters.num_lost) == (0, 1)
        assert (await run(engine, whole("later")))[0].text == "one two"


async def test_a_request_runs_twice_and_no_more() -> None:
    async with serving(3) as (engine, replicas):
        replicas.dying |= {"r0": 0, "r1": 0}
        (lost,) = await run(engine, whole())
        assert (lost.finish_reason, lost.error) == (FinishReason.ABORT, "lost")
        assert [name for name, _ in replicas.calls] == ["r0", "r1"]


async def test_what_the_engine_of_a_replica_raises_is_raised_here() -> None:
    async with serving() as (engine, replicas):
        scripted = replicas.members[0].engine
        assert isinstance(scripted, ScriptedEngine)
        scripted.refusal = QueueFull(3, retry_after=2.5)
        with pytest.raises(QueueFull) as caught:
            await run(engine, ask())
    assert (caught.value.retry_after, caught.value.allowed) == (2.5, 3)


async def test_all_replicas_together_have_room_for_their_queues() -> None:
    async with serving(max_running=2, max_queue=1) as (engine, _):
        for number in range(6):
            engine.submit(ask(f"r{number}"))
        with pytest.raises(QueueFull):
            engine.submit(ask("one more"))


async def test_an_adapter_is_loaded_once_by_each_replica_that_needs_it() -> None:
    async with serving() as (engine, replicas):
        fetched: list[str] = []
        loader = engine._loaders["task-0"]

        def counted() -> Any:
            fetched.append("task-0")
            return loader()

        engine.register("task-0", counted, 1000)
        for number in range(3):
            await run(engine, ask(f"r{number}", TASK))
        assert fetched == ["task-0"]
        replicas.members.reverse()
        await run(engine, ask("elsewhere", TASK))
        assert fetched == ["task-0", "task-0"]
        assert engine.resident() == ("task-0",)


async def test_an_adapter_that_cannot_be_loaded_names_the_problem_of_the_store() -> None:
    def damaged() -> Any:
        raise StoreError("the file is damaged", field="weights", value="a.safetensors")

    async with serving() as (engine, _):
        engine.register("broken", damaged, 1000)
        with pytest.raises(StoreError, match="damaged") as caught:
            await run(engine, ask("r", AdapterSelection("broken")))
        assert (caught.value.field, caught.value.value) == ("weights", "a.safetensors")
        with pytest.raises(NotFound):
            engine.adapter("unknown")


async def test_loading_and_unloading_are_acts_on_every_replica() -> None:
    async with serving() as (engine, replicas):
        await engine.load("task-0")
        assert [each.engine.resident() for each in replicas.members] == [("task-0",)] * 2
        await engine.unload("task-0")
        assert [each.engine.resident() for each in replicas.members] == [()] * 2
        assert engine.resident() == ()


async def test_a_replica_that_comes_later_pins_what_the_others_have_pinned() -> None:
    async with serving() as (engine, replicas):
        late = replicas.members.pop()
        await engine.pin("task-0")
        await engine._look()
        assert late.engine.resident() == ()
        replicas.members.append(late)
        await engine._look()
        await engine._acted()
        assert late.engine.resident() == ("task-0",)


async def test_a_pin_for_which_a_replica_has_no_room_is_none() -> None:
    async with serving() as (engine, replicas):
        for digest in ("task-1", "task-2", "crma-0", "crma-1"):
            await replicas.members[1].pin(digest, {digest: 1000})
        with pytest.raises(AdapterPoolFull):
            await engine.pin("task-0")
        await engine.unload("task-0")  # AdapterInUse if it were pinned in the other one
        assert replicas.members[0].engine.resident() == ()


async def test_a_constraint_is_checked_in_another_replica_if_one_ends() -> None:
    class Dying(InProcessReplicas):
        async def check(self, constraint: Constraint) -> CrmaError | None:
            if len(self.members) == 2:
                del self.members[0]
                raise ReplicaDied("r0")
            return await super().check(constraint)

    async with serving() as (engine, replicas):
        engine._replicas = Dying(replicas.members)
        await engine.check(Constraint(ConstraintKind.REGEX, "a|b"))
        with pytest.raises(InvalidConstraint):
            await engine.check(Constraint(ConstraintKind.REGEX, "(a|b"))


class Silent(InProcessReplicas):
    """Replicas that cannot be asked."""

    async def every(self, act: str, *arguments: Any) -> Any:
        raise RuntimeError("the controller is away")


async def test_what_is_known_of_replicas_stays_while_they_cannot_be_asked() -> None:
    async with serving() as (engine, replicas):
        engine._replicas = Silent(replicas.members)
        await engine._look()
        assert len(engine.fleet.running) == 2
        assert not engine.stats().has_failed


class NoReplica(InProcessReplicas):
    """Replicas of which none ever comes."""

    async def generate(self, call: Call) -> AsyncGenerator[Part, None]:
        await asyncio.Event().wait()
        yield Part()


async def test_a_request_for_which_no_replica_comes_ends_at_its_deadline_or_when_aborted() -> None:
    async with serving() as (engine, replicas):
        engine._replicas = NoReplica(replicas.members)
        past = ask("late", deadline=time.monotonic() - 60)
        (late,) = await run(engine, past)
        assert (late.finish_reason, late.error) == (FinishReason.ABORT, "deadline")
        waiting = asyncio.create_task(run(engine, ask("aborted")))
        await asyncio.sleep(0)
        engine.abort("aborted")
        (aborted,) = await waiting
        assert (aborted.finish_reason, aborted.error) == (FinishReason.ABORT, None)
