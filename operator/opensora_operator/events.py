"""Tells of decisions by Kubernetes events: each reason once for an attempt, in the background, and never in the way."""

from __future__ import annotations

import asyncio
import hashlib
import logging
from datetime import UTC, datetime

from opensora_operator.cluster import ApiError, Cluster
from opensora_operator.constants import MANAGER
from opensora_operator.plans import Event, Object

logger = logging.getLogger(__name__)

_MAX_WAITING = 2000
_MAX_NOTE = 1024
"""The API allows no more."""
_TRIES = 5
_RETRY_SECONDS = 1.0


class Recorder:
    """Sends events. Their names follow from object, reason and attempt: a second one is refused by the API server even
    when another process sent the first."""

    def __init__(self, cluster: Cluster, *, identity: str) -> None:
        self._cluster = cluster
        self._identity = identity
        self._sent: dict[str, set[str]] = {}
        self._waiting: asyncio.Queue[Object] = asyncio.Queue(_MAX_WAITING)

    def record(self, body: Object, event: Event) -> None:
        """Send an event about an object, unless it was sent for this attempt."""
        metadata = body["metadata"]
        attempt = (body.get("status") or {}).get("attempt", 0)
        manifest = self._manifest(body, event, attempt)
        name = manifest["metadata"]["name"]
        sent = self._sent.setdefault(metadata["uid"], set())
        if name in sent:
            return
        sent.add(name)
        level = logging.WARNING if event.warning else logging.INFO
        where = {"kind": body["kind"], "run": f"{metadata['namespace']}/{metadata['name']}", "attempt": attempt}
        logger.log(level, event.message, extra={**where, "reason": event.reason})
        try:
            self._waiting.put_nowait(manifest)
        except asyncio.QueueFull:
            logger.warning("too many events wait to be sent: one is left out", extra={**where, "reason": event.reason})

    def forget(self, uid: str) -> None:
        """The object is gone."""
        self._sent.pop(uid, None)

    async def send(self) -> None:
        """Send what is recorded, for ever."""
        while True:
            manifest = await self._waiting.get()
            try:
                await self._send(manifest)
            finally:
                self._waiting.task_done()

    async def flush(self) -> None:
        """Wait until all that was recorded is sent; `send` has to run."""
        await self._waiting.join()

    async def _send(self, manifest: Object) -> None:
        for attempt in range(1, _TRIES + 1):
            try:
                await self._cluster.create(manifest, later=True)
                return
            except ApiError as error:
                if error.code == 409:
                    return
                # The namespace may be gone or going, or events may be denied to us: nothing here can change that.
                if attempt == _TRIES or error.code in (400, 403, 404, 422):
                    logger.warning("an event was not sent: %s", error, extra={"reason": manifest["reason"]})
                    return
                await asyncio.sleep(max(error.retry_seconds, attempt * _RETRY_SECONDS))

    def _manifest(self, body: Object, event: Event, attempt: int) -> Object:
        metadata = body["metadata"]
        digest = hashlib.sha256(f"{metadata['uid']}/{event.reason}/{attempt}".encode()).hexdigest()[:16]
        return {
            "apiVersion": "events.k8s.io/v1",
            "kind": "Event",
            "metadata": {"name": f"{metadata['name']}.{digest}", "namespace": metadata["namespace"]},
            "eventTime": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
            "type": "Warning" if event.warning else "Normal",
            "reason": event.reason,
            "action": event.reason,
            "note": event.message[:_MAX_NOTE],
            "reportingController": MANAGER,
            "reportingInstance": self._identity[:128],
            "regarding": {
                "apiVersion": body["apiVersion"],
                "kind": body["kind"],
                "namespace": metadata["namespace"],
                "name": metadata["name"],
                "uid": metadata["uid"],
                "resourceVersion": metadata["resourceVersion"],
            },
        }
