"""Leader election by a Lease: of several replicas one works, and another takes over when it falls silent."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Protocol

from opensora_operator.cluster import ApiError
from opensora_operator.plans import Object

logger = logging.getLogger(__name__)


class LeaseLost(Exception):  # noqa: N818  # it is news, and the end of the process
    """We no longer lead. Nothing may be written any more."""


class LeaseApi(Protocol):
    """What of the cluster is needed."""

    async def find(self, kind: str, namespace: str | None, name: str) -> Object | None:
        """The Lease, if there is one."""

    async def create(self, manifest: Object) -> Object:
        """Create it."""

    async def update(self, manifest: Object) -> Object:
        """Replace it, unless it has changed meanwhile."""


@dataclass(frozen=True)
class _Seen:
    """A state of the Lease, and when we first saw it, by our own clock: those of other machines are not believed."""

    record: tuple[Any, ...]
    since: float


class Leader:
    """One replica's part in the election."""

    def __init__(
        self,
        api: LeaseApi,
        *,
        namespace: str,
        name: str,
        identity: str,
        lease_seconds: float,
        renew_seconds: float,
        retry_seconds: float,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Any] = asyncio.sleep,
    ) -> None:
        self._api = api
        self._namespace = namespace
        self._name = name
        self._identity = identity
        self._lease_seconds = lease_seconds
        self._renew_seconds = renew_seconds
        self._retry_seconds = retry_seconds
        self._clock = clock
        self._sleep = sleep
        self._seen: _Seen | None = None
        self._lease: Object | None = None
        self._renewed_at = 0.0
        self.is_leader = False
        """Whether this replica leads, as far as it knows."""

    async def acquire(self) -> None:
        """Wait until we lead."""
        holder = ""
        while True:
            try:
                if await self._try():
                    self.is_leader = True
                    logger.info("%s leads", self._identity)
                    return
            except ApiError as error:
                logger.warning("the Lease %s/%s: %s", self._namespace, self._name, error)
            if self._lease is not None and (now_holds := self._holder()) != holder:
                holder = now_holds
                logger.info("waiting for the Lease, which %s holds", holder)
            await self._sleep(self._wait_seconds())

    async def hold(self) -> None:
        """Renew the Lease for ever. Raises LeaseLost when another has it, or when it could not be renewed in time."""
        while True:
            await self._sleep(self._retry_seconds)
            try:
                async with asyncio.timeout(self._renewed_at + self._renew_seconds - self._clock()):
                    renewed = await self._try()
            except (ApiError, TimeoutError) as error:
                logger.warning("the Lease could not be renewed: %s", error or "no answer")
                renewed = False
            if not renewed and self._lease is not None and self._holder() not in ("", self._identity):
                self.is_leader = False
                raise LeaseLost(f"{self._holder()} has taken the Lease")
            if self._clock() - self._renewed_at >= self._renew_seconds:
                self.is_leader = False
                raise LeaseLost(f"the Lease could not be renewed for {self._renew_seconds:g} s")

    async def release(self) -> None:
        """Let another replica lead at once. That this fails only makes it wait."""
        if not self.is_leader or self._lease is None:
            return
        self.is_leader = False
        spec = {**self._lease["spec"], "holderIdentity": "", "leaseDurationSeconds": 1, "renewTime": _now()}
        try:
            async with asyncio.timeout(self._retry_seconds):
                await self._api.update({**self._lease, "spec": spec})
            logger.info("the Lease is released")
        except (ApiError, TimeoutError) as error:
            logger.warning("the Lease could not be released: %s", error or "no answer")

    async def _try(self) -> bool:
        """Take or renew the Lease; False where another has it."""
        asked_at = self._clock()
        if self.is_leader and await self._renew():
            self._renewed_at = asked_at
            return True
        lease = await self._api.find("Lease", self._namespace, self._name)
        try:
            if lease is None:
                self._lease = await self._api.create(self._manifest())
            else:
                self._lease = lease
                self._look(lease)
                if self._holder() != self._identity and not self._is_free():
                    return False
                self._lease = await self._api.update({**lease, "spec": self._spec(lease["spec"])})
        except ApiError as error:
            if error.code == 409:  # another was quicker
                return False
            raise
        self._renewed_at = asked_at
        return True

    async def _renew(self) -> bool:
        """Write the Lease without a look at it; False where somebody has changed it meanwhile."""
        assert self._lease is not None
        try:
            self._lease = await self._api.update({**self._lease, "spec": self._spec(self._lease["spec"])})
        except ApiError as error:
            if error.code in (404, 409):
                return False
            raise
        return True

    def _look(self, lease: Object) -> None:
        spec = lease["spec"]
        record = (spec.get("holderIdentity"), spec.get("renewTime"), spec.get("leaseTransitions"))
        if self._seen is None or self._seen.record != record:
            self._seen = _Seen(record, self._clock())

    def _is_free(self) -> bool:
        return not self._holder() or self._expires_at() <= self._clock()

    def _expires_at(self) -> float:
        assert self._seen is not None
        assert self._lease is not None
        return self._seen.since + float(self._lease["spec"].get("leaseDurationSeconds") or self._lease_seconds)

    def _wait_seconds(self) -> float:
        """Until the next look: the retry period, or the end of the Lease where that is earlier."""
        if self._seen is None or self._lease is None or not self._holder():
            return self._retry_seconds
        return min(self._retry_seconds, max(0.05, self._expires_at() - self._clock()))

    def _holder(self) -> str:
        assert self._lease is not None
        return self._lease["spec"].get("holderIdentity") or ""

    def _spec(self, old: Object) -> Object:
        is_renewal = old.get("holderIdentity") == self._identity
        return {
            "holderIdentity": self._identity,
            "leaseDurationSeconds": math.ceil(self._lease_seconds),
            "acquireTime": old["acquireTime"] if is_renewal and "acquireTime" in old else _now(),
            "renewTime": _now(),
            "leaseTransitions": old.get("leaseTransitions", 0) + (not is_renewal),
        }

    def _manifest(self) -> Object:
        return {
            "apiVersion": "coordination.k8s.io/v1",
            "kind": "Lease",
            "metadata": {"namespace": self._namespace, "name": self._name},
            "spec": self._spec({"leaseTransitions": -1}),
        }


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
