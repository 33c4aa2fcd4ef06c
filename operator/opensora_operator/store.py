"""What the operator knows of the cluster: our kinds as they are, Jobs and pods as views, all by their owner."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Set
from dataclasses import dataclass

from opensora_operator.plans import Key, Object
from opensora_operator.views import JobView, PodView, view_job, view_pod

Place = tuple[str, str]
"""Namespace and name of an object."""

_VIEWS: Mapping[str, Callable[[Object], JobView | PodView | None]] = {"Job": view_job, "Pod": view_pod}


def place_of(body: Object) -> Place:
    """Where an object is."""
    return body["metadata"].get("namespace", ""), body["metadata"]["name"]


@dataclass(slots=True)
class _Kept:
    version: int
    content: Object | JobView | PodView


class Store:
    """The newest version of each object, by its `resourceVersion`: it does not matter who tells of it first, the watch
    or the answer to our own write.

    What changes it answers with the keys of our objects that have to be looked at again.
    """

    def __init__(self) -> None:
        self._kept: dict[str, dict[Place, _Kept]] = {}
        self._children: dict[str, dict[tuple[str, str, str], JobView | PodView]] = {}

    def put(self, kind: str, body: Object) -> Key | None:
        """Take an object as it is now. Returns whom it concerns; None when nothing that matters is new."""
        version = int(body["metadata"]["resourceVersion"])
        place = place_of(body)
        kept = self._kept.setdefault(kind, {})
        old = kept.get(place)
        if old is not None and old.version >= version:
            return None
        content = _VIEWS[kind](body) if kind in _VIEWS else _trimmed(body)
        if content is None:  # it lost the labels that made it ours
            return self._drop(kind, place)
        kept[place] = _Kept(version, content)
        if not isinstance(content, dict):
            if old is not None and isinstance(old.content, JobView | PodView):
                self._children[old.content.owner.uid].pop((kind, *place), None)
            self._children.setdefault(content.owner.uid, {})[(kind, *place)] = content
        if old is not None and old.content == content:
            return None
        return _concerns(kind, place, content)

    def remove(self, kind: str, body: Object) -> Key | None:
        """An object is gone; `body` is its last version. Returns whom that concerns."""
        place = place_of(body)
        old = self._kept.get(kind, {}).get(place)
        if old is None or old.version > int(body["metadata"]["resourceVersion"]):
            return None
        return self._drop(kind, place)

    def remove_named(self, kind: str, namespace: str, name: str, *, uid: str) -> Key | None:
        """The API server says that there is no object of this name and UID."""
        old = self._kept.get(kind, {}).get((namespace, name))
        return self._drop(kind, (namespace, name)) if old is not None and _uid(old.content) == uid else None

    def drop_missing(self, kind: str, listed: Set[Place], *, namespace: str | None, version: int) -> set[Key]:
        """Drop the objects of a kind, in one namespace or in all, that a list of this version does not have.

        They have gone unnoticed. What is newer than the list stays. Returns whom that concerns.
        """
        gone = [
            place
            for place, old in self._kept.get(kind, {}).items()
            if place not in listed and old.version <= version and namespace in (None, place[0])
        ]
        return {key for place in gone if (key := self._drop(kind, place)) is not None}

    def get(self, key: Key) -> Object | None:
        """An object of our kinds."""
        kept = self._kept.get(key.kind, {}).get((key.namespace, key.name))
        return kept.content if kept is not None and isinstance(kept.content, dict) else None

    def objects(self, kind: str) -> Iterator[Object]:
        """All objects of one of our kinds."""
        return (kept.content for kept in self._kept.get(kind, {}).values() if isinstance(kept.content, dict))

    def jobs(self, owner_uid: str) -> tuple[JobView, ...]:
        """The Jobs of an object, by name."""
        found = [view for view in self._children.get(owner_uid, {}).values() if isinstance(view, JobView)]
        return tuple(sorted(found, key=lambda job: job.name))

    def pods(self, owner_uid: str) -> tuple[PodView, ...]:
        """The pods of an object, by name."""
        found = [view for view in self._children.get(owner_uid, {}).values() if isinstance(view, PodView)]
        return tuple(sorted(found, key=lambda pod: pod.name))

    def _drop(self, kind: str, place: Place) -> Key | None:
        old = self._kept.get(kind, {}).pop(place, None)
        if old is None:
            return None
        if not isinstance(old.content, dict):
            owner = old.content.owner.uid
            self._children[owner].pop((kind, *place))
            if not self._children[owner]:
                del self._children[owner]
        return _concerns(kind, place, old.content)


def _concerns(kind: str, place: Place, content: Object | JobView | PodView) -> Key:
    if isinstance(content, dict):
        return Key(kind, *place)
    return Key(content.owner.kind, content.owner.namespace, content.owner.name)


def _uid(content: Object | JobView | PodView) -> str:
    return str(content["metadata"]["uid"]) if isinstance(content, dict) else content.uid


def _trimmed(body: Object) -> Object:
    """Without what nobody reads and what takes much room."""
    metadata = {key: value for key, value in body["metadata"].items() if key != "managedFields"}
    annotations = metadata.get("annotations") or {}
    if _LAST_APPLIED in annotations:
        metadata["annotations"] = {key: value for key, value in annotations.items() if key != _LAST_APPLIED}
    return {**body, "metadata": metadata}


_LAST_APPLIED = "kubectl.kubernetes.io/last-applied-configuration"
