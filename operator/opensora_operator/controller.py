"""The reconcile step: observe an object, ask the pure planner what to do, apply it."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from opensora_operator.cluster import ApiError, Cluster
from opensora_operator.events import Recorder
from opensora_operator.kinds import PROFILES, Kind
from opensora_operator.metrics import Metrics
from opensora_operator.observation import Observation
from opensora_operator.pacing import ProgressPace
from opensora_operator.plans import (
    Action,
    Child,
    Create,
    Delete,
    Event,
    FailPod,
    Key,
    Needs,
    Object,
    Plan,
    SetSuspend,
)
from opensora_operator.profiles import default_profile
from opensora_operator.progress import ProgressBook
from opensora_operator.queue import Queue, Turn
from opensora_operator.resources import Platform
from opensora_operator.store import Store
from opensora_operator.views import PodView

logger = logging.getLogger(__name__)

_FRESH_SECONDS = 10.0
"""What was looked up is believed for so long, and a child that is ours until the next resync."""
_LIST_SECONDS = 1.0
"""Profiles are not listed more often than this for the sake of objects that name none."""
_REJECTED_SECONDS = 60.0
"""An object that the API server refused is tried again after this time, or when the spec changes."""
_MAX_DECISIONS = 16
"""So many decisions in a row, each of which gives way to another, are a mistake of the planner."""
_MAX_REPEATS = 3
"""Actions that change nothing that the planner sees are repeated at once so often, and then more and more slowly."""
_WATCHED = ("Job", "Pod")
_REFUSALS = (400, 403, 404, 413, 422)


class PlannerError(Exception):
    """A planner does not come to an end, or what it wants does not come about."""


@dataclass(frozen=True)
class _Found:
    """What a look-up gave, and when."""

    value: Any
    time: float


@dataclass
class _Memory:
    """What is remembered about an object between two looks at it. Nothing in it is missed after a restart."""

    uid: str
    depends_on: tuple[Key, ...] = ()
    children: dict[tuple[str, str], _Found] = field(default_factory=dict)
    config_maps: dict[str, _Found] = field(default_factory=dict)
    rejected: dict[str, _Found] = field(default_factory=dict)
    rejected_generation: int = 0
    events: list[Event] = field(default_factory=list)
    """Of actions that are done, until the status that tells of them is written."""
    actions: tuple[Action, ...] = ()
    num_repeats: int = 0


class Controller:
    """Applies plans. One call of `work` is one worker."""

    def __init__(
        self,
        *,
        cluster: Cluster,
        store: Store,
        queue: Queue,
        recorder: Recorder,
        metrics: Metrics,
        kinds: Mapping[str, Kind],
        pace: ProgressPace,
        resync_seconds: float,
        book: ProgressBook,
        platform: Callable[[], Platform] = Platform,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._cluster = cluster
        self._store = store
        self._queue = queue
        self._recorder = recorder
        self._metrics = metrics
        self._kinds = kinds
        self._pace = pace
        self._resync_seconds = resync_seconds
        self._book = book
        self._platform = platform
        self._clock = clock
        self._memories: dict[Key, _Memory] = {}
        self._dependents: defaultdict[Key, set[Key]] = defaultdict(set)
        self._objects: dict[Key, _Found] = {}
        self._nodes: dict[str, _Found] = {}
        self._profiles_listed: dict[str, float] = {}
        self._listing_profiles = asyncio.Lock()

    def concern(self, key: Key, *, seconds: float = 0.0, later: bool = False) -> None:
        """Something about an object is new: look at it, and at those whose plan depends on it."""
        for concerned in (key, *self._dependents.get(key, ())):
            if concerned.kind in self._kinds:
                self._queue.add(concerned, seconds=seconds, later=later)

    async def work(self) -> None:
        """Look at one object after another, for ever."""
        while True:
            turn = await self._queue.get()
            try:
                await self._take(turn)
            finally:
                self._queue.done(turn.key)

    async def _take(self, turn: Turn) -> None:
        """Look at one object; whatever goes wrong is tried again later."""
        key = turn.key
        about = {"kind": key.kind, "run": f"{key.namespace}/{key.name}"}
        started = time.monotonic()
        failed = True
        try:
            await self._reconcile(turn)
            self._queue.succeeded(key)
            failed = False
        except ApiError as error:
            wait = self._queue.retry(key, at_least_seconds=error.retry_seconds)
            logger.warning("again in %.1f s: %s", wait, error, extra=about)
        except Exception:  # a bug, about which one object's owner must not have to wait for another's
            wait = self._queue.retry(key)
            logger.exception("again in %.1f s: this is a bug", wait, extra=about)
        finally:
            self._metrics.count_reconcile(kind=key.kind, seconds=time.monotonic() - started, failed=failed)

    async def _reconcile(self, turn: Turn) -> None:
        key = turn.key
        for _ in range(_MAX_DECISIONS):
            body = self._store.get(key)
            if body is None:
                return self._forget(key)
            if "deletionTimestamp" in body["metadata"]:
                return None  # its children go with it
            memory = self._remember(key, body)
            plan = self._kinds[key.kind].plan(await self._observe(key, body, memory))
            if plan.is_decision:
                await self._write_status(key, body, plan)
                continue
            if await self._converge(turn, body, memory, plan):
                return None
        raise PlannerError(f"{_MAX_DECISIONS} decisions in a row")

    async def _converge(self, turn: Turn, body: Object, memory: _Memory, plan: Plan) -> bool:
        """Apply a plan that decides nothing new. False: the object has changed meanwhile, it must be planned again."""
        key, metadata = turn.key, body["metadata"]
        if plan.actions:
            await self._act(body, memory, plan.actions)  # what the API server did not take is no repetition
            memory.num_repeats = memory.num_repeats + 1 if plan.actions == memory.actions else 0
            memory.actions = plan.actions
            memory.events += plan.events
            if memory.num_repeats >= _MAX_REPEATS:
                raise PlannerError(f"{[type(action).__name__ for action in plan.actions]} has no effect")
            self._queue.add(key, later=True)
            return True
        memory.actions, memory.num_repeats = (), 0
        if plan.status is not None and _difference(body.get("status") or {}, plan.status):
            wait = self._pace.wait_seconds(metadata["uid"]) if plan.is_progress_only else 0.0
            if wait > 0 or (not plan.is_progress_only and not turn.later and self._queue.has_urgent()):
                self._requeue(key, plan)
                self._queue.add(key, seconds=wait, later=True)
                return True
            if not await self._write_status(key, body, plan):
                return False
        else:
            self._record(body, memory, plan)
        if plan.delete_self:
            await self._cluster.delete(key.kind, key.namespace, key.name, uid=metadata["uid"])
        self._requeue(key, plan)
        if memory.rejected:
            self._queue.add(key, seconds=_REJECTED_SECONDS)
        return True

    def _requeue(self, key: Key, plan: Plan) -> None:
        resync = self._resync_seconds * (0.9 + 0.2 * random.random())
        if plan.requeue_seconds is not None and plan.requeue_seconds < resync:
            self._queue.add(key, seconds=plan.requeue_seconds)
        else:
            self._queue.add(key, seconds=resync, later=True)

    # Observe

    async def _observe(self, key: Key, body: Object, memory: _Memory) -> Observation:
        needs = self._kinds[key.kind].needs(body)
        self._depend(key, memory, needs.objects)
        uid, pods = memory.uid, self._store.pods(memory.uid)
        children = {place: await self._child(key.namespace, place, memory) for place in needs.children}
        # What is in our way is none of those that were asked for.
        children |= {place: found.value for place, found in memory.children.items()}
        return Observation(
            now=self._clock(),
            body=body,
            jobs=self._store.jobs(uid),
            pods=pods,
            objects={needed: await self._object(needed) for needed in needs.objects},
            config_maps={name: await self._config_map(key.namespace, name, memory) for name in needs.config_maps},
            children={place: child for place, child in children.items() if child is not None},
            dead_nodes=await self._dead_nodes(pods, needs),
            default_profile=await self._default_profile(key.namespace) if needs.default_profile else None,
            progress=self._book.newest(uid, attempt=max(1, (body.get("status") or {}).get("attempt", 0))),
            rejected={name: found.value for name, found in memory.rejected.items()},
            platform=self._platform(),
        )

    def _remember(self, key: Key, body: Object) -> _Memory:
        metadata = body["metadata"]
        memory = self._memories.get(key)
        if memory is None or memory.uid != metadata["uid"]:
            self._forget(key)
            memory = self._memories[key] = _Memory(metadata["uid"])
        now, generation = self._clock(), metadata.get("generation", 0)
        for name, found in list(memory.rejected.items()):
            if memory.rejected_generation != generation or now - found.time >= _REJECTED_SECONDS:
                del memory.rejected[name]
        memory.rejected_generation = generation
        for place, found in list(memory.children.items()):
            if now - found.time >= self._believed_seconds(memory, found.value):
                del memory.children[place]
        return memory

    def _believed_seconds(self, memory: _Memory, child: Child | None) -> float:
        """What is ours stays; what is missing or somebody else's may change any time."""
        return self._resync_seconds if child is not None and child.owner_uid == memory.uid else _FRESH_SECONDS

    def _forget(self, key: Key) -> None:
        memory = self._memories.pop(key, None)
        if memory is not None:
            self._depend(key, memory, ())
            self._recorder.forget(memory.uid)
            self._pace.forget(memory.uid)
            self._book.forget(memory.uid)
        self._queue.succeeded(key)

    def _depend(self, key: Key, memory: _Memory, needed: tuple[Key, ...]) -> None:
        if needed == memory.depends_on:
            return
        for other in memory.depends_on:
            self._dependents[other].discard(key)
            if not self._dependents[other]:
                del self._dependents[other]
        for other in needed:
            self._dependents[other].add(key)
        memory.depends_on = needed

    async def _object(self, key: Key) -> Object | None:
        """Another object of our kinds. What the watch has not told of may still be there: it may be late."""
        body = self._store.get(key)
        if body is not None:
            return body
        missing = self._objects.get(key)
        if missing is None or self._clock() - missing.time >= _FRESH_SECONDS:
            body = await self._cluster.find(key.kind, key.namespace or None, key.name)
            if body is not None:
                self._objects.pop(key, None)
                self._store.put(key.kind, body)
                return self._store.get(key)
            self._objects = {other: found for other, found in self._objects.items() if self._is_fresh(found)}
            self._objects[key] = _Found(None, self._clock())
        return None

    async def _default_profile(self, namespace: str) -> Object | None:
        """The profile for objects that name none: of the namespace, or else of the cluster; the first by name.

        It is read once in an object's life, so "there is none" is not taken from a watch, which may be late.
        """
        found = self._stored_default(namespace)
        if found is not None:
            return found
        async with self._listing_profiles:  # of a hundred new runs one lists for all
            if self._clock() - self._profiles_listed.get(namespace, 0.0) >= _LIST_SECONDS:
                await asyncio.gather(*(self._list_profiles(kind, namespace) for kind in PROFILES))
                self._profiles_listed[namespace] = self._clock()
        return self._stored_default(namespace)

    async def _list_profiles(self, kind: str, namespace: str) -> None:
        async for items, _ in self._cluster.list_pages(kind, namespace):
            for item in items:
                self._store.put(kind, item)

    def _stored_default(self, namespace: str) -> Object | None:
        return default_profile((found for kind in PROFILES for found in self._store.objects(kind)), namespace)

    async def _child(self, namespace: str, place: tuple[str, str], memory: _Memory) -> Child | None:
        found = memory.children.get(place)
        if found is None:
            kind, name = place
            self._learn(memory, place, await self._cluster.find(kind, namespace, name))
            found = memory.children[place]
        child: Child | None = found.value
        return child

    async def _config_map(self, namespace: str, name: str, memory: _Memory) -> Mapping[str, str] | None:
        found = memory.config_maps.get(name)
        if found is None or not self._is_fresh(found):
            body = await self._cluster.find("ConfigMap", namespace, name)
            found = memory.config_maps[name] = _Found(None if body is None else body.get("data") or {}, self._clock())
        data: Mapping[str, str] | None = found.value
        return data

    async def _dead_nodes(self, pods: Iterable[PodView], needs: Needs) -> frozenset[str]:
        if needs.stuck_pod_seconds is None:
            return frozenset()
        since = self._clock() - needs.stuck_pod_seconds
        stuck = {pod.node for pod in pods if pod.deleting_since is not None and pod.deleting_since <= since}
        return frozenset([node for node in stuck if node and await self._is_dead(node)])

    async def _is_dead(self, name: str) -> bool:
        found = self._nodes.get(name)
        if found is None or not self._is_fresh(found):
            node = await self._cluster.find("Node", None, name)
            self._nodes = {other: found for other, found in self._nodes.items() if self._is_fresh(found)}
            found = self._nodes[name] = _Found(node is None or not _is_ready(node), self._clock())
        return bool(found.value)

    def _is_fresh(self, found: _Found) -> bool:
        return self._clock() - found.time < _FRESH_SECONDS

    def _learn(self, memory: _Memory, place: tuple[str, str], body: Object | None) -> None:
        """Remember a child as the API server has it."""
        if body is not None and place[0] in _WATCHED:
            self._store.put(place[0], body)
        child = None
        if body is not None:
            owners = body["metadata"].get("ownerReferences") or ()
            owner = next((found["uid"] for found in owners if found.get("controller")), "")
            child = Child(uid=body["metadata"]["uid"], owner_uid=owner, data=body.get("data") or {})
        if place[0] in _WATCHED and (child is None or child.owner_uid == memory.uid):
            memory.children.pop(place, None)  # ours are in the store
        else:
            memory.children[place] = _Found(child, self._clock())

    # Apply

    async def _act(self, body: Object, memory: _Memory, actions: Iterable[Action]) -> None:
        """Do all of it in order; what a Job needs is created at once, and before the Job.

        Without one of these, refused or somebody else's, the Job is not made: the planner has to say what is wrong.
        """
        together: list[Create] = []
        for action in actions:
            if isinstance(action, Create) and action.manifest["kind"] != "Job":
                together.append(action)
                continue
            if not await self._create_all(body, memory, together):
                return
            together = []
            await self._act_once(body, memory, action)
        await self._create_all(body, memory, together)

    async def _create_all(self, body: Object, memory: _Memory, actions: Iterable[Create]) -> bool:
        return all(await asyncio.gather(*(self._create(body, memory, action.manifest) for action in actions)))

    async def _act_once(self, body: Object, memory: _Memory, action: Action) -> None:
        namespace = body["metadata"]["namespace"]
        match action:
            case Create():
                await self._create(body, memory, action.manifest)
            case SetSuspend():
                await self._set_suspend(namespace, action)
            case FailPod():
                await self._fail_pod(namespace, action)
            case Delete():
                await self._delete(namespace, memory, action)

    async def _create(self, body: Object, memory: _Memory, manifest: Object) -> bool:
        """Whether the object is there now, and ours."""
        place = (manifest["kind"], manifest["metadata"]["name"])
        created: Object | None
        try:
            created = await self._cluster.create(manifest)
        except ApiError as error:
            if error.code == 409 and error.reason == "AlreadyExists":
                if self._is_ours(memory, place):
                    return True
                created = await self._cluster.find(place[0], body["metadata"]["namespace"], place[1])
            elif error.code in _REFUSALS:
                message = _unknown(manifest) if error.code == 404 else error.message
                memory.rejected[place[1]] = _Found(message, self._clock())
                logger.warning("%s %s is refused: %s", *place, message, extra=_about(body, reason="Rejected"))
                return False
            else:
                raise
        self._learn(memory, place, created)
        return place[0] in _WATCHED or self._is_ours(memory, place)

    def _is_ours(self, memory: _Memory, place: tuple[str, str]) -> bool:
        child = memory.children[place].value if place in memory.children else None
        return child is not None and child.owner_uid == memory.uid

    async def _set_suspend(self, namespace: str, action: SetSuspend) -> None:
        spec: Object = {"suspend": action.suspend}
        if action.parallelism is not None:
            spec |= {"parallelism": action.parallelism, "completions": action.parallelism}
        await self._patch_child("Job", namespace, action.name, action.uid, {"spec": spec})

    async def _fail_pod(self, namespace: str, action: FailPod) -> None:
        condition = {"type": "DisruptionTarget", "status": "True", "reason": "NodeDead", "message": action.message}
        status = {"phase": "Failed", "reason": "NodeDead", "message": action.message, "conditions": [condition]}
        change = {"status": status}
        await self._patch_child("Pod", namespace, action.name, action.uid, change, subresource="status", strategic=True)

    async def _patch_child(
        self, kind: str, namespace: str, name: str, uid: str, change: Object, **options: Any
    ) -> None:
        try:
            body = await self._cluster.patch(kind, namespace, name, {"metadata": {"uid": uid}, **change}, **options)
        except ApiError as error:
            if error.code not in (404, 409):
                raise
            self._store.remove_named(kind, namespace, name, uid=uid)  # it is gone; another of its name may be there
        else:
            self._store.put(kind, body)

    async def _delete(self, namespace: str, memory: _Memory, action: Delete) -> None:
        kind, name, uid = action.kind, action.name, action.uid
        try:
            body = await self._cluster.delete(kind, namespace, name, uid=uid, grace_seconds=action.grace_seconds)
        except ApiError as error:
            if error.code not in (404, 409):
                raise
            body = {}
        memory.children.pop((kind, name), None)
        if kind in _WATCHED:
            ends_later = (
                body.get("kind") == kind and {"deletionTimestamp", "resourceVersion"} <= body["metadata"].keys()
            )
            if ends_later and action.grace_seconds != 0:
                self._store.put(kind, body)
            else:
                self._store.remove_named(kind, namespace, name, uid=uid)

    async def _write_status(self, key: Key, body: Object, plan: Plan) -> bool:
        """Write the status unless the object has changed; False: it has, and the store has it as it is now."""
        assert plan.status is not None
        metadata = body["metadata"]
        old = body.get("status") or {}
        version = {"resourceVersion": metadata["resourceVersion"], "uid": metadata["uid"]}
        change = {"metadata": version, "status": _difference(old, plan.status)}
        try:
            new = await self._cluster.patch(key.kind, key.namespace, key.name, change, subresource="status")
        except ApiError as error:
            if error.code not in (404, 409):
                raise
            await self._look_again(key, metadata["uid"])
            return False
        self._store.put(key.kind, new)
        lost = _difference(new.get("status") or {}, plan.status)
        if lost:
            logger.error("the CRD does not have what the planner writes: %s", lost, extra=_about(body))
        cause = "progress" if plan.is_progress_only else "decision" if plan.is_decision else "state"
        self._metrics.count_status(body, plan.status, cause=cause, now=self._clock())
        self._pace.written(metadata["uid"])
        self._record(new, self._memories[key], plan)
        return True

    async def _look_again(self, key: Key, uid: str) -> None:
        body = await self._cluster.find(key.kind, key.namespace, key.name)
        if body is None or body["metadata"]["uid"] != uid:
            self._store.remove_named(key.kind, key.namespace, key.name, uid=uid)
        if body is not None:
            self._store.put(key.kind, body)

    def _record(self, body: Object, memory: _Memory, plan: Plan) -> None:
        events, memory.events = [*memory.events, *plan.events], []
        for event in events:
            self._recorder.record(body, event)


def _difference(old: Object, new: Object) -> Object:
    """The merge patch that makes one of the other: what is gone is null. Empty when nothing differs."""
    patch: Object = {name: None for name in old if name not in new}
    for name, value in new.items():
        before = old.get(name)
        if isinstance(value, dict) and isinstance(before, dict):
            inner = _difference(before, value)
            if inner:
                patch[name] = inner
        elif name not in old or before != value:
            patch[name] = value
    return patch


def _is_ready(node: Object) -> bool:
    conditions = (node.get("status") or {}).get("conditions") or ()
    return any(found["type"] == "Ready" and found["status"] == "True" for found in conditions)


def _unknown(manifest: Object) -> str:
    """What is wrong where the API server has no such kind. Only one of ours does not come with Kubernetes."""
    return (
        f"the cluster does not know the kind {manifest['kind']} of {manifest['apiVersion']}: "
        "install what brings it, or choose another scheduling.gang.mode"
    )


def _about(body: Object, **more: Any) -> dict[str, Any]:
    metadata = body["metadata"]
    attempt = (body.get("status") or {}).get("attempt", 0)
    return {"kind": body["kind"], "run": f"{metadata['namespace']}/{metadata['name']}", "attempt": attempt, **more}
