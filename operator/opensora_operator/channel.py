"""The progress channel of the replica that leads: its server, its certificates, and the label that leads pods to it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Any

from opensora_operator.certificates import ServerTls, ensure_authorities, label_leader, service_dns_names
from opensora_operator.cluster import ApiError, Cluster
from opensora_operator.constants import MANAGER
from opensora_operator.plans import Key, Object
from opensora_operator.progress import LiveRun, ProgressBook
from opensora_operator.progress_server import ProgressServer
from opensora_operator.resources import Platform
from opensora_operator.settings import Settings
from opensora_operator.status import TERMINAL
from opensora_operator.store import Store
from opensora_operator.tokens import TokenChecker

logger = logging.getLogger(__name__)

SECRET = f"{MANAGER}-progress-ca"
"""The Secret of the certificate authority, in the operator's namespace."""
_RENEWAL_SECONDS = 3600.0
_RETRY_SECONDS = 2.0
_HEARTBEAT_SECONDS = 30.0


class ProgressChannel:
    """Takes reports while this replica leads; does nothing where the settings name no Service."""

    def __init__(
        self,
        settings: Settings,
        cluster: Cluster,
        store: Store,
        book: ProgressBook,
        *,
        on_report: Callable[[Key], None],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._settings = settings
        self._api = _Api(cluster)
        self._store = store
        self._clock = clock
        self._leads = False
        self._tls = ServerTls(service_dns_names(settings.progress_service, settings.own_namespace))
        self._server = ProgressServer(
            book,
            self,
            TokenChecker(self._api),
            is_leader=lambda: self._leads,
            on_report=lambda namespace, name: on_report(Key("TrainingRun", namespace, name)),
        )
        self.platform = Platform()
        """What runs are told of the channel."""

    @property
    def is_on(self) -> bool:
        """Whether the settings name a Service."""
        return bool(self._settings.progress_service)

    async def retire(self) -> None:
        """Take the leader's label off this pod, which may have it from an earlier life of its container."""
        if self.is_on:
            await self._label(leads=False)

    async def start(self) -> None:
        """Have a certificate, listen, and say so. Raises BadSecretError, and OSError where the port is taken."""
        if not self.is_on:
            return
        await self._renew()
        self._leads = True
        address, port = self._settings.http_address, self._settings.progress_port
        await self._server.start(host=address, port=port, tls=self._tls.context)
        await self._label(leads=True)

    async def keep(self) -> None:
        """Renew the certificates when they are due, for ever."""
        while True:
            await asyncio.sleep(_RENEWAL_SECONDS)
            if self.is_on:
                await self._renew()

    async def stop(self) -> None:
        """Take no more reports. A second call does nothing."""
        if self._leads:
            self._leads = False
            await self._server.stop()
            await self.retire()

    def live_run(self, namespace: str, name: str) -> LiveRun | None:
        """The run and its current attempt; None where there is no such run, or it has ended."""
        body = self._store.get(Key("TrainingRun", namespace, name))
        if body is None:
            return None
        spec, status, uid = body["spec"], body.get("status") or {}, body["metadata"]["uid"]
        if status.get("phase") in TERMINAL:
            return None
        attempt = max(1, status.get("attempt", 0))
        return LiveRun(
            uid=uid,
            attempt=attempt,
            pod_uids=frozenset(pod.uid for pod in self._store.pods(uid) if pod.attempt == attempt),
            heartbeat_seconds=float((spec.get("watchdog") or {}).get("heartbeatSeconds", _HEARTBEAT_SECONDS)),
            requests=spec.get("requests") or {},
            answered=status.get("requests") or {},
        )

    async def _renew(self) -> None:
        while True:
            try:
                namespace = self._settings.own_namespace
                known = await ensure_authorities(self._api, namespace=namespace, name=SECRET, now=self._clock())
            except ApiError as error:
                logger.warning("the certificate authority in the Secret %s: %s", SECRET, error)
                await asyncio.sleep(max(_RETRY_SECONDS, error.retry_seconds))
                continue
            self._tls.use(known, now=self._clock())
            host = f"{self._settings.progress_service}.{self._settings.own_namespace}.svc"
            url = f"https://{host}:{self._settings.progress_port}"
            self.platform = Platform(progress_url=url, ca_bundle=known.bundle)
            return

    async def _label(self, *, leads: bool) -> None:
        """That this fails costs reports, not runs."""
        namespace, pod = self._settings.own_namespace, self._settings.identity
        try:
            await label_leader(self._api, namespace=namespace, pod=pod, leads=leads)
        except ApiError as error:
            logger.warning("the leader's label of pod %s: %s", pod, error)


class _Api:
    """The cluster as certificates and tokens want it."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster

    async def read_secret(self, namespace: str, name: str) -> Object | None:
        return await self._cluster.find("Secret", namespace, name)

    async def create_secret(self, manifest: Object) -> Object | None:
        return await _unless(409, self._cluster.create(manifest))

    async def replace_secret(self, manifest: Object) -> Object | None:
        return await _unless(409, self._cluster.update(manifest))

    async def patch_pod(self, namespace: str, name: str, patch: Object) -> Object | None:
        return await _unless(404, self._cluster.patch("Pod", namespace, name, patch))

    async def review_token(self, token: str, *, audience: str) -> Object:
        review = {
            "apiVersion": "authentication.k8s.io/v1",
            "kind": "TokenReview",
            "metadata": {},
            "spec": {"token": token, "audiences": [audience]},
        }
        try:
            answer = await self._cluster.create(review)
        except ApiError as error:
            raise ConnectionError(str(error)) from error
        status: Object = answer.get("status") or {}
        return status

    async def read_public(self, path: str) -> Object | None:
        try:
            return await self._cluster.read(path)
        except ApiError as error:
            if error.code in (401, 403, 404):
                return None
            raise ConnectionError(str(error)) from error


async def _unless(code: int, request: Any) -> Object | None:
    """The answer to a request; None where the API server answers with this code."""
    try:
        answer: Object = await request
    except ApiError as error:
        if error.code == code:
            return None
        raise
    return answer
