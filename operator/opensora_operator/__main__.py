"""`opensora-operator`: waits for the Lease, then works until it is told to stop."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence

import kopf

from opensora_operator import handlers, logs
from opensora_operator.cluster import Cluster, LoginError
from opensora_operator.health import HealthServer
from opensora_operator.kinds import KINDS, Kind
from opensora_operator.leader import Leader, LeaseLost
from opensora_operator.metrics import Metrics
from opensora_operator.pacing import RateLimit
from opensora_operator.runtime import Runtime
from opensora_operator.settings import Settings, SettingsError, read_settings

logger = logging.getLogger("opensora_operator")

_LEASE_LOST = 1
_USAGE = 64


class Operator:
    """One replica. Tests give it other kinds, and a cluster that is in the way of writes."""

    def __init__(
        self,
        settings: Settings,
        *,
        kinds: Mapping[str, Kind] = KINDS,
        cluster_type: Callable[..., Cluster] = Cluster,
    ) -> None:
        self._settings = settings
        self._metrics = Metrics()
        self._cluster = cluster_type(
            kubeconfig=settings.kubeconfig,
            limit=RateLimit(per_second=settings.requests_per_second, burst=settings.requests_burst),
            counter=self._metrics,
        )
        self._leader = Leader(
            self._cluster,
            namespace=settings.own_namespace,
            name=settings.lease_name,
            identity=settings.identity,
            lease_seconds=settings.lease_seconds,
            renew_seconds=settings.renew_seconds,
            retry_seconds=settings.retry_seconds,
        )
        self._runtime = Runtime(settings, self._cluster, self._metrics, kinds=kinds)
        self._health = HealthServer(self._metrics, self._runtime.problem)
        self._holding: asyncio.Task[None] | None = None
        self._told_to_stop = asyncio.Event()

    async def run(self) -> None:
        """Lead when it is our turn, and work until a signal. Raises LoginError, and what a part ended with."""
        self._obey_signals()
        try:
            await self._cluster.open()
            await self._health.start(self._settings.http_address, self._settings.http_port)
            await self._runtime.prepare()
            if await self._is_our_turn():
                await self._work()
        finally:
            await self._stop()
            await self._health.stop()
            await self._cluster.close()

    def _obey_signals(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, self._told_to_stop.set)

    async def _is_our_turn(self) -> bool:
        """Wait for the Lease; False when told to stop before."""
        if self._settings.leader_election:
            acquiring = asyncio.create_task(self._leader.acquire())
            stopping = asyncio.create_task(self._told_to_stop.wait())
            await asyncio.wait({acquiring, stopping}, return_when=asyncio.FIRST_COMPLETED)
            for task in (acquiring, stopping):
                task.cancel()
            await asyncio.wait({acquiring, stopping})
            if not self._leader.is_leader:
                return False
            self._holding = asyncio.create_task(self._hold())
        self._metrics.set_leader(True)
        return not self._told_to_stop.is_set()

    async def _hold(self) -> None:
        try:
            await self._leader.hold()
        except LeaseLost as error:
            # At once, without another word to the API server: somebody else may lead already.
            logger.critical("%s", error)
            sys.stderr.flush()
            os._exit(_LEASE_LOST)

    async def _work(self) -> None:
        """Until told to stop, or until a part ends, which ends all."""
        watching = asyncio.create_task(
            kopf.operator(
                registry=handlers.make_registry(
                    self._runtime, kubeconfig=self._settings.kubeconfig, start=self._start, stop=self._stop
                ),
                settings=handlers.make_settings(),
                clusterwide=not self._settings.namespaces,
                namespaces=self._settings.namespaces,
                stop_flag=self._told_to_stop,
            )
        )
        parts = {watching, self._runtime.failure} | ({self._holding} if self._holding is not None else set())
        done, _ = await asyncio.wait(parts, return_when=asyncio.FIRST_COMPLETED)
        self._told_to_stop.set()
        await watching
        for part in done:
            if not part.cancelled():
                part.result()

    async def _start(self) -> None:
        await self._runtime.start()
        self._obey_signals()  # kopf has put handlers of its own there, which bear only one signal

    async def _stop(self) -> None:
        """Finish, and let another replica lead. A second call does nothing."""
        await self._runtime.stop()
        if self._holding is not None:
            self._holding.cancel()
            await asyncio.wait({self._holding})
        await self._leader.release()
        self._metrics.set_leader(False)


def run(operator: Callable[[Settings], Operator], arguments: Sequence[str]) -> int:
    """Run one replica until it is told to stop, and return its exit code."""
    try:
        settings = read_settings(arguments)
    except SettingsError as error:
        sys.stderr.write(f"opensora-operator: {error}\n")
        return _USAGE
    logs.set_up(level=settings.log_level, form=settings.log_format)
    try:
        asyncio.run(_run(operator, settings))
    except (LoginError, OSError) as error:
        logger.critical("%s", error)
        return 1
    return 0


async def _run(operator: Callable[[Settings], Operator], settings: Settings) -> None:
    await operator(settings).run()


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    return run(Operator, sys.argv[1:] if arguments is None else arguments)


if __name__ == "__main__":
    sys.exit(main())
