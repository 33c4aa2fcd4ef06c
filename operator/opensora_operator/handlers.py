"""kopf's part: it watches our kinds and tells the runtime of every event.

Its stateless half alone: no handler keeps a state on an object, so there are no finalizers and no annotations.
"""

from __future__ import annotations

import itertools
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import kopf

from opensora_operator.cluster import load_configuration
from opensora_operator.constants import GROUP, VERSION
from opensora_operator.runtime import Runtime

_KINDS = {
    "TrainingRun": "trainingruns",
    "SampleJob": "samplejobs",
    "BatchSearch": "batchsearches",
    "TrainingProfile": "trainingprofiles",
    "ClusterTrainingProfile": "clustertrainingprofiles",
}


class Forever:
    """Waits between tries, without an end: a watch is never given up."""

    def __iter__(self) -> Iterator[float]:
        return itertools.chain((0.2, 0.5, 1.0, 2.0, 5.0), itertools.repeat(10.0))


class NoState(kopf.DiffBaseStorage):
    """kopf compares each object with the state it has seen last; nothing here asks for that, and it costs a copy."""

    def build(self, **_: Any) -> kopf.BodyEssence:
        return kopf.BodyEssence({})

    def fetch(self, **_: Any) -> kopf.BodyEssence | None:
        return None

    def store(self, **_: Any) -> None:
        raise AssertionError("no handler has a state")


def make_settings() -> kopf.OperatorSettings:
    """How kopf behaves: it watches, and does nothing else."""
    settings = kopf.OperatorSettings()
    settings.posting.enabled = False
    settings.scanning.disabled = True
    settings.peering.standalone = True
    settings.process.ultimate_exiting_timeout = None
    settings.networking.error_backoffs = Forever()
    settings.persistence.diffbase_storage = NoState()
    settings.watching.chunk_size = 500
    return settings


def make_registry(
    runtime: Runtime, *, kubeconfig: str, start: Callable[[], Awaitable[None]], stop: Callable[[], Awaitable[None]]
) -> kopf.OperatorRegistry:
    """All handlers. `start` is called before kopf watches anything, `stop` when it has ended its watches."""
    registry = kopf.OperatorRegistry()

    @kopf.on.startup(registry=registry, errors=kopf.ErrorsMode.PERMANENT)
    async def begin(**_: Any) -> None:
        await start()

    @kopf.on.cleanup(registry=registry, errors=kopf.ErrorsMode.PERMANENT)
    async def end(**_: Any) -> None:
        await stop()

    @kopf.on.login(registry=registry)
    async def log_in(**_: Any) -> kopf.ConnectionInfo:
        return await connection(kubeconfig)

    for kind, plural in _KINDS.items():
        _watch(registry, runtime, kind, plural)
    return registry


def _watch(registry: kopf.OperatorRegistry, runtime: Runtime, kind: str, plural: str) -> None:
    @kopf.on.event(GROUP, VERSION, plural, registry=registry, id=plural)
    async def observe(event: Any, **_: Any) -> None:
        runtime.observe(kind, event["object"], is_gone=event["type"] == "DELETED")


async def connection(kubeconfig: str) -> kopf.ConnectionInfo:
    """How kopf reaches the API server: as `cluster.py` does."""
    configuration = await load_configuration(kubeconfig)
    if configuration.tls_server_name:
        raise kopf.LoginError("kopf cannot use the kubeconfig's tls-server-name")
    scheme, _, token = (await configuration.get_api_key_with_prefix("BearerToken") or "").partition(" ")
    return kopf.ConnectionInfo(
        server=configuration.host,
        ca_path=configuration.ssl_ca_cert or None,
        insecure=not configuration.verify_ssl,
        scheme=scheme or None,
        token=token.strip() or None,
        certificate_path=configuration.cert_file or None,
        private_key_path=configuration.key_file or None,
        proxy_url=configuration.proxy or None,
    )
