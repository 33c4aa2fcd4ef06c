"""Keeps the store true: watches Jobs and pods, and compares everything with the API server now and then.

Our own kinds are watched by kopf (`handlers.py`), which tells of what happens but not of a deletion that happened while
its watch was cut. The comparison finds that. Jobs and pods are many and change often; here they are watched with a
label selector, become small views at once, and a deletion that was missed is found with the next list.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Iterable
from typing import Protocol

from opensora_operator.cluster import ApiError, Cluster, WatchEvent, resource_of
from opensora_operator.constants import API_VERSION, LABEL_UID
from opensora_operator.plans import Key, Object
from opensora_operator.store import Store, place_of

logger = logging.getLogger(__name__)

_FIRST_RETRY_SECONDS = 0.1
_MAX_RETRY_SECONDS = 15.0
_GATHER_SECONDS = 0.1
"""What only changes numbers of a status is looked at together with what follows at once."""
_QUICK_SECONDS = 1.0
"""A watch that ends sooner than this and without an event counts as a failure."""


class Concern(Protocol):
    """Who hears of each object that has to be looked at again."""

    def __call__(self, key: Key, *, seconds: float = 0.0, later: bool = False) -> None:
        """After this time; `later`: after all that is urgent."""


class Watching:
    """The tasks that keep a store true."""

    def __init__(self, cluster: Cluster, store: Store, *, concern: Concern, namespaces: Iterable[str] = ()) -> None:
        self._cluster = cluster
        self._store = store
        self._concern = concern
        self._namespaces: tuple[str | None, ...] = tuple(namespaces) or (None,)
        self.heard_at = time.monotonic()
        """When the API server last said anything: an event, a bookmark, a list."""

    def heard(self) -> None:
        """The API server said something."""
        self.heard_at = time.monotonic()

    async def compare(self, kinds: Iterable[str]) -> None:
        """List all objects of these kinds, and take what is new, changed or gone. Raises ApiError."""
        for kind in kinds:
            for namespace in self._namespaces if resource_of(kind).namespaced else (None,):
                await self._list(kind, namespace, labels="")

    def streams(self) -> list[tuple[str, str | None]]:
        """What `watch` has to be called with, each in a task of its own."""
        return [(kind, namespace) for kind in ("Job", "Pod") for namespace in self._namespaces]

    async def watch(self, kind: str, namespace: str | None, *, synced: asyncio.Event) -> None:
        """List and watch the children of our objects, for ever. `synced`: the first list is complete."""
        version = ""
        failures = 0
        while True:
            started = time.monotonic()
            retry_seconds = 0.0
            try:
                if not version:
                    version = await self._list(kind, namespace, labels=LABEL_UID)
                    synced.set()
                async for event in self._cluster.watch(kind, namespace, version=version, labels=LABEL_UID):
                    failures = 0
                    self.heard()
                    version = event.object["metadata"]["resourceVersion"]
                    self._take(kind, event)
                if time.monotonic() - started > _QUICK_SECONDS:
                    failures = 0
                    continue
            except ApiError as error:
                retry_seconds = error.retry_seconds
                if error.code == 410:
                    version = ""
                logger.warning("watching %s in %s: %s", kind, namespace or "all namespaces", error)
            await asyncio.sleep(max(retry_seconds, _retry_seconds(failures)))
            failures += 1

    def _take(self, kind: str, event: WatchEvent) -> None:
        if event.type == "DELETED":
            key = self._store.remove(kind, event.object)
        else:
            key = self._store.put(kind, event.object) if event.type != "BOOKMARK" else None
        if key is None:
            return
        if event.type == "DELETED" or _is_news(event.object):
            self._concern(key)
        else:
            self._concern(key, seconds=_GATHER_SECONDS, later=True)

    async def _list(self, kind: str, namespace: str | None, *, labels: str) -> str:
        listed = set()
        version = 0
        async for items, of_version in self._cluster.list_pages(kind, namespace, labels=labels):
            version = of_version
            for item in items:
                listed.add(place_of(item))
                key = self._store.put(kind, item)
                if key is not None:
                    self._concern(key, later=not is_new(item))
        for key in self._store.drop_missing(kind, listed, namespace=namespace, version=version):
            self._concern(key)
        self.heard()
        return str(version)


def is_new(body: Object) -> bool:
    """Whether an object that a list has waits for somebody to act: of thousands that run, a new one comes first."""
    status, generation = body.get("status") or {}, body["metadata"].get("generation", 0)
    return status.get("observedGeneration", 0) < generation if body["apiVersion"] == API_VERSION else _is_news(body)


def _is_news(body: Object) -> bool:
    """Whether something may have to be done about it: a pod that ends or has to, a Job that has come to a verdict."""
    status = body.get("status") or {}
    if body["kind"] == "Pod":
        return "deletionTimestamp" in body["metadata"] or status.get("phase") in ("Failed", "Succeeded")
    return "deletionTimestamp" in body["metadata"] or bool(status.get("conditions"))


def _retry_seconds(failures: int) -> float:
    wait = min(_FIRST_RETRY_SECONDS * 2.0 ** min(failures, 16), _MAX_RETRY_SECONDS)
    return wait * (0.75 + 0.5 * random.random())
