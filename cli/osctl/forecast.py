"""What the operator would make of an object that does not exist yet: its own planner decides, nothing here does."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from opensora_operator.api import KINDS as API_KINDS
from opensora_operator.kinds import KINDS, PROFILES
from opensora_operator.observation import Observation
from opensora_operator.plans import Child, Create, Key, Object
from opensora_operator.profiles import default_profile
from opensora_operator.resources import Platform
from opensora_operator.wire import format_time

_MAX_STEPS = 32
_UID = "00000000-0000-0000-0000-000000000000"
_WITHOUT_NAMESPACE = [kind.name for kind in API_KINDS if not kind.namespaced]
_EARLIER_OBJECTS = "1970-01-01T00:00:00Z"


class Surroundings(Protocol):
    """What an object refers to."""

    def find(self, key: Key) -> Object | None:
        """An object of our kinds."""

    def default_profile(self, namespace: str) -> Object | None:
        """The profile for objects that name none."""

    def config_map(self, namespace: str, name: str) -> Mapping[str, str] | None:
        """The data of a ConfigMap."""


@dataclass(frozen=True)
class Files:
    """Objects that stand in files; nothing else exists."""

    objects: Sequence[Object] = ()

    def find(self, key: Key) -> Object | None:
        """An object of our kinds."""
        for body in self.objects:
            metadata = body["metadata"]
            if (body["kind"], metadata["name"]) == (key.kind, key.name):
                return _complete(body, key.namespace)
        return None

    def default_profile(self, namespace: str) -> Object | None:
        """The profile for objects that name none."""
        profiles = [_complete(body, namespace) for body in self.objects if body["kind"] in PROFILES]
        return default_profile(profiles, namespace)

    def config_map(self, namespace: str, name: str) -> Mapping[str, str] | None:
        """The data of a ConfigMap."""
        for body in self.objects:
            if body["kind"] == "ConfigMap" and body["metadata"]["name"] == name:
                return dict(body.get("data") or {})
        return None


@dataclass(frozen=True)
class Forecast:
    """What would exist."""

    objects: tuple[Object, ...] = ()
    """In the order in which they are created; none where there is a problem."""
    problem: str | None = None
    """Why the operator would create nothing: reason and message."""
    reason: str | None = None
    status: Object = field(default_factory=dict)


def forecast(body: Object, around: Surroundings, *, namespace: str, now: float | None = None) -> Forecast:
    """What the operator would create for an object, as if nothing held it back: neither `suspend` nor a queue."""
    kind = KINDS[body["kind"]]
    moment = time.time() if now is None else now
    body = _complete(copy.deepcopy(body), namespace, now=moment)
    body["spec"]["suspend"] = False
    created: list[Object] = []
    for _ in range(_MAX_STEPS):
        needs = kind.needs(body)
        plan = kind.plan(
            Observation(
                now=moment,
                body=copy.deepcopy(body),
                objects={key: around.find(key) for key in needs.objects},
                default_profile=around.default_profile(namespace) if needs.default_profile else None,
                config_maps={name: around.config_map(namespace, name) for name in needs.config_maps},
                children={(made["kind"], made["metadata"]["name"]): _child(body, made) for made in created},
                platform=Platform(),
            )
        )
        new = [action.manifest for action in plan.actions if isinstance(action, Create)]
        created += [made for made in new if made not in created]
        if any(made["kind"] != "ConfigMap" for made in new):  # a ConfigMap alone is what others wait for
            return Forecast(tuple(created), status=plan.status or {})
        if not new and (plan.status is None or plan.status == body.get("status")):
            break
        body["status"] = body.get("status") if plan.status is None else plan.status
    status = body.get("status") or {}
    if created:
        return Forecast(tuple(created), status=status)
    for condition in status.get("conditions") or ():
        refused = condition["type"] == "Accepted" and condition["status"] == "False"
        if refused or (condition["type"] == "Failed" and condition["status"] == "True"):
            reason = str(condition.get("reason"))
            return Forecast(problem=f"{reason}: {condition.get('message', '')}", reason=reason, status=status)
    return Forecast(problem="the operator would create nothing now", status=status)


def _child(owner: Object, made: Object) -> Child:
    """What the operator would see of an object that it has created."""
    uid = owner["metadata"]["uid"]
    return Child(
        uid=_UID, owner_uid=uid if made["metadata"].get("ownerReferences") else "", data=made.get("data") or {}
    )


def _complete(body: Object, namespace: str, *, now: float | None = None) -> Object:
    """An object with what the API server adds."""
    metadata = {"uid": _UID, "generation": 1, "resourceVersion": "1", **body["metadata"]}
    if body["kind"] not in _WITHOUT_NAMESPACE:
        metadata.setdefault("namespace", namespace)
    metadata.setdefault("creationTimestamp", _EARLIER_OBJECTS if now is None else format_time(now))
    return {**body, "metadata": metadata, "spec": dict(body.get("spec") or {})}
