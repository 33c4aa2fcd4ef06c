"""Leader election: two replicas and one Lease, by a clock of the test's own."""

from __future__ import annotations

import asyncio
import copy
from typing import Any

import pytest
from opensora_operator.cluster import ApiError
from opensora_operator.leader import Leader, LeaseLost
from opensora_operator.plans import Object


class World:
    """A clock, and an API server with at most one Lease."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.lease: Object | None = None
        self.version = 0
        self.failure: ApiError | None = None
        self.looks = 0
        self.end_at = float("inf")

    def clock(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.now += seconds
        await asyncio.sleep(0)
        if self.now >= self.end_at:
            raise EndOfTestError

    async def find(self, kind: str, namespace: str | None, name: str) -> Object | None:
        assert (kind, namespace, name) == ("Lease", "system", "operator")
        self.looks += 1
        if self.failure is not None:
            raise self.failure
        return copy.deepcopy(self.lease)

    async def create(self, manifest: Object) -> Object:
        if self.lease is not None:
            raise ApiError(409, "exists")
        return self._store(manifest)

    async def update(self, manifest: Object) -> Object:
        if self.failure is not None:
            raise self.failure
        if self.lease is None:
            raise ApiError(404, "deleted")
        if manifest["metadata"]["resourceVersion"] != self.lease["metadata"]["resourceVersion"]:
            raise ApiError(409, "changed")
        return self._store(manifest)

    def _store(self, manifest: Object) -> Object:
        self.version += 1
        metadata = {**manifest["metadata"], "resourceVersion": str(self.version)}
        self.lease = copy.deepcopy({**manifest, "metadata": metadata})
        return copy.deepcopy(self.lease)

    def replica(self, identity: str) -> Leader:
        return Leader(
            self,
            namespace="system",
            name="operator",
            identity=identity,
            lease_seconds=15,
            renew_seconds=10,
            retry_seconds=2,
            clock=self.clock,
            sleep=self.sleep,
        )

    @property
    def holder(self) -> Any:
        return self.lease and self.lease["spec"]["holderIdentity"]


class EndOfTestError(Exception):
    """Nothing more is to happen."""


@pytest.fixture
def world() -> World:
    return World()


def test_the_first_replica_leads_at_once(world: World) -> None:
    replica = world.replica("a")
    asyncio.run(replica.acquire())
    assert replica.is_leader
    assert world.holder == "a"
    assert world.now == 1000
    assert world.lease is not None
    assert world.lease["spec"]["leaseTransitions"] == 0


def test_the_second_waits_while_the_first_renews(world: World) -> None:
    async def scenario() -> None:
        first, second = world.replica("a"), world.replica("b")
        await first.acquire()
        world.end_at = 1100
        holding = asyncio.create_task(first.hold())
        with pytest.raises(EndOfTestError):
            await second.acquire()
        holding.cancel()
        await asyncio.gather(holding, return_exceptions=True)
        assert not second.is_leader

    asyncio.run(scenario())
    assert world.holder == "a"


def test_the_second_leads_when_the_first_falls_silent(world: World) -> None:
    async def scenario() -> None:
        await world.replica("a").acquire()
        world.now += 500  # the clocks of two machines need not agree: only the second's own waiting counts
        started = world.now
        await world.replica("b").acquire()
        assert 15 <= world.now - started <= 15.1

    asyncio.run(scenario())
    assert world.holder == "b"
    assert world.lease is not None
    assert world.lease["spec"]["leaseTransitions"] == 1


def test_a_lease_that_is_released_is_free_at_once(world: World) -> None:
    async def scenario() -> None:
        first = world.replica("a")
        await first.acquire()
        await first.release()
        await first.release()
        assert not first.is_leader
        await world.replica("b").acquire()

    asyncio.run(scenario())
    assert (world.holder, world.now) == ("b", 1000)


def test_a_replica_that_does_not_lead_releases_nothing(world: World) -> None:
    async def scenario() -> None:
        await world.replica("a").acquire()
        await world.replica("b").release()

    asyncio.run(scenario())
    assert world.holder == "a"


def test_a_leader_that_cannot_renew_ends_before_the_lease_does(world: World) -> None:
    async def scenario() -> None:
        leader = world.replica("a")
        await leader.acquire()
        world.failure = ApiError(0, "connection refused")
        with pytest.raises(LeaseLost, match="could not be renewed for 10 s"):
            await leader.hold()
        assert not leader.is_leader

    asyncio.run(scenario())
    assert world.now <= 1012


def test_a_short_outage_costs_nothing(world: World) -> None:
    async def scenario() -> None:
        leader = world.replica("a")
        await leader.acquire()
        world.failure = ApiError(503, "starting")
        world.end_at = 1007
        holding = asyncio.create_task(leader.hold())
        with pytest.raises(EndOfTestError):
            await holding
        world.failure, world.end_at = None, 1100
        with pytest.raises(EndOfTestError):
            await leader.hold()
        assert leader.is_leader

    asyncio.run(scenario())


def test_a_leader_ends_at_once_when_another_has_the_lease(world: World) -> None:
    async def scenario() -> None:
        leader = world.replica("a")
        await leader.acquire()
        assert world.lease is not None
        await world.update({**world.lease, "spec": {**world.lease["spec"], "holderIdentity": "b"}})
        with pytest.raises(LeaseLost, match="b has taken the Lease"):
            await leader.hold()

    asyncio.run(scenario())
    assert (world.holder, world.now) == ("b", 1002)


def test_a_renewal_is_one_request(world: World) -> None:
    async def scenario() -> None:
        leader = world.replica("a")
        await leader.acquire()
        world.end_at = 1100
        with pytest.raises(EndOfTestError):
            await leader.hold()

    asyncio.run(scenario())
    assert (world.looks, world.version) == (1, 50)


def test_a_lease_that_somebody_deleted_is_made_again(world: World) -> None:
    async def scenario() -> None:
        leader = world.replica("a")
        await leader.acquire()
        world.lease, world.end_at = None, 1010
        with pytest.raises(EndOfTestError):
            await leader.hold()
        assert leader.is_leader

    asyncio.run(scenario())
    assert world.holder == "a"


def test_of_two_that_try_at_once_one_leads(world: World) -> None:
    async def scenario() -> int:
        replicas = [world.replica(name) for name in "abc"]
        await world.replica("old").acquire()
        world.end_at = 1030
        await asyncio.gather(*(replica.acquire() for replica in replicas), return_exceptions=True)
        return sum(replica.is_leader for replica in replicas)

    assert asyncio.run(scenario()) == 1


def test_an_api_server_that_is_not_there_yet_is_waited_for(world: World) -> None:
    async def scenario() -> None:
        world.failure = ApiError(0, "connection refused")
        acquiring = asyncio.create_task(world.replica("a").acquire())
        for _ in range(20):
            await asyncio.sleep(0)
        assert not acquiring.done()
        world.failure = None
        await acquiring

    asyncio.run(scenario())
    assert world.holder == "a"
